"""TensorRT and TensorRT-RTX on PyTorch: an «engine» is the graph that the real builder gets, run by torch_ops.py on the
runtime's own stream and at the addresses that it binds. Plugins' nodes call the plugins' own kernels (plugin_ops.py).

With a GPU all of the device runtime is real: page-locked memory, copies, streams, CUDA graphs that capture what a
context enqueues, buffers. It cannot show TensorRT's kernels, their time, nor what TensorRT says of a capture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import onnx
import torch

from tests.support.fake_cuda import FakeCuda
from tests.support.fake_library import FakeLibrary
from tests.support.fake_trt import FakeCudaEngine, TensorIOMode
from tests.support.plugin_ops import plugin_ops
from tests.support.torch_ops import DTYPES, Program

ONNX_TYPES = {"FLOAT": 1, "INT8": 3, "HALF": 10, "BF16": 16, "FP8": 17, "INT64": 7, "INT32": 6}


CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


class _DeviceBytes:
    """Device memory, as PyTorch takes that of others."""

    def __init__(self, address: int, size: int) -> None:
        data = {"shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}
        self.__cuda_array_interface__ = data


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Memory that somebody else owns."""
    size = dtype.itemsize * torch.Size(shape).numel()
    if device == "cpu":
        flat = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    else:
        flat = torch.as_tensor(_DeviceBytes(address, size), device=device)
    return flat.view(dtype).reshape(shape)


class TorchTrt(FakeLibrary):
    """The module.

    Args:
        cuda: the CUDA runtime; a FakeCuda means the CPU.
        kernels: the plugins' kernels, for the device or for the host; without them engines have no plugin.
        rtx: whether it is TensorRT-RTX, or TensorRT.
    """

    def __init__(self, cuda: Any, kernels: ctypes.CDLL | None = None, *, rtx: bool = True) -> None:
        super().__init__(cuda, rtx=rtx)
        self.plugins = {} if kernels is None else plugin_ops(kernels)
        # PyTorch runs on cards that the real library does not know
        self.ComputeCapability = type("ComputeCapability", (), {f"SM{n}": n for n in CAPABILITIES})  # type: ignore[misc]
        self.device = "cpu" if isinstance(cuda, FakeCuda) else "cuda"

    @property
    def engine_class(self) -> Any:
        return TorchEngine


class TorchEngine(FakeCudaEngine):
    def make_session(self, serialized: bytes, root: str) -> Any:
        """The program, which needs no files: the weights are inputs."""
        return Program(onnx.load_model_from_string(serialized).graph, self.trt.device, self.trt.plugins)

    def make_context(self) -> Any:
        return TorchContext(self)


class TorchContext:
    """What the runtime asks of an execution context."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.device, self.cuda = engine, engine.trt.device, engine.trt.cuda
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self._views: dict[tuple[str, int, tuple[int, ...]], torch.Tensor] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return name in self.engine.tensors and memory % 256 == 0

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Over a FakeCuda into its queue; on a GPU onto the stream, where a capture takes it."""
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.device == "cpu":
            self.cuda.enqueue(lambda: self._run(shapes, addresses))
            return True
        with torch.cuda.stream(torch.cuda.ExternalStream(stream_handle)):
            self._run(shapes, addresses)
        return True

    def _view(self, name: str, address: int, shape: tuple[int, ...]) -> torch.Tensor:
        key = name, address, shape
        if key not in self._views:
            dtype = DTYPES[ONNX_TYPES[self.engine.tensors[name].dtype.name]]
            self._views[key] = tensor_at(address, shape, dtype, self.device)
        return self._views[key]

    @torch.no_grad()
    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        tensors = self.engine.tensors
        inputs = {
            name: self._view(name, addresses[name], shapes.get(name) or tuple(map(int, tensor.shape)))
            for name, tensor in tensors.items()
            if tensor.mode is TensorIOMode.INPUT
        }
        for name, value in self.engine.session(inputs).items():
            if value.data_ptr() != addresses[name]:
                self._view(name, addresses[name], tuple(value.shape)).copy_(value)
