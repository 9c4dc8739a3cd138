"""The slots of some rows whose caches are paged: a table of blocks for each row and pool of layers.

Enters: for each row what it runs, and on which lengths. Leaves: logits. One call takes rows with any numbers of new
tokens; the others are not in it. Rows may have blocks in common: one that is about to be written is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import MOST_PENDING
from lora_drop_runtime.engines.engine import BindingEngine, Engine, Feed, PagedEngine
from lora_drop_runtime.plan.schedule import StepKind

from . import checks
from .paged_states import PagedStates
from .row_blocks import GONE, RowBlocks, first_seen, held, most_blocks
from .sampling import Ids
from .slots import Logits, Run, Slots, valid_kv_bytes

Table = tuple[int, int, list[int]]  # of a row in a call: valid entries, new ones, and the blocks that hold both
MOST_PADDED = 8  # tokens of a call that is brought to the width of others


def _within(table: Table, window: int, size: int) -> Table:
    """What is left of a row's table where blocks are left out that its new tokens do not see into.

    Args:
        window: of a token, in slots.
        size: of a block.
    """
    past, count, own = table
    first = first_seen(past, window, size)
    return past - first * size, count, own[first:]


class Beginning(NamedTuple):
    """What a row needs that is to begin, and what it begins with.

    Attributes:
        slots: that it needs, {"slots_kept": n, "slots_dropped": m}.
        back: how many entries before its end a run may begin; None where it forgets none.
        blocks: of each pool, of another row.
        entries: that it takes over of these.
    """

    slots: Mapping[str, int]
    back: int | None
    blocks: Sequence[Sequence[int]]
    entries: int


class PagedSlots:
    """`Slots` over paged caches. Rows are admitted before they run.

    Args:
        count: the most rows.
        several: whether runs of several tokens of a row come between those of one.
        chunk: the most tokens of a row in one run.

    Attributes:
        most_bytes: below which rows rather take new blocks than lay what they write into those that they do not need
            any more, which others may begin with.
        recurrent: the rows' recurrent states.
        shorten: gives up a block of what rows that are over have left; whether there was any.
    """

    def __init__(self, bundle: Bundle, engine: PagedEngine, count: int, several: bool, chunk: int) -> None:
        self._bundle, self._engine, self.count, self._several = bundle, engine, count, several
        self._chunk, self.most_bytes = chunk, 0
        self.shorten: Callable[[], bool] = lambda: False
        self._plan = bundle.manifest.plan
        assert engine.block_slots is not None
        self._size = engine.block_slots
        self._fills = self._plan.refresh_policy.fills
        self._steps = engine.steps(several)
        self._rows: list[RowBlocks | None] = [None] * count
        self._states = np.zeros(engine.states_shape(count), np.float32)
        self.recurrent = PagedStates(bundle.manifest, count, self._steps.output)
        self._steps.hold(self.recurrent.arrays)
        model, layers = bundle.manifest.model, (self._plan.kept_attentions, self._plan.dropped_attentions)
        self._forgetful = [  # pools, whether of dropped layers, and bytes of the entries of a block
            (number, group, self._size * model.token_kv_bytes([i for i in layers[group] if model.windows[i] == window]))
            for number, (group, window) in enumerate(engine.table_groups)
            if window
        ]
        self._vocabulary = bundle.manifest.model.vocab_size
        # Of a call, where another number of tokens than before would cost more than tokens that nobody reads
        self._pads = engine.pads_tokens and not self._plan.has_state
        self._width = 0  # of calls so far
        self._spare: RowBlocks | None = None  # what such tokens write
        self._latest: tuple[list[int], list[int], int] | None = None  # due rows, what each wanted, rows that are there
        self._updates = False  # whether the latest run is a LoRA step that has updated states
        self._copied: Logits | None = None

    @property
    def have_recurrent_states(self) -> bool:
        """As of `Slots`."""
        return bool(self.recurrent)

    @property
    def most_lora_steps(self) -> int | None:
        """As of `Slots`."""
        return MOST_PENDING if self.recurrent else None

    def states_aside(self) -> PagedStates:
        """Places for recurrent states of as many rows, which no call reads."""
        return PagedStates(self._bundle.manifest, self.count, self._steps.output)

    # ── whose blocks ───────────────────────────────────────────────────────────────────────────────────────────

    def _counts(self, slots: Mapping[str, int], back: int | None, begun: int = 0) -> list[int]:
        """How many blocks of each pool a row needs of its own that has {"slots_kept": n, "slots_dropped": m}.

        Args:
            back: how many entries before its end a run may begin; None where it forgets none.
            begun: blocks that it begins with.
        """
        counts = []
        for group, window in self._engine.table_groups:
            count = max(0, -(-slots[("slots_kept", "slots_dropped")[group]] // self._size) - begun)
            if window and back is not None:  # and no more than any run sees and writes
                count = min(count, most_blocks(window, back, self._chunk, self._size))
            counts.append(count)
        return counts

    def bytes_of(self, slots: Mapping[str, int], back: int | None, begun: int = 0) -> int:
        """What a row's own blocks take once they are all written; arguments as of `_counts`."""
        counts = self._counts(slots, back, begun)
        return sum(count * pool.block_bytes for pool, count in zip(self._engine.pools, counts, strict=True))

    def admit(
        self,
        slot: int,
        slots: Mapping[str, int],
        back: int | None,
        blocks: Sequence[Sequence[int]] = (),
        entries: int = 0,
    ) -> None:
        """Reserve what a row will need, {"slots_kept": n, "slots_dropped": m}: it never fails later.

        Args:
            back: how many entries before its end a run may begin; None where it forgets none.
            blocks: of each pool those that have the entries it begins with: the full ones are its own as well, and
                nobody writes there any more.
            entries: so many.
        """
        self.release(slot)
        begun = entries // self._size
        counts, shared = self._counts(slots, back, begun), [own[:begun] for own in blocks] or None
        self.recurrent.begin(slot)
        self._rows[slot] = row = RowBlocks(self._engine, counts, shared, back)
        if back is not None:
            row.needed = self._first_seen(entries, entries)

    def release(self, slot: int) -> None:
        """A row is over."""
        row, self._rows[slot] = self._rows[slot], None
        if row is not None:
            row.release()

    def release_behind(self, rows: int) -> None:
        """None but the first rows have anything."""
        for slot in range(rows, self.count):
            self.release(slot)

    def wipe(self, slot: int) -> None:
        """Nothing reads entries of a row that is over."""

    def move(self, source: int, target: int, kept: int, dropped: int) -> None:
        """A row takes another slot, whose row is over; nothing where it has done so already, before an interrupt."""
        if self._rows[source] is not None:
            self.release(target)
            self._states[:, target] = self._states[:, source]
            self.recurrent.copy(self.recurrent, source, target, kept)
            self._rows[target], self._rows[source] = self._rows[source], None

    def copy(self, other: PagedSlots, source: int, target: int, kept: int, dropped: int) -> None:
        """Begin an admitted row with valid entries of another one, whose blocks it shares, and with its state."""
        theirs, ours = other._rows[source], self._rows[target]
        assert theirs is not None
        assert ours is not None
        for pool, (group, _), there, here in zip(
            self._engine.pools, self._engine.table_groups, theirs.blocks, ours.blocks, strict=True
        ):
            shared = -(-(kept, dropped)[group] // self._size)
            pool.share(held(there[:shared]))
            before, here[:shared] = here[:shared], there[:shared]
            pool.give_back(held(before))
        self._states[:, target] = other._states[:, source]
        self.recurrent.copy(other.recurrent, source, target, kept)

    def fork(
        self, engine: PagedEngine, slots: Mapping[str, int], kept: Sequence[int], dropped: Sequence[int]
    ) -> PagedSlots:
        """As `Slots.fork`; blocks are shared until a row writes to them."""
        new = PagedSlots(self._bundle, engine, self.count, self._several, self._chunk)
        for row, valid in enumerate(zip(kept, dropped, strict=True)):
            new.admit(row, slots, self._row(row).back)
            new.copy(self, row, row, *valid)
        new._copied = np.array(self.logits())
        return new

    # ── what is taken over from rows ───────────────────────────────────────────────────────────────────────────

    @property
    def block_slots(self) -> int:
        """Entries of a block."""
        return self._size

    @property
    def pools(self) -> int:
        """How many there are."""
        return len(self._engine.pools)

    @property
    def bytes_in_use(self) -> int:
        """Of all blocks that rows have or have left; not those of padding, which no bound of rows counts."""
        padding = self._spare is not None
        return sum((pool.in_use - padding) * pool.block_bytes for pool in self._engine.pools)

    def _row(self, slot: int) -> RowBlocks:
        row = self._rows[slot]
        assert row is not None
        return row

    def blocks(self, slot: int) -> list[list[int]]:
        """A row's blocks of each pool."""
        return self._row(slot).blocks

    def _first_seen(self, kept: int, dropped: int) -> list[int]:
        """Of each pool the place of the first block that a token behind so many entries sees into."""
        return [first_seen((kept, dropped)[group], window, self._size) for group, window in self._engine.table_groups]

    def see_enough(self, blocks: Sequence[Sequence[int]], kept: int, dropped: int) -> bool:
        """Whether a row's blocks of each pool are all there that tokens behind so many entries see into."""
        for own, first, (group, _) in zip(
            blocks, self._first_seen(kept, dropped), self._engine.table_groups, strict=True
        ):
            if GONE in own[first : -(-(kept, dropped)[group] // self._size)]:
                return False
        return True

    def goes_back(self, slot: int, kept: int, dropped: int) -> bool:
        """Whether there is a row that may go on behind so many of its entries."""
        row = self._rows[slot]
        seen = row is not None and self.see_enough(row.blocks, kept, dropped)
        return seen and self.recurrent.goes_back(slot, kept)

    def goes_on(self, slot: int, kept: int) -> None:
        """A row goes on behind so many entries: what lies behind them is written over."""
        self.recurrent.goes_on(slot, kept)

    def shared(self, blocks: Sequence[Sequence[int]], entries: int) -> RowBlocks:
        """The same blocks, as far as they hold so many entries, for another one who has them."""
        found = RowBlocks(self._engine, [0] * len(blocks), [own[: -(-entries // self._size)] for own in blocks])
        found.needed = self._first_seen(entries, entries)
        return found

    def forget(self) -> None:
        """All rows give back what they do not need any more."""
        for row in self._rows:
            if row is not None:
                row.forget()

    def bytes_with(self, rows: int, new: Sequence[Beginning]) -> int:
        """What so many rows need with some more. What the last of these has to copy is there, too."""
        counts = [self._counts(one.slots, one.back, one.entries // self._size) for one in new]
        total = 0
        for number, pool in enumerate(self._engine.pools):
            taken = [row.taken(number) for row in self._rows[:rows] if row is not None]
            there = set().union(*(blocks for blocks, _ in taken))
            for at, (_, back, shared, entries) in enumerate(new, 1):
                first = 0 if back is None else self._first_seen(entries, entries)[number]
                end = -(-entries // self._size) if at == len(new) else entries // self._size
                there.update(held(shared[number][first:end]))
            own = sum(count for _, count in taken) + sum(count[number] for count in counts)
            total += (len(there) + own) * pool.block_bytes
        return total

    def copy_block(self, source: Sequence[Sequence[int]], slot: int, place: int) -> None:
        """Copy what is in a row's block of each pool, by its place among others, to a row's own."""
        for pool, there, here in zip(self._engine.pools, source, self.blocks(slot), strict=True):
            pool.copy(there[place], here[place])

    def _has_room(self, number: int, row: RowBlocks) -> bool:
        """Whether a row may take one more block of a pool. Below a bound others give up what they do not need, where
        the row has none to write into that nobody else has."""
        block = self._engine.pools[number].block_bytes
        while self.bytes_in_use + block > self.most_bytes:
            if not self.most_bytes or row.has_unneeded(number):
                return False
            if not self.shorten():
                self.forget()
                return False
        return True

    def _own(self, number: int, row: RowBlocks, begin: int, end: int) -> list[int]:
        """A row's blocks of the first `end` slots of a pool, at least one; those from `begin` on are about to be
        written, and are copied where other rows have them as well."""
        pool, own, (_, window) = self._engine.pools[number], row.blocks[number], self._engine.table_groups[number]
        if end > begin:
            if window and row.back is not None:  # a row that has been cut back needs more than before
                least = max(row.needed[number], first_seen(begin - row.back, window, self._size))
                row.needed[number] = min(least, first_seen(begin, window, self._size))
            for place in range(begin // self._size, -(-end // self._size)):
                if place >= len(own) or own[place] == GONE:
                    row.have(number, place, self._has_room(number, row))
                if pool.is_shared(own[place]):
                    own += pool.take(1)  # what an interrupt leaves of it goes with the row
                    pool.copy(own[place], own[-1])
                    own[place], own[-1] = own[-1], own[place]
                    pool.give_back([own.pop()])
            pool.will_write(own[begin // self._size : -(-end // self._size)])
        return own[: max(1, -(-end // self._size))]

    # ── sizes ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def nbytes(self) -> int:
        """Of the rows' blocks, those that nobody has written among them, and of states."""
        return self._allocated() + self._states.nbytes

    def _allocated(self) -> int:
        found = self.recurrent.nbytes
        for number, pool in enumerate(self._engine.pools):
            blocks = {block for row in self._rows if row is not None for block in held(row.blocks[number])}
            found += len(blocks) * pool.block_bytes
        return found

    def kv_bytes(self, kept: int, dropped: int) -> dict[str, int]:
        """Bytes of so many valid entries in kept and in dropped layers, but for those that are forgotten, and of the
        blocks that the rows have."""
        found = valid_kv_bytes(self._bundle.manifest, kept, dropped)
        for number, group, entries_bytes in self._forgetful:
            gone = sum(row.blocks[number].count(GONE) for row in self._rows if row is not None)
            found[("kept", "dropped")[group]] -= gone * entries_bytes
        return found | {"allocated": self._allocated()}

    # ── runs ───────────────────────────────────────────────────────────────────────────────────────────────────

    def run(
        self, kind: StepKind, runs: Sequence[Run], due: Collection[int], *, once: bool = False, held: bool = False
    ) -> None:
        """Run what some rows want. An interrupt leaves every row's valid entries as they are.

        Args:
            kind: of all runs that are due.
            runs: of the rows in the first slots.
            due: which of them run, by slot; at least one.
            once, held: as of `Slots`.
        """
        order = sorted(due)
        if self.recurrent:
            self.recurrent.ready(kind, runs, due)
        chosen, rows = [runs[slot] for slot in order], [self._rows[slot] for slot in order]
        writes_dropped = kind is StepKind.REFRESH or self._fills
        # Nobody reads what dropped attentions make of a LoRA step's zeros: they see the block that is written alone
        written_alone = self._fills and kind is StepKind.LORA
        tables: list[list[Table]] = [[] for _ in self._engine.pools]
        for run, row in zip(chosen, rows, strict=True):
            assert row is not None
            for number, (group, window) in enumerate(self._engine.table_groups):
                past = (run.kept, run.dropped)[group]
                count = len(run.tokens) if writes_dropped or not group else 0
                own = self._own(number, row, past, past + count)
                if group and written_alone:
                    own, past = own[past // self._size :], past % self._size
                tables[number].append(_within((past, count, own), window, self._size))
        tokens = sum(len(run.tokens) for run in chosen)
        wanted = [run.wanted for run in chosen]
        padding = 0 if once else self._padding(tokens)
        if padding:
            chosen = [*chosen, Run(StepKind.REFRESH, [0] * padding, 0, 0)]
            for table, (group, _), own in zip(tables, self._engine.table_groups, self._spare_blocks(), strict=True):
                table.append((0, padding if writes_dropped or not group else 0, own))
        sizes = tuple(sum(len(own) for _, _, own in group) for group in tables)
        recurrence = self.recurrent.sizes(order, chosen)
        feed = self._steps.feed(kind, tokens + padding, sum(wanted), (len(order), len(chosen)), sizes, recurrence)
        self._fill(feed, chosen, len(order), tables)
        will_have_run = self.recurrent.fill(feed.recurrence, kind, order, chosen)
        if self._plan.has_state:
            feed.states[...] = self._states[:, order]
        self.recurrent.give(self._steps, kind, order)
        self._copied = None
        self._latest = order, wanted, len(runs)
        self._steps.run()
        self.recurrent.ran(will_have_run)
        self._updates = kind is StepKind.LORA and bool(self._plan.updated_states)
        if self._plan.has_state and kind is StepKind.REFRESH:
            self._states[:, order] = self._steps.states()
        if not held:
            self.accept()

    def accept(self) -> None:
        """As of `Slots`."""
        if self._updates:
            assert self._latest is not None
            self._states[:, self._latest[0]] = self._steps.states()

    def _padding(self, tokens: int) -> int:
        """How many tokens that nobody reads are added, so that small calls have one width."""
        if not self._pads or tokens > MOST_PADDED:
            return 0
        self._width = max(self._width, tokens)
        return self._width - tokens

    def _spare_blocks(self) -> list[list[int]]:
        """A block of each pool, which only padding writes."""
        if self._spare is None:
            self._spare = RowBlocks(self._engine, [1] * len(self._engine.pools))
        return self._spare.blocks

    def _fill(self, feed: Feed, runs: Sequence[Run], rows: int, tables: Sequence[Sequence[Table]]) -> None:
        """Write what a call reads. Single values of small calls are written by plain Python.

        Args:
            rows: of the runs, those whose logits are wanted.
        """
        place = wanted = 0
        ids, positions = feed.ids[0], feed.positions[0]
        for number, run in enumerate(runs):
            count = len(run.tokens)
            if count == 1:
                ids[place], positions[place] = run.tokens[0], run.kept
            else:
                ids[place : place + count] = run.tokens
                positions[place : place + count] = np.arange(run.kept, run.kept + count)
            if number == rows:
                break
            if run.each:
                feed.index[wanted : wanted + count] = np.arange(place, place + count)
            else:
                feed.index[wanted] = place + count - 1
            wanted += run.wanted
            place += count
            feed.last[number] = place - 1
        for (lengths, begins, numbers, block_begins, longest), group in zip(feed.tables, tables, strict=True):
            at = used = most = 0
            for number, (past, count, own) in enumerate(group):
                lengths[number] = past
                at += count
                begins[number + 1] = at
                numbers[used : used + len(own)] = own
                used += len(own)
                block_begins[number + 1] = used
                most = max(most, past + count)
            longest[...] = most

    def logits(self) -> Logits:
        """float32 [b, R, V] of the latest run, valid until the next: of rows that ran the first of R that they want.

        Raises:
            BundleError: the run has left fewer, as OpenVINO's does now and then that finds no memory.
        """
        if self._copied is not None:
            return self._copied
        assert self._latest is not None
        due, wanted, there = self._latest
        found, most = self._steps.logits(), max(wanted)
        if len(found) < sum(wanted):
            raise checks.too_few_logits(len(found), sum(wanted))
        if len(due) == there and min(wanted) == most:
            # Where the last layer is dropped a LoRA step gives logits of padding, too
            return found[: there * most].reshape(there, most, self._vocabulary)
        whole = np.zeros((there, most, self._vocabulary), np.float32)
        begin = 0
        for slot, count in zip(due, wanted, strict=True):
            whole[slot, :count] = found[begin : begin + count]
            begin += count
        self._copied = whole
        return whole

    def chosen(self) -> Ids:
        """The engine chooses none."""
        raise AssertionError("the engine chooses no tokens")


def prepare_for_several(engine: Engine) -> None:
    """Many runs of several tokens of a row will come between those of one: who has a long time to run may take a while
    to begin."""
    if engine.block_slots is not None:
        cast("PagedEngine", engine).prepare_for_several()


def slots_for(
    bundle: Bundle, engine: Engine, count: int, slots: Mapping[str, int], several: bool, chunk: int
) -> Slots | PagedSlots:
    """Memory for so many rows, as the engine has it.

    Args:
        slots: the most of a row, {"slots_kept": n, "slots_dropped": m}.
        several, chunk: as of `PagedSlots`.
    """
    if engine.block_slots is None:
        return Slots(bundle, cast("BindingEngine", engine), count, slots)
    return PagedSlots(bundle, cast("PagedEngine", engine), count, several, chunk)
