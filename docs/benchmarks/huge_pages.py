"""What a full step and a prompt gain by weights in huge pages (Linux).

    python docs/benchmarks/huge_pages.py BUNDLE [--target openvino] [--context 128]

One session is timed with its weights where the engine allocated them, and again after they were moved. Run it several
times: where memory lies differs from process to process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from lora_drop_runtime import Session
from lora_drop_runtime.engines import huge_pages

REPEATS, TOKENS = 10, 48


def times(session: Session, context: int) -> tuple[float, float]:
    """Medians of milliseconds to the first token, and from one to the next."""
    firsts, steps = [], []
    for _ in range(REPEATS):
        marks, prompt = [time.perf_counter()], np.arange(10, 10 + context).tolist()
        for _ in session.stream(prompt, TOKENS, stop_token_ids=()):
            marks.append(time.perf_counter())
        first, *others = np.diff(marks) * 1e3
        firsts.append(first)
        steps.append(statistics.median(others))
    return statistics.median(firsts), statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=128)
    options = parser.parse_args()
    huge_pages._STEPS = 1 << 30  # not before `settle`
    with Session.open(options.bundle, target=options.target, threads=options.threads, k=0) as session:
        times(session, options.context)  # both see code and data that are warm
        before = times(session, options.context)
        huge_pages.settle()
        after = times(session, options.context)
    for name, old, new in zip(("prompt", "step"), before, after, strict=True):
        print(f"{name:8} {old:8.2f} ms {new:8.2f} ms {old / new:6.3f}×")


if __name__ == "__main__":
    main()
