"""When a refresh comes: a function of the decode step's number."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from lora_drop_runtime.bounds import K
from lora_drop_runtime.errors import PlanError


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
        object.__setattr__(self, "k", K.whole("k", self.k, error=PlanError))

    def kind(self, step: int) -> StepKind:
        return StepKind.REFRESH if step % (self.k + 1) == 0 else StepKind.LORA


def as_schedule(k: int | Schedule) -> Schedule:
    """A window as a schedule; anything with a `kind` is one already."""
    return k if hasattr(k, "kind") else PeriodicSchedule(k)
