"""What may be asked in each state, where each event leads, what an error means: every cell."""

import unittest
from types import SimpleNamespace

from zope.interface import implementer

from zreconnect.exceptions import make_transient
from zreconnect.interfaces import IDisconnectionError, Meaning
from zreconnect.states import (
    CONSEQUENCES,
    NEXT,
    REQUESTS,
    Answer,
    Event,
    Keeping,
    Moment,
    Request,
    State,
    Then,
    Verdict,
    leads_to_idle,
    verdict,
)

SHOWN = {
    "idle": {State.IDLE, State.BEGINNING},
    "active": {
        *(State.ACTIVE, State.ENDED, State.CONFLICT),
        *(State.COMMITTING, State.PREPARING, State.ROLLING_BACK),
    },
    "prepared": {State.PREPARED},
    "doomed": {State.TORN, State.UNSETTLED, State.UNKNOWN, State.DOOMED},
    "closed": {State.CLOSED},
}
MAY_BE_COMMITTED = {State.COMMITTING, State.UNSETTLED, State.UNKNOWN}
# Nothing of it is committed, and nothing but rollback() makes sense.
GONE = {State.BEGINNING, State.PREPARING, State.ROLLING_BACK, State.DOOMED}
# Where each event leads to from each state: "=" where it changes nothing, "." where it must not
# happen. An interrupt can come just before the note that a request leaves, and just after the one
# that it is answered; a subscriber of an event can roll back while a request is under way.
EVENTS = """
                           ID BE TO AC EN CF CO US UN PI PD RB DO CL
BEGIN_LEAVES               BE .  .  .  .  .  .  .  .  .  .  .  .  =
BEGUN                      AC AC .  .  .  .  .  .  .  .  .  .  .  =
NOT_BEGUN                  =  ID .  ID .  .  .  .  .  .  .  .  .  =
NOT_BEGUN_FOR_STATEMENT    TO TO .  TO .  .  .  .  .  .  .  .  .  =
NOT_REACHED_FOR_STATEMENT  DO DO .  .  .  .  .  .  .  .  .  .  .  =
ENDED                      =  =  =  EN =  =  =  =  =  EN =  =  =  =
CONFLICT                   =  =  =  CF =  =  =  =  =  CF =  =  =  =
LOST                       =  =  =  DO DO DO US =  =  =  =  =  =  =
COMMIT_LEAVES              .  .  .  CO .  .  .  .  .  .  .  .  .  =
COMMITTED                  =  .  .  .  .  .  ID ID .  .  .  .  .  =
REFUSED                    .  .  ID .  ID ID ID .  .  .  .  .  .  =
GOES_ON                    .  .  .  =  .  .  AC .  .  AC .  .  .  =
FOUND_ABORTED              =  .  .  .  .  .  DO DO .  .  .  .  =  =
NOT_FOUND                  =  UN .  UN UN UN UN UN =  .  .  .  UN =
PREPARE_LEAVES             .  .  .  PI .  .  .  .  .  .  .  .  .  =
PREPARED                   .  .  .  .  .  .  .  .  .  PD .  .  .  =
FOUND_UNPREPARED           .  .  .  .  .  .  .  .  .  DO .  .  .  =
BRANCH_ENDED               .  .  .  .  .  .  .  .  .  ID ID .  ID =
ROLLBACK_LEAVES            .  .  .  RB RB RB .  .  .  .  .  .  .  =
ROLLED_BACK                =  ID ID ID ID ID ID ID ID ID .  ID ID =
FORKED                     =  DO =  DO DO DO UN UN =  DO DO DO =  =
CLOSED                     CL CL CL CL CL CL CL CL CL CL CL CL CL =
"""
COLUMNS = {
    "ID": State.IDLE,
    "BE": State.BEGINNING,
    "TO": State.TORN,
    "AC": State.ACTIVE,
    "EN": State.ENDED,
    "CF": State.CONFLICT,
    "CO": State.COMMITTING,
    "US": State.UNSETTLED,
    "UN": State.UNKNOWN,
    "PI": State.PREPARING,
    "PD": State.PREPARED,
    "RB": State.ROLLING_BACK,
    "DO": State.DOOMED,
    "CL": State.CLOSED,
}


def answer(state, request):
    """What must become of a request. A KeyError is about what nobody has decided."""
    if state is State.CLOSED:
        return Answer.CLOSED
    if state is State.PREPARED:
        return Answer.PREPARED
    if request is Request.ROLLBACK:
        if state is State.PREPARING:
            # What may be prepared nobody would end any more.
            return Answer.PREPARED
        gives_up = dict.fromkeys(GONE | {State.TORN, State.UNKNOWN}, Answer.LETS_GO)
        asks = dict.fromkeys((State.ACTIVE, State.ENDED, State.CONFLICT), Answer.ROLLS_BACK)
        looks_up = dict.fromkeys((State.COMMITTING, State.UNSETTLED), Answer.SETTLES)
        return {State.IDLE: Answer.NOTHING, **gives_up, **asks, **looks_up}[state]
    if state in MAY_BE_COMMITTED:
        return Answer.UNKNOWN
    if state in GONE:
        return Answer.LOST
    if request is Request.LOOK:
        return Answer.GRANTED
    if state is State.IDLE:
        return {
            Request.STATEMENT: Answer.BEGINS,
            Request.BEGIN: Answer.BEGINS,
            Request.SETTINGS: Answer.GRANTED,
            Request.COMMIT: Answer.NOTHING,
        }[request]
    inside = {
        State.ACTIVE: Answer.GRANTED,
        State.ENDED: Answer.OVER,
        State.TORN: Answer.OVER,
        State.CONFLICT: Answer.CONFLICT,
    }
    return {
        Request.STATEMENT: inside[state],
        Request.COMMIT: inside[state],
        Request.BEGIN: Answer.INSIDE,
        Request.SETTINGS: Answer.INSIDE,
    }[request]


def consequence(moment, verdict):
    """What must follow from an error. A KeyError is about what nobody has decided."""
    thrown_away = (Event.LOST, Keeping.ENDED, Then.PASS)
    passed = (None, Keeping.KEPT, Then.PASS)
    is_gone = verdict in (Verdict.LOST, Verdict.STANDBY)
    is_answer = verdict in (Verdict.ENDED, Verdict.CONFLICT, Verdict.GOES_ON)
    if moment is Moment.CONNECT:
        return (Event.NOT_BEGUN, Keeping.ENDED, Then.PASS)
    if moment in (Moment.BEGIN, Moment.BEGIN_WITH):
        if is_gone and moment is Moment.BEGIN:
            return (Event.LOST, Keeping.TOLD, Then.SETTLED)
        if is_gone:
            # A statement of the user's is never sent again.
            return (Event.NOT_BEGUN, Keeping.TOLD, Then.DISCONNECTION)
        is_outside = verdict in (Verdict.OUTSIDE, Verdict.ENDED, Verdict.CONFLICT)
        return (Event.NOT_BEGUN, Keeping.KEPT if is_outside else Keeping.ENDED, Then.PASS)
    if is_gone:
        if moment is Moment.COMMITTING:
            return (Event.NOT_FOUND, Keeping.TOLD, Then.UNKNOWN)
        # Of several statements, some may have been committed before.
        if moment is Moment.AUTOCOMMIT:
            return (Event.LOST, Keeping.TOLD, Then.UNKNOWN)
        # Its answer says that it is not committed.
        if moment is Moment.COMMIT and verdict is Verdict.STANDBY:
            return (Event.FOUND_ABORTED, Keeping.TOLD, Then.SETTLED)
        is_users = moment is Moment.STATEMENT
        return (Event.LOST, Keeping.TOLD, Then.DISCONNECTION if is_users else Then.SETTLED)
    if moment is Moment.ROLL_BACK:
        # A session that is given up rolls back as well.
        if is_answer:
            return (Event.LOST, Keeping.TOLD, Then.SETTLED)
        return (Event.ROLLED_BACK, Keeping.ENDED, Then.PASS)
    if verdict is Verdict.INTERRUPTED and moment is Moment.COMMITTING:
        return (Event.NOT_FOUND, Keeping.ENDED, Then.PASS)
    if verdict is Verdict.INTERRUPTED:
        return thrown_away
    at_rest = (Verdict.INSIDE, Verdict.OUTSIDE, Verdict.ENDED, Verdict.GOES_ON)
    ended = (Event.ENDED, Keeping.KEPT, Then.PASS)
    refused = (Event.REFUSED, Keeping.KEPT, Then.PASS)
    goes_on = (Event.GOES_ON, Keeping.KEPT, Then.PASS)
    answered = (None, Keeping.KEPT, Then.SETTLED)
    columns = {
        Moment.STATEMENT: (passed, ended, ended, passed),
        Moment.COMMITTING: (passed, ended, ended, passed),
        Moment.AUTOCOMMIT: (passed, passed, passed, passed),
        Moment.OURS: (thrown_away, thrown_away, passed, passed),
        Moment.COMMIT: (goes_on, thrown_away, refused, goes_on),
        Moment.PREPARE: (goes_on, thrown_away, ended, goes_on),
        Moment.END_BRANCH: (thrown_away, thrown_away, answered, answered),
    }[moment]
    cells = dict(zip(at_rest, columns, strict=True))
    has_ended = cells[Verdict.ENDED]
    # What follows upon a conflict may run again, too.
    conflict = (Event.CONFLICT, Keeping.KEPT, Then.PASS)
    cells[Verdict.CONFLICT] = conflict if has_ended == ended else has_ended
    return cells[verdict]


def named(cells):
    """The cells by their names, which a difference shows better."""
    return {column.name: cell.name for column, cell in cells.items()}


class TableTests(unittest.TestCase):
    def test_requests(self):
        self.assertEqual(set(REQUESTS), set(State))
        for state in State:
            with self.subTest(state.name):
                expected = {request: answer(state, request) for request in Request}
                self.assertEqual(named(REQUESTS[state]), named(expected))

    def test_what_is_shown(self):
        for shown, states in SHOWN.items():
            self.assertEqual({state for state in State if state.shown == shown}, states)
        self.assertEqual(set().union(*SHOWN.values()), set(State))

    def test_events(self):
        heading, *lines = EVENTS.strip().splitlines()
        columns = [COLUMNS[name] for name in heading.split()]
        self.assertEqual(set(columns), set(State))
        self.assertEqual([line.split()[0] for line in lines], [event.name for event in Event])
        self.assertEqual(set(NEXT), set(Event))
        for name, *cells in map(str.split, lines):
            with self.subTest(name):
                cells = dict(zip(columns, cells, strict=True))
                expected = {
                    state: state if cell == "=" else COLUMNS[cell]
                    for state, cell in cells.items()
                    if cell != "."
                }
                self.assertEqual(named(NEXT[Event[name]]), named(expected))

    def test_consequences(self):
        self.assertEqual(set(CONSEQUENCES), set(Moment))
        for moment in Moment:
            with self.subTest(moment.name):
                expected = {verdict: consequence(moment, verdict) for verdict in Verdict}
                self.assertEqual(CONSEQUENCES[moment], expected)

    def test_nothing_is_both_unknown_and_forgotten(self):
        """What may be committed becomes idle only when it is settled."""
        for event, states in NEXT.items():
            for state in MAY_BE_COMMITTED & set(states):
                if leads_to_idle(event, state):
                    self.assertIn(event, (Event.COMMITTED, Event.REFUSED, Event.ROLLED_BACK))

    def test_leads_to_idle(self):
        for event, states in NEXT.items():
            for state, after in states.items():
                self.assertIs(leads_to_idle(event, state), after is State.IDLE)
        self.assertTrue(leads_to_idle(Event.COMMITTED, State.COMMITTING))
        self.assertFalse(leads_to_idle(Event.LOST, State.ACTIVE))


class DriverError(Exception):
    """Stands for the driver's Error."""


@implementer(IDisconnectionError)
class OfAnotherConnection(DriverError):
    """A DisconnectionError: it is the driver's as well."""


class VerdictTests(unittest.TestCase):
    def judge(self, error, raw="raw", meaning=Meaning.USER, **found):
        driver = SimpleNamespace(
            module=SimpleNamespace(Error=DriverError),
            meaning=lambda error, raw: meaning,
            is_at_rest=lambda raw: found.get("at_rest", True),
            in_transaction=lambda raw: found.get("inside", False),
        )
        server = SimpleNamespace(driver=driver, is_missed_by=lambda raw: found.get("missed", False))
        return verdict(
            error,
            server,
            None if raw is None else object(),
            lambda error, raw: found.get("refused", False),
        )

    def test_the_servers_answer(self):
        error = DriverError()
        for expected, found in [
            (Verdict.LOST, {"meaning": Meaning.DISCONNECT}),
            (Verdict.LOST, {"meaning": Meaning.DISCONNECT, "missed": True}),
            (Verdict.LOST, {"raw": None}),
            (Verdict.STANDBY, {"missed": True, "inside": True}),
            (Verdict.STANDBY, {"refused": True}),
            (Verdict.STANDBY, {"missed": True}),
            (Verdict.GOES_ON, {"inside": True}),
            (Verdict.GOES_ON, {"inside": True, "at_rest": False}),
            (Verdict.ENDED, {"meaning": Meaning.TRANSIENT}),
        ]:
            with self.subTest(found):
                self.assertIs(self.judge(error, **found), expected)

    def test_a_conflict(self):
        error = DriverError()
        make_transient(error)
        for expected, found in [
            (Verdict.CONFLICT, {}),
            (Verdict.GOES_ON, {"inside": True}),
            (Verdict.LOST, {"meaning": Meaning.DISCONNECT}),
        ]:
            with self.subTest(found):
                self.assertIs(self.judge(error, **found), expected)

    def test_not_the_servers_answer(self):
        for error in (KeyboardInterrupt(), LookupError(), OfAnotherConnection()):
            for expected, found in [
                (Verdict.INTERRUPTED, {"raw": None}),
                (Verdict.INTERRUPTED, {"at_rest": False, "inside": True}),
                (Verdict.INTERRUPTED, {"at_rest": False, "meaning": Meaning.DISCONNECT}),
                (Verdict.INSIDE, {"inside": True}),
                (Verdict.INSIDE, {"inside": True, "missed": True, "refused": True}),
                (Verdict.OUTSIDE, {"meaning": Meaning.DISCONNECT}),
            ]:
                with self.subTest((error, found)):
                    self.assertIs(self.judge(error, **found), expected)
