"""Each engine for PostgreSQL that is created is registered."""

from typing import Any

import sqlalchemy

from zreconnect import FAIL_FAST
from zreconnect.integrations.sqlalchemy import register

create_engine = sqlalchemy.create_engine


def create_registered_engine(*args: Any, **keywords: Any) -> Any:
    engine = create_engine(*args, **keywords)
    if engine.dialect.name == "postgresql":
        register(engine, policy=FAIL_FAST)
    return engine


sqlalchemy.create_engine = create_registered_engine
