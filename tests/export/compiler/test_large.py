"""A Llama-3-8B-shaped checkpoint: shapes only, so neither its 16 GB of memory nor reading them is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
MEASURE = """
import resource, sys
from lora_drop_export.cli import main
code = main(sys.argv[1:])
print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def sparse_checkpoint(directory: Path) -> int:
    """A bf16 checkpoint whose file is one hole of the right size; returns its bytes."""
    config = LlamaConfig(**LLAMA3_8B, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with FakeTensorMode():
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def measured(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of an export that has to succeed."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - begin, int(done.stdout.rsplit("peak_kib", 1)[1]) * 1024


@pytest.mark.slow
def test_llama3_8b_shape(tmp_path):
    """Peaks under 2.5 GB, takes at most 3 minutes, writes a few MB of graphs; the weights are a link.

    Then its two engines, with the weights as their inputs.
    """
    directory = tmp_path / "model"
    directory.mkdir()
    size = sparse_checkpoint(directory)
    assert size > 16e9
    out = tmp_path / "engines"
    arguments = ["--model", str(directory), "--out", str(out), "--weights", "link", "--target", "none"]
    seconds, peak_bytes = measured(arguments)
    graph_bytes = sum((out / f"{name}.onnx").stat().st_size for name in ("refresh", "lora"))
    print(f"8B shape: {seconds:.0f} s, peak {peak_bytes / 1e9:.2f} GB, graphs {graph_bytes / 1e6:.2f} MB")
    assert peak_bytes < 2.5e9
    assert seconds < 180
    assert graph_bytes < 5e6
    weights = out / "weights" / "model.safetensors"
    assert weights.stat().st_ino == (directory / "model.safetensors").stat().st_ino
    assert os.stat(weights).st_blocks * 512 < 1e6  # nobody filled the hole

    seconds, peak_bytes = measured(["--add-target", "tensorrt-rtx", "--out", str(out), "--no-verify"])
    engines = json.loads((out / "lora_drop.json").read_text())["targets"]["tensorrt-rtx"]["engine_bytes"]
    sizes = ", ".join(f"{kind} {size / 2**20:.1f} MiB" for kind, size in engines.items())
    print(f"8B shape, tensorrt-rtx, weights as inputs: {seconds:.0f} s, peak {peak_bytes / 1e9:.2f} GB; {sizes}")
    assert peak_bytes < 2.5e9
    assert sum(engines.values()) < 50e6  # of 16 GB of weights
    assert os.stat(weights).st_blocks * 512 < 1e6
