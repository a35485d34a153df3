"""Interrupts at every moment: what a signal's handler that raises can do to a function."""

from __future__ import annotations

import itertools
import sys


class Interrupt(BaseException):
    """What the handler raises."""


def interrupted(function, module, moment):
    """Call it, and raise `Interrupt` at so many steps of the module's code.

    Returns whether the function had that many steps, and what it returned if it had not.
    """
    steps = itertools.count(1)

    def trace(frame, event, argument):
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        if next(steps) == moment:
            raise Interrupt
        return trace

    # That of a coverage measurement.
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = function()
    except Interrupt:
        return True, None
    finally:
        sys.settrace(before)
    return False, result


def moments():
    """As many as one likes."""
    return itertools.count(1)
