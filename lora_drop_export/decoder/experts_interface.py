"""Our experts, which transformers' models call instead of their own: what a trace makes of a mixture of experts.

Enters: what transformers passes to an experts function. Leaves: an `ExpertsCall` to a function of ours, and its result
[T, d] back. Experts that no step graph holds are refused where the modules are looked at (refusals.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExpertsCall:
    """One call of a layer's experts, for T tokens that a router has sent to K of E each.

    Expert e makes `down_e (silu(gate_e x) · up_e x)` of a token x, and the result is the sum over a token's experts,
    each times its weight.

    Attributes:
        module: of the experts; `gate_up_proj` [E, 2·I, d], gate above up, and `down_proj` [E, d, I].
        hidden: [T, d].
        index: int64 [T, K], the experts of each token.
        weights: [T, K].
    """

    module: Any
    hidden: Any
    index: Any
    weights: Any


def register_experts(name: str, run: Callable[[ExpertsCall], Any]) -> None:
    """Let models with `experts_implementation=name` call `run`, which returns [T, d].

    The last function of a name counts: transformers looks it up at every call.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def experts(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return run(ExpertsCall(module, hidden_states, top_k_index, top_k_weights))

    ALL_EXPERTS_FUNCTIONS.register(name, experts)
