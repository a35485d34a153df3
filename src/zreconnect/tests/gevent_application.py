"""A WSGI application for gunicorn's gevent workers, and gunicorn's configuration.

``gunicorn --config python:zreconnect.tests.gevent_application zreconnect.tests.gevent_application``
serves DATABASE_URL at PORT. With PSYCOGREEN, psycopg2 waits as gevent does.
"""

import functools
import logging
import os

bind = f"127.0.0.1:{os.environ['PORT']}"
worker_class = "gevent"
workers = 1
graceful_timeout = 1
errorlog = "-"
loglevel = "warning"


def post_fork(server, worker):
    if os.environ.get("PSYCOGREEN"):
        from psycogreen.gevent import patch_psycopg

        patch_psycopg()


def application(environ, start_response):
    """``/`` tells that it is there. The others ask the database: ``/guests`` how many there are;
    ``/enter`` adds one, and waits half a second for each answer; ``/wait`` waits for a lock."""
    path = environ["PATH_INFO"]
    try:
        body = "here" if path == "/" else ask(path)
        start_response("200 OK", [("Content-Type", "text/plain")])
    except Exception as error:
        body = f"{type(error).__name__}: {error}"
        start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
    return [body.encode()]


def ask(path):
    # Here, because gevent replaces Python's modules when the worker begins.
    import transaction

    patient, impatient = adapters()
    with transaction.manager:
        if path == "/enter":
            impatient().cursor().execute("INSERT INTO guest VALUES ('one')")
            return "entered"
        cursor = patient().cursor()
        if path == "/wait":
            cursor.execute("UPDATE door SET passed = passed + 1")
            return "passed"
        cursor.execute("SELECT count(*) FROM guest")
        return str(cursor.fetchone()[0])


@functools.cache
def adapters():
    from zreconnect import ReconnectingDatabaseAdapter

    logging.basicConfig(level=logging.WARNING)
    return [
        ReconnectingDatabaseAdapter(os.environ["DATABASE_URL"], response_timeout=seconds)
        for seconds in (None, 0.5)
    ]
