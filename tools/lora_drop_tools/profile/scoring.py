"""What dropping a list of sites costs, in KL against the full model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import Policy

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.exact import ExactLayer
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
    from lora_drop_tools.teacher_forcing.layout import Layout
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

HEAD_ROWS = 128  # tokens whose logits are in memory at once, beside those of one window in full
Tick = Callable[[], None]


def not_finite(dtype: Any) -> ModelError:
    """Of a model that overflows in the dtype that it runs in."""
    return ModelError("The model's logits are not finite.", note=f"Some overflow in {dtype}.", hint="Use --dtype fp32.")


@dataclass(frozen=True)
class Scoring:
    """How drop lists are scored: KL(full model ‖ LoRA step) in nats, mean over LoRA steps.

    Attributes:
        plan: without sites; its surrogate stands for them.
        layout: of every window.
        surrogates: adapters of sites that have one.
    """

    forcing: TeacherForcing
    plan: DropPlan
    layout: Layout
    policy: Policy
    surrogates: Surrogates = field(default_factory=dict)

    def decoded(self, hidden: Any, exact: Sequence[ExactLayer], sites: Sequence[str], first: int) -> Iterator[Any]:
        """The decoded stream after each layer from `first` on, whose input `hidden` is."""
        plan = dataclasses.replace(self.plan, sites=tuple(sites))
        for index in range(first, len(exact)):
            hidden = self.forcing.decoded_layer(
                index, hidden, exact[index], self.layout, plan, self.surrogates, self.policy
            )
            yield hidden

    def reference(self, exact: Sequence[ExactLayer]) -> Any:
        """The full model's log probabilities at the LoRA steps of a window, [S, V]."""
        import torch

        return torch.cat([self._log_probs(rows) for rows in exact[-1].output[:, self.layout.lora].split(HEAD_ROWS, 1)])

    def kl(self, reference: Any, hidden: Any) -> float:
        """Sum over the LoRA steps of a window, from the last layer's output in the decoded stream."""
        import torch

        lora = hidden if self.policy.exact_refreshes else hidden[:, self.layout.lora]
        total = 0.0
        for rows, expected in zip(lora.split(HEAD_ROWS, 1), reference.split(HEAD_ROWS), strict=True):
            found = self._log_probs(rows)
            total += float(torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
        if not math.isfinite(total):
            raise not_finite(lora.dtype)
        return total

    def of_lists(
        self,
        windows: Any,
        lists: Sequence[Sequence[str]],
        tick: Tick,
        surrogates: Sequence[Surrogates] | None = None,
    ) -> list[float]:
        """Of each drop list over windows of token ids [N, T], one window in memory; `tick` after each window.

        Args:
            surrogates: of each list, in the place of those of all.
        """
        import torch

        sums = [0.0] * len(lists)
        with torch.no_grad():
            for ids in windows:
                exact = self.forcing.exact(ids[None])
                reference = self.reference(exact)
                for index, sites in enumerate(lists):
                    plan = dataclasses.replace(self.plan, sites=tuple(sites))
                    own = self.surrogates if surrogates is None else surrogates[index]
                    hidden = self.forcing.decode(exact, ids[None], self.layout, plan, own, self.policy)
                    sums[index] += self.kl(reference, hidden)
                tick()
        return [total / (len(windows) * len(self.layout.lora)) for total in sums]

    def _log_probs(self, hidden: Any) -> Any:
        """[1, S, d] → [S, V]."""
        return self.forcing.logits(hidden)[0].float().log_softmax(dim=-1)
