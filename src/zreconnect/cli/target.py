"""The database of a demonstration: a schema of its own, behind a line that can be cut."""

from __future__ import annotations

import secrets
from contextlib import closing
from typing import Any

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import make_dsn

from zreconnect.cli.errors import CommandError
from zreconnect.drivers.base import load_driver
from zreconnect.dsn import driver_name
from zreconnect.exceptions import one_line
from zreconnect.testing import PortForward

DEFAULT_PORT = "5432"
CONNECT_TIMEOUT = "10"


class Target:
    """Where the job works: a schema that is made for it, reached through a `PortForward`.

    Use it as a context manager, which makes the schema, and removes it unless ``keep`` is true.

    driver: the `IDriver` of the job.
    dsn: the DSN of a database on one TCP host.

    Raises `CommandError` if the DSN cannot be used, also when the block is entered.
    """

    #: How the job marks parameters.
    mark = "%s"

    def __init__(self, driver: Any, dsn: str, keep: bool) -> None:
        self.driver = driver
        parameters = {"connect_timeout": CONNECT_TIMEOUT, **driver.parse(dsn)}
        host = parameters.get("hostaddr") or parameters.get("host", "")
        port = parameters.get("port", DEFAULT_PORT)
        if not host or host[0] in "/@" or "," in host or not port.isdigit():
            raise CommandError("argument --dsn: it must name one host, to be reached by TCP")
        #: The name of the schema, and of the job's application.
        self.schema = f"zreconnect_demo_{secrets.token_hex(4)}"
        #: The database for people, without password.
        self.address: str = self.driver.address(parameters)
        self.forward = PortForward(host, int(port))
        options = f"{parameters.get('options', '')} -c search_path={self.schema}"
        self._parameters = {**parameters, "options": options.strip()}
        #: What is kept.
        self.place = f"the schema {self.schema} in {self.address}"
        self._keep = keep

    def __enter__(self) -> Target:
        try:
            self.query(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self.schema)))
        except psycopg2.Error as error:
            raise CommandError(f"cannot use {self.address}: {one_line(error)}") from error
        self.forward.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.forward.stop()
        if not self._keep:
            self.query(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(self.schema)))

    def count_requests(self) -> int:
        """How many messages the job has sent to the server so far."""
        return self.forward.count().messages_to_server

    @property
    def direct_dsn(self) -> str:
        """The DSN that leads to the schema past the forwarder."""
        return str(make_dsn(**self._parameters))

    @property
    def forwarded_dsn(self) -> str:
        """The DSN that leads to the schema through the forwarder."""
        line = {
            # The name of the host remains, for what depends on it: certificates, password files.
            "hostaddr": self.forward.host,
            "port": str(self.forward.port),
            "application_name": self.schema,
        }
        return str(make_dsn(**{**self._parameters, **line}))

    def query(self, statement: Any, *parameters: object) -> list[tuple[Any, ...]]:
        """Execute a statement on a connection of its own, in autocommit mode.

        Returns the rows, none for a statement without result. Raises psycopg2's errors.
        """
        with closing(psycopg2.connect(self.direct_dsn)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description else []


def driver_for(dsn: str, name: str | None = None) -> Any:
    """The `IDriver` of that name; None takes the one for the DSN.

    Raises `CommandError` if there is none, or if it cannot use the DSN.
    """
    try:
        driver = load_driver(name or driver_name(dsn))
        driver.parse(dsn)
    except ValueError as error:
        raise CommandError(f"argument --dsn: {error}") from None
    except ImportError as error:
        raise CommandError(str(error)) from error
    return driver
