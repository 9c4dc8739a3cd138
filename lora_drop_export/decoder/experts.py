"""transformers' experts interface: a mixture of experts as one node of the trace.

    lora_drop::Experts(x, index, weights, gate and up, down[, their biases]), attributes experts: E, per_token: K
    [T, d], int64 [T, K], [T, K], [E·2I, d], [E·d, I], [E, 2I], [E, d] → [T, d]

Expert e makes of a token x `down_e (g · σ(α g) · (u + β))`, where g is `gate_e x` and u `up_e x`, each with its bias,
and, where there is a limit, g at most that and u between it and less it. `α = 1, β = 0` is SiLU; in some families it is
`down_e (GELU(g) · u)`. The result is the sum over the token's K experts, each times its weight. The two matrices have
the experts' own one below the other, a row of gate and one of up in turns, and so have the biases: what an engine reads
for one expert is one piece then. Where the gate is GELU all gates lie before all ups. In the checkpoint they may lie
otherwise (checkpoint/experts.py). Experts that no step graph holds are refused where the modules are looked at
(refusals.py).

Nemotron H's experts have no gate and make `down_e relu(up_e x)²`. Kernels that read the chosen experts alone have a
gate, so these get one with the rows of up: `relu(u) · u` is the formula with an α at which σ is 0 or 1.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import onnx_ir as ir
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.experts import APART, ROWS

from .attention_interface import DOMAIN
from .gates import SILU, gate_of

_MATRICES = _GATE_UP, _DOWN = 3, 4  # their places among a node's inputs
_STEEP = 2.0**40  # α


def is_mixture(node: ir.Node) -> bool:
    """Whether a node of a trace is a mixture of experts."""
    return node.domain == DOMAIN and node.op_type == "Experts"


def activations_of_experts(graph: ir.Graph) -> set[str]:
    """Of the gates of all mixtures of a trace."""
    return {node.attributes["activation"].as_string() for node in graph if is_mixture(node)}


def is_matrix_of_experts(node: ir.Node, place: int) -> bool:
    """Whether a node of a trace reads all experts' matrices at a place."""
    return is_mixture(node) and place in _MATRICES


def _emit(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """One Experts node in place of a call, with the parameters as transformers has them."""
    import torch

    if top_k_index.shape[1] == 0:
        raise ModelError(
            "The model's config cannot be used.",
            note="Its routers send a token to 0 experts; needed is 1 at least.",
            hint="Check config.json.",
        )
    gate = gate_of(module)
    assert gate is not None  # else refused
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else ()
    (output,) = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Experts",
        (hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, *biases),
        attrs={
            "experts": module.gate_up_proj.shape[0],
            "per_token": top_k_index.shape[1],
            **dataclasses.asdict(gate),
        },
        dtypes=(hidden_states.dtype,),
        shapes=(hidden_states.shape,),
        version=1,
    )
    return output


def _each_expert(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """What a mixture makes of tokens [T, d], one expert after the other."""
    import torch
    from torch.nn.functional import linear

    result = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, place = torch.where(top_k_index == expert)
        inner = self._apply_gate(linear(hidden_states[token], self.gate_up_proj[expert]))
        made = linear(inner, self.down_proj[expert]) * top_k_weights[token, place, None]
        result.index_add_(0, token, made.to(result.dtype))
    return result


@functools.cache
def _gated(kind: Any) -> Any:
    """The class of experts without a gate, whose gate is `relu`."""
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    class Gated(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            name = self.config._experts_implementation
            return ALL_EXPERTS_FUNCTIONS.get_interface(name, _each_expert)(self, *args, **kwargs)

        def _apply_gate(self, gate_up: Any) -> Any:
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.relu(gate) * up

    Gated.__name__ = kind.__name__  # by which other parts know what it is
    return Gated


def _is_squared_relu(activation: Any) -> bool:
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"):
        values = torch.linspace(-8, 8, 33)
        return bool(torch.equal(activation(values), torch.relu(values) ** 2))


def exchange_experts(model: Any) -> None:
    """Let experts that make `down relu(up x)²` have a gate, whose rows are those of up, for good. Their weights are to
    be read anew."""
    import torch

    for module in model.modules():
        if not getattr(module, "has_gate", True) and not module.has_bias and _is_squared_relu(module.act_fn):
            up = module.up_proj
            count, inner, width = up.shape
            del module.up_proj
            module.gate_up_proj = torch.nn.Parameter(up.new_empty((count, 2 * inner, width)), up.requires_grad)
            module.has_gate, module.alpha = True, _STEEP
            kind: Any = type(module)
            module.__class__ = _gated(kind)


def register_experts(name: str) -> None:
    """Let mixtures of models with `experts_implementation=name` be nodes."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, _emit)


def name_experts(graph: ir.Graph, turned: bool) -> dict[str, Fraction]:
    """Give the matrices of experts the form and the name that they have in a bundle; returns the share of each that one
    token reads.

    Args:
        turned: whether transformers has them transposed, as in the families `TURNED`.
    """
    shares: dict[str, Fraction] = {}
    for node in graph:
        if not is_mixture(node):
            continue
        share = Fraction(*(node.attributes[name].as_int() for name in ("per_token", "experts")))
        shares |= {str(bias.name): share for bias in node.inputs[5:] if bias is not None}
        for place in _MATRICES:
            before = node.inputs[place]
            assert before is not None
            assert before.shape is not None
            count, height, width = (int(size) for size in before.shape)  # type: ignore[arg-type]
            if turned:
                height, width = width, height
            is_apart = place == _GATE_UP and node.attributes["activation"].as_string() != SILU
            name = f"{before.name}{APART if is_apart else ROWS}"
            made = ir.Value(name=name, shape=ir.Shape([count * height, width]), type=before.type)
            node.replace_input_with(place, made)
            graph.initializers.add(made)
            del graph.initializers[str(before.name)]
            shares[name] = share
    return shares
