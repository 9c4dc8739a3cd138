"""Rank a model's layers by how little they change their input, on a text.

    python examples/rank_layers.py MODEL_DIR TEXT_FILE

Prints layers in dropping order: mean cosine of each layer's input and output (residual stream), highest first.
The demo's drop list comes from here, with the text that ships in lora_drop_export/sample.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ALWAYS_FIRST, ALWAYS_LAST = 3, 1


def main(model_dir: str, text_file: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(Path(text_file).read_text(), return_tensors="pt").input_ids[:, :1024]
    streams: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for layer in model.model.layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    # streams[i] is layer i's input, so streams[i + 1] is its output; the last layer is never dropped
    cosines = {
        i: torch.nn.functional.cosine_similarity(streams[i], streams[i + 1], dim=-1).mean().item()
        for i in range(ALWAYS_FIRST, len(streams) - ALWAYS_LAST)
    }
    for layer in sorted(cosines, key=lambda i: -cosines[i]):
        print(f"{layer:>3}  {cosines[layer]:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
