"""The database modules that zreconnect knows, each behind `zreconnect.interfaces.IDriver`."""
