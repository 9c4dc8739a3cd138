"""`lora-drop profile` on the command line."""

from __future__ import annotations

import argparse

from lora_drop_runtime.command_line import add_options, settings_of

from .profile import profile
from .settings import ProfileSettings


def run_profile(args: argparse.Namespace) -> None:
    profile(args.model, settings_of(ProfileSettings, args))


def add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a Hugging Face directory, hub id, GGUF file or bundle")
    add_options(command, ProfileSettings)
