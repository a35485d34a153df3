"""What is to be minded behind a pooler for PostgreSQL, where others have its processes, too.

A pooler such as PgBouncer lends a client one of the server's processes: for a transaction
(``pool_mode=transaction``), or for as long as the client is connected (``pool_mode=session``).
Which it is, nobody tells; that there is one shows in its number for the session, which is none of
the server's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zreconnect.documented import implements
from zreconnect.drivers.base import SessionSettings
from zreconnect.interfaces import IPooling

# Of Linux. What PgBouncer and its like give as a number is any of 32 bits.
LARGEST_PID = 2**22
# In a statement that sets modes.
READ_ONLY = re.compile(r"READ\s+ONLY\b|transaction_read_only\b", re.IGNORECASE)
LEAVES = "it would stay in a server process that the pooler gives to others"
OR_SAY = (
    "; or say pooled=False, if the pooler keeps a server process for each connection, as "
    "PgBouncer's pool_mode=session does"
)


@implements(IPooling)
class Pooling:
    """See `IPooling`.

    driver: a `zreconnect.drivers.postgresql.PostgresqlDriver`.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def is_in_between(self, raw: Any) -> bool:
        # A pooler gives its clients numbers of its own, to cancel their requests.
        number = raw.info.backend_pid
        if self._driver.query(raw, "SELECT pg_backend_pid()") == [(number,)]:
            return False
        return not (0 < number <= LARGEST_PID and self._is_pgpool(raw))

    def _is_pgpool(self, raw: Any) -> bool:
        """Whether it is pgpool-II, whose number is that of one server's process, and may have asked
        the other one. It gives nobody's processes to others before he has gone."""
        try:
            return bool(self._driver.query(raw, "SHOW pool_version"))
        except self._driver.module.ProgrammingError:
            # An unknown parameter, to any other.
            return False

    def share(self, raw: Any) -> None:
        # psycopg 3 would prepare statements there, and execute them elsewhere.
        if hasattr(raw, "prepare_threshold"):
            raw.prepare_threshold = None

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        if parameters.get("options"):
            raise ValueError(
                "pooled=True is not possible with options in the DSN: a pooler has none of its "
                "clients' own. Use ALTER ROLE ... SET, or ALTER DATABASE ... SET"
            )

    def check_settings(self, settings: SessionSettings) -> None:
        modes = settings.isolation_level, settings.readonly, settings.deferrable
        if settings.autocommit and modes != (None, None, None):
            raise self._driver.module.ProgrammingError(
                "isolation_level, readonly and deferrable are not possible in autocommit mode "
                f"behind a pooler: {LEAVES}. Use transaction() with them{OR_SAY}"
            )

    def check_statement(self, statement: Any, options: Mapping[str, Any]) -> None:
        stays = "A cursor WITH HOLD" if options.get("withhold") else self._driver.stays(statement)
        if stays:
            raise self._driver.module.ProgrammingError(
                f"{stays} is not possible behind a pooler: "
                f"{LEAVES}. Use another connection, past the pooler{OR_SAY}"
            )

    def is_read_only(self, statement: Any) -> bool:
        return READ_ONLY.search(self._driver.text_of(statement)) is not None

    def check_set_up(self, raw: Any, pooled: bool | None, what: str) -> None:
        if not (self.is_in_between(raw) if pooled is None else pooled):
            return
        raise self._driver.module.ProgrammingError(
            f"{what} is not possible behind a pooler: {LEAVES}. Use ALTER ROLE ... SET, or ALTER "
            f"DATABASE ... SET{OR_SAY}"
        )
