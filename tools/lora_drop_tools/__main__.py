"""`lora-drop`, from its first line on: Ctrl-C while its packages are imported, too, ends with 130."""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        from lora_drop_tools.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
