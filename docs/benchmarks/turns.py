"""The time to the first token of each turn of a chat, with and without its caches.

    python docs/benchmarks/turns.py BUNDLE [--repeats 3]

Two sessions take turns at the same chat, of ten short questions and replies of 24 tokens. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from lora_drop_runtime import Session
from lora_drop_runtime.text import TextCodec

QUESTIONS = (
    "What is a river?",
    "Why does it flow?",
    "Where does it end?",
    "What lives in it?",
    "How deep is it?",
    "Who built the first boats?",
    "What is a dam for?",
    "Is water heavy?",
    "How cold can it be?",
    "Say all that in one sentence.",
)
REPLY = 24


def turns(session: Session, codec: TextCodec, reuse: bool) -> tuple[list[int], list[float]]:
    """Tokens of each turn's prompt, and seconds to its first token."""
    messages: list[dict[str, str]] = []
    lengths, seconds = [], []
    for turn, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        ids = codec.encode_chat(messages)
        begin = time.perf_counter()
        stream = session.stream(ids, REPLY, reuse_prefix=reuse and turn > 0)
        tokens = [next(stream)]
        seconds.append(time.perf_counter() - begin)
        lengths.append(len(ids))
        tokens += stream
        pieces = codec.stream(())
        reply = "".join(pieces.push(token) for token in tokens) + pieces.finish()
        messages.append({"role": "assistant", "content": reply})
    return lengths, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--policy")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    codec = TextCodec.open(options.bundle / "tokenizer")
    found: dict[bool, list[list[float]]] = {True: [], False: []}
    with Session.open(options.bundle, policy=options.policy, threads=options.threads) as session:
        for _ in range(options.repeats):
            for reuse in found:
                lengths, seconds = turns(session, codec, reuse)
                found[reuse].append(seconds)
    print("| turn | tokens of the prompt | caches kept, ms | run again, ms |\n|---|---|---|---|")
    kept, again = ([1000 * statistics.median(one) for one in zip(*rows, strict=True)] for rows in found.values())
    for turn, row in enumerate(zip(lengths, kept, again, strict=True), 1):
        if turn in (1, 2, 5, len(QUESTIONS)):
            print(f"| {turn} | {row[0]} | {row[1]:.0f} | {row[2]:.0f} |")


if __name__ == "__main__":
    main()
