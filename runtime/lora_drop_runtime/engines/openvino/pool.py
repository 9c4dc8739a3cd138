"""Blocks of cache slots, of one kind of layers: which are free, which belong to several rows, and their memory.

Enters: how many blocks a row needs. Leaves: their numbers. A block's number is the same in all layers of the kind. What
nobody has written takes no memory: the system gives pages when they are first touched, and a pool that grows copies no
others.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_GROWTH = 1.5
# Windows has no flags, and gives such pages
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def _untouched(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros in pages that the system has not given yet. Those of numpy may be 2 MiB each, and come with a write."""
    size = math.prod(shape)
    try:
        memory = mmap.mmap(-1, max(1, size) * dtype.itemsize, **_PRIVATE)
    except OSError as error:  # which names no file, and would be taken for one of the standard streams
        raise MemoryError(f"{size * dtype.itemsize} bytes of K/V: {error.strerror}") from None
    return np.frombuffer(memory, dtype, size).reshape(shape)


class BlockPool:
    """Args:
    shapes: name of each cache → shape of a block; those of a layer, whose number ends their names, one behind another.
    dtype: of the memory.
    lock: held while the caches are used: a pool that grows has others.

    Attributes:
        caches: name → [blocks, *shape].
        version: changes whenever the caches are others.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: type, lock: threading.RLock) -> None:
        self._shapes, self._dtype = dict(shapes), np.dtype(dtype)
        self._lock = lock
        self._free: list[int] = []
        self._owners: list[int] = []  # of each block, how many rows have it
        self._written: set[int] = set()  # blocks of rows, but for those that nobody has written
        self.version = 0
        self.caches: dict[str, Array] = {}
        self._resize(0)

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values()) * self._dtype.itemsize

    @property
    def in_use(self) -> int:
        """Blocks that some row has."""
        return len(self._owners) - len(self._free)

    def _resize(self, count: int) -> None:
        """Memory for so many blocks; what is in those that are there goes along."""
        before, written = len(self._owners), np.array(sorted(self._written), np.int64)
        runs = np.split(written, np.flatnonzero(np.diff(written) != 1) + 1)
        self.version += 1  # before the first goes, which a call would read: an interrupt may come, or memory be short
        for _, names in groupby(self._shapes, lambda name: name.rpartition(".")[2]):  # of a layer
            grown = {}
            for name in names:
                grown[name] = _untouched((count, *self._shapes[name]), self._dtype)
                for run in runs if len(written) else ():
                    grown[name][run[0] : run[-1] + 1] = self.caches[name][run[0] : run[-1] + 1]
            self.caches.update(grown)  # at once: a call takes keys and values of one size
        self._owners += [0] * (count - before)
        self._free = [*range(count - 1, before - 1, -1), *self._free]  # the lowest first: they are touched already

    def take(self, count: int) -> list[int]:
        """Blocks of one's own; the pool grows where it has too few."""
        with self._lock:
            if count > len(self._free):
                total = len(self._owners)
                self._resize(max(total + count - len(self._free), int(total * _GROWTH)))
            taken = [self._free.pop() for _ in range(count)]
            for block in taken:
                self._owners[block] = 1
            return taken

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Another row has these as well; returns them."""
        with self._lock:
            for block in blocks:
                self._owners[block] += 1
        return list(blocks)

    def give_back(self, blocks: Iterable[int]) -> None:
        """A row has these no more."""
        with self._lock:
            for block in blocks:
                self._owners[block] -= 1
                if not self._owners[block]:
                    self._free.append(block)
                    self._written.discard(block)

    def will_write(self, blocks: Iterable[int]) -> None:
        """A step is about to write into these."""
        with self._lock:
            self._written.update(blocks)

    def is_shared(self, block: int) -> bool:
        return self._owners[block] > 1

    def copy(self, source: int, target: int) -> None:
        """Copy what is in a block."""
        with self._lock:
            self._written.add(target)
            for cache in self.caches.values():
                cache[target] = cache[source]
