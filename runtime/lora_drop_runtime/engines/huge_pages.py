"""What an engine allocates for its weights, in huge pages where Linux has them.

A step reads all weights. The processor looks up where each page of memory lies: at 4 KiB that is a look-up for every
4096 bytes, and in a virtual machine a dear one; at 2 MiB it is one for 512 times as many. Linux gives huge pages to
those who ask (`transparent_hugepage/enabled` is `madvise`), and the engines do not ask. Where the system says `never`,
nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise; the second since Linux 6.1, before it the system does so some time
_LEAST = 8 << 20  # of weights
_STEPS = 128  # before it: to move weights takes as long as they then spare in about as many
_TOGETHER = 4 << 20  # a block as large has a huge page's worth in a mapping of its own
_PIECE = 32 << 20  # moved in one call, which a process that ends waits for


def _page_bytes() -> int:
    """Size of a huge page; 0 where there are none to be had."""
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text(encoding="utf-8"):
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _mappings() -> list[tuple[int, int]]:
    """Begin and end of the process's own writable memory that is no file's, in order."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, access, _, _, node, *name = line.split(maxsplit=5)
        if access == "rw-p" and node == "0" and name != ["[stack]"]:
            begin, end = span.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _without(spans: list[tuple[int, int]], others: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of spans is in none of the others; both in order, and none of one list meets another of it."""
    place = 0
    for begin, end in spans:
        while place < len(others) and others[place][1] <= begin:
            place += 1
        for other_begin, other_end in others[place:]:
            if other_begin >= end:
                break
            if other_begin > begin:
                yield begin, other_begin
            begin = other_end
        if begin < end:
            yield begin, end


def _lie_together() -> None:
    """Let glibc allocate side by side: weights of their own mappings, each less than a huge page, cannot be moved.

    It puts blocks into the heap that are smaller than one that it has given back; this is such a one.
    """
    with contextlib.suppress(OSError, AttributeError):
        system = ctypes.CDLL(None)
        system.malloc.restype, system.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        system.free.argtypes = [ctypes.c_void_p]
        system.free(system.malloc(_TOGETHER))


def _move(spans: list[tuple[int, int]], size: int) -> None:
    """Put each huge page's worth that is resident, but for an eighth, into one; whatever the system refuses stays."""
    system = ctypes.CDLL(None)
    system.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    system.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for begin, end in spans:
        resident = np.zeros((end - begin) // mmap.PAGESIZE, np.uint8)
        if system.mincore(begin, end - begin, resident.ctypes.data):
            continue  # it is gone
        used = (resident & 1).reshape(-1, size // mmap.PAGESIZE).mean(1) >= 7 / 8
        edges = np.flatnonzero(np.diff(used, prepend=False, append=False))
        for first, last in edges.reshape(-1, 2):
            place, length = begin + int(first) * size, int(last - first) * size
            if system.madvise(place, length, _COLLAPSE):
                system.madvise(place, length, _HUGEPAGE)


class HugePages:
    """Notes what memory the process has, and moves what came later into huge pages once so many steps have run.

    Args:
        expected: bytes that will come; a few are not worth a look at the process's memory.
        scattered: whether they come in blocks of their own mappings.
    """

    def __init__(self, expected: int, scattered: bool = False) -> None:
        self._bytes = _page_bytes() if expected >= _LEAST else 0
        self._before: list[tuple[int, int]] = []
        self._left = _STEPS
        self._thread: threading.Thread | None = None
        _all.add(self)
        if self._bytes:
            if scattered:
                _lie_together()
            with contextlib.suppress(OSError):
                self._before = _mappings()

    def has_run(self) -> None:
        """Called after each step."""
        self._left -= 1
        if self._left == 0:
            self.take()

    def take(self) -> None:
        """Move what has been allocated since, in a thread of its own.

        Moved is what the process uses already, so that it takes hardly more memory. Nothing is done a second time, nor
        where no thread or file is to be had.
        """
        if not self._before:
            return
        size, spans = self._bytes, []
        piece = max(size, _PIECE)
        before, self._before = self._before, []
        try:
            now = _mappings()
        except OSError:  # no file can be opened any more
            return
        for begin, end in _without(now, before):
            last = end // size * size
            spans += [(place, min(place + piece, last)) for place in range(-(-begin // size) * size, last, piece)]
        if not spans:
            return
        thread = threading.Thread(target=_move, args=(spans, size), name="huge pages", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return
        self._thread = thread

    def settle(self) -> None:
        """Move it now, and wait until it has been."""
        self.take()
        if self._thread is not None:
            self._thread.join()


_all: weakref.WeakSet[HugePages] = weakref.WeakSet()


def settle() -> None:
    """For all engines of the process that have run once, as who measures steps wants it."""
    for pages in list(_all):
        pages.settle()
