"""Arguments of `lora-drop eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES

from lora_drop_tools.eval.tasks.files import TASKS
from lora_drop_tools.shared.arguments import names, numbers

from .eval import eval


def run_eval(args: argparse.Namespace) -> None:
    eval(
        args.bundle,
        labels=args.label or (),
        k=args.k,
        policies=args.policy,
        text=args.text,
        window=args.window,
        prompt=args.prompt,
        windows=args.windows,
        tasks=args.tasks,
        data=args.data,
        limit=args.limit,
        seed=args.seed,
        out_dir=args.out,
        bench_file=args.bench,
        target=args.target,
        provider=args.provider,
        threads=args.threads,
        json_file=args.json,
        plots=args.plots,
    )


def add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--label", action="append", metavar="NAME", help="for the tables, once for each bundle (default: directories)"
    )
    command.add_argument(
        "--k", type=numbers, default=(1, 3), metavar="K,…", help="windows (default 1,3); 0 always runs"
    )
    command.add_argument(
        "--policy",
        type=names,
        default=(DEFAULT_POLICY,),
        metavar="NAME,…",
        help=f"{', '.join(POLICIES)} (default skip)",
    )
    command.add_argument("--text", type=Path, metavar="FILE", help="for perplexity, agreement and KL")
    command.add_argument("--window", type=int, default=512, metavar="T", help="tokens of a piece of it (default 512)")
    command.add_argument("--prompt", type=int, default=32, metavar="T", help="of them given, not scored (default 32)")
    command.add_argument("--windows", type=int, default=32, metavar="N", help="how many pieces at most (default 32)")
    command.add_argument("--tasks", type=names, default=(), metavar="NAME,…", help=f"of {', '.join(TASKS)}")
    command.add_argument("--data", type=Path, metavar="DIR", help="the tasks' files")
    command.add_argument("--limit", type=int, default=300, metavar="N", help="items of a task at most (default 300)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of subsets and phases (default 0)")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="keeps every item's result; a rerun goes on from there"
    )
    command.add_argument("--bench", type=Path, metavar="FILE", help="speed-ups, as lora-drop bench --json wrote them")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    command.add_argument("--plots", type=Path, metavar="DIR", help="write figures; needs matplotlib")
