"""SQLObject's ``connectionForURI()`` gives the connection of a class under ``initZopeless``.

SQLObject's own commits each statement. This one's work is committed when a test has ended.
"""

from __future__ import annotations

from typing import Any

import sqlobject
import transaction

from zreconnect import initZopeless, isZopeless

connection_for_uri = sqlobject.connectionForURI


class OfSuite(sqlobject.SQLObject):
    """Has the connection."""


def connection_under_zopeless(uri: str, *args: Any, **keywords: Any) -> Any:
    if not uri.startswith("postgres:"):
        return connection_for_uri(uri, *args, **keywords)
    if not isZopeless():
        dsn = uri.partition("?")[0].replace("postgres:", "postgresql:", 1)
        initZopeless(dsn, sqlClass=OfSuite, implicitBegin=True)
    return OfSuite._connection


def pytest_runtest_teardown(item: Any) -> None:
    try:
        transaction.commit()
    except Exception:
        transaction.abort()


sqlobject.connectionForURI = connection_under_zopeless
