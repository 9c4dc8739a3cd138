"""What the two commands share: how they parse, what they need, and how they end.

A user's error is printed without a traceback and ends with 2 (a failed verification with 1), Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .errors import InputError, LoraDropError

# Of the extra `export`, by import name, less what only GGUF files need
EXPORT_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnx_graphsurgeon",
    "polygraphy",
    "ml_dtypes",
    "rich",
)


class Parser(argparse.ArgumentParser):
    """An argparse parser that complains in the project's three-part form."""

    def error(self, message: str) -> NoReturn:
        raise InputError(
            "The command line is not understood.",
            note=message[:1].upper() + message[1:] + ".",
            hint=f"See {self.prog} --help.",
        )


def require_export_packages(reason: str) -> None:
    """Refuse at once, not after minutes of work, where a package of the exporter is missing. Imports none of them.

    Raises:
        InputError: one is not installed; `reason` says who needs it.
    """
    for name in EXPORT_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                "The exporter's packages are not installed.",
                note=f"{name} is missing; {reason}.",
                hint="pip install 'lora-drop-export[export]'",
            )


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
