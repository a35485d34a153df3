"""The database of a demonstration: a schema of its own, behind a line that can be cut."""

from __future__ import annotations

import secrets
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlencode

import psycopg2
from psycopg2.extensions import make_dsn

from zreconnect.cli.errors import CommandError
from zreconnect.cli.file import FileTarget
from zreconnect.drivers.base import load_driver
from zreconnect.drivers.mysql import ER_NO_SUCH_THREAD, MysqlDriver, errno
from zreconnect.dsn import driver_name
from zreconnect.exceptions import one_line
from zreconnect.testing import PortForward

CONNECT_TIMEOUT = "10"


def target_for(dsn: str, keep: bool, driver_named: str | None = None) -> Target | FileTarget:
    """The target for a DSN.

    driver_named: the name of the driver that the job uses; None takes the one for the DSN.

    Raises `CommandError` if the DSN cannot be used.
    """
    try:
        driver = load_driver(driver_name(dsn, driver_named))
        parameters = driver.parse(dsn)
    except ValueError as error:
        raise CommandError(f"argument --dsn: {error}") from None
    except ImportError as error:
        raise CommandError(str(error)) from error
    if not driver.has_sessions:
        return FileTarget(driver, parameters, keep)
    target_class = MysqlTarget if isinstance(driver, MysqlDriver) else Target
    return target_class(driver, {"connect_timeout": CONNECT_TIMEOUT, **parameters}, keep)


class Target:
    """Where the job works: a schema that is made for it, reached through a `PortForward`.

    Use it as a context manager, which makes the schema, and removes it unless ``keep`` is true.

    driver: the `IDriver` of the job.
    parameters: of a database on one TCP host.

    Raises `CommandError` if the database cannot be used, also when the block is entered.
    """

    default_port = "5432"
    #: The errors of the module that `query` uses.
    errors: type[Exception] = psycopg2.Error
    #: The name of the interruption that `terminate` is.
    terminates_by = "terminate_backend"
    create = "CREATE SCHEMA {}"
    remove = "DROP SCHEMA {} CASCADE"

    def __init__(self, driver: Any, parameters: dict[str, str], keep: bool) -> None:
        host = parameters.get("hostaddr") or parameters.get("host", "")
        port = parameters.get("port", self.default_port)
        if not host or host[0] in "/@" or "," in host or not port.isdigit():
            raise CommandError("argument --dsn: it must name one host, to be reached by TCP")
        self.driver = driver
        #: The name of the schema, and of the job's application.
        self.schema = f"zreconnect_demo_{secrets.token_hex(4)}"
        #: The database for people, without password.
        self.address: str = driver.address(parameters)
        self.forward = PortForward(host, int(port))
        self._parameters = parameters
        self._keep = keep

    @property
    def place(self) -> str:
        """What is kept."""
        return f"the schema {self.schema} in {self.address}"

    def count_requests(self) -> int:
        """How many messages the job has sent to the server so far."""
        return self.forward.count().messages_to_server

    def __enter__(self) -> Target:
        try:
            self._administer(self.create.format(self.schema))
        except self.errors as error:
            raise CommandError(f"cannot use {self.address}: {one_line(error)}") from error
        self.forward.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.forward.stop()
        if not self._keep:
            self._administer(self.remove.format(self.schema))

    @property
    def direct_dsn(self) -> str:
        """The DSN that leads to the schema past the forwarder."""
        return str(make_dsn(**self._in_schema()))

    @property
    def forwarded_dsn(self) -> str:
        """The DSN that leads to the schema through the forwarder."""
        line = {
            # The name of the host remains, for what depends on it: certificates, password files.
            "hostaddr": self.forward.host,
            "port": str(self.forward.port),
            "application_name": self.schema,
        }
        return str(make_dsn(**{**self._in_schema(), **line}))

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Execute a statement on a connection of its own, in autocommit mode.

        Returns the rows, none for a statement without result. Raises `errors`.
        """
        with closing(psycopg2.connect(self.direct_dsn)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description else []

    def session(self) -> int:
        """The number of the job's session, 0 if it has none now."""
        return self.process(f"application_name = '{self.schema}'")

    def process(self, condition: str) -> int:
        """The number of the youngest server process of which the condition holds, 0 if none."""
        rows = self.query(
            "SELECT pid FROM pg_stat_activity"
            f" WHERE {condition} ORDER BY backend_start DESC LIMIT 1"
        )
        return rows[0][0] if rows else 0

    def terminate(self, session: int) -> None:
        """End a session, if it still is there. Raises `errors` if that is not allowed."""
        self.query("SELECT pg_terminate_backend(%s)", session)

    def may_terminate(self) -> bool:
        """Whether `terminate` is allowed."""
        with closing(psycopg2.connect(self.direct_dsn)) as victim:
            try:
                self.terminate(victim.info.backend_pid)
            except psycopg2.Error:
                return False
        return True

    def _in_schema(self) -> dict[str, str]:
        options = f"{self._parameters.get('options', '')} -c search_path={self.schema}"
        return {**self._parameters, "options": options.strip()}

    def _administer(self, statement: str) -> None:
        """Execute a statement that makes the schema or removes it."""
        self.query(statement)


class MysqlTarget(Target):
    """Where MySQL and MariaDB are concerned, a schema is a database."""

    default_port = "3306"
    terminates_by = "KILL"
    # The names of files that differ in case differ.
    create = "CREATE DATABASE {} CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
    remove = "DROP DATABASE {}"

    @property
    def errors(self) -> type[Exception]:  # type: ignore[override]
        errors: type[Exception] = self.driver.module.Error
        return errors

    @property
    def direct_dsn(self) -> str:
        return mysql_dsn(self._in_schema())

    @property
    def forwarded_dsn(self) -> str:
        line = {"host": self.forward.host, "port": str(self.forward.port)}
        return mysql_dsn({**self._in_schema(), **line})

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self._query(self._in_schema(), statement, *parameters)

    def session(self) -> int:
        rows = self.query(
            "SELECT MAX(id) FROM information_schema.processlist"
            " WHERE db = %s AND id <> CONNECTION_ID()",
            self.schema,
        )
        return rows[0][0] or 0

    def terminate(self, session: int) -> None:
        try:
            self.query(f"KILL CONNECTION {session}")
        except self.errors as error:
            if errno(error) != ER_NO_SUCH_THREAD:
                raise

    def may_terminate(self) -> bool:
        # One's own sessions, always.
        return True

    def _in_schema(self) -> dict[str, str]:
        return {**self._parameters, "dbname": self.schema}

    def _administer(self, statement: str) -> None:
        self._query(self._parameters, statement)

    def _query(
        self, to: dict[str, str], statement: str, *parameters: object
    ) -> list[tuple[Any, ...]]:
        raw = self.driver.connect(to, float(CONNECT_TIMEOUT))
        try:
            self.driver.prepare(raw)
            rows: list[tuple[Any, ...]] = self.driver.query(raw, statement, parameters or None)
            return rows
        finally:
            self.driver.close(raw)


def mysql_dsn(parameters: dict[str, str]) -> str:
    """The URL with these parameters."""
    rest = dict(parameters)
    user, password, host, port, dbname = (
        quote(rest.pop(name, ""), safe="")
        for name in ("user", "password", "host", "port", "dbname")
    )
    login = f"{user}:{password}@" if user else ""
    return f"mysql://{login}{host}:{port or MysqlTarget.default_port}/{dbname}?{urlencode(rest)}"
