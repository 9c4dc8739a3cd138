"""The exporter: from a Hugging Face causal language model to a bundle that decodes with LoRA-Drop.

Reading order: compiler.py (the whole way), then checkpoint.py, trace.py, surgery.py, lower_ort.py,
lower_trt.py, build_trt.py, verify.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_drop_export.compiler.add_target import add_target
    from lora_drop_export.compiler.export import export
    from lora_drop_export.compiler.options import ExportOptions
    from lora_drop_export.targets.trt.options import BuilderOptions

__all__ = ["BuilderOptions", "ExportOptions", "add_target", "export"]


def __getattr__(name: str) -> Any:
    """The names of `__all__`, imported when asked for: they bring onnx."""
    if name in __all__:
        from lora_drop_export.compiler import export as compiler

        return getattr(compiler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
