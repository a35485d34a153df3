"""The database of a drill: one's own server or a given one, behind a line that can be cut."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from zreconnect.cli.drill.program import POLL_INTERVAL
from zreconnect.cli.errors import CommandError
from zreconnect.drivers.base import load_driver
from zreconnect.drivers.mysql import ER_NO_SUCH_THREAD, MysqlDriver, errno
from zreconnect.dsn import driver_name
from zreconnect.exceptions import one_line
from zreconnect.testing import EmbeddedMariaDB, EmbeddedPostgres, EmbeddedServerError, PortForward

# Seconds in which a question must be answered that is asked past the line.
TIMEOUT = 10.0
POSTGRESQL, MARIADB = "postgresql", "mariadb"
# Of the caller's environment: they would lead the program past the line.
MISLEADING = (
    *("PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE", "PGTARGETSESSIONATTRS", "PGPASSFILE"),
    *("PGPASSWORD", "MYSQL_UNIX_PORT", "MYSQL_PWD", "MYSQL_PASSWORD"),
)
# The modes in which the name of the host is that in the server's certificate.
BY_NAME = ("verify-ca", "verify-full")
# Of a running kernel; containers share it.
BOOT_ID = "/proc/sys/kernel/random/boot_id"


@contextlib.contextmanager
def open_database(dsn: str | None, own: str, really: bool) -> Iterator[Database]:
    """The database that ``dsn`` leads to, or one of a server that is started for the purpose.

    own: which server to start, ``postgresql`` or ``mariadb``. really: whether the server may be on
    another machine.

    Raises `CommandError` if it cannot be used, or is not on this machine.
    """
    try:
        if dsn is not None:
            driver, parameters = _understood(dsn)
            if not really:
                # Before anybody is contacted.
                _check_addresses(driver.address(parameters), parameters)
            database = _database(driver, parameters)
            if not really:
                _check_that_it_is_here(database)
            with database.forward:
                yield database
            return
        with EmbeddedMariaDB() if own == MARIADB else EmbeddedPostgres() as server:
            database = _database(*_understood(server.dsn()))
            database.server = server
            with database.forward:
                yield database
    except (EmbeddedServerError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "pymysql":
            raise
        raise CommandError(str(error)) from error


def _understood(dsn: str) -> tuple[Any, dict[str, str]]:
    """The driver for questions, and the parameters."""
    try:
        name = driver_name(dsn)
        # Its connections tell the password, wherever libpq has found it.
        driver = load_driver("psycopg2" if name == "psycopg" else name)
        parameters = driver.parse(dsn)
    except ValueError as error:
        raise CommandError(f"argument --dsn: {error}") from None
    except ImportError as error:
        raise CommandError(str(error)) from error
    if not driver.has_sessions:
        raise CommandError("argument --dsn: there is no line to a file that could be cut")
    return driver, parameters


def _database(driver: Any, parameters: Mapping[str, str]) -> Database:
    kind = MysqlDatabase if isinstance(driver, MysqlDriver) else Database
    return kind(driver, parameters)


class Database:
    """Where the program works: through `forward`; questions are asked past it.

    driver: the `IDriver` for questions. parameters: of a database on one TCP host.

    Raises `CommandError` if the database cannot be used.
    """

    scheme = "postgresql"
    default_port = "5432"
    version_statement = "SELECT 'PostgreSQL ' || current_setting('server_version')"

    def __init__(self, driver: Any, parameters: Mapping[str, str]) -> None:
        self.driver = driver
        #: The server, if it was started for the drill.
        self.server: EmbeddedPostgres | EmbeddedMariaDB | None = None
        #: What can be raised by what is asked.
        self.errors: type[Exception] = driver.module.Error
        self.parameters = dict(parameters)
        try:
            with self._connected(self.parameters) as raw:
                self.parameters = self._resolved(raw)
                ((version,),) = driver.query(raw, self.version_statement)
        except (self.errors, OSError) as error:
            address = driver.address(self.parameters)
            raise CommandError(f"cannot use {address}: {one_line(error)}") from error
        host = self.parameters.get("hostaddr") or self.parameters.get("host", "")
        port = self.parameters.get("port", self.default_port)
        if not host or host[0] in "/@" or "," in host or not port.isdigit():
            raise CommandError(
                "argument --dsn: it must name one host, to be reached by TCP: the line to it is "
                "what is cut"
            )
        #: What the server is, for people.
        self.version = str(version)
        #: The database for people, without password.
        self.address: str = driver.address(self.parameters)
        self.forward = PortForward(host, int(port))

    # What the program is told

    @property
    def password(self) -> str:
        """What must not be told."""
        return self.parameters.get("password", "")

    def dsn(self) -> str:
        """The URL that leads through the line."""
        rest = self._through_line()
        user, password, host, port, dbname = (
            quote(rest.pop(name, ""), safe="")
            for name in ("user", "password", "host", "port", "dbname")
        )
        login = f"{user}:{password}@" if password else f"{user}@" if user else ""
        options = f"?{urlencode(rest, quote_via=quote)}" if rest else ""
        return f"{self.scheme}://{login}{host}:{port}/{dbname}{options}"

    def environment(self) -> dict[str, str]:
        """The environment of the program: the present one, led through the line."""
        kept = {name: value for name, value in os.environ.items() if name not in MISLEADING}
        led = {**self._variables(), "DATABASE_URL": self.dsn()}
        return {**kept, **{name: value for name, value in led.items() if value}}

    def _variables(self) -> dict[str, str]:
        line = self._through_line()
        return {
            "PGHOST": line["host"],
            "PGHOSTADDR": line.get("hostaddr", ""),
            "PGPORT": line["port"],
            "PGUSER": line.get("user", ""),
            "PGPASSWORD": line.get("password", ""),
            "PGDATABASE": line.get("dbname", ""),
            # What is encrypted cannot be seen.
            "PGSSLMODE": line.get("sslmode", "disable"),
        }

    def _through_line(self) -> dict[str, str]:
        line = {**self.parameters, "port": str(self.forward.port)}
        by_name = line.get("sslmode") in BY_NAME
        line["hostaddr" if by_name else "host"] = self.forward.host
        if not by_name:
            line.pop("hostaddr", None)
        return line

    # What is asked past the line

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Execute a statement in autocommit mode on a connection of its own, past the line.

        Returns the rows, none for a statement without result. Raises `errors`.
        """
        with self._connected(self.parameters) as raw:
            rows: list[tuple[Any, ...]] = self.driver.query(raw, statement, parameters or None)
            return rows

    def ended_transactions(self) -> int:
        """A number that grows with the transactions that write, of all the server's clients."""
        ((number,),) = self.query("SELECT txid_snapshot_xmax(txid_current_snapshot())")
        return int(number)

    def can_be_reached(self) -> bool:
        """Whether somebody else gets an answer through the line."""
        try:
            with self._connected(self._unencrypted()):
                return True
        except (self.errors, OSError):
            return False

    def sessions(self) -> list[int]:
        """The server's numbers for the program's sessions."""
        rows = self.query(
            "SELECT pid FROM pg_stat_activity WHERE client_port = ANY(%s)"
            " AND client_addr IS NOT DISTINCT FROM inet_client_addr() ORDER BY pid",
            self.forward.server_ports(),
        )
        return [pid for (pid,) in rows]

    def terminate(self, session: int) -> None:
        """End a session, if it still is there. Raises `errors` if that is not allowed."""
        self.query("SELECT pg_terminate_backend(%s)", session)

    def terminate_all(self) -> bool:
        """End the program's sessions, and return whether there were any.

        They have ended by then: what is done afterwards is done by others.
        """
        sessions = self.sessions()
        for session in sessions:
            self.terminate(session)
        deadline = time.monotonic() + TIMEOUT
        while not set(sessions).isdisjoint(self.sessions()) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL)
        return bool(sessions)

    def may_terminate(self) -> bool:
        """Whether `terminate_all` works here: not behind a pooler, which hides whose they are."""
        try:
            with self._connected(self._unencrypted()):
                return self.terminate_all()
        except self.errors:
            return False

    def origin(self, raw: Any) -> int:
        """The port that the server sees a connection come from."""
        ((port,),) = self.driver.query(raw, "SELECT inet_client_port()")
        return int(port or 0)

    def fileno(self, raw: Any) -> int:
        """The socket of a connection."""
        return int(raw.fileno())

    def boot_id(self, raw: Any) -> str:
        """That of the server's machine, empty if the role may not know it."""
        try:
            ((text,),) = self.driver.query(raw, "SELECT pg_read_file(%s)", (BOOT_ID,))
        except self.errors:
            return ""
        return str(text).strip()

    @contextlib.contextmanager
    def connected(self) -> Iterator[Any]:
        """A connection past the line. Raises `errors`."""
        with self._connected(self.parameters) as raw:
            yield raw

    @contextlib.contextmanager
    def _connected(self, parameters: Mapping[str, str]) -> Iterator[Any]:
        raw = self.driver.connect(parameters, TIMEOUT)
        try:
            self.driver.prepare(raw)
            yield raw
        finally:
            self.driver.close(raw)

    def _resolved(self, raw: Any) -> dict[str, str]:
        """The parameters, with what libpq had from elsewhere."""
        info = raw.info
        found = {
            "host": info.host,
            "port": str(info.port),
            "user": info.user,
            "password": info.password,
            "dbname": info.dbname,
        }
        with socket.socket(fileno=os.dup(self.fileno(raw))) as copy:
            if copy.family != socket.AF_UNIX:
                # A name may have several addresses, and the line must lead to the same.
                found["hostaddr"] = copy.getpeername()[0]
        elsewhere = ("service", "passfile")
        given = {name: each for name, each in self.parameters.items() if name not in elsewhere}
        return given | {name: each for name, each in found.items() if each}

    def _unencrypted(self) -> dict[str, str]:
        """As the program connects."""
        return {"sslmode": "disable", **self._through_line()}


class MysqlDatabase(Database):
    """MySQL and MariaDB."""

    scheme = "mysql"
    default_port = "3306"
    version_statement = "SELECT CONCAT(IF(VERSION() LIKE '%MariaDB%', '', 'MySQL '), VERSION())"

    def ended_transactions(self) -> int:
        ((_name, number),) = self.query("SHOW GLOBAL STATUS LIKE 'Handler_commit'")
        return int(number)

    def sessions(self) -> list[int]:
        rows = self.query(
            "SELECT id, SUBSTRING_INDEX(host, ':', -1) FROM information_schema.processlist"
            " WHERE SUBSTRING_INDEX(host, ':', 1) = (SELECT SUBSTRING_INDEX(host, ':', 1)"
            " FROM information_schema.processlist WHERE id = CONNECTION_ID()) ORDER BY id"
        )
        ports = {str(port) for port in self.forward.server_ports()}
        return [session for session, port in rows if port in ports]

    def terminate(self, session: int) -> None:
        try:
            self.query(f"KILL CONNECTION {session}")
        except self.errors as error:
            if errno(error) != ER_NO_SUCH_THREAD:
                raise

    def origin(self, raw: Any) -> int:
        ((host,),) = self.driver.query(
            raw, "SELECT host FROM information_schema.processlist WHERE id = CONNECTION_ID()"
        )
        port = host.rpartition(":")[2]
        return int(port) if port.isdigit() else 0

    def fileno(self, raw: Any) -> int:
        return int(self.driver.fileno(raw))

    def boot_id(self, raw: Any) -> str:
        return ""

    def _variables(self) -> dict[str, str]:
        line = self._through_line()
        return {
            "MYSQL_HOST": line["host"],
            "MYSQL_PORT": line["port"],
            "MYSQL_TCP_PORT": line["port"],
            "MYSQL_USER": line.get("user", ""),
            "MYSQL_PASSWORD": line.get("password", ""),
            "MYSQL_PWD": line.get("password", ""),
            "MYSQL_DATABASE": line.get("dbname", ""),
        }

    def _through_line(self) -> dict[str, str]:
        return {
            **self.parameters,
            "host": self.forward.host,
            "port": str(self.forward.port),
        }

    def _resolved(self, raw: Any) -> dict[str, str]:
        return dict(self.parameters)

    def _unencrypted(self) -> dict[str, str]:
        return self._through_line()


def _check_that_it_is_here(database: Database) -> None:
    """Raise `CommandError` unless the server is on this machine for certain."""
    # What libpq has had from elsewhere is known now.
    _check_addresses(database.address, database.parameters)
    with database.connected() as raw:
        boot_id = database.boot_id(raw)
        with contextlib.suppress(OSError), open(BOOT_ID) as ours:
            if boot_id and boot_id == ours.read().strip():
                return
        with socket.socket(fileno=os.dup(database.fileno(raw))) as copy:
            is_direct = copy.getsockname()[1] == database.origin(raw)
    if boot_id or not is_direct:
        raise CommandError(
            f"{database.address} leads through this machine to a server that may be on another: "
            "through a tunnel, a pooler or a container's port. A drill cuts and terminates what "
            "works there: --really does it all the same"
        )


def _check_addresses(server: str, parameters: Mapping[str, str]) -> None:
    """Raise `CommandError` if the server is on another machine."""
    host = parameters.get("hostaddr") or parameters.get("host", "")
    # Others than TCP's are complained of elsewhere.
    for each in host.split(",") if host and host[0] not in "/@" else ():
        try:
            found = socket.getaddrinfo(each, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise CommandError(f"cannot find the host {each!r} of {server}: {error}") from error
        for family, _type, _protocol, _name, address in found:
            if not _is_own(family, address):
                raise CommandError(
                    f"{server} is not on this machine ({address[0]}). A drill cuts and terminates "
                    "what works there: --really does it all the same"
                )


def _is_own(family: int, address: Any) -> bool:
    """Whether an address is one of this machine's: others cannot be bound to."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
    return True
