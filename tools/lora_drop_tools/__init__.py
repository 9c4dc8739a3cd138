"""The tools around a bundle: one function per `lora-drop` command, with its name and arguments.

generate, chat, inspect   need the runtime only
compare                   needs the exporter (torch, transformers)
"""

from .compare import compare
from .generate import chat, generate
from .inspect import inspect

__all__ = ["chat", "compare", "generate", "inspect"]
