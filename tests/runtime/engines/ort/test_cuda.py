"""ONNX Runtime's own CUDA provider, over CUDA libraries that execute nothing (tests/support/cuda_stub).

It shows that graphs load and kernels take their arguments, where nodes and buffers lie, and what is copied. It cannot
show a number that a kernel computes, nor how long one takes. `make test-cuda` runs this file.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
from lora_drop_runtime.bundle.bundle import Bundle

from lora_drop_export.compiler.export import write_bundle
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from tests.support.bundles import family, family_trace, make_bundle, record_again, traced_family
from tests.support.cuda_stub.build import CUDART, LIBRARIES, build_stub
from tests.support.models import MORE_FAMILIES, gemma3, llama

ENVIRONMENT = "CUDA_VENV"
pytestmark = [
    pytest.mark.cuda_stub,
    pytest.mark.skipif(ENVIRONMENT not in os.environ, reason="needs onnxruntime-gpu: `make test-cuda` runs it"),
]

ROOT = Path(__file__).parents[4]
OPEN = """
import sys
from lora_drop_runtime import LoraDropError, Session
try:
    Session.open(sys.argv[1], provider="cuda").close()
except LoraDropError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    (include,) = Path(os.environ[ENVIRONMENT]).glob("headers/nvidia/*/include")
    return build_stub(tmp_path_factory.mktemp("cuda") / "stub", include)


def halves(name: str, activations: str, root: Path, **options: Any) -> Bundle:
    """A bundle that a GPU's provider takes."""
    root.mkdir(parents=True)
    exported = ExportOptions(max_seq_len=64, **options)
    traced = family_trace(name, activations)
    return write_bundle(root, family(name).checkpoint, traced, activations, exported, Console())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return halves("llama", "float16", tmp_path_factory.mktemp("cuda") / "b", rank=2, surrogate="recurrent")


def run_there(libraries: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python with onnxruntime-gpu, which finds CUDA's libraries in a folder."""
    program = Path(os.environ[ENVIRONMENT]).absolute() / "bin" / "python"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"}
    return subprocess.run(
        [program, "-W", "error", *map(str, arguments)],
        env=environment | {"LD_LIBRARY_PATH": str(libraries), "HOME": str(libraries)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def decoded(stub: Path, bundle: Bundle, out: Path) -> list[dict[str, Any]]:
    """What the worker tells of every policy and batch."""
    done = run_there(stub, "-m", "tests.support.cuda_stub.worker", bundle.root, out)
    assert done.returncode == 0, done.stderr  # -11 where the host touched the device's memory
    assert done.stderr == ""
    runs: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    assert {run["batch"] for run in runs} == {1, 3}
    assert len({run["policy"] for run in runs}) >= 2
    return runs


def check(run: dict[str, Any], shapes: frozenset[str] = frozenset({"Concat"}), constants: int = 0) -> None:
    """Caches stay where they are, weights are there once, and a decode step is one launch and two copies.

    Args:
        shapes: what makes the shapes of several tokens on the host.
        constants: bytes that sessions hold beside the weights, at most.
    """
    assert [step["kind"] for step in run["steps"]] == ["lora", "lora", "refresh"] * 3
    assert run["in_place"]
    assert run["moved"] == []
    # What attention reads on the host is no token's length: it is in the CUDA graph as it was
    assert run["on_host"] == ["total_dropped", "total_kept"]
    opening = run["opening"]
    assert (
        run["weight_bytes"] <= opening["to_device_bytes"] <= run["weight_bytes"] + constants + 4096
    )  # shapes, scalars
    graphs = 0
    for place, step in enumerate(run["steps"]):
        several = step["kind"] == "refresh" and run["policy"] == "backfill"  # the tokens taken back, row by row
        again = place >= 3 or (place == 1 and run["sides"] == 1)  # as an earlier step, on the same side of the state
        graphs += not (several or again)
        check_step(run, step, several, again)
        assert step["held_graphs"] == graphs
        assert step["held_bytes"] == run["steps"][0]["held_bytes"]  # the arena does not grow
    for kind, placed in run["placed"].items():
        assert placed.keys() == {"CUDAExecutionProvider", "CPUExecutionProvider"}
        # The number of new tokens, and shapes of a Reshape: ONNX Runtime keeps such nodes on the host on purpose
        on_host = {"lora": {"Squeeze"}, "refresh": {"Squeeze"} | shapes}[kind]
        assert placed["CPUExecutionProvider"].keys() == on_host
        on_device = placed["CUDAExecutionProvider"].keys()
        assert {"GroupQueryAttention", "RMSNormalization"} <= on_device
        assert on_device & {"Gemm", "MatMulNBits"}
        assert not on_device & {"If", "MemcpyFromHost", "MemcpyToHost"}
        assert not [op for op in on_device if op.startswith("Reduce")]  # over several rows they need cuDNN


def check_step(run: dict[str, Any], step: dict[str, Any], several: bool, again: bool) -> None:
    """Args:
    several: the step takes several tokens of each row, in a run of its own, and is not captured.
    again: such a one ran before.
    """
    runs, tokens = (run["batch"], 3 * run["batch"]) if several else (1, run["batch"])
    assert step["captures"] == (0 if several or again else 1)
    assert step["replays"] == (0 if several else 1)
    if several:
        assert step["kernels"] > 50 * runs
    else:
        assert step["replayed_kernels"] > 50
        assert step["kernels"] == (0 if again else 2 * step["replayed_kernels"])  # it runs once, then it is captured
    if again:
        assert step["to_host_calls"] == 1
        assert step["to_host_bytes"] == run["logits_bytes"]
        assert step["to_device_calls"] == runs
        assert step["to_device_bytes"] <= runs * 8 * 256  # ids, lengths, last slots, index
        assert step["waits"] == 2 * runs
    assert step["on_device_largest"] <= tokens * 256 < run["cache_bytes"]  # a token's queries, cos and sin
    assert step["on_device_bytes"] <= 3 * tokens * 256 * (run["layers"] + 1)


TOUCH = """
import ctypes
import numpy
import onnxruntime
value = onnxruntime.OrtValue.ortvalue_from_numpy(numpy.arange(4), "cuda", 0)
print(value.numpy(), flush=True)
ctypes.string_at(value.data_ptr(), 1)
"""


def test_the_host_cannot_touch_the_devices_memory(stub):
    """Else the tests below would not see that it does; copies through the provider work."""
    done = run_there(stub, "-c", TOUCH)
    assert done.stdout == "[0 1 2 3]\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_steps_run_in_place(stub, bundle, tmp_path):
    for run in decoded(stub, bundle, tmp_path / "out.json"):
        check(run)
        assert not any(step["variables"] for step in run["steps"])


FORK = """
import sys
import numpy as np
from lora_drop_runtime import Session
session = Session.open(sys.argv[1], provider="cuda", policy="backfill", k=2)
session.prefill(np.ones((1, 5), np.int64), np.array([5]), max_new_tokens=20)
memory, caches = session._engine._memory, session._request.caches
for number, cache in enumerate(caches.values()):
    memory.fill(memory._values[cache.name], np.full(cache.nbytes, number + 1, np.uint8))
first = session.fork()
other = first.fork()
for fork in first, other:
    for number, (name, cache) in enumerate(fork._request.caches.items()):
        assert cache.address != caches[name].address
        rows = memory.read(cache).reshape(*cache.shape[:3], -1)
        assert (rows[:, :, :5] == number + 1).all() and not rows[:, :, 5:].any(), (name, rows)
for _ in range(7):
    for one in session, first, other:
        one.step([3])
values = len(memory._values)
rooms = len(memory._rooms)
session.close()
assert len(memory._values) == values - rooms
first.step([3])
first.close()
assert len(memory._values) == values - 2 * rooms
for _ in range(7):
    other.step([3])
other.close()
print("done")
"""


def test_a_fork_has_caches_of_its_own(stub, bundle):
    done = run_there(stub, "-c", FORK, bundle.root)
    assert done.stdout == "done\n", done.stderr


def test_steps_run_in_bfloat16(stub, tmp_path):
    """With biases, and a surrogate that has no state."""
    made = halves("qwen2", "bfloat16", tmp_path / "b")
    for run in decoded(stub, made, tmp_path / "out.json"):
        check(run)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["apertus", "gemma3", "gemma4", "minicpm3"])
def test_families_have_all_their_kernels(stub, tmp_path, name, dtype):
    """A comparison, norms of two dtypes, heads of two sizes, keys that are put into a tensor."""
    source = traced_family(f"more.{name}", gemma3() if name == "gemma3" else MORE_FAMILIES[name](), dtype)
    made = make_bundle(source, tmp_path / "b", max_seq_len=32, drop_layers=(1,), always_first=0, always_last=0)
    done = run_there(stub, "-c", OPEN, made.root)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr  # ONNX Runtime warns of every ScatterND


def test_steps_run_with_quantized_weights(stub, tmp_path):
    """The integers are on the GPU once, also where a table that is looked up is the head as well."""
    options: dict[str, Any] = {"dtype": "int4", "activation_dtype": "float16", "surrogate": "recurrent", "rank": 2}
    made = halves("qwen2", "float16", tmp_path / "b", **options)
    assert made.manifest.model.weight_dtype == "int4"
    for run in decoded(stub, made, tmp_path / "out.json"):
        check(run, shapes=frozenset())  # MatMulNBits takes tokens as they are, no Reshape is around it
        for placed in run["placed"].values():
            assert {"GatherBlockQuantized", "MatMulNBits"} <= placed["CUDAExecutionProvider"].keys()


def test_steps_run_with_int8_caches(stub, tmp_path):
    """In the fast kernel, which alone of all reads a variable of its module on the host, when a node first runs."""
    model = llama(head_dim=64, num_key_value_heads=1, num_hidden_layers=5)
    source = traced_family("llama.1_heads_of_64.5_layers", model, "float16")
    made = make_bundle(source, tmp_path / "b", kv_dtype="int8", max_seq_len=64, surrogate="recurrent", rank=2)
    assert made.manifest.model.kv_dtype == "int8"
    runs = decoded(stub, made, tmp_path / "out.json")
    scales = 2 * 5 * 2 * (2 * 4 + 2 * 1) * 64  # of two graphs: for queries, outputs, keys and values
    for run in runs:
        check(run, constants=scales)
        assert run["steps"][0]["variables"] >= 4  # of the layers that are kept
        assert not any(step["variables"] for step in run["steps"][3:])


def test_a_node_that_the_provider_has_not_is_named(stub, bundle, tmp_path):
    """Else it would run on the CPU, with a copy of what it reads and writes in every step."""
    shutil.copytree(bundle.root, tmp_path / "b")
    file = tmp_path / "b" / "ort" / "lora.onnx"
    model = onnx.load(file, load_external_data=False)
    (cos,) = (node for node in model.graph.node if node.op_type == "Cos")
    cos.op_type = "Acosh"  # which it has no kernel for
    onnx.save(model, file)
    record_again(tmp_path / "b")
    done = run_there(stub, "-c", OPEN, tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "cannot run all of a graph" in done.stdout
    assert "ort/lora.onnx: CUDAExecutionProvider leaves 1 nodes to the CPU, among them Acosh" in done.stdout


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_that_does_not_load_is_named(stub, bundle, tmp_path, library):
    """By the loader's own words, whatever else of CUDA this machine has."""
    shutil.copytree(stub, tmp_path / "broken")
    (tmp_path / "broken" / library).write_bytes(b"not a library")
    done = run_there(tmp_path / "broken", "-c", OPEN, bundle.root)
    assert done.returncode == 0, done.stderr
    fact, note, hint = done.stdout.splitlines()
    assert fact == "The execution provider cannot run the bundle here."
    assert note.startswith("Note: CUDAExecutionProvider: ")
    assert f"{library}: file too short" in note
    assert "pip install 'lora-drop-export[cuda]'" in hint


def test_a_library_that_is_missing_is_named(stub, bundle, tmp_path):
    shutil.copytree(stub, tmp_path / "stub")
    missing = next((name for name in LIBRARIES if name != CUDART and not loads(name)), None)
    if missing is None:
        pytest.skip("this machine has all of CUDA's libraries")
    (tmp_path / "stub" / missing).unlink()
    done = run_there(tmp_path / "stub", "-c", OPEN, bundle.root)
    assert done.returncode == 0, done.stderr
    assert f"Note: CUDAExecutionProvider: {missing}: cannot open shared object file" in done.stdout


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def test_libraries_from_wheels_are_loaded_first(stub, bundle, tmp_path):
    """`nvidia` beside the package is where NVIDIA's wheels put theirs; the loader alone does not look there."""
    site = tmp_path / "site"
    shutil.copytree(package_of(stub), site / "onnxruntime", symlinks=True)
    wheels = site / "nvidia" / "cu13" / "lib"
    shutil.copytree(stub, wheels)
    (tmp_path / "driver").mkdir()
    shutil.move(wheels / "libcuda.so.1", tmp_path / "driver")  # not in a wheel, but NVIDIA's driver
    code = f"import sys\nsys.path.insert(0, {str(site)!r})\n{OPEN}"
    done = run_there(tmp_path / "driver", "-c", code, bundle.root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def package_of(stub: Path) -> Path:
    """The folder of the installed onnxruntime."""
    done = run_there(stub, "-c", "import onnxruntime; print(onnxruntime.__path__[0])")
    return Path(done.stdout.strip())
