"""The fakes against the real libraries, as far as these go without a GPU."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.trt import cuda_device as cuda_device_module
from lora_drop_runtime.engines.trt import kernels
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.engines.trt.library import error_logger
from lora_drop_runtime.errors import NoDeviceError

from tests.support import fake_cuda, fake_trt
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_trt import TARGET


def test_cuda_functions_have_the_real_signatures() -> None:
    """Each function that cuda_device.py names exists, takes as many arguments, and is faked with the same names."""
    real = pytest.importorskip("cuda.bindings.runtime")
    modules = {part: pytest.importorskip(f"cuda.bindings.{part}") for part in ("driver", "nvrtc")}
    trees = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in (cuda_device_module, kernels)]
    used = {}
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("_call", "call") and isinstance(node.args[0], ast.Constant):
            used[node.args[0].value] = len(node.args) - 1
        elif called.startswith(("cuda", "nvrtc")):
            used[called] = len(node.args)
    assert len(used) >= 31
    for name, count in used.items():
        part = "nvrtc" if name.startswith("nvrtc") else "driver"
        module = real if name.startswith("cuda") else modules[part]
        theirs = list(inspect.signature(getattr(module, name)).parameters)
        ours = list(inspect.signature(getattr(FakeCuda, name)).parameters)[1:]
        assert theirs == ours, name
        assert len(theirs) == count, name
    for enumeration in ("cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr", "cudaStreamCaptureMode"):
        for member in getattr(fake_cuda, enumeration):
            assert int(getattr(getattr(real, enumeration), member.name)) == member, member
    assert FakeCuda.cudaStreamNonBlocking == real.cudaStreamNonBlocking
    assert FakeCuda.cudaEventDisableTiming == real.cudaEventDisableTiming
    assert int(real.cudaStream_t(5)) == 5


def test_the_real_cuda_bindings_without_a_gpu(bundle: Bundle) -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    error, _ = real.cudaGetDeviceCount()
    if not error:
        pytest.skip("this machine has a GPU")
    with pytest.raises(NoDeviceError, match="no GPU"):
        CudaDevice()
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(NoDeviceError, match="no GPU"):
        Session.open(bundle.root, target=TARGET)


def test_tensorrt_classes_have_what_the_fakes_have() -> None:
    """Every method and property of the fakes that the TensorRT engine uses, with the parameters' names."""
    trt = pytest.importorskip("tensorrt_rtx")
    pairs = {
        "Runtime": fake_trt.FakeRuntime,
        "ICudaEngine": fake_trt.FakeCudaEngine,
        "IExecutionContext": fake_trt.FakeExecutionContext,
        "IRuntimeConfig": fake_trt.FakeRuntimeConfig,
        "IRuntimeCache": fake_trt.FakeRuntimeCache,
        "IPluginRegistry": fake_trt.FakePluginRegistry,
        "ILogger": fake_trt.ILogger,
    }
    folder = Path(cuda_device_module.__file__).parent
    source = "".join(file.read_text() for file in sorted(folder.glob("*.py")))
    checked = 0
    for name, fake in pairs.items():
        for member, value in vars(fake).items():
            if member.startswith("_") or not callable(value) or f".{member}(" not in source:
                continue
            documented = getattr(getattr(trt, name), member).__doc__
            signatures = re.findall(rf"{member}\(self: [\w.]+(?:, )?(.*)\) ->", documented)
            names = [re.findall(r"(?:^|, )(\w+): ", signature) for signature in signatures]
            ours = list(inspect.signature(value).parameters)[1:]
            if member == "create_execution_context":
                assert sorted(n[0] for n in names) == ["runtime_config", "strategy"]
            else:
                assert ours in names, (name, member, names)
            checked += 1
    assert checked > 15
    for name in ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"):
        assert isinstance(getattr(trt.ICudaEngine, name), property)
    assert isinstance(trt.IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy, property)
    for enumeration in ("ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):
        for member in getattr(fake_trt, enumeration):
            assert int(getattr(getattr(trt, enumeration), member.name)) == member.value
    for member in fake_trt.ILogger.Severity:
        assert int(getattr(trt.ILogger.Severity, member.name)) == member
    assert trt.ILogger.Severity.INTERNAL_ERROR <= trt.ILogger.Severity.ERROR < trt.ILogger.Severity.WARNING
    assert {member.name for member in fake_trt.DataType} <= set(trt.DataType.__members__)


def test_the_real_logger_and_runtime(bundle: Bundle) -> None:
    """As far as TensorRT-RTX goes without a GPU: its runtime refuses a plan, and our logger hears why."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = error_logger(trt)
    runtime = trt.Runtime(logger)
    assert runtime.deserialize_cuda_engine(b"this is no engine") is None
    assert logger.lines
    assert runtime.get_plugin_registry() is not None
