"""The parts of `make bench`, a module each."""
