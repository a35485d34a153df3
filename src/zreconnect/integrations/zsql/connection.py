"""The connection object: what Zope stores, what its management screens show, what methods use."""

from __future__ import annotations

from html import escape
from typing import Any

from zreconnect.dsn import driver_name
from zreconnect.integrations import needs
from zreconnect.integrations.zsql.columns import database_of
from zreconnect.integrations.zsql.database import (
    Settings,
    SQLDatabase,
    dsn_of,
    forget_database,
    shared_database,
)

with needs(__name__, "zreconnect[zsql]"):
    from AccessControl.class_init import InitializeClass
    from AccessControl.Permissions import (
        change_database_connections,
        open_close_database_connection,
    )
    from AccessControl.SecurityInfo import ClassSecurityInfo
    from Acquisition import aq_base
    from App.special_dtml import DTMLFile
    from DateTime import DateTime
    from Shared.DC.ZRDB.Connection import Connection
    from zExceptions import BadRequest

ADD_PERMISSION = "Add ZReconnect Database Connections"
#: That of Products.ZPsycopgDA: repeatable read.
TILEVEL = 2

ADD_FORM = DTMLFile("add", globals())


def manage_addZReconnectConnection(
    self: Any,
    id: str,
    title: str,
    connection_string: str,
    zdatetime: Any = None,
    tilevel: int | str = TILEVEL,
    encoding: str = "",
    check: Any = None,
    timeout: float | str | None = None,
    REQUEST: Any = None,
) -> Any:
    """Add a connection to a folder. The arguments are those of `ReconnectingSQLConnection`."""
    self._setObject(
        id,
        ReconnectingSQLConnection(
            *(id, title, connection_string, zdatetime, check, tilevel, encoding, timeout)
        ),
    )
    return None if REQUEST is None else self.manage_main(self, REQUEST)


class ReconnectingSQLConnection(Connection):
    """A database connection for Z SQL Methods, whose requests survive their database.

    connection_string: a DSN as `connect` takes it, of PostgreSQL or MySQL; or ENV: and the name of
    an environment variable that has it.
    zdatetime: whether dates and times are Zope's DateTime; else Python's.
    check: whether to connect at once, and to raise what that raises.
    tilevel: the isolation level: 1 read committed, 2 repeatable read, 3 serializable, 4 read
    uncommitted.
    encoding: the client encoding; empty for the server's own.
    timeout: seconds that a request waits for a database that is away, as for
    `ReconnectingDatabaseAdapter`; None, or an empty string, does not wait.

    Raises BadRequest for one that makes no sense.
    """

    _isAnSQLConnection = True
    database_type = "ZReconnect"
    meta_type = "Z Reconnecting Database Connection"
    zmi_icon = "fas fa-database"
    security = ClassSecurityInfo()
    security.declareProtected(change_database_connections, "edit", "manage_edit")
    security.declareProtected(change_database_connections, "manage_properties")
    security.declareProtected(open_close_database_connection, "manage_open_connection")

    title: str
    connection_string: str
    zdatetime: Any = None
    tilevel: int = TILEVEL
    encoding = ""
    timeout: float | None = None

    manage_properties = DTMLFile("edit", globals())

    def __init__(
        self,
        id: str,
        title: str,
        connection_string: str,
        zdatetime: Any = None,
        check: Any = None,
        tilevel: int | str = TILEVEL,
        encoding: str = "",
        timeout: float | str | None = None,
    ) -> None:
        self.id = str(id)
        self.edit(title, connection_string, zdatetime, check, tilevel, encoding, timeout)

    def edit(
        self,
        title: str,
        connection_string: str,
        zdatetime: Any = None,
        check: Any = None,
        tilevel: int | str = TILEVEL,
        encoding: str = "",
        timeout: float | str | None = None,
    ) -> None:
        """Change what the object was told. Raises BadRequest, and leaves it as it is, for what
        makes no sense; with ``check``, what connecting raises."""
        try:
            seconds = float(timeout) if timeout not in (None, "") else None
            new = Settings(
                connection_string, bool(zdatetime), int(tilevel), encoding or "", seconds
            )
            database = shared_database(new)
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error)) from None
        old = self._settings() if self.connection_string else new
        self.title, self.connection_string = title, connection_string
        self.zdatetime, self.tilevel = zdatetime, int(tilevel)
        self.encoding, self.timeout = encoding, seconds
        if old != new:
            forget_database(old)
        self._use(database)
        if check:
            database.open()

    def manage_edit(
        self,
        title: str,
        connection_string: str,
        zdatetime: Any = None,
        check: Any = None,
        tilevel: int | str = TILEVEL,
        encoding: str = "",
        timeout: float | str | None = None,
        REQUEST: Any = None,
    ) -> Any:
        """Change the connection."""
        self.edit(title, connection_string, zdatetime, check, tilevel, encoding, timeout)
        if REQUEST is None:
            return None
        return self.manage_main(self, REQUEST, manage_tabs_message="Connection changed.")

    def connect(self, s: str) -> Any:
        """Be ready to connect: the first request does. Raises ValueError for a connection string
        that makes no sense."""
        self._use(shared_database(self._settings()))
        return self

    def manage_open_connection(self, REQUEST: Any = None) -> Any:
        """Connect now, and show what that meets."""
        message = ""
        try:
            self.connect(self.connection_string)
            self().open()
        except Exception as error:
            self._v_connected = ""
            message = escape(str(error))
        if REQUEST is None:
            return None
        return self.manage_main(self, REQUEST, manage_tabs_message=message)

    def sql_quote__(self, v: str | bytes) -> str:
        """A text as it stands in a statement, for ``<dtml-sqlvar>`` and ``<dtml-sqltest>``."""
        return database_of(driver_name(dsn_of(self.connection_string))).quote(v)

    def _settings(self) -> Settings:
        return Settings(
            self.connection_string,
            bool(self.zdatetime),
            self.tilevel,
            self.encoding or "",
            self.timeout,
        )

    def _use(self, database: SQLDatabase) -> None:
        self._v_database_connection = database
        self._v_connected = DateTime()


InitializeClass(ReconnectingSQLConnection)


def replace_connection(container: Any, id: str, timeout: float | None = None) -> Any:
    """Put a `ReconnectingSQLConnection` in the place of a connection object of
    Products.ZPsycopgDA's, and return it. It has the same id and settings, owner and local roles.

    container: the folder. timeout: seconds, as there. Works also when that product is gone, and
    Zope shows a broken object. Raises KeyError if the folder has no such object, and BadRequest for
    one that is no such connection.
    """
    old = aq_base(container[id])
    old._p_activate()
    state = dict(old.__getstate__() or {})
    if not {"connection_string", "tilevel"} <= set(state):
        raise BadRequest(f"{id} is no database connection of Products.ZPsycopgDA's")
    new = ReconnectingSQLConnection(id, state["title"], state["connection_string"])
    new.__dict__.update(state, timeout=timeout)
    new.connect(new.connection_string)
    container.manage_delObjects([id])
    container._setObject(id, new)
    return container[id]
