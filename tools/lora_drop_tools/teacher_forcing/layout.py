"""Which tokens of a text are refreshes, and what each of them sees."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, Policy
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind


@dataclass(frozen=True)
class Layout:
    """Which tokens of a text a LoRA step decodes.

    Attributes:
        is_lora: bool [T].
    """

    is_lora: Any

    @classmethod
    def of(cls, tokens: int, prompt: int, schedule: PeriodicSchedule, device: Any = "cpu") -> Layout:
        """`prompt` tokens at once, then one per decode step."""
        import torch

        kinds = [schedule.kind(position - prompt + 1) for position in range(prompt, tokens)]
        flags = [False] * min(prompt, tokens) + [kind is StepKind.LORA for kind in kinds]
        return cls(torch.tensor(flags, device=device))

    @functools.cached_property
    def lora(self) -> Any:
        """Positions of LoRA steps, [S]."""
        return self.is_lora.nonzero()[:, 0]

    @functools.cached_property
    def full(self) -> Any:
        """Positions of prompt and refreshes, [T − S]."""
        return (~self.is_lora).nonzero()[:, 0]

    @functools.cached_property
    def anchor(self) -> Any:
        """For each LoRA step the position of the last refresh or prompt token before it, [S]."""
        return self.full[self.segment]

    @functools.cached_property
    def segment(self) -> Any:
        """The same as an index into `full`, [S]."""
        import torch

        return torch.searchsorted(self.full, self.lora) - 1

    @functools.cached_property
    def offset(self) -> Any:
        """How many LoRA steps there were since the last refresh or prompt token, itself counted, [T]; 0 at these."""
        import torch

        offset = torch.zeros_like(self.is_lora, dtype=torch.int64)
        offset[self.lora] = self.lora - self.anchor
        return offset

    @functools.cached_property
    def segment_begin(self) -> Any:
        """For each LoRA step the index in `lora` of the first one after the same anchor, [S]."""
        import torch

        return torch.searchsorted(self.segment.contiguous(), self.segment.contiguous())


def check_policy(policy: Policy, k: int) -> None:
    """Refuse a policy whose stream is neither of the two that teacher forcing computes.

    Raises:
        PlanError: refreshes take some LoRA steps back and leave others.
    """
    if not policy.exact_refreshes and any(policy.steps_taken_back(steps) for steps in range(1, k + 1)):
        raise PlanError(
            "Texts cannot be decoded all tokens at once under this policy.",
            note=f"A refresh under {policy.name} takes some of {k} LoRA steps back and leaves the others.",
            hint=f"Use --policy {DEFAULT_POLICY}.",
        )
