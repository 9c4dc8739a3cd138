"""The demo: a real small model from checkpoint to text, and what LoRA-Drop saved. Run by `make demo`.

Files go to `.demo/`: the model (98 MB, downloaded once) and the bundle.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from fetch_model import fetch_model
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.shared import costs

HERE = Path(".demo")
# Seven layers, chosen and fitted as docs/quality.md says; they bring the policy that they were fitted for, backfill
ADAPTERS = Path(__file__).parent / "adapters" / "SmolLM2-135M-Instruct"
PROMPT = "The capital of Italy is"
NEW_TOKENS, ROUNDS = 64, 5


def run(*command: str) -> None:
    """Run an installed command as a user would, shown first."""
    print("\n$ " + " ".join(f'"{part}"' if " " in part else part for part in command), flush=True)
    program = Path(sys.executable).with_name(command[0])
    subprocess.run([program, *command[1:]], check=True)


def report(bundle: str, policy: str) -> None:
    """K/V bytes and time per token, full schedule (k = 0) against the bundle's own, from one bundle in one process."""
    with Session.open(bundle, policy=policy) as session:
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
    ceiling = costs.speedup_ceiling(manifest, len(ids), NEW_TOKENS - 1, k, POLICIES[policy])
    base, ours = (kv[window]["kept"] + kv[window]["dropped"] for window in (0, k))
    print(
        f"  k = {k}, {policy:<8}  {ratio:.2f}× as fast (the bytes allow {ceiling:.2f}×), "
        f"K/V {base / 2**20:.2f} → {ours / 2**20:.2f} MiB ({1 - ours / base:.1%} less)"
    )
    if ratio > ceiling:
        print("                   more than the bytes allow: noise, or time that does not go with bytes")


def policies(bundle: str) -> list[str]:
    """Those that the bundle's steps can be run under; what verifies drafts is the full schedule step by step."""
    plan = Bundle.open(bundle).manifest.plan
    return [p.name for p in POLICIES.values() if p.fills == plan.refresh_policy.fills and not p.verifies]


def main() -> None:
    model = fetch_model(HERE)
    bundle = str(HERE / "engines")
    adapters = os.path.relpath(ADAPTERS)
    run("lora-drop-export", "--model", str(model), "--out", bundle, "--adapters", adapters, "--k", "3", "--force")
    run("lora-drop", "inspect", bundle)
    length = ("--max-new-tokens", "28")
    run("lora-drop", "generate", bundle, "--prompt", PROMPT, *length)
    run("lora-drop", "generate", bundle, "--prompt", PROMPT, *length, "--k", "0")
    print(f"\nAgainst the full schedule, {NEW_TOKENS} tokens after that prompt, medians of {ROUNDS} interleaved runs:")
    for policy in policies(bundle):
        report(bundle, policy)


if __name__ == "__main__":
    main()
