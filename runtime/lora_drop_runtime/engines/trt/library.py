"""TensorRT's Python module, and what an engine says of itself.

Enters: a target's name, the module, an engine. Leaves: the module, its errors in words, tables of tensors and profiles.
Knows no memory, no session and no step.
"""

from __future__ import annotations

import functools
import importlib
from collections import deque
from typing import Any

from lora_drop_runtime.errors import BundleError, first_line

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
KEPT_LINES = 50  # of each kind, for messages


def library(target: str) -> Any:
    """The Python module of a target. Raises BundleError when it is not installed."""
    name = MODULES[target]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BundleError(
            "The library of the target is not installed.",
            note=f"Target {target!r} needs the Python module {name}: {first_line(error)}.",
            hint=f"pip install 'lora-drop-export[{target}]'"
            + (", on a machine with an NVIDIA GPU; tensorrt-rtx builds without one." if target == "tensorrt" else "."),
        ) from None


@functools.cache
def error_logger(trt: Any) -> Any:
    """The one logger of a library, which keeps the first that it is given and ignores all later ones."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, for the message of ours that follows them, and apart from them the warnings."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.lines: deque[str] = deque(maxlen=KEPT_LINES)
            self.warnings: deque[str] = deque(maxlen=KEPT_LINES)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                is_error = severity <= trt.ILogger.Severity.ERROR
                (self.lines if is_error else self.warnings).append(" ".join(message.split())[:600])

        def last_words(self) -> str:
            return " | ".join(list(self.lines)[-2:]) or "nothing"

    return Logger()
