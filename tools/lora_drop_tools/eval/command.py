"""`lora-drop eval` and `lora-drop lm-eval` on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lora_drop_runtime.command_line import add_options, settings_of
from lora_drop_runtime.errors import InputError

from .calibrate import calibrate
from .eval import eval, reproduce
from .settings import EvalSettings


def run_eval(args: argparse.Namespace) -> None:
    settings = settings_of(EvalSettings, args)
    if not settings.measures:
        reproduce(args.bundle, settings)
        return
    if settings.calibrate is None:
        eval(args.bundle, settings)
        return
    if len(args.bundle) > 1:
        raise InputError(
            "A threshold is found for one bundle.",
            note=f"{len(args.bundle)} were given.",
            hint="Use --calibrate with one bundle at a time.",
        )
    calibrate(args.bundle[0], settings)


def run_harness(arguments: Sequence[str]) -> None:
    """`lora-drop lm-eval`; all arguments are lm-eval's."""
    from .tasks.lm_eval_command import run_lm_eval

    run_lm_eval(arguments)


def add_eval(command: argparse.ArgumentParser) -> None:
    add_options(command, EvalSettings)
