"""SQLObject's URIs for PostgreSQL give connections that reconnect."""

from zreconnect import FAIL_FAST
from zreconnect.integrations.sqlobject import register

register("postgres", policy=FAIL_FAST)
