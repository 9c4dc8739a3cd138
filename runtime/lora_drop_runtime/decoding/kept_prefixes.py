"""Prompts of a batch that need not run again: the K/V of rows that run, and of rows that are over, which stay a while.

Enters: a row's first tokens, whenever it begins or is over. Leaves: how many tokens of a new row are in its caches
already. What is taken over is what full steps have written behind tokens of full steps (`Row.exact`): it depends on the
tokens alone, and not on the adapters, the k or the policy of the row that wrote it. No state is taken over: the last
token of each prompt runs in full, which sets it.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from lora_drop_runtime.engines.engine import Engine

from .paged_slots import Beginning, PagedSlots
from .row_blocks import RowBlocks
from .sampling import Ids
from .slots import Slots

Place = TypeVar("Place")


def common(one: Ids, other: Ids) -> int:
    """With how many tokens both begin."""
    most = min(len(one), len(other))
    differs = one[:most] != other[:most]
    return int(differs.argmax()) if differs.any() else most


@dataclass(eq=False)
class Kept(Generic[Place]):
    """What a row has left, mostly at its end: tokens [n], and the place of their K/V; whether it stays for others where
    one goes on behind all of it; and, beside blocks, where its recurrent states are."""

    tokens: Ids
    place: Place
    stays: bool = False
    states: int = 0


class Prefixes(ABC, Generic[Place]):
    """K/V of rows, by their tokens.

    Args:
        of_all: whether a row that runs has what belongs to each of its first tokens; else only of all of them.
    """

    def __init__(self, of_all: bool = True) -> None:
        self.of_all = of_all
        self._kept: list[Kept[Place]] = []  # the least recently used first

    def longest(self, tokens: Ids, running: Sequence[Ids]) -> tuple[int, int | Kept[Place] | None]:
        """How many of these tokens some row begins with, at most, and where: its slot if it runs.

        Args:
            running: `Row.exact` of the rows in the first slots.
        """
        found: list[tuple[Ids, int | Kept[Place]]] = [(row, slot) for slot, row in enumerate(running)]
        count, source = 0, None
        for there, place in found + [(one.tokens, one) for one in self._kept]:
            same = common(there, tokens)
            # Of those that have as many the one that was used last
            if same and same >= count and self._see_enough(place, same):
                count, source = same, place
        return count, source

    def parts(self, tokens: Ids, running: Sequence[Ids]) -> int:
        """With how many of these tokens some row begins, at most, whether or not another may go on behind them."""
        return max([common(one, tokens) for one in (*running, *(kept.tokens for kept in self._kept))], default=0)

    @abstractmethod
    def _see_enough(self, place: int | Kept[Place], count: int) -> bool:
        """Whether what `longest` has found has all that tokens behind so many of it see."""

    @abstractmethod
    def begin(self, slot: int, slots: Mapping[str, int], back: int | None, tokens: Ids, running: Sequence[Ids]) -> int:
        """Admit a row, and take over what there is of its prompt.

        Args:
            slot: behind those of the rows that run.
            slots, back: as of `PagedSlots.admit`.
            tokens: of its prompt that need not run.

        Returns:
            How many of them it has in its caches.
        """

    def keep(self, slot: int, tokens: Ids, rows: int) -> None:
        """Let the first entries of a row stay that is over.

        Args:
            rows: so many are in the first slots, this one among them.
        """
        count = len(tokens)
        if not count or not self._see_enough(slot, count):  # nobody could go on behind them
            return
        begin_so = [one for one in self._kept if common(one.tokens, tokens) == count]
        again = next((one for one in begin_so if self._see_enough(one, count)), None)
        if again is not None:
            self._used(again)
        else:
            for one in [one for one in self._kept if common(one.tokens, tokens) == len(one.tokens)]:
                if self._see_enough(slot, len(one.tokens)):
                    self._drop(one)
            self._store(slot, tokens, rows)

    @abstractmethod
    def leave(self, slot: int, tokens: Ids, rows: int) -> None:
        """Let a row that runs leave a copy of its entries, which are of these tokens, where there is a place for them.

        Args:
            rows: so many are in the first slots.
        """

    @abstractmethod
    def _store(self, slot: int, tokens: Ids, rows: int) -> None:
        """`keep` of what is not there yet."""

    def _used(self, one: Kept[Place]) -> None:
        self._kept = [*(other for other in self._kept if other is not one), one]

    def _drop(self, one: Kept[Place]) -> None:
        self._kept = [other for other in self._kept if other is not one]


class PagedPrefixes(Prefixes[RowBlocks]):
    """Blocks that rows share. Those that are full nobody writes to any more; the entries behind them are copied, and so
    are recurrent states, of which as many are kept as there are slots.

    Args:
        most: bytes that all blocks may take. Those that only rows that are over have go first, the end of the text that
            was used least recently before all others.
    """

    def __init__(self, slots: PagedSlots, most: int) -> None:
        super().__init__(of_all=not slots.have_recurrent_states)
        self._slots, self._most, self._aside = slots, most, slots.states_aside()
        shorten = weakref.WeakMethod(self._shorten_first)  # no cycle: the memory goes when a batch is closed
        slots.most_bytes, slots.shorten = most, lambda: (found := shorten()) is not None and found()

    def _blocks(self, source: int | Kept[RowBlocks] | None) -> Sequence[Sequence[int]]:
        """Those of what `longest` has found, of each pool."""
        if source is None:
            return [[] for _ in range(self._slots.pools)]
        return self._slots.blocks(source) if isinstance(source, int) else source.place.blocks

    def _see_enough(self, place: int | Kept[RowBlocks], count: int) -> bool:
        if isinstance(place, int):  # which has no row where an interrupt came as it moved
            return self._slots.goes_back(place, count, count)
        return self._aside.goes_back(place.states, count) and self._slots.see_enough(place.place.blocks, count, count)

    def have_room(self, new: Sequence[tuple[Mapping[str, int], int | None, Ids]], running: Sequence[Ids]) -> bool:
        """Whether rows may begin that need such slots and have such tokens, whatever has to go of rows that are over.

        Args:
            new: slots and back, as of `PagedSlots.admit`, and tokens.
        """
        beside: list[Beginning] = []
        for slots, back, tokens in new:
            found = self._taken_over(slots, back, tokens, running, beside)
            if found is None and (running or beside):
                return False
            count, source = found or (0, None)
            beside.append(Beginning(slots, back, self._blocks(source), count))
        return True

    def _taken_over(
        self,
        slots: Mapping[str, int],
        back: int | None,
        tokens: Ids,
        running: Sequence[Ids],
        beside: Sequence[Beginning],
    ) -> tuple[int, int | Kept[RowBlocks] | None] | None:
        """What a row begins with beside rows that begin before it: what `longest` finds, if need be without what is
        copied. None where there is no room: with what windows see of it a row may need more than it needs alone."""
        count, source = self.longest(tokens, running)
        for entries in (count, count - count % self._slots.block_slots)[: 1 + self.of_all]:
            new = Beginning(slots, back, self._blocks(source), entries)
            has_room = self._slots.bytes_with(len(running), [*beside, new]) <= self._most
            if has_room and self._slots.see_enough(new.blocks, entries, entries):
                return entries, source
        return None

    def begin(self, slot: int, slots: Mapping[str, int], back: int | None, tokens: Ids, running: Sequence[Ids]) -> int:
        self._slots.release_behind(slot)  # of an admission that was interrupted
        count, source = self._taken_over(slots, back, tokens, running, ()) or (0, None)
        if isinstance(source, Kept):
            self._used(source)
        full, rest = divmod(count, self._slots.block_slots)
        taken = self._slots.shared(self._blocks(source), count)
        try:
            new = self._slots.bytes_of(slots, back, full)
            while self._slots.bytes_in_use + new > self._most and self._shorten_first():
                pass
            if self._slots.bytes_in_use + new > self._most:
                self._slots.forget()
                taken.forget()
            self._slots.admit(slot, slots, back, taken.blocks, count)
            if rest:
                self._slots.copy_block(taken.blocks, slot, full)
            if isinstance(source, Kept):
                self._slots.recurrent.copy(self._aside, source.states, slot, count)
            elif source is not None:
                self._slots.recurrent.copy(self._slots.recurrent, source, slot, count)
        finally:
            taken.release()
        return count

    def _shorten_first(self) -> bool:
        """What was used least recently, if there is any."""
        if not self._kept:
            return False
        self._shorten(self._kept[0])
        return True

    def _shorten(self, one: Kept[RowBlocks]) -> None:
        """By a block."""
        count = (len(one.tokens) - 1) // self._slots.block_slots
        entries = count * self._slots.block_slots
        if count and self._see_enough(one, entries):
            one.tokens = one.tokens[:entries]
            one.place.cut(count)
        else:
            self._drop(one)

    def leave(self, slot: int, tokens: Ids, rows: int) -> None:
        if all(not np.array_equal(one.tokens, tokens) for one in self._kept):
            self._store(slot, tokens, rows)

    def _store(self, slot: int, tokens: Ids, rows: int) -> None:
        place = 0
        if not self.of_all:
            if len(self._kept) == self._slots.count:
                self._drop(self._kept[0])
            place = min({*range(self._slots.count)} - {one.states for one in self._kept})
            self._aside.copy(self._slots.recurrent, slot, place, len(tokens))
        blocks = self._slots.shared(self._slots.blocks(slot), len(tokens))
        self._kept = [*self._kept, Kept(tokens, blocks, states=place)]

    def _drop(self, one: Kept[RowBlocks]) -> None:
        super()._drop(one)
        one.place.release()


class SlotPrefixes(Prefixes[int]):
    """Entries in the slots behind those of the rows that run; a row takes over a copy of them, or the slot itself.

    Args:
        count: of all slots.
    """

    def __init__(self, slots: Slots, count: int) -> None:
        super().__init__(of_all=not slots.have_recurrent_states)
        self._slots, self._count = slots, count

    def _see_enough(self, place: int | Kept[int], count: int) -> bool:
        return self._slots.goes_back(place if isinstance(place, int) else place.place, count, count)

    def begin(self, slot: int, slots: Mapping[str, int], back: int | None, tokens: Ids, running: Sequence[Ids]) -> int:
        count, source = self.longest(tokens, running)
        place = source.place if isinstance(source, Kept) else slot if source is None else source
        there = next((one for one in self._kept if one.place == slot), None)
        if isinstance(source, Kept):
            self._used(source)
            if count == len(source.tokens) and not source.stays:  # the row has all of it
                self._drop(source)
                if there not in (None, source):
                    self._exchange(there, source)
                    return count
                there = None
        if there is not None:
            free = self._free([one for one in range(slot + 1, self._count) if one != place], there)
            if free is None:
                self._drop(there)
            else:
                self._slots.copy(self._slots, slot, free, len(there.tokens), len(there.tokens))
                there.place = free
        if not count:
            self._slots.admit(slot, slots, back)
        elif place != slot:
            self._slots.copy(self._slots, place, slot, count, count)
        return count

    def leave(self, slot: int, tokens: Ids, rows: int) -> None:
        again = next((one for one in self._kept if np.array_equal(one.tokens, tokens)), None)
        if again is not None:
            again.stays = True
            return
        place = self._free(range(rows, self._count), None)
        if place is not None:
            self._slots.copy(self._slots, slot, place, len(tokens), len(tokens))
            self._kept = [*self._kept, Kept(tokens, place, stays=True)]

    def _exchange(self, there: Kept[int], source: Kept[int]) -> None:
        """Let two change places, the second of which is a row's from now on. An interrupt loses both."""
        before = self._kept
        self._drop(there)
        self._slots.exchange(there.place, source.place, len(there.tokens), len(source.tokens))
        there.place = source.place
        self._kept = before

    def _free(self, places: Sequence[int], one: Kept[int] | None) -> int | None:
        """One of these places, for another entry or for `one`: a free one, or that of what was used least recently,
        which goes; None where that is `one`."""
        held = [other for other in self._kept if other is one or other.place in places]
        free = next((place for place in places if all(other.place != place for other in held)), None)
        if free is None and held and held[0] is not one:
            free = held[0].place
            self._drop(held[0])
        return free

    def _store(self, slot: int, tokens: Ids, rows: int) -> None:
        place: int | None = slot
        if slot < rows - 1:  # the last row moves there
            place = self._free(range(rows, self._count), None)
            if place is None:
                return
            self._slots.copy(self._slots, slot, place, len(tokens), len(tokens))
        assert place is not None
        self._kept = [*self._kept, Kept(tokens, place)]


def prefixes_for(
    engine: Engine, slots: Slots | PagedSlots, count: int, most: int
) -> PagedPrefixes | SlotPrefixes | None:
    """What keeps them, in an engine that can; one on a GPU does not.

    Args:
        count: of slots.
        most: bytes that the blocks of paged caches may take.
    """
    if isinstance(slots, PagedSlots):
        return PagedPrefixes(slots, most)
    on_host = engine.many_requests and not engine.runs_cycles
    return SlotPrefixes(slots, count) if on_host else None
