"""The CUDA runtime of fake_cuda.py with what measuring needs beside it, and the attention kernel on it.

What it stands for: events, properties, waiting for the device, copies that wait; kernels that a stream runs when it is
waited for, also out of a captured graph. What it cannot show: time. Between any two events there is a millisecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import mmap
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from plugins.kernels.binding import LoraDropAttention, LoraDropInt4Gemm
from tests.support.fake_cuda import FakeCuda, cuda_function, cudaMemcpyKind, host
from tests.support.kernel_build import NoCompilerError, chooser_on_host

BINDINGS = tuple(f"cuda.bindings.{part}" for part in ("runtime", "driver", "nvrtc"))  # that it stands for

SPARSE_BYTES = 1 << 28  # blocks from here on are pages of zeros that nobody has touched


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrMultiProcessorCount = 16
    cudaDevAttrL2CacheSize = 38
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class FakeGpu(FakeCuda):
    cudaDeviceAttr = cudaDeviceAttr  # type: ignore[assignment]

    def __init__(self) -> None:
        kernel = None
        with contextlib.suppress(NoCompilerError):
            kernel = chooser_on_host()
        super().__init__(memory_bytes=1 << 34, kernel=kernel)

    @cuda_function
    def cudaGetDeviceProperties(self, device: int) -> Any:
        return SimpleNamespace(
            name=b"a stand-in for CUDA",
            major=self.capability[0],
            minor=self.capability[1],
            multiProcessorCount=4,
            totalGlobalMem=self.memory_bytes,
            l2CacheSize=1 << 16,
        )

    @cuda_function
    def cudaDeviceGetAttribute(self, attr: int, device: int) -> int:
        return {16: 4, 38: 1 << 16, 75: self.capability[0], 76: self.capability[1]}[attr]

    @cuda_function
    def cudaDriverGetVersion(self) -> int:
        return 13000

    @cuda_function
    def cudaRuntimeGetVersion(self) -> int:
        return 13000

    @cuda_function
    def cudaDeviceSynchronize(self) -> None:
        self._refuse_in_capture()
        self._run_queue()

    @cuda_function
    def cudaMalloc(self, size: int) -> int:
        if size < SPARSE_BYTES:
            return FakeCuda.cudaMalloc(self, size)[1]
        block = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    @cuda_function
    def cudaFree(self, devPtr: int) -> None:
        self._refuse_in_capture()
        self._run_queue()
        block = self.blocks.pop(devPtr)
        if block.nbytes < SPARSE_BYTES:
            block[...] = 0xFF
            self._graveyard.append(block)

    @cuda_function
    def cudaMemcpy(self, dst: int, src: int, count: int, kind: cudaMemcpyKind) -> None:
        self._refuse_in_capture()
        self._run_queue()
        to_device, to_host = cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToHost
        target = host(dst, count) if kind == to_host else self.view(dst, count)
        target[...] = host(src, count) if kind == to_device else self.view(src, count)

    @cuda_function
    def cudaEventCreate(self) -> int:
        event = 0xE0 + self.called
        self.events[event] = None
        return event

    @cuda_function
    def cudaEventElapsedTime(self, start: int, end: int) -> float:
        assert start != end
        return 1.0


class QueuedKernels:
    """The kernel's library for the host, its calls in the stand-in's stream; a null stream runs them at once."""

    def __init__(self, library: ctypes.CDLL, cuda: FakeCuda) -> None:
        self._library, self._cuda = library, cuda
        self.lora_drop_attention_problem = library.lora_drop_attention_problem
        self.lora_drop_workspace_bytes = library.lora_drop_workspace_bytes
        self.lora_drop_int4_gemm_problem = library.lora_drop_int4_gemm_problem

    def lora_drop_int4_gemm(self, call: LoraDropInt4Gemm, stream: int | None) -> int:
        return self._run(partial(self._library.lora_drop_int4_gemm, LoraDropInt4Gemm.from_buffer_copy(call)), stream)

    def lora_drop_attention(
        self, call: LoraDropAttention, workspace_bytes: int, multiprocessors: int, stream: int | None
    ) -> int:
        taken = LoraDropAttention.from_buffer_copy(call)
        attend = partial(self._library.lora_drop_attention, taken, workspace_bytes, multiprocessors)
        return self._run(attend, stream)

    def _run(self, kernel: Callable[[None], int], stream: int | None) -> int:
        def run() -> None:
            assert kernel(None) == 0

        if stream is None:
            run()
        else:
            self._cuda.enqueue(run)
        return 0
