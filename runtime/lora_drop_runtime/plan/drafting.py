"""What a policy that verifies drafts is told: how many drafts, where they come from, and how strictly they are judged.
Read once, at the edge.

Enters: k, the name of a draft and a lenience as the user gave them. Leaves: a schedule, a `DraftSource`, or an
InputError. Knows no token and no cache.

    lora     LoRA steps
    ngram    what followed the last tokens at their latest earlier occurrence in the row's own text (prompt look-up)
    both     that, and LoRA steps where it finds nothing
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora_drop_runtime.bounds import LENIENCE, K
from lora_drop_runtime.command_line import check_known
from lora_drop_runtime.errors import InputError, PlanError

from .policy import Policy
from .schedule import LastLogits, PeriodicSchedule, Schedule, StepKind, as_schedule

AUTO = "auto"  # as k: as many drafts as pay


@dataclass(frozen=True)
class DraftSource:
    """Where drafts come from.

    Attributes:
        lenience: of who verifies them: below 1 some are accepted that the full schedule would not have chosen
            (decoding/acceptance.py).
    """

    name: str
    looks_up: bool
    runs_lora_steps: bool
    lenience: float = 1.0


DRAFTS = {
    source.name: source
    for source in (DraftSource("lora", False, True), DraftSource("ngram", True, False), DraftSource("both", True, True))
}


@dataclass(frozen=True)
class VerifiedSchedule:
    """Every step is a refresh, and each verifies up to `drafts` tokens beside its own; None for as many as pay."""

    drafts: int | None

    def __post_init__(self) -> None:
        if self.drafts is not None:
            object.__setattr__(self, "drafts", K.whole("k", self.drafts, error=PlanError))

    def kind(self, step: int, last: LastLogits | None = None) -> StepKind:
        return StepKind.REFRESH


def scheduled(k: int | str | Schedule, policy: Policy) -> Schedule:
    """The schedule that a policy runs under a window k, `auto`, or a schedule object.

    Raises:
        InputError: `auto` or a schedule object where the policy has no use for it.
        PlanError: k out of range.
    """
    if isinstance(k, VerifiedSchedule):
        return k if policy.verifies else PeriodicSchedule(k.drafts or 0)
    if not policy.verifies:
        if isinstance(k, str) and k == AUTO:
            raise InputError(
                "k cannot be chosen by itself under this policy.",
                note=f"k is {AUTO!r}, the policy {policy.name!r}; it needs one that verifies its drafts.",
                hint="Use --policy lossless, or a number.",
            )
        return as_schedule(k)  # type: ignore[arg-type]  # of another text it says that it is no number
    if isinstance(k, str) and k == AUTO:
        return VerifiedSchedule(None)
    if isinstance(k, PeriodicSchedule):
        return VerifiedSchedule(k.k)
    if hasattr(k, "kind"):
        raise InputError(
            "This policy follows no schedule object.",
            note=f"A {type(k).__name__} was given; under {policy.name} k says how many drafts a refresh verifies.",
            hint=f"Give a number or {AUTO!r} as k, or use another policy.",
        )
    return VerifiedSchedule(k)  # type: ignore[arg-type]  # checked there


def said_policy(name: str, lenience: float | None) -> str:
    """`lossless`, or `lossless, lenience 0.3`: a policy as results have it."""
    return name if lenience is None or lenience == 1 else f"{name}, lenience {float(lenience)!r}"


def draft_source(
    name: Any, policy: Policy, sites: int, lenience: Any = None, usual: DraftSource | None = None
) -> DraftSource:
    """Where drafts come from; what is usual when None, or suits the bundle.

    Args:
        sites: that the bundle drops.
        lenience: above 0; what is usual when None, or 1, which accepts what the full schedule chooses.
        usual: of who asks for nothing else, where the policy has drafts.

    Raises:
        InputError: there is none of that name, the policy has no drafts, or the bundle makes none of that kind; the
            lenience is out of range.
    """
    if lenience is not None:
        lenience = LENIENCE.real("The lenience", lenience)
    if name is not None:
        check_known("draft", name, tuple(DRAFTS))
    for what, given in (("draft", name), ("lenience", lenience)):
        if given is not None and not policy.verifies:
            raise InputError(
                "The policy has no drafts.",
                note=f"{what} is {given!r}, the policy {policy.name!r}, which verifies none.",
                hint=f"Leave {what} out, or use the policy lossless.",
            )
    usual = usual if usual is not None and policy.verifies else DRAFTS["lora" if sites else "ngram"]
    source = DRAFTS[name or usual.name]
    if source.runs_lora_steps and not sites:
        raise InputError(
            "The bundle makes no drafts of that kind.",
            note=f"draft is {name!r}, which takes LoRA steps, and the bundle drops no layer.",
            hint="Use the draft ngram, or export with a drop list.",
        )
    return replace(source, lenience=usual.lenience if lenience is None else lenience)
