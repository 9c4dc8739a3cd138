"""The tools around a bundle: one function per `lora-drop` command, with its name and arguments.

generate, chat, inspect   need the runtime only
compare                   needs the exporter (torch, transformers)
"""

from typing import Any

from .generate import chat, generate
from .inspect import inspect

__all__ = ["chat", "compare", "generate", "inspect"]


def __getattr__(name: str) -> Any:
    """`compare`, imported when asked for: it brings torch."""
    if name == "compare":
        from .compare import compare

        globals()["compare"] = compare  # importing the module has put itself under this name
        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
