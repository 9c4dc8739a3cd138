"""ONNX Runtime as a target: lowers both steps into one graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_drop_runtime.plan.schedule import StepKind


def lower_to_ort(root: Path, graphs: Mapping[StepKind, Any], max_seq_len: int) -> dict[str, Any]:
    from .lower import ort_from_neutral

    entry = {"steps": "ort/steps.onnx"}
    joined = ort_from_neutral(graphs[StepKind.REFRESH], graphs[StepKind.LORA], max_seq_len)
    (root / entry["steps"]).write_bytes(joined.SerializeToString())
    return entry
