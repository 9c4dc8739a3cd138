"""Weights that are not stored as was asked for are named: printed, in the manifest, and by `lora-drop inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_tools.inspect import describe
from safetensors import safe_open

from lora_drop_export.quantize.choice import Quantization, departures
from lora_drop_export.quantize.formats import BlockFormat
from tests.support.bundles import make_bundle


def entry(weights: str, count: int, block_size: int | None, symmetric: bool | None) -> dict[str, Any]:
    return {"weights": weights, "count": count, "block_size": block_size, "symmetric": symmetric}


def test_what_is_named() -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("a", "b", "c", "d", "norm")]
    shapes = {name: (4,) if "norm" in name else (4, 96) for name in names} | {"head.weight": (8, 100)}
    asked, small, symmetric = BlockFormat(4, 32, False), BlockFormat(4, 16, False), BlockFormat(4, 32, True)
    forms = {"a": asked, "b": small, "c": symmetric}
    formats = {name: forms[name.split(".")[3]] for name in names if name.split(".")[3] in forms}
    found = departures(shapes, formats, {}, Quantization(4))
    assert found == [
        entry("model.layers.*.b.weight", 12, 16, False),
        entry("model.layers.*.c.weight", 12, 32, True),
        entry("model.layers.*.d.weight", 12, None, None),
        entry("head.weight", 1, None, None),
    ]
    native = dict.fromkeys(names, symmetric)  # as the checkpoint has it: kept, and no departure
    assert departures(shapes, formats, native, Quantization(4)) == [found[0], *found[2:]]
    assert departures({}, {}, {}, Quantization(4)) == []


@pytest.mark.parametrize(("dtype", "departs"), [("int4", True), ("int8", False)])
def test_an_export_names_them(dtype: str, departs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 96 make 3 blocks of 32, an odd number: 4-bit weights of them get blocks of 16."""
    bundle = make_bundle("llama", tmp_path / "b", dtype=dtype)
    said = json.loads((bundle.root / MANIFEST_NAME).read_text())["quantization"]
    with safe_open(bundle.root / "weights" / "model.safetensors", "np") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    scales = {name: shape[1] for name, shape in stored.items() if "down_proj" in name and "scale" in name}
    assert set(scales.values()) == {6 if departs else 3}  # blocks of a row
    line = "blocks of 16, with zero points: model.layers.*.mlp.down_proj.weight (8)"
    if departs:
        assert said["departures"] == [entry("model.layers.*.mlp.down_proj.weight", 8, 16, False)]
    else:
        assert "departures" not in said
    assert (f"quantized in {line}" in capsys.readouterr().err) == departs
    assert (f"             {line}" in describe(Bundle.open(bundle.root))) == departs


def test_what_is_left_in_float_is_said(tmp_path: Path) -> None:
    bundle = make_bundle("llama", tmp_path / "b", dtype="int8")
    written = json.loads((bundle.root / MANIFEST_NAME).read_text())
    written["quantization"]["departures"] = [entry("lm_head.weight", 1, None, None)]
    (bundle.root / MANIFEST_NAME).write_text(json.dumps(written))
    assert "             float: lm_head.weight (1)" in describe(Bundle.open(bundle.root))
