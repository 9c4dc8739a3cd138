"""The exporter: from a Hugging Face causal language model to a bundle that decodes with LoRA-Drop.

Reading order: compiler.py (the whole way), then checkpoint.py, trace.py, surgery.py, lower_ort.py, verify.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler import ExportOptions, export

__all__ = ["ExportOptions", "export"]


def __getattr__(name: str) -> Any:
    """`export` and `ExportOptions`, imported when asked for: they bring onnx."""
    if name in __all__:
        from . import compiler

        return getattr(compiler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
