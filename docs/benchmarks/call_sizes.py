"""What memory target `openvino` keeps for the largest call, and for each number of tokens that calls have had.

    python docs/benchmarks/call_sizes.py BUNDLE --rows 1 --most 300 --sizes 280 --every 70

Prints what the process itself holds (Anonymous, of Linux's smaps_rollup; Python is in it): after opening, after a short
prompt, after the longest one in so many rows, after prompts of one row and of other lengths, and once the session is
closed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from lora_drop_runtime import Session


def tell(when: str) -> None:
    found = re.search(r"Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(encoding="utf-8"))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    assert peak is not None
    print(f"{when}: {int(found[1]) / 1024:.0f} MiB, resident at most {int(peak[1]) / 1024:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--rows", type=int, default=1, help="of the largest prompt")
    parser.add_argument("--most", type=int, default=300, help="tokens of each of its rows")
    parser.add_argument("--sizes", type=int, default=280, help="how many other lengths")
    parser.add_argument("--every", type=int, default=70, help="of these the memory is told")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not 0 <= options.sizes <= options.most - 2 or min(options.rows, options.every) < 1:
        parser.error("--sizes is 0 to --most - 2, --rows and --every at least 1")
    with Session.open(options.bundle, target="openvino", threads=options.threads, k=0) as session:

        def prompt(rows: int, tokens: int) -> None:
            session.prefill(np.ones((rows, tokens), np.int64), max_new_tokens=2)

        tell("open")
        prompt(1, 1)
        tell("one token")
        prompt(options.rows, options.most)
        tell(f"rows of {options.most} tokens, {options.rows} in all")
        lengths = np.random.default_rng(0).permutation(np.arange(2, options.most))
        for count, tokens in enumerate(lengths[: options.sizes].tolist(), 1):
            prompt(1, tokens)
            if count % options.every == 0:
                tell(f"{count} other lengths")
    tell("closed")


if __name__ == "__main__":
    main()
