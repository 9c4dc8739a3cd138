"""Arguments of `lora-drop profile`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES

from lora_drop_tools.shared.arguments import names
from lora_drop_tools.shared.corpus import DTYPES

from .profile import RANKINGS, profile


def run_profile(args: argparse.Namespace) -> None:
    profile(
        args.model,
        args.text,
        args.out,
        k=args.k,
        policy=args.policy,
        rankings=args.rankings,
        tokens=args.tokens,
        window=args.window,
        sensitivity_tokens=args.sensitivity_tokens,
        always_first=args.always_first,
        always_last=args.always_last,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
    )


def add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text", action="append", required=True, type=Path, metavar="FILE", help="repeat for more")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="for figures and drop lists")
    command.add_argument("--k", type=int, default=3, help="LoRA steps between two refreshes (default 3)")
    command.add_argument("--policy", choices=POLICIES, default=DEFAULT_POLICY, help="refresh policy (default skip)")
    command.add_argument(
        "--rankings", type=names, default=RANKINGS, metavar="NAME,…", help=f"of {', '.join(RANKINGS)} (default all)"
    )
    command.add_argument("--tokens", type=int, default=8192, metavar="N", help="for the layers' figures (default 8192)")
    command.add_argument("--window", type=int, default=256, metavar="T", help="tokens of a piece of it (default 256)")
    command.add_argument(
        "--sensitivity-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="to rank by sensitivity, which takes longest, and as many others to compare the lists on (default 1024)",
    )
    command.add_argument("--always-first", type=int, default=3, metavar="N", help="never drop the first N (default 3)")
    command.add_argument("--always-last", type=int, default=1, metavar="N", help="never drop the last N (default 1)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="which pieces of the text (default 0)")
    command.add_argument("--device", default="cpu", metavar="NAME", help="of PyTorch (default cpu)")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the model (default fp32)")
    command.add_argument("--force", action="store_true", help="replace an existing profile at --out")
    command.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings")
