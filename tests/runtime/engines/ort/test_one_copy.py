"""Both steps hold one copy of the weights in memory."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest

from lora_drop_export.targets.ort.lower import lower_step
from tests.support.bundles import Family, make_bundle, traced_model
from tests.support.models import llama

# Memory that is this process's own, whoever else runs: what is in no file (copies of a file's pages are in none), and
# the pages of the bundle's files, each once. Libraries are left out: whether their pages are private, and what share
# of them PSS counts, depends on who else has loaded them.
MEASURE = """
import os, re, sys
import numpy as np
import onnxruntime
from lora_drop_runtime import Session
from lora_drop_runtime.engines.ort.session_options import session_options

def own_kib(root):
    anonymous, mapped, path = 0, {}, ""
    for line in open("/proc/self/smaps"):
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ \\S+ [0-9a-f]+ \\S+ \\d+ *(.*)", line):
            path = header[1]
        name, _, value = line.partition(":")
        if name in ("Anonymous", "Swap"):
            anonymous += int(value.split()[0])
        if path.startswith(root) and name in ("Rss", "Anonymous"):
            sign = 1 if name == "Rss" else -1
            mapped[path] = mapped.get(path, 0) + sign * int(value.split()[0])
    return anonymous + sum(min(kib, os.path.getsize(path) // 1024 + 4) for path, kib in mapped.items())

def refresh_alone(root, graph):
    options = session_options(onnxruntime, root, 1)
    session = onnxruntime.InferenceSession(graph, options)
    sizes = {"batch": 1, "sequence": 1, "rows": 1}
    types = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}  # int32: a total, of the one token
    inputs = {
        i.name: np.full([sizes.get(d, 16) if isinstance(d, str) else d for d in i.shape],
                        int(i.type == "tensor(int32)"), types.get(i.type, np.float32))
        for i in session.get_inputs()
    }
    for _ in range(6):
        session.run(["logits"], inputs)
    return session

root, graph = sys.argv[1:]
if graph:
    held = refresh_alone(root, graph)
else:
    held = Session.open(root, threads=1)
    held.prefill(np.array([[1, 2, 3]]), max_new_tokens=8, k=3)
    for _ in range(6):
        held.step(np.array([4]))
print(own_kib(os.path.realpath(root)))
"""


@pytest.fixture(scope="module")
def large() -> Family:
    """34M parameters in two layers, since tracing takes its time for each."""
    return traced_model(llama(hidden_size=512, intermediate_size=8192, vocab_size=8192, num_hidden_layers=2))


@pytest.mark.parametrize("dtype", ["float32", "int4", "int8"])
def test_two_steps_hold_one_copy_of_the_weights(large, tmp_path, dtype):
    """Memory of the process after warm-up, both steps against the refresh step alone."""
    # However the integers were found: `rtn` is quick, and they take the same memory
    quantization = None if dtype == "float32" else "rtn"
    plan = {"drop_layers": (1,), "always_first": 0, "always_last": 0}
    bundle = make_bundle(large, tmp_path / "b", dtype=dtype, quantization=quantization, **plan)
    weights_kib = (bundle.root / "weights" / "model.safetensors").stat().st_size / 1024
    assert weights_kib > {"float32": 120_000, "int4": 15_000, "int8": 30_000}[dtype]
    refresh = onnx.load(bundle.root / "refresh.onnx", load_external_data=False)
    alone = bundle.root / "alone.onnx"
    alone.write_bytes(lower_step(refresh, 128).SerializeToString())

    def measure(graph: str) -> int:
        command = [sys.executable, "-c", MEASURE, str(bundle.root), graph]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    one, two = measure(str(alone)), measure("")
    print(f"{dtype}: weights {weights_kib:.0f}, one step {one}, two steps {two} KiB, ratio {two / one:.4f}")
    assert one > 0.9 * weights_kib
    assert two <= 1.03 * one, f"{two} KiB against {one} KiB"
