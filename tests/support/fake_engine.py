"""An engine without a model: it keeps what a session binds and what every run sees, and does the bookkeeping of one.

Enters: the session's buffers. Leaves: a list of bindings, a list of runs, and buffers written the way the step graphs
write them (docs/algorithm.md), with token ids in the place of K and V:

    caches   slot len + s of a row gets `token + 1`, so a cache reads as the tokens that its layer has seen
    states   get the number of the run that wrote them, counted from 1
    logits   are one-hot at the next token: scripted, or computed from token and position

A run that would write past a cache's capacity fails, on every engine and in every test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Limits, Manifest, ModelFacts, SpecialTokens
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.engine import STANDING_SLOTS, copy_arrays
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule, Schedule, StepKind
from numpy.typing import NDArray

Array = NDArray[Any]

KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 2, 4, 6, 50
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 4  # of K and V of one token in one layer, float32


def make_manifest(
    plan: DropPlan, *, limits: Limits | None = None, eos: tuple[int, ...] = (), vocab_size: int = VOCAB
) -> Manifest:
    """A manifest written by hand; nothing of it is on disk."""
    model = ModelFacts(
        name="fake",
        model_type="fake",
        fingerprint="f" * 64,
        num_layers=plan.num_layers,
        hidden_size=HIDDEN,
        vocab_size=vocab_size,
        num_heads=4,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        context_length=4096,
        dtype="float32",
        windows=(0,) * plan.num_layers,
        layer_bytes=(1000,) * plan.num_layers,
        attention_bytes=(400,) * plan.num_layers,
        kv_bytes=(100,) * plan.num_layers,
        head_bytes=500,
        embedding_row_bytes=4 * HIDDEN,
    )
    return Manifest(model, plan, limits or Limits(4096, 4000, 8), SpecialTokens(eos, pad=0))


@dataclass(frozen=True)
class Binding:
    """One `prepare`: the buffers themselves, not copies."""

    kind: StepKind
    inputs: dict[str, Array]
    outputs: dict[str, Array]

    def address(self, name: str) -> int:
        """Where the buffer of an input or output begins."""
        return (self.inputs | self.outputs)[name].ctypes.data


@dataclass(frozen=True)
class Run:
    """What one run saw: copies, except `binding`. None where the graph has no such input."""

    kind: StepKind
    binding: Binding
    input_ids: Array
    len_kept: Array
    len_dropped: Array | None
    logits_index: Array | None
    past_states: dict[str, Array]


# Rows stand still; or several rows take several tokens, but write what is not theirs; or not even that
KINDS = {
    "idle rows": (True, True, 0),
    "together": (True, False, STANDING_SLOTS),
    "one by one": (False, False, 0),
}


class FakeEngine:
    """Implements the protocol `Engine`. Resident memory is never zeros, which a session must not rely on.

    Args:
        plan: tells dropped from kept layers when slots are written.
        script: `script[j][row]` is the token that decode step j (0: the prefill) makes likeliest.
        interrupt_at: the number of the run (from 1) in which Ctrl-C is pressed, after K/V and before the logits.
    """

    target = "fake"  # a graph for each step
    chooses_tokens = False
    prefill_chunk: int | None = None
    verified_tokens: int | None = None
    batched_chunks = False
    idle_rows = False
    spare_slots = 0
    block_slots = None
    many_requests = True
    warms_up = False
    runs_cycles = False

    def __init__(
        self, plan: DropPlan, script: Sequence[Sequence[int]] | None = None, interrupt_at: int | None = None
    ) -> None:
        self.plan = plan
        self.script = script
        self.interrupt_at = interrupt_at
        self.allocated: list[Array] = []
        self.bindings: list[Binding] = []
        self.runs: list[Run] = []
        self.adapters: list[Mapping[str, Array]] = []
        self.times_closed = 0

    def behave(self, kind: str) -> None:
        """As one of `KINDS`, from the next request on."""
        self.batched_chunks, self.idle_rows, self.spare_slots = KINDS[kind]

    @property
    def kinds(self) -> list[StepKind]:
        return [run.kind for run in self.runs]

    def forget(self) -> None:
        """Drop the records, as before a new request."""
        self.allocated, self.bindings, self.runs = [], [], []

    # ── the protocol ───────────────────────────────────────────────────────────────────────────────────────

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        return {name: count + self.spare_slots for name, count in needed.items()}

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        buffer = np.zeros(shape, dtype)
        self.allocated.append(buffer)
        return buffer

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        buffer = np.full(shape, -7, dtype)
        self.allocated.append(buffer)
        return buffer

    def read(self, buffer: Array) -> Array:
        return buffer

    def copy(self, source: Array, target: Array, slots: int | None) -> None:
        copy_arrays(source, target, slots)

    def zero(self, buffer: Array) -> None:
        buffer[...] = 0

    def prepare(self, kind: StepKind, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        binding = Binding(kind, dict(inputs), dict(outputs))
        for name, array in (binding.inputs | binding.outputs).items():
            assert array.flags["C_CONTIGUOUS"], f"{name} is not contiguous: an engine binds address and shape"
        self.bindings.append(binding)
        return lambda: self._run(binding)

    def replace_adapters(self, weights: Mapping[str, Array]) -> None:
        self.adapters.append(weights)

    def beside(self) -> Self:
        return self

    def notes(self) -> list[str]:
        return []

    def close(self) -> None:
        self.times_closed += 1

    # ── one run ────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self, binding: Binding) -> None:
        def copied(name: str) -> Array | None:
            return binding.inputs[name].copy() if name in binding.inputs else None

        run = Run(
            kind=binding.kind,
            binding=binding,
            input_ids=binding.inputs["input_ids"].copy(),
            len_kept=binding.inputs["len_kept"].copy(),
            len_dropped=copied("len_dropped"),
            logits_index=copied("logits_index"),
            past_states={name: array.copy() for name, array in binding.inputs.items() if "past_state" in name},
        )
        self.runs.append(run)
        for name in binding.inputs:
            if name.startswith(("past_key.", "past_value.")):
                dropped = int(name.partition(".")[2]) in self.plan.dropped_attentions
                self._write(name, run, run.len_dropped if dropped else run.len_kept)
        for name, array in binding.outputs.items():
            if name.startswith("present_state."):
                stands = self.idle_rows and run.logits_index is not None
                array[run.logits_index[:, -1] >= 0 if stands else slice(None)] = len(self.runs)
        if len(self.runs) == self.interrupt_at:
            raise KeyboardInterrupt
        self._predict(run)

    def _write(self, name: str, run: Run, lengths: Array) -> None:
        cache = run.binding.outputs[name.replace("past_", "present_")]  # [b, H, slots, D]
        width = run.input_ids.shape[1]
        for row, length in enumerate(lengths.tolist()):
            count = width
            if self.idle_rows and run.logits_index is not None:
                count = int(run.logits_index[row, -1]) + 1
            if not count:
                continue
            room = cache.shape[2] - length
            assert 0 < count <= width <= room, f"{name}, row {row}: {length} + {count} tokens in {cache.shape[2]} slots"
            cache[row, :, length : length + count] = run.input_ids[row, :count, None] + 1

    def _predict(self, run: Run) -> None:
        logits = run.binding.outputs["logits"]  # [b, 1, V]
        rows = np.arange(len(logits))
        index = np.zeros((len(rows), 1), np.int64) if run.logits_index is None else run.logits_index
        if self.script is not None:
            tokens = np.array(self.script[len(self.runs) - 1])[:, None]
        else:
            tokens = next_token(run.input_ids[rows[:, None], index], run.len_kept[:, None] + index, logits.shape[2])
        logits[...] = 0
        np.put_along_axis(logits, tokens[:, :, None], 1, 2)


def next_token(token: Any, position: Any, vocab_size: int = VOCAB) -> Any:
    """The fake model: the token after `token` at `position`."""
    return (3 * token + 7 * position + 1) % vocab_size


class IdleEngine(FakeEngine):
    """Runs do nothing at all and nothing is recorded: what is left is the session's own time."""

    def prepare(self, kind: StepKind, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        return lambda: None


def open_session(
    plan: DropPlan, *, k: int = 3, schedule: Schedule | None = None, engine: FakeEngine | None = None, **manifest: Any
) -> tuple[Session, FakeEngine]:
    """A session on a fake engine; `manifest` as for `make_manifest`."""
    engine = engine or FakeEngine(plan)
    bundle = Bundle(Path("/nowhere"), make_manifest(plan, **manifest))
    return Session(bundle, engine, schedule or PeriodicSchedule(k)), engine
