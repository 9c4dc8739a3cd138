"""Arguments of `lora-drop fit`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import INJECTIONS, parse_layers
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.shared.arguments import numbers
from lora_drop_tools.shared.corpus import DTYPES

from .fit import fit
from .settings import LEARNING_RATE


def run_fit(args: argparse.Namespace) -> None:
    from lora_drop_export.checkpoint.drop_list import DropList, read_drop_list

    if args.drop_layers is not None and args.drop_list is not None:
        raise InputError(
            "The drop list is given twice.",
            note="--drop-layers and --drop-list exclude each other.",
            hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
        )
    listed = None if args.drop_layers is None else DropList(parse_layers(args.drop_layers))
    if args.drop_list is not None:
        listed = read_drop_list(args.drop_list)
    fit(
        args.model,
        args.text,
        args.out,
        drop_layers=None if listed is None else listed.layers,
        drop_list_fingerprint=None if listed is None else listed.fingerprint,
        drop_ratio=args.drop_ratio,
        always_first=args.always_first,
        always_last=args.always_last,
        surrogate=args.surrogate,
        injection=args.injection,
        k=args.k,
        policy=args.policy,
        rank=args.rank,
        alpha=args.alpha,
        tokens=args.tokens,
        steps=args.steps,
        learning_rate=args.learning_rate,
        batch=args.batch,
        window=args.window,
        accumulate=args.accumulate,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        resume=args.resume,
        force=args.force,
        trust_remote_code=args.trust_remote_code,
    )


def add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text", action="append", required=True, type=Path, metavar="FILE", help="repeat for more")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the adapters, in PEFT's format")
    plan = command.add_argument_group("the plan (of a bundle: its own)")
    plan.add_argument("--drop-ratio", type=float, metavar="ρ", help="as for lora-drop-export (default 0.5)")
    plan.add_argument("--drop-layers", metavar="4,6,9", help="the layers to drop, counted from 0")
    plan.add_argument("--drop-list", type=Path, metavar="FILE", help="the same from a file of lora-drop profile")
    plan.add_argument("--always-first", type=int, metavar="N", help="never drop the first N (default 3)")
    plan.add_argument("--always-last", type=int, metavar="N", help="never drop the last N (default 1)")
    plan.add_argument("--surrogate", choices=SURROGATES, help="default residual")
    plan.add_argument("--injection", choices=INJECTIONS, help="default block")
    plan.add_argument("--k", type=numbers, default=(3,), metavar="K,…", help="windows, mixed if several (default 3)")
    plan.add_argument("--policy", choices=POLICIES, help="of the refreshes at deployment (default skip)")
    plan.add_argument("--rank", type=int, default=16, metavar="R", help="default 16")
    plan.add_argument("--alpha", type=float, metavar="A", help="PEFT's; the scale is alpha / r (default: the rank)")
    how = command.add_argument_group("how")
    how.add_argument(
        "--tokens", type=int, default=32768, metavar="N", help="of the closed form, 0 to skip it (default 32768)"
    )
    how.add_argument("--steps", type=int, default=300, metavar="N", help="of distillation, 0 to skip it (default 300)")
    how.add_argument("--learning-rate", type=float, default=LEARNING_RATE, metavar="X", help=f"default {LEARNING_RATE}")
    how.add_argument("--batch", type=int, default=4, metavar="B", help="texts of a batch (default 4)")
    how.add_argument("--window", type=int, default=256, metavar="T", help="tokens of a text (default 256)")
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches of a step (default 1)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="which pieces of the text (default 0)")
    how.add_argument("--device", default="cpu", metavar="NAME", help="of PyTorch (default cpu)")
    how.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="of the model; adapters stay fp32 (default fp32)"
    )
    how.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU (default: its own choice)")
    how.add_argument("--resume", action="store_true", help="go on where an interrupted fit with these options stopped")
    how.add_argument("--force", action="store_true", help="replace adapters at --out, and begin anew")
    how.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings")
