"""Shared by all tests."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Read when libraries are imported, here and in commands that tests start. Nothing is fetched. PyTorch has one thread: a
# second one of each worker would find no core of its own, and the first would wait for it
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # also of those that import ONNX Runtime themselves
os.environ["LORA_DROP_CACHE"] = ""  # nothing is kept in the user's folder
# Some machines set these, which hides what commands do elsewhere: output that waited in a pipe hung a test there
for name in ("PYTHONUNBUFFERED", "PYTHONIOENCODING"):
    os.environ.pop(name, None)

# A trace makes millions of objects, and few of them are garbage: looking for it as often as by default takes a tenth
gc.set_threshold(100_000, 50, 50)

TRACES = "LORA_DROP_TEST_TRACES"


def pytest_configure(config: pytest.Config) -> None:
    """The workers of a parallel run share traces (tests/support/bundles.py) in a directory that the controller owns.

    Each has cores of its own. Libraries make no more threads than those, which takes some hundredths less CPU time.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None:
        directory = tempfile.mkdtemp(prefix="lora-drop-traces-")
        os.environ[TRACES] = directory
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    elif hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))[int(worker["workerid"][2:]) :: worker["workercount"]]
        if own:  # there may be more workers than cores
            os.sched_setaffinity(0, own)


@pytest.fixture
def no_figures() -> Iterator[None]:
    """`profile` writes none: they take longer than the rest."""
    from tests.support.profiles import without_figures

    with without_figures():
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """A process of a parallel run that dies ends the run: with `--dist loadfile` the others would wait for ever."""
    pytest.exit(f"a process died in {crashitem}", returncode=pytest.ExitCode.INTERNAL_ERROR)


# What takes a core longest, the longest first: no worker is left with one of them at the end. Those that take the same
# traces are apart: who comes second waits for each
LONG = (
    "tests/test_real_model.py",
    "tests/export/test_recurrences.py",
    "tests/export/test_against_oracle.py",
    "tests/tools/fit/test_fit.py",
    "tests/tools/test_gpu_check.py",
    "tests/plugins/test_kernel_device.py",
    "tests/export/targets/openvino/test_against_oracle.py",
    "tests/serve/test_ray.py",
    "tests/export/targets/trt/test_trt.py",
    "tests/export/decoder/test_repeats.py",
    "tests/export/test_halves.py",
    "tests/export/targets/trt/test_against_oracle.py",
    "tests/export/staging/test_kills.py",
    "tests/plugins/test_plugin_engines.py",
    "tests/plugins/test_kernel_host.py",
    "tests/runtime/engines/openvino/test_engine.py",
    "tests/runtime/engines/openvino/test_formats.py",
    "tests/export/array/test_array_0.py",
    "tests/export/array/test_array_2.py",
    "tests/export/check/test_gptq.py",
    "tests/export/test_experts.py",
    "tests/tools/test_streams.py",
    "tests/serve/test_faults.py",
    "tests/serve/test_command.py",
    "tests/tools/eval/tasks/test_program.py",
    "tests/export/compiler/test_atomic.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order in which files are given to workers, with `--dist loadfile --no-loadscope-reorder`."""
    first = [config.rootpath / name for name in LONG]
    items.sort(key=lambda item: first.index(item.path) if item.path in first else len(first))


def pytest_collection_finish() -> None:
    """What is imported by now stays: full collections, which every few bundles bring about, need not go through it.

    For each trace torch makes its table of operators anew, which takes a seventh of the time of a tiny model's, and
    keeps what every operator made of its shapes, which takes longer than it saves.
    """
    if "torch" in sys.modules:
        import torch._dynamo.config
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        setattr(torch._dynamo.config, "fake_tensor_cache_enabled", False)  # noqa: B010
        setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))  # noqa: B010
    gc.collect()
    gc.freeze()
