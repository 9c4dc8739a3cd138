"""Transformers with a static cache and torch.compile: `python -m gpu_check.baseline MODEL PROMPT NEW_TOKENS DEVICE`.

A process of its own, so that its memory is free before and after. Prints JSON. transformers compiles the decode step of
a static cache by itself on a GPU, with CUDA graphs; `compiled` says whether it did.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

RUNS = 3  # of which the first ones compile and capture


class Clock:
    """Takes the time of each token, as a streamer does."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main(directory: str, prompt: str, new_tokens: str, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    ids = torch.tensor([[1 + 7 * i % 97 for i in range(int(prompt))]], device=device)
    options = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0, "eos_token_id": None}
    count = int(new_tokens)
    for _ in range(RUNS):
        clock = Clock()
        model.generate(ids, min_new_tokens=count, max_new_tokens=count, streamer=clock, **options)
    times = clock.times[1:]  # the first is the prompt's
    assert len(times) == count, f"{len(times)} tokens, {count} were asked for"
    rate = (count - 1) / (times[-1] - times[0])
    compiled = hasattr(model, "_compiled_call")
    print(json.dumps({"tokens_per_s": rate, "compiled": compiled, "cache": "static"}))


if __name__ == "__main__":
    main(*sys.argv[1:])
