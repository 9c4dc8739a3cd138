"""The demo: a real small model from checkpoint to text, and what LoRA-Drop saved. Run by `make demo`.

Files go to `.demo/`: the model (98 MB, downloaded once) and the bundle.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from fetch_model import fetch_model
from lora_drop_runtime import Session
from lora_drop_runtime.text import TextCodec
from lora_drop_tools import costs

HERE = Path(".demo")
# The seven eligible layers that change their input least: lora-drop profile MODEL --rankings influence
# --text lora_drop_export/sample.txt --window 64 --tokens 512 --sensitivity-tokens 64 --out DIR
DROP_LAYERS = "3,13,14,15,17,25,26"
PROMPT = "The capital of Italy is"
NEW_TOKENS, ROUNDS = 64, 5


def run(*command: str) -> None:
    """Run an installed command as a user would, shown first."""
    print("\n$ " + " ".join(f'"{part}"' if " " in part else part for part in command), flush=True)
    program = Path(sys.executable).with_name(command[0])
    subprocess.run([program, *command[1:]], check=True)


def main() -> None:
    model = fetch_model(HERE)
    bundle = str(HERE / "engines")
    run("lora-drop-export", "--model", str(model), "--out", bundle, "--drop-layers", DROP_LAYERS, "--k", "3", "--force")
    run("lora-drop", "inspect", bundle)
    length = ("--max-new-tokens", "28")
    run("lora-drop", "generate", bundle, "--prompt", PROMPT, *length)
    run("lora-drop", "generate", bundle, "--prompt", PROMPT, *length, "--k", "0")
    report(bundle)


def report(bundle: str) -> None:
    """K/V bytes and time per token, full schedule (k = 0) against the bundle's own, from one bundle in one process."""
    with Session.open(bundle) as session:
        manifest = session.bundle.manifest
        k = manifest.plan.k
        ids = TextCodec.open(session.bundle.root / "tokenizer").encode(PROMPT)
        seconds: dict[int, list[float]] = {0: [], k: []}
        kv: dict[int, dict[str, int]] = {}
        for _ in range(ROUNDS):
            for window in seconds:  # interleaved: both see the same machine
                session.prefill(ids[None], max_new_tokens=NEW_TOKENS, k=window)
                begin = time.perf_counter()
                for token in range(NEW_TOKENS - 1):
                    session.step(np.array([token]))
                seconds[window].append(time.perf_counter() - begin)
                kv[window] = session.kv_bytes()
    ratio = float(np.median(np.array(seconds[0]) / np.array(seconds[k])))
    ceiling = costs.speedup_ceiling(manifest, len(ids), NEW_TOKENS - 1, k)
    base, ours = (kv[window]["kept"] + kv[window]["dropped"] for window in (0, k))
    print(f"\nWhat k = {k} saved against the full schedule, {NEW_TOKENS} tokens after a prompt of {len(ids)}:")
    print(f"  K/V cache       {base / 2**20:.2f} → {ours / 2**20:.2f} MiB ({1 - ours / base:.1%} less)")
    print(
        f"  time per token  {ratio:.2f}× as fast (median of {ROUNDS} interleaved runs; the bytes allow {ceiling:.2f}×)"
    )
    if ratio > ceiling:
        print("                  more than the bytes allow: noise, or time that does not go with bytes")


if __name__ == "__main__":
    main()
