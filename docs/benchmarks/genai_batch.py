"""Tokens a second of onnxruntime-genai with several rows at once, in its own Python API.

    python docs/benchmarks/genai_batch.py MODEL --batch 8 --prompt-tokens 128 --new-tokens 64

MODEL is a directory that `python -m onnxruntime_genai.models.builder` wrote; runs where onnxruntime-genai is
installed. All rows begin and end together, and the prompts' time counts. The last line is the median.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    try:
        import onnxruntime_genai as og
    except ImportError:
        parser.error("onnxruntime-genai is not installed here: pip install onnxruntime-genai, in a place of its own")
    config = og.Config(options.model)
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {options.threads}}}}}}}}}')
    model, rng = og.Model(config), np.random.default_rng(0)
    whole = options.prompt_tokens + options.new_tokens
    speeds = []
    for repeat in range(options.repeats + 1):
        prompts = rng.integers(100, 10000, (options.batch, options.prompt_tokens)).astype(np.int32)
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, min_length=whole, max_length=whole, batch_size=options.batch)
        begin = time.perf_counter()
        generator = og.Generator(model, params)
        generator.append_tokens(prompts)
        while not generator.is_done():
            generator.generate_next_token()
        seconds = time.perf_counter() - begin
        if repeat:  # the first warms up
            speeds.append(options.batch * options.new_tokens / seconds)
            print(f"{speeds[-1]:.1f}")
    print(f"{statistics.median(speeds):.1f}")


if __name__ == "__main__":
    main()
