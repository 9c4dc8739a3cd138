"""How an expert joins gate and up is found by trying its own code."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from lora_drop_export.decoder.gates import gate_of


def experts(kind: type = GptOssExperts, **numbers: float) -> torch.nn.Module:
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_local_experts": 2}
    return kind(transformers.GptOssConfig(**sizes, **numbers))


@pytest.mark.parametrize("alpha", [1.702, 1.0, 30.0])
@pytest.mark.parametrize("limit", [1e-7, 0.6, 7.0, 1e7, 1e20, 3e38])
def test_any_limit(limit, alpha):
    """One added to numbers that are all far from it, or of nearly nothing, is not seen."""
    module = experts(swiglu_limit=limit, swiglu_alpha=alpha)
    gate = gate_of(module)
    assert gate is not None
    assert (gate.alpha, gate.added) == (alpha, 1.0)
    for size in (1e-8, 1.0, 10.0, 1e6):
        both = size * torch.linspace(-1, 1, 18).reshape(3, 6)
        assert torch.allclose(gate(both[..., ::2], both[..., 1::2]), module._apply_gate(both), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("hidden_activation", "activation"),
    [("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("gelu", "gelu"), ("silu", "silu"), ("relu", None)],
)
def test_activations(hidden_activation, activation):
    sizes = {"hidden_size": 4, "moe_intermediate_size": 6, "num_experts": 2, "num_attention_heads": 1}
    module = Gemma4TextExperts(transformers.Gemma4TextConfig(**sizes, hidden_activation=hidden_activation))
    gate = gate_of(module)
    assert (None if gate is None else gate.activation) == activation
    if gate is not None:
        both = 3 * torch.linspace(-1, 1, 36).reshape(3, 12)
        assert torch.allclose(gate(*both.chunk(2, dim=-1)), module._apply_gate(both), rtol=1e-5, atol=1e-7)


class ClampedBehind(GptOssExperts):
    """As Step 3.7 does."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(gate_up[..., ::2]).clamp(max=self.limit)
        return gate * gate_up[..., 1::2].clamp(-self.limit, self.limit)


@pytest.mark.parametrize("limit", [1e-4, 0.6, 7.0])
def test_a_limit_behind_the_silu_is_another_formula(limit):
    assert gate_of(experts(ClampedBehind, swiglu_limit=limit)) is None


def test_a_negative_limit_is_another_formula():
    """ONNX Runtime's kernel ends the process there."""
    assert gate_of(experts(swiglu_limit=-1.0)) is None


def test_modules_of_an_older_transformers():
    """Of 5.6, which does not say that gate and up lie in turns."""
    module = experts()
    del module.is_concatenated
    gate = gate_of(module)
    assert gate is not None
    assert (gate.alpha, gate.added, gate.limit) == (1.702, 1.0, 7.0)
