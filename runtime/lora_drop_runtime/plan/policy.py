"""What becomes of the K/V that LoRA steps leave out: the one place that knows the refresh policies by name.

Enters: a name typed by a user or stored in a manifest, read once at the edge by `policy_named`. Leaves: an object that
says which LoRA steps a refresh takes back, and what room that needs. Knows nothing of caches, graphs or engines.

A refresh *takes back* a LoRA step by running its token again, in all layers and at its position: what the step wrote
into kept layers is overwritten, the hole that it left in dropped layers is filled.

    skip (the paper)   takes none back: it runs one token and leaves the holes
    backfill           takes all back since the last refresh: afterwards every cache is the full model's
    fill               takes none back and leaves no holes: LoRA steps write K/V of dropped attentions, made of the
                       input that the surrogate gets. That is another graph, so it is chosen at the export
    lossless           as backfill, and its logits judge the LoRA steps' tokens, which are drafts: what the full model
                       would not have chosen goes (decoding/lossless.py)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lora_drop_runtime.command_line import check_known

from .schedule import PeriodicSchedule, Schedule, StepKind, most_refreshes


@dataclass(frozen=True)
class Policy(ABC):
    """What a refresh does about the LoRA steps before it.

    Attributes:
        name: as users write it and manifests store it.
        leaves_holes: whether tokens of LoRA steps stay missing in dropped layers, which is what saves K/V. A policy
            that leaves none gives dropped layers as many slots as kept ones.
        exact_refreshes: whether all caches and logits are the full model's after a refresh.
        fills: whether LoRA steps write K/V of dropped attentions.
        verifies: whether tokens of LoRA steps are drafts that a refresh accepts or not, so that a request's tokens are
            those of the full schedule, and single steps (`Session.step`) are all refreshes.
    """

    name: str
    leaves_holes: ClassVar[bool]
    exact_refreshes: ClassVar[bool]
    fills: ClassVar[bool] = False
    verifies: ClassVar[bool] = False

    @property
    def keeps_up(self) -> bool:
        """Whether dropped attentions have every token that kept ones have, after each step and not each refresh."""
        return self.fills or self.verifies

    @property
    def in_steps(self) -> Policy:
        """The policy that runs the same steps on tokens that are given, one call for each."""
        return self

    @abstractmethod
    def steps_taken_back(self, lora_steps: int) -> int:
        """How many LoRA steps a refresh takes back, the latest ones, after `lora_steps` since the refresh before it."""

    def refresh_tokens(self, lora_steps: int) -> int:
        """Tokens of a row that a refresh runs: those of the LoRA steps that it takes back, and its own."""
        return self.steps_taken_back(lora_steps) + 1

    def runs_several(self, schedule: Schedule) -> bool:
        """Whether steps of several tokens of a row come between those of one, about as many each time: drafts to be
        verified are now more and now fewer."""
        is_full = isinstance(schedule, PeriodicSchedule) and not schedule.k
        return self.refresh_tokens(1) > 1 and not self.verifies and not is_full

    def dropped_slots(self, prompt: int, steps: int, schedule: Schedule) -> int:
        """Slots that a row needs in a dropped layer's cache: `prompt` tokens, then decode steps 1 … `steps`.

        Exact for the periodic schedule. Of another only the most refreshes are known: one slot for each, and for the
        LoRA steps that they take back as many as if one refresh took them all.
        """
        if not self.leaves_holes:
            return prompt + steps
        if not isinstance(schedule, PeriodicSchedule):
            refreshes = most_refreshes(schedule, steps)
            return prompt + refreshes + (self.steps_taken_back(steps - refreshes) if refreshes else 0)
        slots, lora_steps = prompt, 0
        for step in range(1, steps + 1):
            if schedule.kind(step) is StepKind.REFRESH:
                slots, lora_steps = slots + self.refresh_tokens(lora_steps), 0
            else:
                lora_steps += 1
        return slots


class Skip(Policy):
    """The paper's: the refresh runs one token, holes stay."""

    leaves_holes = True
    exact_refreshes = False

    def steps_taken_back(self, lora_steps: int) -> int:
        return 0


class Backfill(Policy):
    """The refresh runs all tokens since the last one, which makes every cache exact and saves no K/V."""

    leaves_holes = False
    exact_refreshes = True

    def steps_taken_back(self, lora_steps: int) -> int:
        return lora_steps


class Fill(Policy):
    """LoRA steps write K/V of dropped attentions, too, from approximated inputs; the refresh runs one token."""

    leaves_holes = False
    exact_refreshes = False
    fills = True

    def steps_taken_back(self, lora_steps: int) -> int:
        return 0


class Lossless(Backfill):
    """Backfill whose logits verify the tokens of the LoRA steps: the output is the full schedule's."""

    verifies = True

    @property
    def in_steps(self) -> Policy:
        return _BACKFILL


DEFAULT_POLICY = "skip"
_BACKFILL = Backfill("backfill")
POLICIES: dict[str, Policy] = {
    policy.name: policy for policy in (Skip(DEFAULT_POLICY), _BACKFILL, Fill("fill"), Lossless("lossless"))
}


def policy_named(name: str) -> Policy:
    """The policy that a user calls `name`.

    Raises:
        InputError: there is none of that name.
    """
    check_known("refresh policy", name, tuple(POLICIES))
    return POLICIES[name]
