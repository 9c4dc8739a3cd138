"""The tools around a bundle: one function per `lora-drop` command, with its name, and the class of its settings.

`calibrate` is `lora-drop eval --calibrate`, and `reproduce` its `--paper table4` and `fig3`.

generate, chat, inspect   need the runtime only
bench                     the same; matplotlib for --plots, other runtimes for --peers
serve                     the same, and the extra serve
eval, calibrate           the same as bench; lm-eval for --tasks
compare                   needs the exporter (torch, transformers)
profile                   the same; matplotlib for its figures
fit                       the same
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_drop_tools.bench.bench import bench
    from lora_drop_tools.bench.settings import BenchSettings
    from lora_drop_tools.compare import CompareSettings, compare
    from lora_drop_tools.eval.calibrate import calibrate
    from lora_drop_tools.eval.eval import eval, reproduce
    from lora_drop_tools.eval.settings import EvalSettings
    from lora_drop_tools.fit.fit import fit
    from lora_drop_tools.fit.settings import FitSettings
    from lora_drop_tools.generate import ChatSettings, GenerateSettings, chat, generate
    from lora_drop_tools.inspect import inspect
    from lora_drop_tools.profile.profile import profile
    from lora_drop_tools.profile.settings import ProfileSettings
    from lora_drop_tools.serve import ServeSettings, serve

__all__ = [
    "BenchSettings",
    "ChatSettings",
    "CompareSettings",
    "EvalSettings",
    "FitSettings",
    "GenerateSettings",
    "ProfileSettings",
    "ServeSettings",
    "bench",
    "calibrate",
    "chat",
    "compare",
    "eval",
    "fit",
    "generate",
    "inspect",
    "profile",
    "reproduce",
    "serve",
]

_MODULES = {
    "BenchSettings": "bench.settings",
    "ChatSettings": "generate",
    "CompareSettings": "compare",
    "EvalSettings": "eval.settings",
    "FitSettings": "fit.settings",
    "GenerateSettings": "generate",
    "ProfileSettings": "profile.settings",
    "ServeSettings": "serve",
    "bench": "bench.bench",
    "calibrate": "eval.calibrate",
    "chat": "generate",
    "compare": "compare",
    "eval": "eval.eval",
    "fit": "fit.fit",
    "generate": "generate",
    "inspect": "inspect",
    "profile": "profile.profile",
    "reproduce": "eval.eval",
    "serve": "serve",
}


def __getattr__(name: str) -> Any:
    """The names of `__all__`, imported when asked for: a command needs one of them."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"lora_drop_tools.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(types.ModuleType):
    """Whose functions have the names of the modules that they stand in: `bench` stays the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
