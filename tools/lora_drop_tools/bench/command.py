"""`lora-drop bench` on the command line."""

from __future__ import annotations

import argparse

from lora_drop_runtime.command_line import add_options, settings_of

from .bench import bench
from .settings import BenchSettings


def run_bench(args: argparse.Namespace) -> None:
    bench(args.bundle, settings_of(BenchSettings, args))


def add_bench(command: argparse.ArgumentParser) -> None:
    add_options(command, BenchSettings)
