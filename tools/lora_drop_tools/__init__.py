"""The tools around a bundle: one function per `lora-drop` command, with its name and arguments.

generate, chat, inspect   need the runtime only
bench                     the same; matplotlib for --plots, other runtimes for --peers
compare                   needs the exporter (torch, transformers)
"""

from .bench import bench
from .compare import compare
from .generate import chat, generate
from .inspect import inspect

__all__ = ["bench", "chat", "compare", "generate", "inspect"]
