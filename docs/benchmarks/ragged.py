"""What one call over rows with different numbers of new tokens gains on this machine.

    python docs/benchmarks/ragged.py BUNDLE [--target openvino] [--longest 30 --longest 120] [--repeats 7]

Medians of ratios of runs that take turns: the prefill of eight prompts, of a fifteenth of `--longest` tokens to all of
them, in one call over that row by row, and beside it one prompt of as many tokens in all over the same; and a tick of
seven rows of one token beside a prompt chunk of 128 over a prompt chunk of 135.
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

CONTEXT, CHUNK, ROWS = 128, 128, 8
LONGEST = (30, 60, 120)


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


def lengths_of(longest: int) -> list[int]:
    return [max(longest * (2 * row + 1) // (2 * ROWS - 1), 1) for row in range(ROWS)]


def prompts(session: Session, longest: int, repeats: int) -> tuple[float, float]:
    """One call over row by row, as a speed; and one row of all the tokens over row by row."""
    lengths = np.array(lengths_of(longest))
    ids = np.ones((ROWS, longest), np.int64)
    alone = np.ones((1, lengths.sum()), np.int64)

    def apart() -> None:
        for row, length in enumerate(lengths):
            session.prefill(ids[row : row + 1, :length], max_new_tokens=2)

    def together() -> None:
        session.prefill(ids, lengths, max_new_tokens=2)

    bound = ratio(lambda: session.prefill(alone, max_new_tokens=2), apart, repeats)
    return 1 / ratio(together, apart, repeats), 1 / bound


def tick(bundle: Bundle, target: str | None, threads: int | None, repeats: int) -> float:
    """A mixed tick over a chunk of as many tokens."""
    engine = open_engine(bundle, target, None, threads)
    room = CONTEXT + 2 * CHUNK
    needed = {"slots_kept": room, "slots_dropped": room}
    slots = slots_for(bundle, engine, ROWS, needed, several=True, chunk=CHUNK + ROWS)
    for row in range(ROWS):
        slots.admit(row, needed, None)
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
    parser.add_argument("--longest", type=int, action="append", help="tokens of the longest of the eight prompts")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with Session.open(options.bundle, target=options.target, threads=options.threads) as session:
        wanted, most = options.longest or LONGEST, session.bundle.manifest.limits.max_prompt_len
        for longest in wanted:
            if longest < 1 or sum(lengths_of(longest)) > most:
                parser.error(f"--longest {longest}: its prompts must have 8 to {most} tokens together")
        for longest in wanted:
            speed, bound = prompts(session, longest, options.repeats)
            print(
                f"prefill of {ROWS} prompts of {lengths_of(longest)[0]} to {longest} tokens: {speed:.2f} of the "
                f"speed row by row; one prompt of all the tokens {bound:.2f}"
            )
    over = tick(Bundle.open(options.bundle), options.target, options.threads, options.repeats)
    print(f"a tick of {ROWS - 1} rows of one token and a chunk of {CHUNK}: {over:.2f} of a chunk of {CHUNK + ROWS - 1}")


if __name__ == "__main__":
    main()
