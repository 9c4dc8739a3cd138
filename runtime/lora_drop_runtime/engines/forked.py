"""What a forked process must not free: engines wait for their threads as they go, and a fork has none of them.

Steps run there, since an engine does alone what none of its threads takes; without this only its end never came.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref

_held: weakref.WeakSet[object] = weakref.WeakSet()


def _hold() -> None:
    """Count a reference more, which nothing gives back: the interpreter frees what any object of its own holds."""
    for one in list(_held):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


@functools.cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=_hold)


def hold_in_forks(waits: object) -> None:
    """Never free in a process that is forked from now on what waits for its threads when it is freed."""
    _register()
    _held.add(waits)
