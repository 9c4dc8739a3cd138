"""When a refresh comes: after a fixed number of LoRA steps, or as soon as the logits are unsure.

Enters: a decode step's number, and how sure the logits before it are. Leaves: the step's kind. Knows no engine: logits
come from a function that is called when a schedule asks for them.

    periodic   k LoRA steps, then a refresh (the paper)
    margin     after the LoRA step whose two largest logits are closer than a threshold, at the latest after k
    entropy    after the LoRA step whose entropy is above a threshold, at the latest after k
"""

from __future__ import annotations

import enum
import functools
import inspect
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bounds import K
from lora_drop_runtime.errors import InputError, PlanError, wrong_type


class StepKind(enum.Enum):
    """What a decode step runs: the whole model, or kept layers and surrogates."""

    REFRESH = "refresh"
    LORA = "lora"


class LastLogits:
    """How sure the logits before a decode step are: those that its token was chosen from. Computed when asked for.

    Attributes:
        lora_steps: how many LoRA steps there were since the last refresh or the prefill; 0 where that made the logits.
    """

    def __init__(self, lora_steps: int, read: Callable[[], npt.NDArray[np.float32]]) -> None:
        """`read` gives the logits [R, V] of the rows that are still going, at least one."""
        self.lora_steps = lora_steps
        self._read = read

    @functools.cached_property
    def _logits(self) -> npt.NDArray[np.float32]:
        return self._read()

    @functools.cached_property
    def margin(self) -> float:
        """The largest logit less the second largest; of the row where it is smallest. NaN where one is not a number."""
        logits = self._logits
        rows, largest = np.arange(len(logits)), logits.argmax(axis=1)  # argmax finds a NaN
        others = logits.copy()
        others[rows, largest] = -np.inf
        with np.errstate(invalid="ignore"):
            return float((logits[rows, largest] - others.max(axis=1)).min())

    @functools.cached_property
    def entropy(self) -> float:
        """Of the distribution, in nats; of the row where it is largest. NaN where a logit is not a number."""
        logits = self._logits
        with np.errstate(invalid="ignore"):
            shifted = logits - logits.max(axis=1, keepdims=True)
            weights = np.exp(shifted)
            total = weights.sum(axis=1, dtype=np.float64)
            shifted[weights == 0] = 0  # 0 · −∞
            return float((np.log(total) - (weights * shifted).sum(axis=1, dtype=np.float64) / total).max())


class Schedule(Protocol):
    """Chooses the kind of every decode step of a request; one's own may be any object with this method.

    It may also have `most_refreshes(steps) -> int`, the most refreshes among the first `steps` decode steps. Without
    it, dropped layers get a slot for every step.
    """

    def kind(self, step: int, last: LastLogits | None) -> StepKind:
        """The kind of decode step `step`, asked once before it; 1 is the first step after the prefill."""
        ...


@dataclass(frozen=True)
class PeriodicSchedule:
    """`k` LoRA steps, then a refresh, and so on; `k = 0` is the full schedule.

    Decode step j is a refresh iff `j mod (k+1) == 0` (the paper's text; its Algorithm 1 says `j mod k`).
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", K.whole("k", self.k, error=PlanError))

    def kind(self, step: int, last: LastLogits | None = None) -> StepKind:
        return StepKind.REFRESH if step % (self.k + 1) == 0 else StepKind.LORA

    def most_refreshes(self, steps: int) -> int:
        """How many there are."""
        return steps // (self.k + 1)


@dataclass(frozen=True)
class JoinedSchedule:
    """The periodic schedule of a row that joins others in the midst of their cycle: its first refresh is theirs.

    Attributes:
        ahead: LoRA steps of the cycle that the others have run, 0 to k.
    """

    k: int
    ahead: int

    def kind(self, step: int, last: LastLogits | None = None) -> StepKind:
        return PeriodicSchedule(self.k).kind(step + self.ahead)

    def most_refreshes(self, steps: int) -> int:
        return (steps + self.ahead) // (self.k + 1)


@dataclass(frozen=True)
class AdaptiveSchedule(ABC):
    """A refresh follows a LoRA step whose logits are unsure, and at the latest the k-th.

    Logits of a refresh or the prefill do not count: a LoRA step always follows, for k above 0. So one limit of the
    threshold is the periodic schedule of k, the other the periodic schedule of one LoRA step.

    Attributes:
        threshold: what the logits are compared with; may be infinite.
    """

    name: ClassVar[str]

    k: int
    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", K.whole("k", self.k, error=PlanError))
        given = self.threshold
        if isinstance(given, bool) or not isinstance(given, numbers.Real) or given != given:
            raise InputError(
                "The threshold must be a number.",
                note=f"It is {given!r:.40}, of type {type(given).__name__}.",
                hint=f"Use for example {type(self).__name__}(k=3, threshold=1.5).",
            )
        object.__setattr__(self, "threshold", float(given))

    @abstractmethod
    def is_sure(self, last: LastLogits) -> bool:
        """Whether another LoRA step may follow one with these logits; never where one is not a number."""

    def kind(self, step: int, last: LastLogits | None) -> StepKind:
        assert last is not None, "an adaptive schedule chooses by logits"
        if last.lora_steps == 0:
            return StepKind.LORA if self.k else StepKind.REFRESH
        return StepKind.LORA if last.lora_steps < self.k and self.is_sure(last) else StepKind.REFRESH

    def most_refreshes(self, steps: int) -> int:
        """Every second step, where no logits are sure."""
        return steps // 2 if self.k else steps


class MarginSchedule(AdaptiveSchedule):
    """Unsure is a margin below `threshold`: at −∞ none is, at +∞ every one."""

    name = "margin"

    def is_sure(self, last: LastLogits) -> bool:
        return last.margin >= self.threshold


class EntropySchedule(AdaptiveSchedule):
    """Unsure is an entropy above `threshold` nats: at +∞ none is, at −∞ every one."""

    name = "entropy"

    def is_sure(self, last: LastLogits) -> bool:
        return last.entropy <= self.threshold


ADAPTIVE: dict[str, type[AdaptiveSchedule]] = {one.name: one for one in (MarginSchedule, EntropySchedule)}
PERIODIC = "periodic"
SCHEDULES = (PERIODIC, *ADAPTIVE)


def as_schedule(k: int | Schedule) -> Schedule:
    """A window as a schedule; anything with a `kind` is one already.

    Raises:
        PlanError: a window out of range.
        InputError: `kind` cannot be called with a step and the last logits.
    """
    kind: Any = getattr(k, "kind", None)
    if kind is None:
        return PeriodicSchedule(k)  # type: ignore[arg-type]  # without a kind it is a number, or refused
    try:
        inspect.signature(kind).bind(1, None)
    except ValueError:  # of a function in C, which says nothing
        pass
    except TypeError as error:
        raise InputError(
            "The schedule's kind cannot be called with a step and the last logits.",
            note=f"{type(k).__name__}.kind: {error}.",
            hint="Write it as def kind(self, step, last): …, which returns StepKind.REFRESH or StepKind.LORA.",
        ) from None
    return k  # type: ignore[return-value]


def periodic_like(schedule: Schedule, k: int) -> PeriodicSchedule:
    """A schedule that chooses without logits, and has the window of this one, or else `k`."""
    if isinstance(schedule, PeriodicSchedule):
        return schedule
    return PeriodicSchedule(schedule.k if isinstance(schedule, AdaptiveSchedule) else k)


def kind_of_step(schedule: Schedule, step: int, last: LastLogits) -> StepKind:
    """What a schedule chooses.

    Raises:
        InputError: it is no StepKind.
    """
    kind = schedule.kind(step, last)
    if not isinstance(kind, StepKind):
        raise wrong_type("What a schedule's kind returns", kind, "a StepKind", "Return StepKind.REFRESH or .LORA.")
    return kind


def most_refreshes(schedule: Schedule, steps: int) -> int:
    """The most refreshes among the decode steps 1 … `steps`.

    Raises:
        InputError: a schedule says something else than a number from 0 to `steps`.
    """
    own: Callable[[int], int] | None = getattr(schedule, "most_refreshes", None)
    if own is None:
        return steps
    if not callable(own):
        raise wrong_type(
            f"{type(schedule).__name__}.most_refreshes", own, "a method", "Write def most_refreshes(self, steps): …."
        )
    most = own(steps)
    if isinstance(most, bool) or not isinstance(most, numbers.Integral) or not 0 <= most <= steps:
        raise InputError(
            "A schedule says an impossible number of refreshes.",
            note=f"{type(schedule).__name__}.most_refreshes({steps}) is {most!r:.40}; possible is 0 to {steps}.",
            hint="Leave most_refreshes out; dropped layers then get a slot for every step.",
        )
    return int(most)
