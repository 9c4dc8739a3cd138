"""The exporter: from a Hugging Face causal language model to a bundle that decodes with LoRA-Drop.

Reading order: compiler/export.py (the whole way), then checkpoint/, decoder/, graphs/, targets/, check/.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_drop_export.compiler.add_target import add_target
    from lora_drop_export.compiler.export import export
    from lora_drop_export.compiler.options import ExportOptions
    from lora_drop_export.targets.trt.options import BuilderOptions

__all__ = ["BuilderOptions", "ExportOptions", "add_target", "export"]

_MODULES = {
    "BuilderOptions": "targets.trt.options",
    "ExportOptions": "compiler.options",
    "add_target": "compiler.add_target",
    "export": "compiler.export",
}


def __getattr__(name: str) -> Any:
    """The names of `__all__`, imported when asked for: they bring onnx."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"lora_drop_export.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
