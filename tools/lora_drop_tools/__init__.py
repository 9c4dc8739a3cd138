"""The tools around a bundle: one function per `lora-drop` command, with its name, and the class of its settings.

generate, chat, inspect   need the runtime only
bench                     the same; matplotlib for --plots, other runtimes for --peers
eval                      the same as bench; lm-eval for --tasks
compare                   needs the exporter (torch, transformers)
profile                   the same; matplotlib for its figures
fit                       the same
"""

from lora_drop_tools.bench.bench import bench
from lora_drop_tools.bench.settings import BenchSettings
from lora_drop_tools.compare import CompareSettings, compare
from lora_drop_tools.eval.eval import eval
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.fit.fit import fit
from lora_drop_tools.fit.settings import FitSettings
from lora_drop_tools.generate import ChatSettings, GenerateSettings, chat, generate
from lora_drop_tools.inspect import inspect
from lora_drop_tools.profile.profile import profile
from lora_drop_tools.profile.settings import ProfileSettings

__all__ = [
    "BenchSettings",
    "ChatSettings",
    "CompareSettings",
    "EvalSettings",
    "FitSettings",
    "GenerateSettings",
    "ProfileSettings",
    "bench",
    "chat",
    "compare",
    "eval",
    "fit",
    "generate",
    "inspect",
    "profile",
]
