"""The repoze example together with requests that lose their connection, and with an error page.

It is given to waitress-serve. The environment variable PIPELINE is the path of a configuration
that is the example's but for its application, `make_application`, and `make_error_page` outside.
"""

import os

import webob
from guestbook import database, guest_book
from paste.deploy import loadapp
from transaction import manager

from zreconnect import CommitOutcomeUnknown
from zreconnect.tests.losses import LOSSES, attempts, receive, run_loss


def application(environ, start_response):
    name = environ["PATH_INFO"].strip("/")
    if name not in (*LOSSES, "Attempts", "ReceivesFile", "ReceivesBody"):
        return guest_book(environ, start_response)
    start_response("200 OK", [("Content-Type", "text/plain")])
    if name == "ReceivesFile":
        file = webob.Request(environ).POST["file"].file
        return [receive("file", file, database().cursor())]
    if name == "ReceivesBody":
        return [receive("body", environ["wsgi.input"], database().cursor())]
    if name == "Attempts":
        return [str(attempts.total()).encode()]
    response = run_loss(name, database().cursor(), manager)
    return [response] if isinstance(response, bytes) else response


def make_application(global_config):
    return application


def error_page(inner):
    """The application's own page for `CommitOutcomeUnknown`."""

    def outer(environ, start_response):
        try:
            return list(inner(environ, start_response))
        except CommitOutcomeUnknown:
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"Please look whether it is there"]

    return outer


def make_error_page(global_config):
    return error_page


def main():
    return loadapp("config:" + os.environ["PIPELINE"])
