"""What one call over rows with different numbers of new tokens gains on this machine.

    python docs/benchmarks/ragged.py BUNDLE [--target openvino] [--repeats 7]

Two figures, medians of ratios of runs that take turns: the prefill of eight prompts of 8 to 120 tokens in one call over
that row by row; and a tick of seven rows of one token beside a prompt chunk of 128 over a prompt chunk of 135.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.paged_slots import slots_for
from lora_drop_runtime.decoding.slots import Run
from lora_drop_runtime.engines.open import open_engine
from lora_drop_runtime.plan.schedule import StepKind

LENGTHS = (8, 24, 40, 56, 72, 88, 104, 120)
CONTEXT, CHUNK, ROWS = 128, 128, 8


def ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> float:
    """The median of our time over theirs."""
    found = []
    for number in range(repeats + 1):
        seconds = []
        for call in (ours, theirs):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        if number:  # the first run prepares
            found.append(seconds[0] / seconds[1])
    return statistics.median(found)


def prompts(session: Session, repeats: int) -> float:
    """One call over row by row, as a speed."""
    ids = np.ones((len(LENGTHS), max(LENGTHS)), np.int64)
    lengths = np.array(LENGTHS)

    def apart() -> None:
        for row, length in enumerate(LENGTHS):
            session.prefill(ids[row : row + 1, :length], max_new_tokens=2)

    return 1 / ratio(lambda: session.prefill(ids, lengths, max_new_tokens=2), apart, repeats)


def tick(bundle: Bundle, target: str | None, threads: int | None, repeats: int) -> float:
    """A mixed tick over a chunk of as many tokens."""
    engine = open_engine(bundle, target, None, threads)
    room = CONTEXT + 2 * CHUNK
    needed = {"slots_kept": room, "slots_dropped": room}
    slots = slots_for(bundle, engine, ROWS, needed, several=True)
    for row in range(ROWS):
        slots.admit(row, needed)
    tokens = [1] * (CHUNK + ROWS - 1)
    mixed = [Run(StepKind.REFRESH, [1], CONTEXT, CONTEXT) for _ in range(ROWS - 1)]
    mixed.append(Run(StepKind.REFRESH, tokens[:CHUNK], CONTEXT, CONTEXT))
    alone = [Run(StepKind.REFRESH, tokens, CONTEXT, CONTEXT)]
    try:
        return ratio(
            lambda: slots.run(StepKind.REFRESH, mixed, range(ROWS)),
            lambda: slots.run(StepKind.REFRESH, alone, [0]),
            repeats,
        )
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with Session.open(options.bundle, target=options.target, threads=options.threads) as session:
        speed = prompts(session, options.repeats)
    print(f"prefill of {len(LENGTHS)} ragged prompts: {speed:.2f} of the speed row by row")
    over = tick(Bundle.open(options.bundle), options.target, options.threads, options.repeats)
    print(f"a tick of {ROWS - 1} rows of one token and a chunk of {CHUNK}: {over:.2f} of a chunk of {CHUNK + ROWS - 1}")


if __name__ == "__main__":
    main()
