"""`lora-drop eval` on the command line."""

from __future__ import annotations

import argparse

from lora_drop_runtime.command_line import add_options, settings_of
from lora_drop_runtime.errors import InputError

from .calibrate import calibrate
from .eval import eval
from .settings import EvalSettings


def run_eval(args: argparse.Namespace) -> None:
    settings = settings_of(EvalSettings, args)
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


def add_eval(command: argparse.ArgumentParser) -> None:
    add_options(command, EvalSettings)
