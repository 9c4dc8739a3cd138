"""The tools around a bundle: one function per `lora-drop` command, with its name and arguments.

generate, chat, inspect   need the runtime only
bench                     the same; matplotlib for --plots, other runtimes for --peers
eval                      the same as bench; lm-eval for --tasks
compare                   needs the exporter (torch, transformers)
profile                   the same; matplotlib for its figures
fit                       the same
"""

from .bench import bench
from .compare import compare
from .eval import eval
from .fit import fit
from .generate import chat, generate
from .inspect import inspect
from .profile import profile

__all__ = ["bench", "chat", "compare", "eval", "fit", "generate", "inspect", "profile"]
