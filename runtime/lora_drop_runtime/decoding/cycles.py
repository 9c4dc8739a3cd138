"""A request in whole cycles, on an engine that runs them (flight.py).

Enters: the request behind its prompt, its first tokens. Leaves: tokens; the request counts what was told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from lora_drop_runtime.plan.schedule import PeriodicSchedule

from .flight import FirstState, Flight
from .request import Request, checked_tokens
from .sampling import Ids, RowSampler, SamplingOptions
from .slots import Slots
from .stream import Chosen


class Cycles:
    """The rest of a request.

    Args:
        request: its prompts have run.
        options: how its tokens are chosen.
        samplers: have chosen the first ones; None where the engine has.
        stops: tokens that end a row.
    """

    def __init__(
        self, request: Request, options: SamplingOptions, samplers: Sequence[RowSampler] | None, stops: Collection[int]
    ) -> None:
        self._request, self._options, self._samplers, self._stops = request, options, samplers, list(stops)
        self._left = request.max_steps

    def tokens(self, first: Ids, go_on: Callable[[], None]) -> Chosen:
        """Yields (token per row, whether the row has one), from the first tokens on.

        Args:
            go_on: raises where the request is over; the device may then be another one's.
        """
        request, active = self._request, np.ones(len(first), np.bool_)
        tokens, told, flight = first, 0, None
        try:
            for left in reversed(range(self._left + 1)):
                tokens = checked_tokens(tokens, active)
                active = active & ~np.isin(tokens, self._stops)
                if not active.any():
                    return
                yield tokens, active
                if left:
                    go_on()
                    if flight is None:
                        flight = self._flight(first)
                    if told == len(flight.tokens):
                        flight.keep_ahead()
                        flight.read()
                    fed, tokens = tokens, flight.tokens[told]
                    request.took(request.next_kind(None), fed.tolist(), np.flatnonzero(active).tolist())
                    told += 1
        finally:
            if flight is not None and flight.begun > told:  # caches and states are ahead of what was told
                request.truncate(request.kept)

    def _flight(self, first: Ids) -> Flight:
        request = self._request
        assert isinstance(request.schedule, PeriodicSchedule)
        assert isinstance(request.slots, Slots)
        rows = [
            FirstState(
                token,
                request.kept[number],
                request.dropped[number],
                self._left,
                self._options,
                None if self._samplers is None else self._samplers[number],
                self._stops,
            )
            for number, token in enumerate(first.tolist())
        ]
        return Flight(request.slots, request.schedule.k, request.policy, rows)
