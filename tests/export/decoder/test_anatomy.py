"""Where the parts of a decoder are found, in families that name them differently."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_drop_export.decoder.anatomy import between_halves, decoder_layers, first_output
from tests.support.models import SIZES

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # ModernBERT wants some


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("Llama", "down_proj"),
        ("Gemma2", "post_feedforward_layernorm"),
        ("Gemma3Text", "post_feedforward_layernorm"),
        ("Olmo2", "post_feedforward_layernorm"),
        ("Olmo3", "post_feedforward_layernorm"),
        ("Exaone4", "post_feedforward_layernorm"),
        ("Glm4", "post_mlp_layernorm"),
        ("Apertus", "down_proj"),
        ("ModernBertDecoder", "mlp.Wo"),
        ("GPT2", "mlp.c_proj"),
        ("BioGpt", "fc2"),
        ("CTRL", "ffn.2"),
    ],
)
def test_the_stream_between_halves(name, ends):
    """A layer whose second half adds nothing gives what its first half gave."""
    config = getattr(transformers, f"{name}Config")(**SIZES | {"num_hidden_layers": 2} | IDS)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layer = decoder_layers(model)[1]
    last = [module for place, module in layer.named_modules() if place.endswith(ends)]
    assert len(last) == 1
    for parameter in last[0].parameters():  # Gemma adds 1 to a norm's weight
        torch.nn.init.constant_(parameter, -1.0 if name.startswith("Gemma") else 0.0)
    seen = []
    between_halves(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.register_forward_hook(lambda _, args, output: seen.append(first_output(output)))
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 3, 11, 19, 2]]), use_cache=False)
    middle, y = seen
    assert torch.equal(middle, y)
