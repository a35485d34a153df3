"""Storm's URIs with ``postgres:`` lead to stores that reconnect."""

from zreconnect import FAIL_FAST
from zreconnect.integrations.storm import register

register("postgres", policy=FAIL_FAST)
