"""A guest book with Pyramid, pyramid_tm and pyramid_retry."""

import os

from pyramid.config import Configurator
from pyramid.view import view_config

from zreconnect import Ledger, ReconnectingDatabaseAdapter

# Without a timeout, a request does not wait for a database that is down.
timeout = os.environ.get("DATABASE_TIMEOUT")
database = ReconnectingDatabaseAdapter(
    os.environ["DATABASE_URL"],
    timeout=float(timeout) if timeout else None,
    # Knows what became of a COMMIT after a crash of the server as well.
    witness=Ledger(),
)


# request.tm, so that what is done becomes part of the request's transaction.
@view_config(route_name="guests", request_method="GET", renderer="string")
def count_guests(request):
    cursor = database(request.tm).cursor()
    cursor.execute("SELECT count(*) FROM guest")
    return f"{cursor.fetchone()[0]} guests\n"


@view_config(route_name="guests", request_method="POST", renderer="string")
def add_guest(request):
    name = request.POST["name"]
    cursor = database(request.tm).cursor()
    cursor.execute("INSERT INTO guest VALUES (%s)", (name,))
    return f"Welcome, {name}\n"


@view_config(route_name="all guests", renderer="string")
def list_guests(request):
    cursor = database(request.tm).cursor()
    cursor.execute("SELECT name FROM guest ORDER BY name")
    return "".join(f"{name}\n" for (name,) in cursor)


def main(global_config, **settings):
    config = Configurator(settings=settings)
    config.include("pyramid_tm")
    config.include("pyramid_retry")
    config.include("zreconnect.integrations.pyramid")
    config.add_route("guests", "/")
    config.add_route("all guests", "/all")
    config.scan()
    return config.make_wsgi_app()
