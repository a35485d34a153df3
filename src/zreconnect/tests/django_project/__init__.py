"""A project of Django's with a batch job, which the manual prints and the tests run."""

import django
from django.conf import settings
from django.db import connections


def configure(databases):
    """Do what manage.py does with a project's settings; here also with others, later.

    databases: the setting DATABASES.
    """
    if not settings.configured:
        settings.configure(
            INSTALLED_APPS=[__name__],
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            USE_TZ=True,
        )
        django.setup()
    forget_connections()
    connections.settings = connections.configure_settings(databases)


def forget_connections():
    """Close the calling thread's connections, and have it make new ones."""
    for connection in connections.all(initialized_only=True):
        connection.close()
        del connections[connection.alias]
