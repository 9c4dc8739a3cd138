"""Arguments that several commands have."""

from __future__ import annotations

import argparse

from lora_drop_runtime.plan.policy import POLICIES


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,3,5") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def add_policy(command: argparse.ArgumentParser) -> None:
    what = "of refreshes: skip leaves holes, backfill fills them (default: the bundle's)"
    command.add_argument("--policy", choices=POLICIES, help=what)


def add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", metavar="NAME", help="of the bundle's targets (default: its first)")
    command.add_argument(
        "--provider",
        metavar="cpu|cuda|rtx",
        help="of ONNX Runtime (default cpu for ort; another target runs its own engines without it)",
    )
    command.add_argument("--threads", type=int, metavar="N", help="default: one per physical core")
