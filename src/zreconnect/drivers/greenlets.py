"""Under gevent: database modules in C, which keep all greenlets of a process waiting.

gevent makes Python's own waiting cooperative, and not that of C. While such a module waits for its
server, nothing else of the process runs: no other request, and not the watchdog, which is a
greenlet then, so that no time limit is kept.
"""

from __future__ import annotations

import sys

from zreconnect import events

_told: set[str] = set()


def tell_if_it_blocks(module: str, remedy: str) -> None:
    """Log, once in a process, that a module in C keeps greenlets waiting, if there are some.

    Called for each new session. module: its name. remedy: what to do about it.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or module in _told or not monkey.is_module_patched("threading"):
        return
    _told.add(module)
    events.logger.warning(
        "%s keeps all greenlets of this process waiting while it waits for its server, and "
        "zreconnect's time limits are not kept meanwhile: neither response_timeout nor a policy's "
        "timeout. %s",
        module,
        remedy,
    )
