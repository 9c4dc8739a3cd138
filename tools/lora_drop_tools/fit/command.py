"""`lora-drop fit` on the command line."""

from __future__ import annotations

import argparse

from lora_drop_runtime.command_line import add_options, settings_of

from .fit import fit
from .settings import FitSettings


def run_fit(args: argparse.Namespace) -> None:
    fit(args.model, settings_of(FitSettings, args))


def add_fit(command: argparse.ArgumentParser) -> None:
    what = "a Hugging Face directory, hub id, GGUF file, or a bundle, which brings its plan"
    command.add_argument("model", metavar="MODEL", help=what)
    add_options(command, FitSettings)
