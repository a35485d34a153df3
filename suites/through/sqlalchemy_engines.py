"""Each engine for PostgreSQL that is created is registered."""

from typing import Any

import sqlalchemy

from zreconnect import FAIL_FAST
from zreconnect.integrations.sqlalchemy import DRIVERS, register

create_engine = sqlalchemy.create_engine


def create_registered_engine(*args: Any, **keywords: Any) -> Any:
    engine = create_engine(*args, **keywords)
    dialect = engine.dialect
    is_ours = dialect.name == "postgresql" and dialect.driver in DRIVERS and not dialect.is_async
    # A test's own module is its mock of the driver.
    if is_ours and "module" not in keywords:
        register(engine, policy=FAIL_FAST)
    return engine


for module in (sqlalchemy, sqlalchemy.engine):
    module.create_engine = create_registered_engine
