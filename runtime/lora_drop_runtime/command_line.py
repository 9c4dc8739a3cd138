"""What the two commands share: how they parse, and how they end.

A user's error is printed without a traceback and ends with 2 (a failed verification with 1), Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .errors import InputError, LoraDropError


class Parser(argparse.ArgumentParser):
    """An argparse parser that complains in the project's three-part form."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message[:1].upper() + message[1:] + ".", hint=f"See {self.prog} --help.")


def run_command(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command's body and return its exit code."""
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except LoraDropError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 141
    return 0
