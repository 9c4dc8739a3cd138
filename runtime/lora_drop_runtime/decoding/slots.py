"""The slots of some rows: caches and states, and runs of some rows in which the others stand still.

Enters: for each row what it runs, and on which lengths. Leaves: logits. Knows no token's choice and no schedule. The
rows that are there lie in the first slots, so that a run takes one slice of every buffer.

An engine in which rows stand still (`Engine.idle_rows`) takes any rows in one call. In another one a row that is not
due writes behind its valid entries, which its own next run overwrites, or the rows that are due run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import MOST_PENDING
from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.engines.engine import (
    Array,
    BindingEngine,
    Buffer,
    Cycle,
    CycleEngine,
    CycleRows,
    CycleStep,
    DeviceBuffer,
    Step,
)
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import StepKind

from . import checks
from .buffers import RowBuffers
from .sampling import Ids

Logits = npt.NDArray[np.float32]
_PREPARED = 64  # steps of different sizes that stay bound


class Run(NamedTuple):
    """What a row wants to run.

    Attributes:
        tokens: of the row; a LoRA step runs one. None of a row that is over: its entries stay if they can.
        kept, dropped: the slots that are valid before it.
        each: whether logits after each token are wanted, else after the last.
    """

    kind: StepKind
    tokens: Sequence[int]
    kept: int
    dropped: int
    each: bool = False

    @property
    def wanted(self) -> int:
        return len(self.tokens) if self.each else 1

    def behind(self, count: int) -> Run:
        """What is left of it after so many of its tokens."""
        return self._replace(tokens=self.tokens[count:], kept=self.kept + count, dropped=self.dropped + count)


@dataclass(frozen=True)
class _Prepared:
    """A step over ids [b, S] with logits at some places [b, R]; both also as views, which plain Python writes to."""

    ids: Ids
    id_view: memoryview
    index_view: memoryview
    step: Step


def valid_kv_bytes(manifest: Manifest, kept: int, dropped: int) -> dict[str, int]:
    """Bytes of so many entries in `kept` and in `dropped` layers."""
    plan, model = manifest.plan, manifest.model
    return {
        "kept": kept * model.token_kv_bytes(plan.kept_attentions),
        "dropped": dropped * model.token_kv_bytes(plan.dropped_attentions),
    }


class _RecurrentStates:
    """Which tokens are in the recurrent states of rows, where layers have any; else nothing.

    A refresh reads one side of states and entries and writes the other, of all rows: those that stand still are copied
    there. So the side that it has read is as it was, until the next one. A row that goes on behind fewer tokens than
    have run goes back to it: the run was interrupted before it was counted, or has verified drafts and not accepted
    all. Not so where a later call of the same run has written that side. What an interrupt must not come between is
    assigned in one statement.

    Attributes:
        tokens: of each slot, those that are in its states.
        side: of the buffers, which the next run reads.
    """

    def __init__(self, buffers: RowBuffers, count: int) -> None:
        self._held, form = buffers, buffers.bundle.manifest.model.recurrence
        self._recent = 0 if form is None else form.recent
        self.tokens, self.side = [0] * count, 0
        self._sides = [0] * count  # where the states of each slot are, those of no row as well
        self._ran: set[int] = set()  # slots whose tokens calls of the latest refresh have run
        # Of slots whose other side is as before the latest run: the tokens in its states, and how many that run has
        # found, and left, in the row
        self._before: dict[int, tuple[int, int, int]] = {}

    @property
    def buffers(self) -> list[Buffer]:
        return [one for held in self._held.recurrences for one in held.values()]

    def goes_back(self, slot: int, kept: int) -> bool:
        """Whether a row may go on behind so many tokens: its states are of no later one."""
        return kept >= self.tokens[slot]

    def ready(self, kind: StepKind, runs: Sequence[Run], due: Collection[int]) -> None:
        """Before a run. Raises InputError where too many LoRA steps follow each other."""
        for slot, run in enumerate(runs):
            self.goes_on(slot, run.kept)
        if kind is StepKind.LORA:
            checks.check_lora_steps(max(runs[slot].kept - self.tokens[slot] for slot in due) + 1, MOST_PENDING)
        if 2 * self._sides[: len(runs)].count(self.side) < len(runs):  # most of them went back
            self.side, self._before = 1 - self.side, {}
        if kind is StepKind.REFRESH:
            self._before, self._ran = {}, set()  # until it has run
        for slot in range(len(runs)):
            if self._sides[slot] != self.side:
                self._copy(self._held.recurrences[self._sides[slot]], slot, self._held.recurrences[self.side], slot)
                self._sides[slot] = self.side

    def ran(self, rows: int, runs: Mapping[int, Run]) -> None:
        """A refresh of the rows in the first slots has run the tokens of some, and those that were not in their
        states."""
        before, tokens, side = {}, self.tokens.copy(), 1 - self.side
        for slot, run in runs.items():
            tokens[slot] = run.kept + len(run.tokens)
            if slot not in self._ran:
                before[slot] = self.tokens[slot], run.kept, tokens[slot]
        sides, ran = [side] * rows + self._sides[rows:], self._ran.union(runs)
        self.tokens, self._sides, self.side, self._before, self._ran = tokens, sides, side, before, ran

    def goes_on(self, slot: int, kept: int) -> None:
        """A row goes on behind so many tokens. Where these are not all of the latest run it does so with the states of
        the other side, and what entries of that run count join there the ones that are in no state yet.

        Raises:
            InputError: what that needs is not there any more.
        """
        if kept >= self.tokens[slot]:
            return
        before = self._before.get(slot)
        if before is None:
            raise checks.states_are_torn()
        in_states, begun, end = before
        places = [place % self._recent for place in range(begun, kept)]
        if places and (end - begun > self._recent or kept - in_states > MOST_PENDING):
            raise checks.states_are_torn()
        here = self._sides[slot]
        for name, target in self._held.recurrences[1 - here].items() if places else ():
            if name.startswith("past_recent."):
                source = self._held.recurrences[here][name]
                assert isinstance(source, np.ndarray)
                assert isinstance(target, np.ndarray)
                target[slot, places] = source[slot, places]
        tokens, sides, others = self.tokens.copy(), self._sides.copy(), self._before.copy()
        tokens[slot], sides[slot] = in_states, 1 - here
        del others[slot]
        self.tokens, self._sides, self._before = tokens, sides, others

    def begin(self, slot: int) -> None:
        """A row begins, with states and entries of no token: zeros."""
        self._before.pop(slot, None)
        self.tokens[slot], self._sides[slot] = 0, self.side
        for buffer in self._held.recurrences[self.side].values():
            self._held.engine.zero(buffer[slot : slot + 1])

    def copy(self, other: _RecurrentStates, source: int, target: int, kept: int) -> None:
        """Take the states of a row of so many tokens, and the entries of its last ones, from a slot of these or of
        other ones."""
        other.goes_on(source, kept)
        self._before.pop(target, None)
        self._copy(other._held.recurrences[other._sides[source]], source, self._held.recurrences[self.side], target)
        self.tokens[target], self._sides[target] = other.tokens[source], self.side

    def _copy(self, before: Mapping[str, Buffer], source: int, after: Mapping[str, Buffer], target: int) -> None:
        for name, buffer in after.items():
            self._held.engine.copy(before[name][source : source + 1], buffer[target : target + 1], None)

    def exchange(self, one: int, other: int) -> None:
        """Let two slots exchange theirs, in the host's memory."""
        for slot in (one, other):
            self._before.pop(slot, None)
        for held in self._held.recurrences:
            for buffer in held.values():
                assert isinstance(buffer, np.ndarray)
                buffer[[one, other]] = buffer[[other, one]]
        for said in (self.tokens, self._sides):
            said[one], said[other] = said[other], said[one]


class Slots:
    """Memory for `count` rows, allocated once.

    Args:
        slots: {"slots_kept": n, "slots_dropped": m}, of each row.
    """

    def __init__(self, bundle: Bundle, engine: BindingEngine, count: int, slots: Mapping[str, int]) -> None:
        self._engine, self._count = engine, count
        self._plan = bundle.manifest.plan
        if bundle.manifest.model.recurrent_layers:  # so that drafts are verified in one call beside any other row
            slots = {name: most + MOST_PENDING + 1 for name, most in slots.items()}
        self.buffers = RowBuffers.allocate(bundle, engine, count, slots)
        outputs = bundle.manifest.io(StepKind.REFRESH, engine.target).outputs
        self._spec = next(spec for spec in outputs if spec.name == "logits")
        self._state_specs = [spec for spec in outputs if spec.name.startswith("present_state.")]
        self._aside: dict[str, Buffer] = {}  # states of rows that stand still in an engine where none does
        self._dropped = set(self._plan.dropped_attentions)
        self._most_kept, self._most_dropped = self._capacities()
        names = ("len_kept", "len_dropped", "len_state")
        self._lengths = {name: engine.allocate(name, (count,), "int64") for name in names}
        self._kept_now, self._dropped_now, self._state_now = (lengths.data for lengths in self._lengths.values())
        self._states, self._recurs = _RecurrentStates(self.buffers, count), bool(self.buffers.recurrences[0])
        self._most_verified = engine.verified_tokens or self._most_kept
        self._idle = -1 if engine.idle_rows else 0  # the place of a row that stands still
        self._side = self._written_side = 0  # of the states: what the next run reads, and what the latest one wrote
        self._outputs: dict[int, tuple[Buffer, Ids]] = {}  # of all slots, by how many a row wants; read before the next
        self._several: Array | None = None  # the host's memory of those of more than one, which take turns in it
        self._prepared: dict[tuple[StepKind, int, int, int, int, int, int], _Prepared] = {}
        self._wanted = 1  # of the latest run
        self._keeps = True  # what is prepared now
        self._parts: Logits | None = None  # of the latest run, where it took several calls
        self._output(1)  # every request wants them, and nothing else is in their way once it has begun

    @property
    def have_recurrent_states(self) -> bool:
        """Whether layers have a state of all of a row's tokens, and not of each of its first ones."""
        return self._recurs

    @property
    def most_lora_steps(self) -> int | None:
        """How many follow each other at most; None for no limit."""
        return MOST_PENDING if self._recurs else None

    @property
    def nbytes(self) -> int:
        """Of caches and states."""
        held = {id(one): one for states in self.buffers.states for one in states.values()}
        return sum(one.nbytes for one in (*self.buffers.caches.values(), *held.values(), *self._states.buffers))

    def kv_bytes(self, kept: int, dropped: int) -> dict[str, int]:
        """Bytes of so many valid entries in kept and in dropped layers, and of all K/V buffers and recurrent states."""
        allocated = sum(buffer.nbytes for buffer in (*self.buffers.caches.values(), *self._states.buffers))
        return valid_kv_bytes(self.buffers.bundle.manifest, kept, dropped) | {"allocated": allocated}

    def bytes_of(self, slots: Mapping[str, int], back: int | None) -> int:
        """What a row needs beside what is allocated: nothing."""
        return 0

    def goes_back(self, slot: int, kept: int, dropped: int) -> bool:
        """Whether a row may go on behind so many of its entries."""
        return self._states.goes_back(slot, kept)

    def goes_on(self, slot: int, kept: int) -> None:
        """A row goes on behind so many tokens, which may be fewer than the latest run has run of it."""
        self._states.goes_on(slot, kept)

    def admit(self, slot: int, slots: Mapping[str, int], back: int | None) -> None:
        """A row begins; its memory is there."""
        self._states.begin(slot)

    def release(self, slot: int) -> None:
        """A row is over."""

    def run(
        self, kind: StepKind, runs: Sequence[Run], due: Collection[int], *, once: bool = False, held: bool = False
    ) -> None:
        """Run what some rows want; the others stand still. An interrupt leaves every row's valid entries as they are.

        Args:
            kind: of all runs that are due.
            runs: of the rows in the first slots.
            due: which of them run, by slot; at least one.
            once: a run of this size hardly comes again, as one of a prompt: nothing is kept for it, and an engine that
                captures steps does not capture it.
            held: states count as they were until `accept`: the same may run again.
        """
        self._keeps = not once
        width = 1 if kind is StepKind.LORA else max([len(runs[slot].tokens) for slot in due])
        self._wanted = 1 if width == 1 else max([runs[slot].wanted for slot in due])
        self._parts = None
        if self._recurs:
            self._states.ready(kind, runs, due)
        double = self.buffers.are_double
        if double:
            self._choose_side(kind, runs)
        stand = self._engine.idle_rows or len(runs) == 1
        beside = [] if stand else [slot for slot, run in enumerate(runs) if run.tokens and slot not in due]
        room = self._room(kind, [runs[slot] for slot in (*beside, *due)])
        if not stand and not self._engine.batched_chunks and self._runs_one_by_one(kind, runs, due, width, room):
            for slot in due:
                self._call(kind, runs, (slot,), slot, slot + 1, len(runs[slot].tokens))
        elif width <= room:
            self._call_beside(kind, runs, due, width, self._about_to_read(runs, beside))
        else:
            self._run_in_parts(kind, runs, due, beside)
        self._written_side = 1 - self._side if double and kind is StepKind.LORA else self._side
        if not held:
            self._side = self._written_side

    def accept(self) -> None:
        """The rows go on behind the latest run, from the states that it has left; may be said again before the next."""
        self._side = self._written_side

    def logits(self) -> Logits:
        """float32 [b, R, V] of the latest run, valid until the next: of rows that ran the first of R that they want."""
        if self._wanted not in self._outputs:  # an interrupt has ended a run before its first call
            self._output(self._wanted)
        return self._engine.read(self._outputs[self._wanted][0]) if self._parts is None else self._parts

    def chosen(self) -> Ids:
        """int64 [b]: what the engine chose in the latest run, where it chooses and one token a row was wanted."""
        if self._parts is None:
            return self._outputs[1][1][:, 0]
        logits = self._parts[:, 0]  # a later call has chosen in rows that had run before it
        return np.where(np.isfinite(logits.max(axis=1)), logits.argmax(axis=1), -1)

    def wipe(self, slot: int) -> None:
        """Forget what a row has left that had logits which are no numbers. Attention of some engines multiplies slots
        behind a row's length by 0, and 0 · NaN is NaN: whoever came after it would have none either."""
        for held in (self.buffers.caches, *self.buffers.states, *self.buffers.recurrences):
            for buffer in held.values():
                self._engine.zero(buffer[slot : slot + 1])

    def move(self, source: int, target: int, kept: int, dropped: int) -> None:
        """Copy a row's valid entries and its state to another slot."""
        self.copy(self, source, target, kept, dropped)

    def copy(self, other: Slots, source: int, target: int, kept: int, dropped: int) -> None:
        """Copy a row's valid entries, and its state, from other slots of the same bundle and engine."""
        for name, cache in self.buffers.caches.items():
            valid = dropped if int(name.rpartition(".")[2]) in self._dropped else kept
            self._engine.copy(other.buffers.caches[name][source : source + 1], cache[target : target + 1], valid)
        for name, state in self.buffers.states[self._side].items():
            before = other.buffers.states[other._side][name]
            self._engine.copy(before[source : source + 1], state[target : target + 1], None)
        self._states.copy(other._states, source, target, kept)

    def exchange(self, one: int, other: int, ones: int, others: int) -> None:
        """Let two slots of no row exchange so many entries of all layers, in the host's memory. An interrupt leaves
        them between."""
        for cache in self.buffers.caches.values():
            assert isinstance(cache, np.ndarray)
            aside = cache[one, :, :ones].copy()
            cache[one, :, :others] = cache[other, :, :others]
            cache[other, :, :ones] = aside
        self._states.exchange(one, other)

    def has_memory_of(self, other: Slots) -> bool:
        """Whether the caches lie where those of other slots lie, row for row."""
        pairs = [(cache, other.buffers.caches[name]) for name, cache in self.buffers.caches.items()]
        return all(a is b or (isinstance(a, DeviceBuffer) and a == b) for a, b in pairs)

    def fork(
        self, engine: BindingEngine, slots: Mapping[str, int], kept: Sequence[int], dropped: Sequence[int]
    ) -> Slots:
        """Slots of one's own with the same rows, which have so many valid entries; and with the latest logits.

        Args:
            engine: this one's, or one beside it.
        """
        new = Slots(self.buffers.bundle, engine, self._count, slots)
        new._side, new._wanted = self._side, self._wanted
        for row, valid in enumerate(zip(kept, dropped, strict=True)):
            new.copy(self, row, row, *valid)
        new._parts = np.array(self.logits())
        return new

    def _choose_side(self, kind: StepKind, runs: Sequence[Run]) -> None:
        """A refresh writes the first side, but beside a row whose next LoRA step reads the other one."""
        if kind is StepKind.REFRESH and not any(run.kind is StepKind.LORA for run in runs if run.tokens):
            self._side = 0

    # ── a whole cycle on the device ────────────────────────────────────────────────────────────────────────────

    def cycle(self, k: int, policy: Policy, count: int) -> tuple[CycleRows, Cycle]:
        """`k` LoRA steps of the rows in the first `count` slots and their refresh, in an engine that runs them without
        the host. They begin behind a refresh.

        Returns:
            What the rows begin with, to be filled, and the cycle.
        """
        engine: CycleEngine = self._engine  # type: ignore[assignment]  # it says so
        width, back, fills = policy.refresh_tokens(k), policy.steps_taken_back(k), int(policy.fills)
        rows = engine.cycle_rows(count, width)
        if self._side:  # a refresh beside rows that were amid their cycles has left states there
            for name, state in self.buffers.states[self._side].items():
                engine.copy(state, self.buffers.states[0][name], None)
            self._side = 0
        rows.host["logits_index"][...] = width - 1
        lengths = {name: rows.device[name] for name in ("len_kept", "len_dropped", "logits_index")}
        everyone = slice(0, count)
        logits = self._output(1)[0][everyone]
        steps = []
        for number in range(k + 1):
            is_refresh, before_refresh = number == k, number == k - 1
            kind = StepKind.REFRESH if is_refresh else StepKind.LORA
            inputs = lengths | {"input_ids": rows.device["window" if is_refresh else "ids"]}
            before = self.buffers.states[0 if is_refresh else number % 2]
            after = self.buffers.states[0 if is_refresh else 1 - number % 2]
            bound = self.buffers.bindings(kind, everyone, inputs, logits, rows.device["next_token"], before, after)
            kept, dropped = (width, width) if is_refresh else (1, fills)
            then = (back, width) if before_refresh else (0, width if k == 0 else 1)
            steps.append(CycleStep(kind, *bound, kept, dropped, *then, place=(number + 1) % (k + 1) % width))
        capacities = {"slots_kept": self._most_kept, "slots_dropped": min(self._most_dropped, self._most_kept)}
        return rows, engine.cycle(rows, steps, capacities)

    def ran(self, lora_steps: int) -> None:
        """A cycle has run, and so many LoRA steps behind its last refresh."""
        self._side = lora_steps % 2 if self.buffers.are_double else 0
        self._wanted, self._parts = 1, None

    def have_room(self, kept: int, dropped: int, width: int) -> bool:
        """Whether a row with so many entries can stand still beside others that write `width`."""
        return kept + width <= self._most_kept and dropped + width <= self._most_dropped

    # ── one call of the engine ─────────────────────────────────────────────────────────────────────────────────

    def _runs_one_by_one(
        self, kind: StepKind, runs: Sequence[Run], due: Collection[int], width: int, room: int
    ) -> bool:
        """Whether an engine that takes no batched chunks runs these rows alone."""
        there = [run for run in runs if run.tokens]
        if width > 1 and (len(due) == 1 or any(run.kept for run in there)):
            return True
        if kind is StepKind.REFRESH and self._plan.has_state and any(run.kind is StepKind.LORA for run in there):
            return True
        return width > room

    def _run_in_parts(self, kind: StepKind, runs: Sequence[Run], due: Collection[int], beside: Sequence[int]) -> None:
        """Rows have fewer free slots than others have tokens: these go on without them, a few tokens at a time."""
        found = np.zeros((len(runs), *self._spec.sized({"batch": 1, "rows": self._wanted})[1:]), np.float32)
        left, done = list(runs), dict.fromkeys(due, 0)
        while going := [slot for slot in due if left[slot].tokens]:
            if self._recurs:  # what may not count in full runs last: nothing writes over what it has read
                going = [slot for slot in going if not runs[slot].each] or going
            over = [slot for slot in due if not left[slot].tokens]
            standing = [] if self._engine.idle_rows else [*beside, *over]
            room = self._room(kind, [left[slot] for slot in (*standing, *going)])
            assert room > 0, "a row has no slot left to stand in"
            width = min(room, max(len(left[slot].tokens) for slot in going))
            now = list(left)
            for slot in going:
                now[slot] = left[slot]._replace(tokens=left[slot].tokens[:width])
            self._call_beside(kind, now, going, width, [*self._about_to_read(runs, beside), *over])
            logits = self._engine.read(self._outputs[self._wanted][0])
            for slot in going:
                count, place = now[slot].wanted, done[slot] if now[slot].each else 0
                found[slot, place : place + count] = logits[slot, :count]
                done[slot] += len(now[slot].tokens)
                left[slot] = runs[slot].behind(done[slot])
        self._parts = found

    def _about_to_read(self, runs: Sequence[Run], beside: Sequence[int]) -> list[int]:
        """Those whose next LoRA step reads their state."""
        return [slot for slot in beside if runs[slot].kind is StepKind.LORA]

    def _call_beside(
        self, kind: StepKind, runs: Sequence[Run], due: Collection[int], width: int, beside: Sequence[int]
    ) -> None:
        """Call with all rows. A refresh writes the state of every one: those `beside` the due ones get theirs back."""
        engine = self._engine
        writes = kind is StepKind.REFRESH and self._plan.has_state and not engine.idle_rows
        rows = [slice(slot, slot + 1) for slot in beside] if writes else []
        states = self.buffers.states[self._side]
        for spec in self._state_specs if rows else ():
            name, shape = spec.name.removeprefix("present_state."), {"batch": self._count, "rows": 1}
            if name not in self._aside:
                self._aside[name] = engine.allocate_resident(f"aside.{name}", spec.sized(shape), spec.dtype)
        for name, state in states.items() if rows else ():
            for row in rows:
                engine.copy(state[row], self._aside[name][row], None)
        try:
            self._call(kind, runs, due, 0, len(runs), width)
        finally:
            for name, state in states.items() if rows else ():
                for row in rows:
                    engine.copy(self._aside[name][row], state[row], None)

    def _call(
        self, kind: StepKind, runs: Sequence[Run], due: Collection[int], first: int, end: int, width: int
    ) -> None:
        """Bind and run the rows of some slots. Plain Python writes single values: after a step that has streamed all
        weights, numpy's own code has left the CPU's caches."""
        wanted = self._wanted
        prepared = self._prepared.get(key := (kind, first, end, width, wanted, self._side, self._states.side))
        if prepared is None:
            prepared = self._prepare(*key)
        ids, index = prepared.id_view, prepared.index_view
        if width > 1:
            prepared.ids[:] = 0
        for slot in range(first, end):
            _, tokens, kept, dropped, each = runs[slot]
            row, last = slot - first, len(tokens) - 1
            if last < 0:  # what it writes all the same lies within its slots
                kept, dropped = min(kept, self._most_kept - width), min(dropped, self._most_dropped - width)
            elif slot not in due:  # and behind what it is to run again
                kept, dropped = kept + last, dropped + last
            self._kept_now[slot], self._dropped_now[slot] = kept, dropped
            if self._recurs:
                self._state_now[slot] = self._states.tokens[slot] if slot in due else kept
            if slot not in due:
                for place in range(wanted):
                    index[row, place] = self._idle
                continue
            if last:
                prepared.ids[row, : last + 1] = tokens
            else:
                ids[row, 0] = tokens[0]
            for place in range(wanted):
                index[row, place] = min(place, last) if each else last
        prepared.step()
        if self._recurs and kind is StepKind.REFRESH:
            self._states.ran(len(runs), {slot: runs[slot] for slot in due})

    def _capacities(self) -> tuple[int, int]:
        """Slots of kept and of dropped layers."""
        found = {True: 2**62, False: 2**62}
        for name, cache in self.buffers.caches.items():
            group = int(name.rpartition(".")[2]) in self._dropped
            found[group] = min(found[group], cache.shape[2])
        return found[False], found[True]

    def _room(self, kind: StepKind, runs: Collection[Run]) -> int:
        """New tokens that every one of these rows has slots for, and that the engine takes with the logits wanted."""
        most = self._most_verified if self._wanted > 1 else self._most_kept
        if kind is StepKind.LORA and not self._plan.refresh_policy.fills:  # writes no dropped cache
            return min(most, min([self._most_kept - run.kept for run in runs]))
        return min(most, min([min(self._most_kept - run.kept, self._most_dropped - run.dropped) for run in runs]))

    def _logits(self, name: str, wanted: int, shape: tuple[int, ...]) -> Buffer:
        """Memory for the logits of one run: a view of what there is where that is the host's and large enough."""
        size = math.prod(shape)
        if wanted > 1 and self._several is not None and self._several.size >= size:
            return self._several[:size].reshape(shape)
        logits = self._engine.allocate_resident(name, shape, self._spec.dtype)
        if wanted > 1 and isinstance(logits, np.ndarray):
            self._several = logits.reshape(-1)
            self._outputs = {count: output for count, output in self._outputs.items() if count == 1}
            self._prepared = {key: one for key, one in self._prepared.items() if key[4] == 1}
        return logits

    def _output(self, wanted: int) -> tuple[Buffer, Ids]:
        """Logits and chosen tokens of all slots, so many of each row."""
        if wanted not in self._outputs:
            name = "logits" if wanted == 1 else f"logits.{wanted}"
            logits = self._logits(name, wanted, self._spec.sized({"batch": self._count, "rows": wanted}))
            tokens = self._engine.allocate(f"next_{name}", (self._count, wanted * self._engine.chooses_tokens), "int64")
            self._outputs[wanted] = logits, tokens
        return self._outputs[wanted]

    def _prepare(
        self, kind: StepKind, first: int, end: int, width: int, wanted: int, side: int, recurrent: int
    ) -> _Prepared:
        engine, states, rows = self._engine, self.buffers.states, slice(first, end)
        sizes = {"input_ids": (end - first, width), "logits_index": (end - first, wanted)}
        ids, index = (
            engine.allocate(f"{name}.{first}.{end}.{width}.{wanted}", shape, "int64")
            if self._keeps
            else np.zeros(shape, np.int64)
            for name, shape in sizes.items()
        )
        logits, tokens = self._output(wanted)
        inputs: dict[str, Array] = {"input_ids": ids, "logits_index": index}
        inputs |= {name: lengths[rows] for name, lengths in self._lengths.items()}
        after = states[1 - side] if kind is StepKind.LORA else states[side]
        bound = self.buffers.bindings(kind, rows, inputs, logits[rows], tokens[rows], states[side], after, recurrent)
        found = _Prepared(ids, ids.data, index.data, engine.prepare(kind, *bound))
        if self._keeps:
            self._prepared[kind, first, end, width, wanted, side, recurrent] = found
            if len(self._prepared) > _PREPARED:
                del self._prepared[next(iter(self._prepared))]
        return found
