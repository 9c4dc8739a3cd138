"""Where a bundle's dtype, and its end and padding tokens, come from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime.bundle.manifest import SpecialTokens

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.compiler.facts import activations_dtype, special_tokens, with_experts_alike
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.quantize.formats import BlockFormat


@pytest.mark.parametrize(
    ("generation", "config", "eos", "pad"),
    [
        (None, {"eos_token_id": 5, "pad_token_id": 2}, (5,), 2),
        (None, {"eos_token_id": [5, 6]}, (5, 6), 0),
        ({"eos_token_id": [7, 8], "pad_token_id": 9}, {"eos_token_id": 5, "pad_token_id": 2}, (7, 8), 9),
        ({}, {"eos_token_id": 5}, (5,), 0),  # it says how to sample, and nothing of the end
        ({"eos_token_id": [-1, 3], "pad_token_id": -1}, {"eos_token_id": 5}, (3,), 0),
        ({}, {}, (), 0),
    ],
)
def test_the_generation_config_comes_first(
    generation: dict[str, Any] | None, config: dict[str, Any], eos: tuple[int, ...], pad: int, tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert special_tokens(Checkpoint("m", tmp_path, SimpleNamespace(**config), {})) == SpecialTokens(eos=eos, pad=pad)


def test_the_dtype_is_that_of_most_bytes() -> None:
    """Norms in float32 are many, and small."""
    tensors: dict[str, Any] = {f"norm{n}": SimpleNamespace(dtype="float32", size_bytes=256) for n in range(9)}
    tensors["matrix"] = SimpleNamespace(dtype="bfloat16", size_bytes=1 << 20)
    checkpoint = Checkpoint("m", Path(), SimpleNamespace(), tensors)
    assert activations_dtype(checkpoint, ExportOptions(targets=("none",)), quantized=False) == "bfloat16"


UP, DOWN = "layers.0.experts.gate_up_proj.rows", "layers.0.experts.down_proj.rows"
SHAPES = {UP: (192, 64), DOWN: (192, 96), "layers.0.q_proj.weight": (64, 96)}
WIDE, NARROW = BlockFormat(4, 32, False), BlockFormat(4, 16, False)


@pytest.mark.parametrize(
    ("found", "given", "wanted"),
    [
        ({UP: WIDE, DOWN: WIDE}, (), {UP: WIDE, DOWN: WIDE}),
        ({UP: BlockFormat(4, 64, True), DOWN: WIDE}, (), dict.fromkeys((UP, DOWN), BlockFormat(4, 32, True))),
        ({UP: WIDE, DOWN: NARROW}, (), {UP: NARROW, DOWN: NARROW}),
        ({UP: WIDE}, (), {}),  # no block divides the other's rows
        ({DOWN: WIDE}, (), {}),
        ({UP: WIDE, DOWN: NARROW}, (UP,), {UP: WIDE, DOWN: NARROW}),  # a checkpoint's integers are not rounded again
        ({UP: WIDE}, (UP,), {UP: WIDE}),
        ({DOWN: WIDE}, (DOWN,), {DOWN: WIDE}),
    ],
)
def test_experts_of_a_layer_have_one_format(found: Any, given: tuple[str, ...], wanted: Any) -> None:
    """A kernel reads both of their matrices; no other weight is touched."""
    others = {"layers.0.q_proj.weight": WIDE}
    assert with_experts_alike(found | others, SHAPES, given) == wanted | others


def test_experts_with_gelu_may_have_two_formats() -> None:
    """The kernels that run them read one matrix each."""
    apart = UP.replace(".rows", ".apart")
    shapes = {apart: SHAPES[UP], DOWN: SHAPES[DOWN]}
    for found in ({apart: WIDE, DOWN: NARROW}, {apart: WIDE}, {DOWN: WIDE}):
        assert with_experts_alike(found, shapes, ()) == found
