"""Tokens per refresh under `lossless` with LoRA steps as drafts, and the speed over the full schedule.

    python docs/modes/lossless.py BUNDLE… --text prose=held-out.txt --text code=code.txt --json lossless-MODEL.json

Each bundle continues windows of each text greedily, with k drafts a cycle and with k = 0, which take turns. grid.py
makes a table of the JSON. With --lenience 1,0.3 each of these is a row, and `backfill` is timed beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime import Session
from lora_drop_runtime.errors import DraftsDoNotPay
from lora_drop_runtime.text import TextCodec

PROMPT, NEW = 128, 96  # tokens


def continued(session: Session, prompt: Any, k: int, lenience: float | None = None) -> tuple[list[int], float]:
    """New tokens, and the seconds from the first to the last."""
    stream = session.stream(prompt, NEW, k=k, stop_token_ids=(), lenience=lenience)
    tokens = [next(stream)]
    begin = time.perf_counter()
    tokens += stream
    return tokens, time.perf_counter() - begin


class Arm:
    """Of one text, k and lenience: tokens per refresh, the share of drafts accepted, the speed, where outputs part."""

    def __init__(self, lenience: float | None = None) -> None:
        self.lenience = lenience
        self._tokens = self._refreshes = self._drafted = self._accepted = 0
        self._speeds, self._parts = list[float](), list[int]()

    def run(self, session: Session, window: Any, k: int, full: list[int], plain: float) -> None:
        """Continue a window, of which the full schedule made `full` in `plain` seconds."""
        ours, seconds = continued(session, window, k, self.lenience)
        if (counted := session.statistics()) is not None:
            self._tokens, self._refreshes = self._tokens + counted.tokens, self._refreshes + counted.refreshes
            self._drafted, self._accepted = self._drafted + counted.drafted, self._accepted + counted.accepted
        self._speeds.append(plain / seconds)
        same = next((place for place, (a, b) in enumerate(zip(full, ours, strict=True)) if a != b), None)
        if same is not None:
            self._parts.append(same)

    def figures(self) -> dict[str, Any]:
        return {
            "tokens_per_refresh": self._tokens / max(1, self._refreshes),
            "accepted": self._accepted / max(1, self._drafted),
            "speed": statistics.median(self._speeds),
            "parts": self._parts,
            "windows": len(self._speeds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--k", default="1,2,3,5")
    parser.add_argument("--lenience", metavar="L,…")
    parser.add_argument("--target")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    opening = {"target": options.target, "threads": options.threads}
    given = [None] if options.lenience is None else [*map(float, options.lenience.split(","))]
    for bundle in options.bundles:
        codec = TextCodec.open(bundle / "tokenizer")
        with contextlib.ExitStack() as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore", DraftsDoNotPay)  # that is measured here
            session = opened.enter_context(Session.open(bundle, policy="lossless", **opening))
            unverified = None
            if options.lenience is not None:
                unverified = opened.enter_context(Session.open(bundle, policy="backfill", **opening))
            for name, file in (text.split("=", 1) for text in options.text):
                ids = codec.encode(Path(file).read_text(encoding="utf-8")[:400_000])
                begins = np.random.default_rng(1).integers(0, len(ids) - PROMPT, options.windows)
                windows = [ids[begin : begin + PROMPT] for begin in begins]
                for k in map(int, options.k.split(",")):
                    arms, backfill = [Arm(lenience) for lenience in given], Arm()
                    for window in windows:
                        full, plain = continued(session, window, 0)
                        for arm in arms:
                            arm.run(session, window, k, full, plain)
                        if unverified is not None:
                            backfill.run(unverified, window, k, full, plain)
                    for arm in arms:
                        own = {} if arm.lenience is None else {"lenience": arm.lenience}
                        rows.append({"bundle": bundle.name, "text": name, "k": k, **own, **arm.figures()})
                        print(rows[-1], flush=True)
                    if unverified is not None:
                        figures = {one: backfill.figures()[one] for one in ("speed", "parts", "windows")}
                        rows.append({"bundle": bundle.name, "text": name, "k": k, "policy": "backfill", **figures})
                        print(rows[-1], flush=True)
    options.json.write_text(json.dumps({"rows": rows}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
