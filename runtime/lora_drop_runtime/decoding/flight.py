"""Whole cycles of some rows, on an engine that runs them and chooses their tokens without the host.

Enters: what rows begin with, their first tokens among it. Leaves: tokens, a cycle after they were made: the next one is
begun before they are read. A row that ends stands still on the device; who counts its entries counts what was told.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lora_drop_runtime.engines.engine import Array, Engine
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import JoinedSchedule, PeriodicSchedule, Schedule

from .constraint import Constraint
from .sampling import Ids, RowSampler, SamplingOptions
from .slots import Slots

MOST_STEPS = 64  # of a cycle: a CUDA graph holds all of them, and their tokens come at once


def why_single_steps(
    engine: Engine,
    schedule: Schedule,
    policy: Policy,
    options: SamplingOptions,
    constraint: Constraint | None,
    logprobs: int | None = None,
) -> str:
    """Why the tokens of a row go through the host, one by one; empty where whole cycles run in the engine: every step
    is known before it begins, and logits alone decide the tokens, by options that engines know."""
    if constraint is not None:
        return "a constraint chooses among its tokens"
    if logprobs is not None:
        return "its logprobs are asked for"
    if options.on_host_alone:
        return f"its {options.on_host_alone[0]} is of the host alone"
    if policy.verifies:
        return f"its policy {policy.name} verifies drafts"
    if not isinstance(schedule, PeriodicSchedule | JoinedSchedule):
        return f"its schedule {type(schedule).__name__} is not periodic"
    width, most = policy.refresh_tokens(schedule.k), engine.prefill_chunk
    if most is not None and width > most:
        return f"its refresh runs {width} tokens, the engine takes {most} at once"
    if schedule.k >= MOST_STEPS:
        return f"its cycle has {schedule.k + 1} steps, the most are {MOST_STEPS}"
    return "" if engine.runs_cycles else "the engine runs single steps"


@dataclass(frozen=True)
class FirstState:
    """What a row begins its cycles with.

    Attributes:
        token: that it feeds first.
        kept, dropped: valid entries of its caches.
        new_tokens: the most that it makes; 0 of a row that stands still.
        options, sampler: how they are chosen; no sampler where the engine takes the largest logit. The sampler's own
            random stream is left as it is.
        stops: tokens that end it.
    """

    token: int = 0
    kept: int = 0
    dropped: int = 0
    new_tokens: int = 0
    options: SamplingOptions = field(default_factory=SamplingOptions)
    sampler: RowSampler | None = None
    stops: Collection[int] = ()

    def fill(self, host: Mapping[str, Array], row: int) -> None:
        """Write it to a row of `CycleRows.host`."""
        vocab, options = host["stops"].shape[1], self.options
        host["ids"][row, 0] = host["window"][row, 0] = self.token
        host["len_kept"][row], host["len_dropped"][row] = self.kept, self.dropped
        host["new_tokens"][row], host["over"][row] = self.new_tokens, self.new_tokens == 0
        host["temperature"][row], host["penalty"][row] = options.temperature, options.repetition_penalty
        host["top_k"][row], host["top_p"][row] = options.top_k, options.top_p
        host["stops"][row, [token for token in self.stops if 0 <= token < vocab]] = 1
        if self.sampler is not None:
            host["seen"][row, self.sampler.seen.ids] = 1
            if options.temperature > 0:
                ahead = copy.deepcopy(self.sampler.generator)
                host["uniforms"][: self.new_tokens, row] = ahead.random(self.new_tokens)


class Flight:
    """Cycles on the device, from what rows begin with until each has made its tokens.

    Args:
        rows: in the first slots.

    Attributes:
        rows: as they were.
        tokens: int64 [B] of each step that was read, −1 where logits are no numbers.
        begun: steps that were begun.
        is_torn: an interrupt or an error came as a cycle was begun: where the device stands is not known.
    """

    def __init__(self, slots: Slots, k: int, policy: Policy, rows: Sequence[FirstState]) -> None:
        self.rows = rows
        self._slots, self._window = slots, k + 1
        self._most = max(row.new_tokens for row in rows)
        self.begun, self.is_torn = 0, False
        self.tokens: list[Ids] = []
        on_device, self._cycle = slots.cycle(k, policy, len(rows))
        for number, row in enumerate(rows):
            row.fill(on_device.host, number)
        self._cycle.begin()

    @property
    def unread(self) -> int:
        """Steps that were begun and not read."""
        return self.begun - len(self.tokens)

    def keep_ahead(self, cycles: int = 2) -> None:
        """Begin cycles until so many, at most two, are not read, or until no row makes more."""
        while self.begun < self._most and self.unread <= (cycles - 1) * self._window:
            count = min(self._most - self.begun, self._window)
            self.is_torn = True
            self.begun += count
            self._cycle.run(count)
            self._slots.ran(count % self._window)
            self.is_torn = False

    def read(self) -> None:
        """Wait for the earliest cycle that was not read. After an interrupt it can be read again."""
        self.tokens.extend(self._cycle.read(len(self.tokens) // self._window))
