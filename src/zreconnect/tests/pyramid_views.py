"""Adds to the Pyramid example what loses its connection: ``pyramid.includes`` takes this module."""

from collections import Counter

from guestbook import database
from pyramid.response import Response

from zreconnect import CommitOutcomeUnknown, DisconnectionError, ReconnectTimeout
from zreconnect.tests.losses import LOSSES, attempts, lose_connection, receive, run_loss

shown = Counter()


class SecurityPolicy:
    """Knows its users from the database, and loses it once, or always, when it asks for one."""

    def authenticated_userid(self, request):
        name = request.path_info.strip("/")
        if name not in ("LosesUserOnce", "LosesUserAlways"):
            return None
        attempts[name] += 1
        cursor = database(request.tm).cursor()
        if attempts[name] == 1 or name == "LosesUserAlways":
            lose_connection(cursor)
        return "somebody"


def lose(request):
    response = run_loss(request.matchdict["loss"], database(request.tm).cursor(), request.tm)
    if isinstance(response, bytes):
        return Response(response, content_type="text/plain")
    return Response(app_iter=response, content_type="text/plain")


def receive_file(request):
    return Response(receive("file", request.POST["file"].file, database(request.tm).cursor()))


def receive_body(request):
    return Response(receive("body", request.body_file, database(request.tm).cursor()))


def greet(request):
    return Response("Hello")


def count_attempts(request):
    return Response(str(attempts.total()))


def count_shown(request):
    return Response(str(shown))


def show_unknown_outcome(error, request):
    """The application's own page for `CommitOutcomeUnknown`."""
    return Response("Please look whether it is there", status=500)


def show_any_error(error, request):
    """The application's page for all errors that have no other."""
    shown[type(error).__name__] += 1
    return Response("Sorry", status=500)


def show_own_page(error, request):
    """The application's own page for a database that cannot be reached."""
    shown[type(error).__name__] += 1
    return Response("Closed at the moment", status=503)


def includeme(config):
    config.set_security_policy(SecurityPolicy())
    for name, view in (
        ("Attempts", count_attempts),
        ("Shown", count_shown),
        ("ReceivesFile", receive_file),
        ("ReceivesBody", receive_body),
        ("LosesUserOnce", greet),
        ("LosesUserAlways", greet),
    ):
        config.add_route(name, f"/{name}")
        config.add_view(view, route_name=name)
    config.add_route("loss", f"/{{loss:{'|'.join(LOSSES)}}}")
    config.add_view(lose, route_name="loss")
    config.add_exception_view(show_unknown_outcome, context=CommitOutcomeUnknown)
    config.add_exception_view(show_any_error, context=Exception)
    if "own_page" in config.get_settings():
        for error in (DisconnectionError, ReconnectTimeout):
            config.add_exception_view(show_own_page, context=error, retryable_error=False)
