"""What an attention call says of a layer is what transformers does by itself, in eager mode."""

from __future__ import annotations

import torch
import transformers

from lora_drop_export.decoder.attention_interface import AttentionCall, register_attention
from tests.support.models import SIZES

NAME = "lora_drop_test_interface"
TYPES = ["sliding_attention", "full_attention"]


def test_a_window_that_only_the_mask_knows():
    """Qwen2-MoE's dense layers hand their attention no window; transformers hides what is behind it all the same."""
    calls: list[AttentionCall] = []
    register_attention(NAME, lambda call: calls.append(call) or call.query.transpose(1, 2))
    window = {"use_sliding_window": True, "sliding_window": 5, "layer_types": TYPES, "mlp_only_layers": [0, 1]}
    config = transformers.Qwen2MoeConfig(**SIZES | {"num_hidden_layers": 2}, **window, attn_implementation=NAME)
    with torch.device("meta"):
        transformers.Qwen2MoeForCausalLM(config)(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False)
    assert [call.window for call in calls] == [5, 0]
