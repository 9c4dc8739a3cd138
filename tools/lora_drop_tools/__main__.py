"""`lora-drop`, from its first line on: Ctrl-C while its packages are imported, too, ends with 130, SIGTERM with 143.

Without a handler the system keeps SIGTERM from a container's first process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While nothing is half done yet; an exception could be lost in an import. `run_command` has its own handlers."""
    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        yield
    finally:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        with _ended_by_sigterm():
            from lora_drop_tools.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
