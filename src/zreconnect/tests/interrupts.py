"""Interrupts a call: at the n-th line of zreconnect that it comes to, or after so many seconds."""

from __future__ import annotations

import ast
import dis
import functools
import importlib.util
import os
import signal
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path

import zreconnect

HOME = str(Path(zreconnect.__file__).parent) + os.sep
_COVERAGE = importlib.util.find_spec("coverage")
MEASUREMENT = tuple(_COVERAGE.submodule_search_locations) if _COVERAGE is not None else ()
NOT_SWEPT = (f"{HOME}testing{os.sep}", f"{HOME}tests{os.sep}", *MEASUREMENT)
# Seconds after which a call is not expected to end by itself.
LIMIT = 30.0
# What begins the code of a with statement, and not the code that leaves its block.
ENTERING = ("LOAD_FAST", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME")


class Alarm(Exception):
    """What a signal handler of the program's raises."""


class Hung(BaseException):
    """What is done takes longer than anything may."""


@functools.cache
def is_swept(filename):
    """Whether the lines of this file count."""
    return filename.startswith(HOME) and not filename.startswith(NOT_SWEPT)


def is_in_measurement(frame):
    """Whether it is one of coverage's, which has a lock that an interrupt would leave locked."""
    return frame is not None and frame.f_code.co_filename.startswith(MEASUREMENT)


class Interrupt:
    """What both kinds have in common: the errors, and what became of them.

    errors: are raised one after the other.
    places: where they were raised, as "file:line function".
    is_unraisable: whether the interpreter has swallowed one, as it does in a finalizer.
    """

    def __init__(self, *errors):
        self.errors = list(errors)
        self.places = []
        self.is_unraisable = False

    @property
    def place(self):
        return ", ".join(self.places)

    def caused(self, error):
        """Whether one of the errors is that one, or is what it was raised upon."""
        seen = []
        while error is not None and error not in seen:
            if any(error is each for each in self.errors):
                return True
            seen.append(error)
            error = error.__cause__ or error.__context__
        return False

    def forget(self):
        """Let go of what the errors' tracebacks keep alive."""
        for error in self.errors:
            error.__traceback__ = error.__context__ = None

    def _next_error(self, frame):
        file = frame.f_code.co_filename.removeprefix(HOME)
        self.places.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        return self.errors[len(self.places) - 1]

    @contextmanager
    def _seeing_unraisable(self):
        hook = sys.unraisablehook

        def see(unraisable):
            if any(unraisable.exc_value is error for error in self.errors):
                self.is_unraisable = True
            else:
                hook(unraisable)

        sys.unraisablehook = see
        try:
            yield
        finally:
            sys.unraisablehook = hook


class AtLines(Interrupt):
    """In its block, each of ``errors`` is raised when that many lines have been counted.

    With no errors it only counts: ``lines``.
    """

    def __init__(self, numbers=(), errors=()):
        super().__init__(*errors)
        self.lines = 0
        self._numbers = numbers

    @contextmanager
    def __call__(self):
        previous = sys.gettrace()
        with self._seeing_unraisable():
            sys.settrace(self._trace_call)
            try:
                yield
            finally:
                sys.setprofile(None)
                sys.settrace(previous)

    def _trace_call(self, frame, event, argument):
        return self._trace_line if is_swept(frame.f_code.co_filename) else None

    def _trace_line(self, frame, event, argument):
        if event == "line" and not _is_out_of_reach(frame):
            self.lines += 1
            fired = len(self.places)
            if fired < len(self.errors) and self.lines == self._numbers[fired]:
                error = self._next_error(frame)
                if fired + 1 < len(self.errors):
                    # The interpreter ends the tracing when a trace function raises.
                    sys.setprofile(self._go_on)
                raise error
        return self._trace_line

    def _go_on(self, frame, event, argument):
        sys.setprofile(None)
        while frame is not None:
            if is_swept(frame.f_code.co_filename):
                frame.f_trace = self._trace_line
            frame = frame.f_back
        sys.settrace(self._trace_call)


class AtMoment(Interrupt):
    """In its block, ``error`` is raised by a signal handler after so many seconds.

    Not before zreconnect is entered, and not when it has been left.
    """

    def __init__(self, seconds, error):
        super().__init__(error)
        self._seconds = max(seconds, 1e-6)

    @contextmanager
    def __call__(self):
        with self._seeing_unraisable(), alarms(self._handle, self._seconds, LIMIT):
            yield

    def _handle(self, number, frame):
        while frame is not None and not is_swept(frame.f_code.co_filename):
            if frame.f_code.co_filename.startswith(NOT_SWEPT):
                return
            frame = frame.f_back
        if frame is not None:
            raise Hung(f"after {LIMIT} seconds") if self.places else self._next_error(frame)


@contextmanager
def alarms(handler, seconds, interval=0.0):
    """SIGALRM's handler in the block. What was due before is due again afterwards."""
    previous = signal.signal(signal.SIGALRM, handler)
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds, interval)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:
            left = max(left - (time.monotonic() - started), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, again)


@contextmanager
def time_limit():
    """What lasts too long in the block is ended with `Hung`, and so is what comes then."""

    def hang(number, frame):
        raise Hung(f"after {LIMIT} seconds")

    with alarms(hang, LIMIT, LIMIT):
        yield


# Where no signal is handled


def _is_out_of_reach(frame):
    """Whether no signal's handler can run before this line, after the one before.

    CPython calls it when a function begins, after a call, and when a loop begins again. So none
    runs between the end of a block and the release of a lock after it, if that is a call of C.
    """
    code = frame.f_code
    expression, is_block = _releases(code.co_filename).get(frame.f_lineno, (None, False))
    if expression is None or (is_block and _opname(code, frame.f_lasti).startswith(ENTERING)):
        return False
    try:
        value = eval(expression, frame.f_globals, frame.f_locals)
    except Exception:
        return False
    function = type(value).__exit__ if is_block else value
    return not isinstance(function, (types.FunctionType, types.MethodType))


def _opname(code, offset):
    return dis.opname[code.co_code[offset]]


@functools.cache
def _releases(filename):
    """By the line, the expression of a with statement, or of what a finally calls first."""
    found = {}
    for node in ast.walk(ast.parse(Path(filename).read_text())):
        if isinstance(node, ast.With) and len(node.items) == 1:
            expression, lines = node.items[0].context_expr, {node.lineno}
            lines.add(expression.lineno)
        elif (
            isinstance(node, ast.Try)
            and node.finalbody
            and isinstance(node.finalbody[0], ast.Expr)
            and isinstance(node.finalbody[0].value, ast.Call)
        ):
            expression, lines = node.finalbody[0].value.func, {node.finalbody[0].lineno}
        else:
            continue
        # A name, and names of attributes.
        if all(isinstance(each, _NAMES) for each in ast.walk(expression)):
            compiled = compile(ast.Expression(expression), filename, "eval")
            found |= dict.fromkeys(lines, (compiled, isinstance(node, ast.With)))
    return found


_NAMES = (ast.Name, ast.Attribute, ast.Load)
