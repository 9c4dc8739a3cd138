"""Where a bundle's dtype, and its end and padding tokens, come from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime.bundle.manifest import SpecialTokens

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.compiler.facts import activations_dtype, special_tokens
from lora_drop_export.compiler.options import ExportOptions


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
