"""How much faster `lossless` with drafts looked up in the text edits passages than the full schedule does.

    python examples/editing/measure.py BUNDLE [--task edit] [--draft ngram] [--k auto] [--target NAME] [--json FILE]

Each of the passages of edits.json goes into the model's chat template with its edit; those named `module:function` are
read from Python's own library. Both runs are greedy, and alternate. Printed are the median of the ratios of decoding
time, the tokens that a refresh made, and after how many tokens the outputs part, which rounding may let them do.
`--task continue` goes on from the prose passages instead, by draws at temperature 0.8: text in which little repeats.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_drop_runtime import Session
from lora_drop_runtime.command_line import run_command
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.text import TextCodec

ROOM = 1.3  # new tokens that an edit may take, over those of the passage
ENTRIES = json.loads(Path(__file__).with_name("edits.json").read_text(encoding="utf-8"))
CONTINUED = 128  # new tokens of a passage that is continued
DRAWS = SamplingOptions(temperature=0.8, seed=1)


def passage(entry: dict[str, str]) -> str:
    """The text to be edited."""
    if "text" in entry:
        return entry["text"]
    module, _, name = entry["source"].partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return "```python\n" + textwrap.dedent(inspect.getsource(found)) + "```"


def timed(
    session: Session, prompt: Any, new_tokens: int, k: int | str | None, sampling: SamplingOptions | None
) -> tuple[list[int], float]:
    """Tokens, and seconds from the first to the last."""
    tokens: list[int] = []
    begin = 0.0
    for token in session.stream(prompt, new_tokens, k=k, sampling=sampling):
        if not tokens:
            begin = time.perf_counter()
        tokens.append(token)
    return tokens, time.perf_counter() - begin


def parted(ours: list[int], theirs: list[int]) -> int | None:
    """The tokens before the first that differs; None where there is none."""
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def measure(arguments: Sequence[str]) -> None:
    """Parse the arguments, measure, print a line for each passage and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--task", choices=("edit", "continue"), default="edit")
    parser.add_argument("--target", help="of the bundle's, for example openvino")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--draft", default="ngram")
    parser.add_argument("--k", default="auto")
    parser.add_argument("--lenience", type=float, help="of the verification, above 0 and at most 1")
    parser.add_argument("--count", type=int, default=len(ENTRIES), help="the first so many passages")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if min(options.count, options.repeats) < 1:
        parser.error("--count and --repeats are at least 1")
    if options.k != "auto" and not options.k.isdecimal():
        parser.error(f"--k is {options.k}, possible is a number or auto")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json is {options.json}, and there is no such directory")
    k = options.k if options.k == "auto" else int(options.k)
    entries, edits = ENTRIES[: options.count], options.task == "edit"
    entries = entries if edits else [entry for entry in entries if "text" in entry]
    sampling = None if edits else DRAWS
    warnings.simplefilter("ignore")
    rows = []
    with Session.open(
        options.bundle,
        policy="lossless",
        draft=options.draft,
        lenience=options.lenience,
        k=k,
        target=options.target,
        threads=options.threads,
    ) as session:
        codec = TextCodec.open(session.bundle.root / "tokenizer")
        for entry in entries:
            text = passage(entry)
            content = f"{entry['edit']} Answer with the edited text only.\n\n{text}"
            prompt = codec.encode_chat([{"role": "user", "content": content}])
            count = int(ROOM * len(codec.encode(text))) + 16
            if not edits:
                prompt, count = codec.encode(text), CONTINUED
            ratios, where, made = [], None, 0
            for _ in range(options.repeats):
                theirs, full = timed(session, prompt, count, 0, sampling)
                ours, seconds = timed(session, prompt, count, None, sampling)
                ratios.append(full / len(theirs) / (seconds / len(ours)))
                where, made = parted(ours, theirs), len(ours)
            counted = session.statistics()
            per_refresh = 1.0 if counted is None else counted.tokens_per_refresh
            rows.append({"name": entry["name"], "tokens": made, "speedup": statistics.median(ratios)})
            rows[-1] |= {"tokens_per_refresh": per_refresh, "parts_after": where}
            print(
                f"{entry['name']:<22}{made:5d} tokens  {rows[-1]['speedup']:5.2f}×  {per_refresh:5.2f} a refresh  "
                f"{'' if sampling else 'same' if where is None else f'parts after {where}'}",
                flush=True,
            )
    speedups = [row["speedup"] for row in rows]
    kinds = []
    for kind in ("prose", "code"):
        own = [row["speedup"] for row in rows if row["name"].startswith(kind)]
        kinds += [f"{kind} {statistics.median(own):.2f}×"] if own else []
    same = sum(row["parts_after"] is None for row in rows)
    print(
        f"median of {len(rows)}: {statistics.median(speedups):.2f}× ({', '.join(kinds)}), lowest "
        f"{min(speedups):.2f}×" + (f"; {same} outputs are the full schedule's" if edits else "")
    )
    if options.json is not None:
        settings = {"bundle": options.bundle, "draft": options.draft, "lenience": options.lenience or 1.0}
        options.json.write_text(json.dumps({**settings, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(measure, None))
