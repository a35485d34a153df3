"""One drill: a program works, faults happen, and what becomes of it is written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from zreconnect.cli.drill.database import Database
from zreconnect.cli.drill.faults import HARMLESS, KINDS, Way
from zreconnect.cli.drill.observation import Observation
from zreconnect.cli.drill.program import POLL_INTERVAL, Program, how_it_ended
from zreconnect.cli.drill.schedule import CALM, Planned
from zreconnect.cli.errors import CommandError
from zreconnect.cli.threads import in_another_thread
from zreconnect.exceptions import one_line

WORKED = "worked again"
ENDED = "ended"
HUNG = "hung"
FINISHED = "finished"
MISSED = "no occasion"
#: The outcomes that a program does not survive.
DEADLY = (ENDED, HUNG)

NOT_SURVIVED = "the command has not survived"
FINISHED_ITSELF = "the command finished its work by itself, with status 0"

# Seconds in which the sessions of a program that has ended are gone from the server.
SESSIONS_END = 10.0
# Seconds in which a program has made the tables that the check asks.
CHECK_PATIENCE = 15.0

#: A row that the check has returned, as text.
Row = tuple[str, ...]


@dataclass
class Interruption:
    """A fault that has happened, and what became of the program.

    number: from 1. kind: of `KINDS`. began, ended: seconds since the beginning of the drill.
    outcome: "worked again", "ended", "hung", "finished" (the program was done) or "no occasion"
    (the fault could not happen, as none of what it happens at came).
    seconds: from the end of the fault until the first transaction after it, or until the program
    was given up.
    status: the program's exit status, negative for a signal, if it has ended.
    said: what the program printed last, if it has not survived.
    connections, connections_after: how many it had before, and at the end of the calm after it.
    findings: what the check has found for the first time after it.
    """

    number: int
    kind: str
    began: float
    ended: float
    connections: int
    connections_after: int | None = None
    outcome: str = MISSED
    seconds: float | None = None
    status: int | None = None
    said: list[str] = field(default_factory=list)
    findings: list[Row] = field(default_factory=list)

    @property
    def description(self) -> str:
        """What happened, for people."""
        return KINDS[self.kind].description

    @property
    def how(self) -> str:
        """What became of the program, for people."""
        if self.outcome == WORKED:
            return f"worked again after {self.seconds:.2f} s"
        if self.outcome == ENDED and self.status is not None:
            return f"ended with {how_it_ended(self.status)}"
        if self.outcome == HUNG:
            return f"hung: nothing done for {self.seconds:.0f} s, although it could"
        if self.outcome == FINISHED:
            return "finished its work, status 0"
        return "did not happen: there was no occasion"


class Trial:
    """Puts a program to the test.

    start: starts the program. ways: how each kind of fault happens. patience: seconds without
    anything done after which the program hangs. once: whether the drill is over when the program
    has not survived a fault; else it is started again. check: SQL that returns a row for whatever
    is wrong, None for no check. tell: is called with each `Interruption` when its outcome is final.
    """

    def __init__(
        self,
        database: Database,
        start: Callable[[], Program],
        ways: Mapping[str, Way],
        patience: float,
        once: bool,
        check: str | None,
        tell: Callable[[Interruption], object],
    ) -> None:
        self._database = database
        self._start = start
        self._ways = ways
        self._patience = patience
        self._once = once
        self.check = check
        self._tell = tell
        self._program: Program | None = None
        # Whether it has not survived and was not started again.
        self._is_down = False
        # How many interruptions were told.
        self._told = 0
        #: What has happened, in order.
        self.interruptions: list[Interruption] = []
        #: How often the program was started.
        self.starts = 0
        #: Why it was over before its time, None if it was not.
        self.over: str | None = None
        #: Whether the program has ended, and not well, long after a fault.
        self.has_failed = False
        #: What the check has found before the first fault, and at the end but not before.
        self.findings_before: list[Row] = []
        self.findings: list[Row] = []
        self.observation = Observation(database.forward.count, database.ended_transactions)

    def run(self, plan: Iterable[Planned], is_enough: Callable[[float, int], bool]) -> None:
        """Have the faults of the plan happen until it is enough, or the program has ended.

        is_enough: is called with the seconds since the beginning and the number of faults.

        Raises `CommandError` if the program cannot be started, or the check cannot be executed.
        """
        with self.observation, self._running():
            self.over = self._begin()
            if self.over is None and self.check is not None:
                self.findings_before = self._found_first()
            for planned in plan:
                if is_enough(self.observation.now(), len(self.interruptions)):
                    break
                if not self._is_ready(planned.calm):
                    break
                self._interrupt(planned)
            if self.over is None and not self._is_down:
                self._works_for(CALM[0])
            self._tell_all()
        self._await_end_of_sessions()
        if self.check is not None:
            known = set(self.findings_before)
            self.findings = [row for row in self._found() if row not in known]
            for each in self.interruptions:
                # What was not yet there, or still, when others were at work, is no finding.
                each.findings = [row for row in each.findings if row in self.findings]

    @property
    def survived(self) -> bool:
        """Whether the program has survived all that has happened, and the check found nothing."""
        is_dead = self.has_failed or any(each.outcome in DEADLY for each in self.interruptions)
        return not self.findings and not is_dead

    @property
    def tried(self) -> bool:
        """Whether anything has happened to a program that worked."""
        return any(each.outcome != MISSED for each in self.interruptions)

    # One fault

    def _interrupt(self, planned: Planned) -> None:
        self._tell_all()
        # What it did first need not be what it does.
        self.observation.settle()
        observation, program = self.observation, self._running_program()
        connections = self._connections()
        began = observation.now()
        happened = self._ways[planned.kind](planned)
        each = Interruption(
            len(self.interruptions) + 1, planned.kind, began, observation.now(), connections
        )
        self.interruptions.append(each)
        if happened is False and program.status() is None:
            return
        self._await_outcome(each, program, observation.done(now=True))
        if self.check is not None:
            self._note_findings(each)
        if each.outcome in DEADLY:
            self._give_up(program)
        elif each.outcome == FINISHED:
            self.over = FINISHED_ITSELF

    def _await_outcome(self, each: Interruption, program: Program, done: int) -> None:
        """Find out what became of the program. done: what it had done when the fault ended."""
        observation = self.observation
        while each.outcome == MISSED:
            # In this order, so that what it did before it ended is seen.
            status = program.status()
            has_worked = observation.done() > done
            each.seconds = observation.now() - each.ended
            if status is not None:
                # It may have been about to end anyway.
                was_done = not each.connections or each.kind in HARMLESS
                is_fine = status == 0 and (has_worked or was_done)
                each.outcome, each.status = FINISHED if is_fine else ENDED, status
            elif has_worked:
                each.outcome = WORKED
            elif each.seconds > self._patience:
                each.outcome = HUNG
                if not self._database.can_be_reached():
                    raise CommandError(f"after {each.kind!r} nobody can connect to the server")
            else:
                time.sleep(POLL_INTERVAL / 2)
        if each.outcome in DEADLY:
            each.said = program.last_lines()

    def _is_ready(self, calm: float) -> bool:
        """Let the program work undisturbed, started again if need be; whether it is so far."""
        while self.over is None:
            if self._is_down:
                self.over = self._begin()
            elif self._works_for(calm):
                return True
        return False

    def _works_for(self, seconds: float) -> bool:
        """Whether the program goes on for so long: what it does not survive it has from the last
        fault."""
        program, untold = self._running_program(), self.interruptions[self._told :]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (status := program.status()) is not None:
                break
            time.sleep(POLL_INTERVAL)
        else:
            for each in untold:
                each.connections_after = self._connections()
            return True
        worked = [each for each in untold if each.outcome == WORKED]
        if status == 0:
            self.over = FINISHED_ITSELF
        elif worked:
            worked[-1].outcome, worked[-1].status = ENDED, status
            worked[-1].said = program.last_lines()
            self._give_up(program)
        else:
            self.over = _sentence(program, status, "when nothing had happened to it")
            self.has_failed = True
        return False

    def _tell_all(self) -> None:
        """Tell what is final by now."""
        for each in self.interruptions[self._told :]:
            self._tell(each)
        self._told = len(self.interruptions)

    # The program

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._program is not None:
                self._program.end()

    def _running_program(self) -> Program:
        assert self._program is not None
        return self._program

    def _connections(self) -> int:
        return len(self._database.forward.server_ports())

    def _begin(self) -> str | None:
        """Start the program, and wait until it works; return why it does not, if so."""
        done = self.observation.done()
        program = self._program = self._start()
        self.starts += 1
        self._is_down = False
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            # In this order, so that what it did before it ended is seen.
            status = program.status()
            if self.observation.done() > done if self.starts > 1 else self.observation.settle():
                break
            if status is not None:
                again = " again" if self.starts > 1 else ""
                return _sentence(program, status, f"before it had done anything{again}")
            time.sleep(POLL_INTERVAL)
        else:
            return (
                f"the command has done nothing in {self._patience:g} seconds, with "
                f"{self._connections()} connections: does it use the database that it is given?"
            )
        return None

    def _give_up(self, program: Program) -> None:
        program.end()
        self._is_down = True
        if self._once:
            self.over = NOT_SURVIVED

    # The check

    def _found(self) -> list[Row]:
        check = self.check
        assert check is not None
        try:
            rows = in_another_thread(lambda: self._database.query(check))
        except self._database.errors as error:
            raise CommandError(f"argument --check: {one_line(error)}") from error
        return [tuple(str(value) for value in row) for row in rows]

    def _found_first(self) -> list[Row]:
        """What is found before the first fault: the program may still have to make its tables."""
        deadline = time.monotonic() + CHECK_PATIENCE
        while True:
            try:
                return self._found()
            except CommandError:
                if time.monotonic() > deadline or self._running_program().status() is not None:
                    raise
            time.sleep(POLL_INTERVAL)

    def _note_findings(self, each: Interruption) -> None:
        known = {row for other in self.interruptions for row in other.findings}
        known.update(self.findings_before)
        each.findings = [row for row in self._found() if row not in known]

    def _await_end_of_sessions(self) -> None:
        """What they still do is done when the check is executed."""
        deadline = time.monotonic() + SESSIONS_END
        while self._database.sessions() and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL)


def _sentence(program: Program, status: int, when: str) -> str:
    said = "".join(f"\n  {line}" for line in program.last_lines())
    return f"the command ended with {how_it_ended(status)} {when}{':' if said else ''}{said}"
