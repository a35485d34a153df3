"""What a web server's stack must be told, one module for each; each needs its stack alone."""
