"""Arguments of `lora-drop bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_drop_tools.bench.peers.options import PEERS
from lora_drop_tools.shared.arguments import add_policy, names, numbers

from .bench import bench


def run_bench(args: argparse.Namespace) -> None:
    bench(
        args.bundle,
        k=args.k,
        contexts=args.contexts,
        batches=args.batches,
        new_tokens=args.new_tokens,
        policy=args.policy,
        repeats=args.repeats,
        target=args.target,
        provider=args.provider,
        threads=args.threads,
        peers=args.peers,
        model=args.model,
        peer_cache=args.peer_cache,
        peer_python=args.peer_python or (),
        json_file=args.json,
        plots=args.plots,
    )


def add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--k", type=numbers, default=(1, 3, 5), metavar="K,…", help="windows (default 1,3,5); 0 always runs"
    )
    command.add_argument(
        "--contexts",
        type=numbers,
        metavar="T,…",
        help="tokens of a prompt (default 128,2048, or what the bundles allow)",
    )
    command.add_argument("--batches", type=numbers, default=(1,), metavar="B,…", help="rows (default 1)")
    command.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default 64")
    add_policy(command)
    command.add_argument("--repeats", type=int, default=5, metavar="R", help="default 5")
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure and every step's time")
    command.add_argument("--plots", type=Path, metavar="DIR", help="write figures; needs matplotlib")
    command.add_argument(
        "--peers",
        type=names,
        nargs="?",
        const=(),
        metavar="NAME,…",
        help=f"other runtimes in the same run: {', '.join(PEERS)} (without names: all)",
    )
    command.add_argument(
        "--model",
        action="append",
        type=Path,
        metavar="DIR|FILE.gguf",
        help="what the peers load, the same weights; a directory, a GGUF file, or repeated for both",
    )
    command.add_argument("--peer-cache", type=Path, metavar="DIR", help="keeps what peers build from the model")
    command.add_argument(
        "--peer-python", action="append", metavar="NAME=PATH", help="the Python that a peer is installed in"
    )
