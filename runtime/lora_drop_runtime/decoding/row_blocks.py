"""The blocks of one row over paged caches: which it has, and which it has forgotten.

A layer with a sliding window, or a convolution as wide, needs no entries before its window. A row that goes on gives up
the blocks of such layers that it does not see any more, and lays what it writes into them, or has others take them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from lora_drop_runtime.engines.engine import PagedEngine, Pool
from lora_drop_runtime.plan.drafting import VerifiedSchedule
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import AdaptiveSchedule, JoinedSchedule, PeriodicSchedule, Schedule

from .pace import MOST_DRAFTS

GONE = -1  # in the place of a block that a row has forgotten


def most_taken_back(policy: Policy, schedule: Schedule) -> int | None:
    """How many entries before its end a row's runs begin at most; None where that is not known."""
    if isinstance(schedule, VerifiedSchedule):
        return 1 + (MOST_DRAFTS if schedule.drafts is None else schedule.drafts)
    if not policy.steps_taken_back(1):
        return 0
    is_known = isinstance(schedule, PeriodicSchedule | JoinedSchedule | AdaptiveSchedule)
    return policy.steps_taken_back(schedule.k) if is_known else None  # type: ignore[attr-defined]


def held(blocks: Iterable[int]) -> list[int]:
    """Those that are not forgotten."""
    return [block for block in blocks if block != GONE]


def first_seen(entries: int, window: int, size: int) -> int:
    """The place of the first block that a token behind so many entries sees into.

    Args:
        window: in slots; 0 where it sees all.
        size: of a block.
    """
    return max(0, entries - window) // size if window else 0


def most_blocks(window: int, back: int, chunk: int, size: int) -> int:
    """How many blocks hold what any run of a row sees and writes, wherever it begins in one.

    Args:
        window: of the layers.
        back: how many entries before the row's end the run may begin.
        chunk: the most tokens that it has.
        size: of a block.
    """
    return -(-(window + back + chunk) // size) + 1


def _give_back(pools: Sequence[Pool], blocks: Sequence[list[int]]) -> None:
    for pool, own in zip(pools, blocks, strict=True):
        while own:
            pool.give_back(held([own.pop()]))


class RowBlocks:
    """A row's blocks of each pool; given back when it goes.

    Args:
        new: of each pool, how many blocks of its own it begins with.
        shared: the ones before these, which others have as well.
        back: how many entries before its end a run may begin (`most_taken_back`); None where nothing is forgotten.

    Attributes:
        blocks: of each pool by place, `GONE` where one is forgotten.
        needed: of each pool the place before which no run of the row reads.
    """

    def __init__(
        self,
        engine: PagedEngine,
        new: Sequence[int],
        shared: Sequence[Sequence[int]] | None = None,
        back: int | None = None,
    ) -> None:
        self.blocks: list[list[int]] = [[] for _ in new]
        self.back = back
        self._pools: list[Pool] = list(engine.pools)
        self._windows = [window for _, window in engine.table_groups]
        self._reserved, self._shared = list(new), [0] * len(new)
        self.needed = [0] * len(new)
        weakref.finalize(self, _give_back, self._pools, self.blocks)
        try:
            for number, (pool, own, count) in enumerate(zip(self._pools, self.blocks, new, strict=True)):
                first = shared[number] if shared else ()
                pool.share(held(first))
                own += first
                self._shared[number] = len(first)
                own += pool.take(count)
        except BaseException:
            self.release()
            raise

    def have(self, number: int, place: int, may_grow: bool) -> None:
        """Have a block at a place of a pool where there is none: one that the row does not need any more, or another.

        Args:
            may_grow: rather another.
        """
        pool, own = self._pools[number], self.blocks[number]
        while len(own) <= place:
            own.append(GONE)
        for old in range(0 if may_grow else min(self.needed[number], place)):
            if own[old] == GONE:
                continue
            if not pool.is_shared(own[old]):
                own[old], own[place] = own[place], own[old]
                return
            self._forget(number, old)
        own += pool.take(1)  # what an interrupt leaves of it goes with the row
        own[place], own[-1] = own[-1], own[place]
        own.pop()

    def has_unneeded(self, number: int) -> bool:
        """Whether the row has a block of a pool that it does not need any more, and that nobody else has."""
        pool, own = self._pools[number], self.blocks[number]
        return any(not pool.is_shared(block) for block in held(own[: self.needed[number]]))

    def _forget(self, number: int, place: int) -> None:
        own = self.blocks[number]
        own.append(GONE)
        own[place], own[-1] = own[-1], own[place]
        self._pools[number].give_back([own.pop()])

    def forget(self) -> None:
        """Give back what no run of the row reads, but for what it was promised."""
        for number, own in enumerate(self.blocks):
            begin = self._shared[number]
            more = len(held(own[begin:])) - self._reserved[number]
            for place in range(self.needed[number]):
                if own[place] != GONE and (place < begin or more > 0):
                    more -= place >= begin
                    self._forget(number, place)

    def taken(self, number: int) -> tuple[set[int], int]:
        """What a pool has to have for the row, whatever it runs: blocks that others have as well, and how many of its
        own."""
        own, begin = self.blocks[number], self._shared[number]
        if self.back is None or not self._windows[number]:
            return set(held(own)), 0
        return set(held(own[self.needed[number] : begin])), self._reserved[number]

    def cut(self, count: int) -> None:
        """Give back all but the first so many of each pool."""
        for pool, own in zip(self._pools, self.blocks, strict=True):
            while len(own) > count:
                pool.give_back(held([own.pop()]))

    def release(self) -> None:
        """What an interrupt leaves of it goes with the row."""
        _give_back(self._pools, self.blocks)
