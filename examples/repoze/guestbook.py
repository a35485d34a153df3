"""A guest book with plain WSGI, in a pipeline with repoze.retry and repoze.tm2."""

import os
from urllib.parse import parse_qs

from paste.deploy import loadapp

from zreconnect import Ledger, ReconnectingDatabaseAdapter

# Without a timeout, a request does not wait for a database that is down.
timeout = os.environ.get("DATABASE_TIMEOUT")
database = ReconnectingDatabaseAdapter(
    os.environ["DATABASE_URL"],
    timeout=float(timeout) if timeout else None,
    # Knows what became of a COMMIT after a crash of the server as well.
    witness=Ledger(),
)


def guest_book(environ, start_response):
    cursor = database().cursor()
    match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
        case "GET", "/":
            cursor.execute("SELECT count(*) FROM guest")
            text = f"{cursor.fetchone()[0]} guests\n"
        case "POST", "/":
            form = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            [name] = parse_qs(form.decode())["name"]
            cursor.execute("INSERT INTO guest VALUES (%s)", (name,))
            text = f"Welcome, {name}\n"
        case "GET", "/all":
            cursor.execute("SELECT name FROM guest ORDER BY name")
            text = "".join(f"{name}\n" for (name,) in cursor)
        case _:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"Not found\n"]
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]


def make_guest_book(global_config):
    return guest_book


def main():
    return loadapp("config:guestbook.ini", relative_to=os.path.dirname(__file__))
