"""Linux's namespaces: what root sets up in one is there for whoever is in it, and then is gone."""

import ctypes
import os

NETWORK, MOUNTS = 0x40000000, 0x20000
_libc = ctypes.CDLL(None, use_errno=True)


def leave_others(kind):
    """Have the thread, and whatever it starts, in a new namespace of that kind. For root."""
    _check(_libc.unshare(kind))


def enter(descriptor, kind):
    """Have the thread in the namespace that an open file refers to."""
    _check(_libc.setns(descriptor, kind))


def _check(result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
