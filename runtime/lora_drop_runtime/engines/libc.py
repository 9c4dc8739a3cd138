"""Memory that engines give back to the system by calls of the C library, which Python has not.

Each does nothing where the system has no such call: glibc has both, macOS one, Windows neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable
from typing import Any

import numpy.typing as npt

_DONTNEED = 4  # madvise, on every system that has it
_WITHOUT = (OSError, AttributeError, TypeError)  # the last: Windows has no library of the process's own


def trim_heap() -> None:
    """Give back what is free in the heap; megabytes, where weights were packed."""
    with contextlib.suppress(*_WITHOUT):
        ctypes.CDLL(None).malloc_trim(0)


def forget_pages(mapped: Iterable[npt.NDArray[Any]]) -> None:
    """Give back the pages of mapped files that arrays lie in; they come again where they are read."""
    with contextlib.suppress(*_WITHOUT):
        advise = ctypes.CDLL(None).madvise
        for array in mapped:
            begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
            length = array.ctypes.data + array.nbytes - begin
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), ctypes.c_int(_DONTNEED))
