"""`lora-drop eval` on the command line."""

from __future__ import annotations

import argparse

from lora_drop_runtime.command_line import add_options, settings_of

from .eval import eval
from .settings import EvalSettings


def run_eval(args: argparse.Namespace) -> None:
    eval(args.bundle, settings_of(EvalSettings, args))


def add_eval(command: argparse.ArgumentParser) -> None:
    add_options(command, EvalSettings)
