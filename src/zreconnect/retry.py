"""Run a unit of work again: the one place that decides on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tenacity

from zreconnect.policy import check_attempts

Result = TypeVar("Result")

# Two units of work that met in a deadlock would meet again if they did not wait for times of
# their own. After a disconnect it is begin() that waits.
PAUSE = tenacity.wait_random_exponential(multiplier=0.02, max=1.0)


def run_unit_of_work(
    function: Callable[[], Result],
    *,
    begin: Callable[[], object],
    commit: Callable[[], object],
    abort: Callable[[], object],
    may_run_again: Callable[[BaseException], bool],
    attempts: int,
) -> Result:
    """Begin, call ``function``, commit; abort and do it all again after an error that allows it.

    Returns what ``function`` returned. Raises TypeError or ValueError if ``attempts`` is no whole
    number of at least 1, else what the last attempt raised.
    """
    check_attempts(attempts)

    def unit_of_work() -> Result:
        begin()
        try:
            result = function()
            commit()
        except BaseException:
            abort()
            raise
        return result

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_run_again),
        stop=tenacity.stop_after_attempt(attempts),
        wait=PAUSE,
        reraise=True,
    )
    return retrying(unit_of_work)
