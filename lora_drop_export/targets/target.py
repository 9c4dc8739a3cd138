"""The table of targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.targets.ort.target import lower_to_ort
from lora_drop_export.targets.trt.target import build_engines


def build_target(
    root: Path,
    manifest: Manifest,
    graphs: Mapping[StepKind, Any],
    target: str,
    options: ExportOptions,
    console: Console,
    timing_cache: bytes = b"",
) -> dict[str, Any]:
    """Lower the neutral graphs, build what the target runs into `root/target`, and return its manifest entry."""
    (root / target).mkdir()
    if target == "ort":
        with console.phase("lowering to ONNX Runtime"):
            return lower_to_ort(root, graphs, manifest.limits.max_seq_len)
    return build_engines(root, manifest, graphs, target, options, console, timing_cache)
