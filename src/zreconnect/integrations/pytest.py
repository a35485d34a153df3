"""Fixtures for pytest: a server, a bad line to it, and losses. pytest finds them by itself.

The program under test needs nothing of zreconnect: it gets the DSN of the line. What the fixtures
need is imported by the first test that uses them; all other runs of pytest have nothing but this
module of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from zreconnect.integrations import needs

with needs(__name__, "zreconnect[pytest]"):
    import pytest

if TYPE_CHECKING:
    from zreconnect.testing import Cut, EmbeddedPostgres, EmbeddedServer, Line

# The seconds that a test waits at its end to be told that a loss has happened, of which its
# connection knows already.
_PATIENCE = 1.0


class _InOrder:
    """Sees to it that a test finds the server in order, whatever the one before has done to it."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server

    def pytest_runtest_setup(self, item: Any) -> None:
        if "zreconnect_server" in getattr(item, "fixturenames", ()):
            self._server.ensure_running()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: Any, request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Have the server in order for each test, also one that the program's own fixture returns."""
    server = yield
    if fixturedef.argname == "zreconnect_server" and hasattr(server, "ensure_running"):
        plugins, in_order = request.config.pluginmanager, _InOrder(server)
        plugins.register(in_order)
        fixturedef.addfinalizer(lambda: plugins.unregister(in_order))
    return server


@pytest.fixture(scope="session")
def zreconnect_server() -> Iterator[EmbeddedPostgres]:
    """An `EmbeddedPostgres` for all tests, of this process if there are several, as with
    pytest-xdist. A test may crash it and suspend its processes.

    For another one, such as an `EmbeddedMariaDB`, let a fixture of this name return it.
    """
    from zreconnect.testing import EmbeddedPostgres

    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def zreconnect_line(zreconnect_server: EmbeddedServer) -> Iterator[Line]:
    """A `Line` to the server: ``zreconnect_line.dsn()`` is the URL of an empty database of the
    test's, through a `PortForward` that fails on request."""
    from zreconnect.testing import line_to_fresh_database

    with line_to_fresh_database(zreconnect_server) as line:
        yield line


@pytest.fixture
def lose_connection(zreconnect_line: Line) -> Callable[..., int]:
    """A function that ends all connections on the line, and returns how many there were.

    ``reset=True`` ends them with RST, as a crash of the machine does, and not with FIN."""
    return zreconnect_line.drop


@pytest.fixture
def lose_commit_answer(zreconnect_line: Line) -> Iterator[Callable[..., Cut]]:
    """A function: the next COMMIT on the line is executed, and its answer lost with the connection.

    It takes and returns what `PortForward.cut_at_commit` does. A test that has called it, and
    lost nothing, fails at its end.
    """
    cuts: list[Cut] = []

    def lose_commit_answer(*arguments: Any, **keywords: Any) -> Cut:
        cuts.append(zreconnect_line.cut_at_commit(*arguments, **keywords))
        return cuts[-1]

    yield lose_commit_answer
    if not all(cut.wait(_PATIENCE) for cut in cuts):
        pytest.fail(
            "lose_commit_answer() was called, and no COMMIT has passed on zreconnect_line since: "
            "does the program use zreconnect_line.dsn(), without TLS?"
        )


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Waiting for a server, and before work is run again, takes no time: see
    `zreconnect.testing.no_waiting`."""
    from zreconnect.testing import no_waiting

    with no_waiting():
        yield
