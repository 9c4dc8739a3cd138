"""A layer with dropped sites, in the decoded stream of a text."""

from __future__ import annotations

from typing import Any, Protocol

from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.sites import ATTENTION, MLP, half_of

from .attention import Attention
from .exact import ExactLayer
from .layout import Layout
from .surrogates import features


class Halves(Protocol):
    """What runs the model's own layers (forcing.py)."""

    def sight(self, hidden: Any, exact: ExactLayer, layout: Layout, policy: Policy) -> Attention: ...

    def full_tokens(self, index: int, hidden: Any, layout: Layout, policy: Policy) -> tuple[Any, Any]: ...

    def first_half(self, index: int, hidden: Any, state: Attention) -> Any: ...

    def second_half(self, index: int, middle: Any) -> Any: ...


class DroppedLayer:
    """Sends LoRA steps through a layer, one of its sites after the other; prompt and refresh tokens take it in full.

    Whoever drives it takes `features` of each of the `sites` in turn, and sets `x` to what the surrogate makes of them;
    then `output` is the layer's. A half that is kept is computed on the way.

    Args:
        begun: of the sites with a state, by name: what prompt and refresh tokens had before them, [B, T − S, d]. It is
            written where a run with a change begins, and read where it ends: there its adapters have their place, since
            no change is known before.

    Attributes:
        sites: dropped ones of the layer, in the order of their computation.
        x: [B, S, d], what LoRA steps give the next site.
    """

    def __init__(
        self,
        forcing: Halves,
        index: int,
        hidden: Any,
        exact: ExactLayer,
        layout: Layout,
        plan: DropPlan,
        policy: Policy,
        begun: dict[str, Any],
    ) -> None:
        self.sites = plan.sites_of(index)
        self._forcing, self._index, self._layout = forcing, index, layout
        self._hidden, self._begun = hidden, begun
        self._states, self._owners = plan.states, plan.states_behind
        self._form, self._policy, self._exact = plan.form, policy, exact
        self._full: tuple[Any, Any] | None = None  # middle and output of full tokens, [B, T − S, d] each
        self.x = hidden if policy.exact_refreshes else hidden[:, layout.lora]
        if index not in plan.dropped_attentions:
            self.x = self._attended(hidden)
        elif not policy.exact_refreshes:
            output, middle = forcing.full_tokens(index, hidden, layout, policy)
            self._full = middle, output

    def _attended(self, hidden: Any) -> Any:
        """What LoRA steps have between the halves, after an attention that is kept."""
        forcing, index, layout, policy = self._forcing, self._index, self._layout, self._policy
        middle = forcing.first_half(index, hidden, forcing.sight(hidden, self._exact, layout, policy))
        if policy.exact_refreshes:
            return middle
        full = middle[:, layout.full]
        self._full = full, forcing.second_half(index, full)
        return middle[:, layout.lora]

    def features(self, site: str) -> tuple[Any, Any]:
        """What a site's surrogate multiplies and what it adds to, [B, S, d] each."""
        with_change, half = self._form.with_change, half_of(site)
        if with_change and site in self._states:
            self._begun[site] = self._full_tokens(1 if half == MLP else 0)
        if site not in self._owners:
            return self.x, self.x
        state = self._full_tokens(1 if half == ATTENTION else 2)
        if with_change:
            state = state - self._begun[self._owners[site]]
        return features(self.x, state, self._layout, self._form)

    def _full_tokens(self, place: int) -> Any:
        """The stream before the layer, between its halves or behind it, [B, T − S, d]; `place` is 0, 1 or 2."""
        full, exact = self._layout.full, self._exact
        if self._full is None:
            return (exact.input, exact.middle, exact.output)[place][:, full]
        return self._full[place - 1] if place else self._hidden[:, full]

    def output(self) -> Any:
        """Of the layer, after all its sites: [B, S, d] if refreshes are exact, else [B, T, d]."""
        import torch

        lora = self.x
        if half_of(self.sites[-1]) == ATTENTION:
            lora = self._forcing.second_half(self._index, lora)
        if self._full is None:
            return lora
        layout, full = self._layout, self._full[1]
        output = torch.empty(lora.shape[0], len(layout.is_lora), lora.shape[2], dtype=lora.dtype, device=lora.device)
        return output.index_copy(1, layout.lora, lora).index_copy(1, layout.full, full)
