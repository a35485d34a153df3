"""Z SQL Methods: a database connection object for Zope that reconnects.

It takes the place of the object of Products.ZPsycopgDA, with the same id, and the methods stay as
they are; see `zreconnect.integrations.zsql.connection`. To have it in a site::

    <include package="zreconnect.integrations.zsql" />
"""

from __future__ import annotations

from typing import Any

from zreconnect.integrations import needs


def initialize(context: Any) -> None:
    """Register the class with Zope, which calls this when it starts.

    Raises ImportError, which says what to install, if Products.ZSQLMethods is missing.
    """
    with needs(__name__, "zreconnect[zsql]"):
        from zreconnect.integrations.zsql import connection

    context.registerClass(
        connection.ReconnectingSQLConnection,
        permission=connection.ADD_PERMISSION,
        constructors=(
            ("manage_addZReconnectConnectionForm", connection.ADD_FORM),
            connection.manage_addZReconnectConnection,
        ),
    )
