"""Memory and sizes of an 8B-shaped export; `python -m tests.overhead` prints how long it takes."""

from __future__ import annotations

import json
import os

import pytest

from tests.support.large import engines_without_weights, graphs_only, measured, sparse_checkpoint


@pytest.mark.slow
def test_llama3_8b_shape(tmp_path):
    """Peaks under 2.5 GB, reads and writes megabytes; the weights are a link.

    Then its two engines, with the weights as their inputs. Three of its layers with MLPs of four times its width:
    weights of more than twice that. The engines are for one generation of GPUs.
    """
    directory = tmp_path / "model"
    directory.mkdir()
    size = sparse_checkpoint(directory, layers=3, intermediate_size=57344)
    assert size > 5.5e9
    out = tmp_path / "engines"
    add = [*engines_without_weights(out), "--compute-capability", "8.9"]
    export, addition = measured(graphs_only(directory, out, "--always-first", "1"), add)
    print(export, addition)
    assert export.peak_bytes < 2.5e9
    assert export.read_bytes < 1e9  # of the weights nothing: the libraries' own files, and samples for the fingerprint
    assert sum((out / f"{name}.onnx").stat().st_size for name in ("refresh", "lora")) < 5e6
    weights = out / "weights" / "model.safetensors"
    assert weights.stat().st_ino == (directory / "model.safetensors").stat().st_ino
    assert os.stat(weights).st_blocks * 512 < 1e6  # nobody filled the hole
    assert addition.peak_bytes < 2.5e9
    engines = json.loads((out / "lora_drop.json").read_text())["targets"]["tensorrt-rtx"]["engine_bytes"]
    assert sum(engines.values()) < 50e6  # without weights
