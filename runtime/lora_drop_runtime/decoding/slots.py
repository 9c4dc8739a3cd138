"""The slots of a batch: caches and states, and runs of some rows in which the others stand still.

Enters: for each row what it runs, and on which lengths. Leaves: logits. Knows no token's choice and no schedule. The
rows that are there lie in the first slots, so that a run takes one slice of every buffer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.engine import Buffer, Engine, Step
from lora_drop_runtime.plan.schedule import StepKind

from .buffers import RowBuffers
from .row import Logits, Run
from .sampling import Ids

_PREPARED = 64  # steps of different sizes that stay bound


@dataclass(frozen=True)
class _Prepared:
    """A step over ids [b, S] with logits [b, R, V] at `index` [b, R]."""

    ids: Ids
    index: Ids
    logits: Buffer
    step: Step


class Slots:
    """Memory for `count` rows, allocated once.

    Args:
        slots: {"slots_kept": n, "slots_dropped": m}, of each row.
    """

    def __init__(self, bundle: Bundle, engine: Engine, count: int, slots: Mapping[str, int]) -> None:
        self._engine = engine
        self.buffers = RowBuffers.allocate(bundle, engine, count, slots)
        outputs = bundle.manifest.io(StepKind.REFRESH, engine.target).outputs
        self._spec = next(spec for spec in outputs if spec.name == "logits")
        self._dropped = set(bundle.manifest.plan.dropped_attentions)
        self._kept_lengths, self._dropped_lengths = (
            engine.allocate(name, (count,), "int64") for name in ("len_kept", "len_dropped")
        )
        self._side, self._count = 0, count
        self._logits: dict[int, Buffer] = {}  # of all slots, by how many a row wants; read before the next run
        self._prepared: OrderedDict[tuple[StepKind, int, int, int, int], _Prepared] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Of caches and states."""
        held = {id(one): one for states in self.buffers.states for one in states.values()}
        return sum(one.nbytes for one in (*self.buffers.caches.values(), *held.values()))

    def run(self, kind: StepKind, runs: Sequence[Run], due: Collection[int]) -> dict[int, Logits]:
        """Run what some rows want; the others stand still.

        Args:
            runs: of the rows in the first slots.
            due: which of them, by slot; at least one.

        Returns:
            by slot logits float32 [n, V] after each of the row's tokens, or [1, V]; valid until the next run.
        """
        width = max(len(runs[slot].tokens) for slot in due)
        wanted = max(len(runs[slot].tokens) if runs[slot].each else 1 for slot in due)
        prepared = self._step(kind, len(runs), width, wanted)
        ids, index = prepared.ids, prepared.index
        if width > 1:
            ids[:] = 0
        for slot, run in enumerate(runs):
            self._kept_lengths[slot], self._dropped_lengths[slot] = run.kept, run.dropped
            last = len(run.tokens) - 1
            if slot not in due:
                index[slot] = -1
                continue
            ids[slot, : last + 1] = run.tokens
            index[slot] = np.minimum(np.arange(wanted), last) if run.each else last
        prepared.step()
        if kind is StepKind.LORA and self.buffers.are_double:
            self._side = 1 - self._side
        logits = self._engine.read(prepared.logits)  # [b, R, V]
        return {slot: logits[slot, : len(runs[slot].tokens) if runs[slot].each else 1] for slot in due}

    def move(self, source: int, target: int, kept: int, dropped: int) -> None:
        """Copy a row's valid entries and its state to another slot."""
        for name, cache in self.buffers.caches.items():
            valid = dropped if int(name.rpartition(".")[2]) in self._dropped else kept
            cache[target : target + 1][:, :, :valid] = cache[source : source + 1][:, :, :valid]
        for state in self.buffers.states[self._side].values():
            state[target : target + 1][:] = state[source : source + 1]

    def _step(self, kind: StepKind, rows: int, width: int, wanted: int) -> _Prepared:
        key = kind, rows, width, wanted, self._side
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = self._prepare(*key)
            if len(self._prepared) > _PREPARED:
                self._prepared.popitem(last=False)
        else:
            self._prepared.move_to_end(key)
        return found

    def _prepare(self, kind: StepKind, rows: int, width: int, wanted: int, side: int) -> _Prepared:
        engine, states = self._engine, self.buffers.states
        sizes = ((width, "ids"), (wanted, "index"), (wanted * engine.chooses_tokens, "token"))
        ids, index, token = (engine.allocate(f"batch_{name}", (rows, count), "int64") for count, name in sizes)
        if wanted not in self._logits:
            shape = self._spec.sized({"batch": self._count, "rows": wanted})
            self._logits[wanted] = engine.allocate_resident(f"batch_logits.{wanted}", shape, self._spec.dtype)
        logits = self._logits[wanted][:rows]
        lengths = {"len_kept": self._kept_lengths[:rows], "len_dropped": self._dropped_lengths[:rows]}
        inputs = {"input_ids": ids, "logits_index": index, **lengths}
        after = states[1 - side] if kind is StepKind.LORA else states[side]
        step = self.buffers.bind(kind, slice(rows), inputs, logits, token, states[side], after)
        return _Prepared(ids, index, logits, step)
