"""What a step, a prompt and a batch cost on the targets of one or several bundles, which take turns.

    python docs/benchmarks/engines.py BUNDLE@TARGET … [--context 128] [--threads 2] [--repeats 15] [--json FILE]

Prints for each arm the median in ms of a LoRA step, of a refresh over 1, 4 and 8 tokens of one row, of a refresh of
eight rows over one token each, and of prompts of 128 and 512 tokens; and each as a multiple of the first arm's, the
median of the ratios of runs that followed each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lora_drop_runtime import Session
from lora_drop_runtime.decoding.slots import Run
from lora_drop_runtime.engines import huge_pages
from lora_drop_runtime.plan.schedule import StepKind

ROWS, NEW_TOKENS = 8, 16


def calls_of(session: Session, context: int) -> dict[str, Callable[[], object]]:
    """What is timed, by its name; each leaves the session's request as it was."""

    def begun(rows: int) -> Callable[[StepKind, int], Callable[[], object]]:
        session.prefill(np.full((rows, context), 5), max_new_tokens=NEW_TOKENS, k=0)
        request = session._request
        assert request is not None

        def of(kind: StepKind, tokens: int) -> Callable[[], object]:
            runs = [Run(kind, [7] * tokens, context, context)] * rows

            def call() -> object:
                request.slots.run(kind, runs, range(rows))
                return request.slots.logits()

            return call

        return of

    one, several = begun(1), begun(ROWS)

    def prompt(tokens: int) -> Callable[[], object]:
        ids = np.full((1, tokens), 5)
        return lambda: session.prefill(ids, max_new_tokens=2)

    return {
        "LoRA step": one(StepKind.LORA, 1),
        "refresh of 1": one(StepKind.REFRESH, 1),
        "refresh of 4": one(StepKind.REFRESH, 4),
        "refresh of 8": one(StepKind.REFRESH, 8),
        "8 rows": several(StepKind.REFRESH, 1),
        "prompt of 128": prompt(128),
        "prompt of 512": prompt(512),
    }


def measured(arms: dict[str, Session], context: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call, by arm and call; all arms run a call twice in turn, and the second counts."""
    calls = {arm: calls_of(session, context) for arm, session in arms.items()}
    for own in calls.values():
        own["refresh of 1"]()  # weights are where they stay
    huge_pages.settle()
    found: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in own} for arm, own in calls.items()}
    for name in next(iter(calls.values())):
        for _ in range(max(3, repeats // 3) if name.startswith("prompt") else repeats):
            for arm, own in calls.items():
                own[name]()
                begin = time.perf_counter()
                own[name]()
                found[arm][name].append(time.perf_counter() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="+", metavar="BUNDLE@TARGET")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sessions = {}
    for arm in options.arms:
        path, _, target = arm.partition("@")
        name = f"{Path(path).name} on {target or 'its first target'}"
        sessions[name] = Session.open(path, target=target or None, policy="backfill", threads=options.threads)
    found = measured(sessions, options.context, options.repeats)
    first = next(iter(found.values()))
    for arm, calls in found.items():
        print(arm)
        for name, seconds in calls.items():
            ratio = statistics.median(own / base for own, base in zip(seconds, first[name], strict=True))
            print(f"  {name:14} {1000 * statistics.median(seconds):8.2f} ms  {ratio:.2f}×")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"context": options.context, "seconds": found}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
