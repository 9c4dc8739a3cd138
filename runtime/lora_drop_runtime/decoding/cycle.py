"""Where a request stands in its schedule: which step comes next, and how many LoRA steps there were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import LastLogits, Schedule, StepKind, kind_of_step, most_refreshes


class Cycle:
    """Asks a schedule for one step after another.

    Args:
        schedule: of the request.
        most_steps: decode steps that it may have.

    Attributes:
        steps_done: decode steps after the prefill.
        lora_steps: since the last refresh.
    """

    def __init__(self, schedule: Schedule, most_steps: int) -> None:
        self._schedule, self._most_steps = schedule, most_steps
        self._refreshes_left = most_refreshes(schedule, most_steps)
        self._next: StepKind | None = None  # until its step is done, once it was asked for
        self.steps_done = self.lora_steps = 0

    def next_kind(self, read: Callable[[], npt.NDArray[np.float32]]) -> StepKind:
        """What the next step runs; the schedule is asked once.

        Args:
            read: the logits [R, V] that its tokens were chosen from.

        Raises:
            InputError: it returns something else, or more refreshes than it said there would be.
        """
        if self._next is None:
            kind = kind_of_step(self._schedule, self.steps_done + 1, LastLogits(self.lora_steps, read))
            if kind is StepKind.REFRESH and not self._refreshes_left:
                most = most_refreshes(self._schedule, self._most_steps)
                raise InputError(
                    "The schedule has more refreshes than it said.",
                    note=f"Its most_refreshes({self._most_steps}) is {most}; step {self.steps_done + 1} would be one "
                    "more.",
                    hint="Leave most_refreshes out; dropped layers then get a slot for every step.",
                )
            self._next = kind
        return self._next

    def done(self) -> None:
        """The step that was asked for has run."""
        refresh = self._next is StepKind.REFRESH
        self._next = None
        self._refreshes_left -= refresh
        self.lora_steps = 0 if refresh else self.lora_steps + 1
        self.steps_done += 1
