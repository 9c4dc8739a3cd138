"""A Llama-3-8B-shaped checkpoint: shapes only, so neither its 16 GB of memory nor reading them is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
import json, re, sys
from lora_drop_export.cli import main
from lora_drop_export.compiler import records
from lora_drop_runtime.bundle.manifest import FileRecord

def record_but_not_the_hole(path, plain=records.record_file):
    "Reading 16 GB of nothing, to hash them, takes most of a minute."
    size = path.stat().st_size
    return FileRecord(size, "0" * 64) if size > 2**30 else plain(path)

records.record_file = record_but_not_the_hole
for arguments in json.loads(sys.argv[1]):
    if code := main(arguments):
        sys.exit(code)
    try:
        read = re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1]
        # Not getrusage: what it says of a process begins with what the one had that started it
        peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    except OSError:
        read = peak = 0
    print("measured", peak, read)
"""


@dataclass(frozen=True)
class Measured:
    """Peak memory of a process, and what it read from files with `read`; 0 where the system does not tell."""

    peak_bytes: int
    read_bytes: int


def sparse_checkpoint(directory: Path, layers: int = 32, **sizes: Any) -> int:
    """A bf16 checkpoint whose file is one hole of the right size; returns its bytes. `sizes` as of LlamaConfig."""
    config = LlamaConfig(**(LLAMA3_8B | {"num_hidden_layers": layers} | sizes), dtype="bfloat16")
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


def graphs_only(model: Path, out: Path, *more: str) -> list[str]:
    """Arguments of an export that links the weights and writes the neutral graphs."""
    return ["--model", str(model), "--out", str(out), "--weights", "link", "--target", "none", *more]


def engines_without_weights(out: Path) -> list[str]:
    """Arguments that add TensorRT-RTX engines whose inputs the weights are."""
    return ["--add-target", "tensorrt-rtx", "--out", str(out), "--no-verify"]


def measured(*commands: list[str]) -> list[Measured]:
    """Exports that have to succeed, one after the other in a process of their own; each with those before it."""
    command = [sys.executable, "-c", MEASURE, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^measured (\d+) (\d+)$", done.stdout, re.MULTILINE)
    return [Measured(int(peak_kib) * 1024, int(read)) for peak_kib, read in found]
