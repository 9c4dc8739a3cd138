"""Tokens per refresh under `lossless` with LoRA steps as drafts, and the speed over the full schedule.

    python docs/modes/lossless.py BUNDLE… --text prose=held-out.txt --text code=code.txt --json lossless-MODEL.json

Each bundle continues windows of each text greedily, with k drafts a cycle and with k = 0, which take turns. grid.py
makes a table of the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime import Session
from lora_drop_runtime.text import TextCodec

PROMPT, NEW = 128, 96  # tokens


def continued(session: Session, prompt: Any, k: int) -> tuple[list[int], float]:
    """New tokens, and the seconds from the first to the last."""
    stream = session.stream(prompt, NEW, k=k, stop_token_ids=())
    tokens = [next(stream)]
    begin = time.perf_counter()
    tokens += stream
    return tokens, time.perf_counter() - begin


def measured(session: Session, windows: list[Any], k: int) -> dict[str, Any]:
    """Of one text and k: tokens per refresh, the share of drafts accepted, the median speed, where outputs part."""
    tokens = refreshes = drafted = accepted = 0
    speeds, parts = [], []
    for window in windows:
        full, plain = continued(session, window, 0)
        ours, seconds = continued(session, window, k)
        counted = session.statistics()
        assert counted is not None
        tokens, refreshes = tokens + counted.tokens, refreshes + counted.refreshes
        drafted, accepted = drafted + counted.drafted, accepted + counted.accepted
        speeds.append(plain / seconds)
        same = next((place for place, (a, b) in enumerate(zip(full, ours, strict=True)) if a != b), None)
        if same is not None:
            parts.append(same)
    return {
        "tokens_per_refresh": tokens / refreshes,
        "accepted": accepted / max(1, drafted),
        "speed": statistics.median(speeds),
        "parts": parts,
        "windows": len(windows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--k", default="1,2,3,5")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for bundle in options.bundles:
        codec = TextCodec.open(bundle / "tokenizer")
        with Session.open(bundle, policy="lossless", threads=options.threads) as session, warnings.catch_warnings():
            for name, file in (text.split("=", 1) for text in options.text):
                ids = codec.encode(Path(file).read_text(encoding="utf-8")[:400_000])
                begins = np.random.default_rng(1).integers(0, len(ids) - PROMPT, options.windows)
                windows = [ids[begin : begin + PROMPT] for begin in begins]
                for k in map(int, options.k.split(",")):
                    row = {"bundle": bundle.name, "text": name, "k": k, **measured(session, windows, k)}
                    rows.append(row)
                    print(row, flush=True)
    options.json.write_text(json.dumps({"rows": rows}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
