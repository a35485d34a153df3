"""What puts zreconnect into the place of the driver in each suite: its public names only."""
