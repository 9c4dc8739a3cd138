"""When a refresh comes: a function of the decode step's number."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from lora_drop_runtime.errors import InputError, PlanError, whole_number


class StepKind(enum.Enum):
    """What a decode step runs: the whole model, or kept layers and surrogates."""

    REFRESH = "refresh"
    LORA = "lora"


class Schedule(Protocol):
    """Chooses the kind of every decode step of a request: a function of the step's number alone."""

    def kind(self, step: int) -> StepKind:
        """The kind of decode step `step`; 1 is the first step after the prefill."""
        ...


@dataclass(frozen=True)
class PeriodicSchedule:
    """`k` LoRA steps, then a refresh, and so on; `k = 0` is the full schedule.

    Decode step j is a refresh iff `j mod (k+1) == 0` (the paper's text; its Algorithm 1 says `j mod k`).
    """

    k: int

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "k", whole_number("k", self.k, ""))
        except InputError:
            k = -1
        else:
            k = self.k
        if k < 0:
            raise PlanError(
                "k must be a whole number of LoRA steps between two refreshes.",
                note=f"k is {self.k!r:.60}, the smallest is 0 (every step a refresh).",
                hint="Use --k 3, or --k 0 for the full schedule.",
            )

    def kind(self, step: int) -> StepKind:
        return StepKind.REFRESH if step % (self.k + 1) == 0 else StepKind.LORA


def as_schedule(k: int | Schedule) -> Schedule:
    """A window as a schedule; anything with a `kind` is one already."""
    return k if hasattr(k, "kind") else PeriodicSchedule(k)
