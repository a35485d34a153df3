"""What is chosen for a connection once and for all, and passed on to its forks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from zreconnect.documented import documented_by
from zreconnect.interfaces import IWitness
from zreconnect.policy import PERSIST, RetryPolicy, check_number
from zreconnect.witness import NoObserver, XidWitness


@documented_by(IWitness)
class Witness(Protocol):
    """`IWitness`, for type checkers."""

    def observer(self, driver: Any) -> Any: ...


@dataclass(frozen=True)
class Options:
    """The keywords of `connect` that are not about where the server is.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """

    policy: RetryPolicy = PERSIST
    witness: Witness | str | None = "xid"
    on_connect: Callable[[Any], object] | None = None
    response_timeout: float | None = None
    two_phase: bool = False
    pooled: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, RetryPolicy):
            raise TypeError(f"policy must be a RetryPolicy, not {self.policy!r}")
        if self.on_connect is not None and not callable(self.on_connect):
            raise TypeError(f"on_connect must be callable, not {self.on_connect!r}")
        if self.response_timeout is not None:
            check_number("response_timeout", self.response_timeout, at_least=0)
        if self.pooled not in (None, True, False):
            raise TypeError(f"pooled must be True, False or None, not {self.pooled!r}")
        object.__setattr__(self, "witness", choose_witness(self.witness))

    def check(self, driver: Any, parameters: Mapping[str, Any]) -> None:
        """Raise ValueError for what is not possible with this `IDriver`, and these parameters."""
        if self.two_phase and not driver.supports_two_phase:
            raise ValueError(f"two_phase is not possible with the driver {driver.name}")
        if self.pooled:
            if driver.pooling is None:
                raise ValueError(f"pooled=True is not possible with the driver {driver.name}")
            driver.pooling.check_parameters(parameters)

    def observer(self, driver: Any) -> Any:
        """A new `IObserver` for one connection of one process."""
        if self.witness is None or not driver.has_sessions:
            return NoObserver(driver)
        witness: Any = self.witness
        return witness.observer(driver)


def choose_witness(witness: Any) -> Any:
    """The observer factory for the value of a ``witness`` keyword.

    Raises TypeError or ValueError if it is neither "xid", nor None, nor an `IWitness`.
    """
    if witness is None:
        return None
    if isinstance(witness, str):
        if witness != "xid":
            raise ValueError(f'witness must be "xid", None or a Ledger, not {witness!r}')
        return XidWitness()
    if not IWitness.providedBy(witness):
        raise TypeError(f'witness must be "xid", None or a Ledger, not {witness!r}')
    return witness
