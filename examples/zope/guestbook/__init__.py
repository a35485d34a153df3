"""A guest book in a database that may be restarted at any time."""
