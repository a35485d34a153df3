"""A database backend of Django's: ``"ENGINE": "zreconnect.integrations.django"``."""
