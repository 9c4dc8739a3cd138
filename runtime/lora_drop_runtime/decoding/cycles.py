"""A request in whole cycles, on an engine that runs them and chooses their tokens without the host.

Enters: the request behind its prompt, its first tokens. Leaves: tokens, a cycle after they were made: the next one is
begun before they are read. What a stop token ends stands still on the device; the request counts what was told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping

import numpy as np

from lora_drop_runtime.engines.engine import Array, Engine
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import PeriodicSchedule, Schedule

from .constraint import Constraint
from .request import Request, checked_tokens
from .sampling import Ids, Sampler, SamplingOptions
from .slots import Slots
from .stream import Chosen


def runs_in_cycles(engine: Engine, schedule: Schedule, policy: Policy, constraint: Constraint | None) -> bool:
    """Whether every step of a request is known before it begins, and the engine can run them: a periodic schedule, and
    tokens that logits alone decide."""
    if not isinstance(schedule, PeriodicSchedule) or constraint is not None:
        return False
    width = policy.refresh_tokens(schedule.k)
    return (engine.prefill_chunk is None or width <= engine.prefill_chunk) and engine.runs_cycles


class Cycles:
    """The rest of a request.

    Args:
        request: its prompts have run.
        options: how its tokens are chosen.
        sampler: has chosen the first ones; None where the engine has.
        stops: tokens that end a row.
    """

    def __init__(
        self, request: Request, options: SamplingOptions, sampler: Sampler | None, stops: Iterable[int]
    ) -> None:
        assert isinstance(request.schedule, PeriodicSchedule)
        assert isinstance(request.slots, Slots)
        self._request, self._options, self._sampler, self._stops = request, options, sampler, set(stops)
        self._k, self._slots, self._left = request.schedule.k, request.slots, request.max_steps
        self._ahead = 0  # steps that were begun and not counted yet

    def tokens(self, first: Ids, go_on: Callable[[], None]) -> Chosen:
        """Yields (token per row, whether the row has one), from the first tokens on.

        Args:
            go_on: raises where the request is over; the device may then be another one's.
        """
        request, active = self._request, np.ones(len(first), np.bool_)
        made, tokens = self._made(first), first
        try:
            for left in reversed(range(self._left + 1)):
                tokens = checked_tokens(tokens, active)
                active = active & ~np.isin(tokens, list(self._stops))
                if not active.any():
                    return
                yield tokens, active
                if left:
                    go_on()
                    fed, tokens = tokens, next(made)
                    request.took(request.next_kind(None), fed.tolist(), np.flatnonzero(active).tolist())
                    self._ahead -= 1
        finally:
            if self._ahead:  # caches and states are ahead of what was told
                request.truncate(request.kept)

    def _made(self, first: Ids) -> Generator[Ids, None, None]:
        """Tokens [B] of one step after another, behind the first."""
        rows, cycle = self._slots.cycle(self._k, self._request.policy)
        self._fill(rows.host, first)
        cycle.begin()
        unread: deque[int] = deque()
        left = self._left
        while left or unread:
            while left and len(unread) < 2:
                count = min(left, self._k + 1)
                self._ahead += count
                unread.append(count)
                cycle.run(count)
                left -= count
                self._slots.ran(count % (self._k + 1))
            unread.popleft()
            yield from cycle.read()

    def _fill(self, host: Mapping[str, Array], first: Ids) -> None:
        """What the rows begin with."""
        options = self._options
        host["ids"][:, 0] = host["window"][:, 0] = first
        host["len_kept"][:], host["len_dropped"][:] = self._request.kept, self._request.dropped
        values = {"temperature": options.temperature, "penalty": options.repetition_penalty}
        for name, value in (values | {"top_p": options.top_p, "top_k": options.top_k}).items():
            host[name][0] = value
        vocab = len(host["stops"])
        host["stops"][[token for token in self._stops if 0 <= token < vocab]] = 1
        if self._sampler is None:
            return
        for number, row in enumerate(self._sampler.rows):
            host["seen"][number, row.seen] = 1
            if options.temperature > 0:
                host["uniforms"][: self._left, number] = row.generator.random(self._left)
