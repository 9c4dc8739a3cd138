"""The CUDA runtime over host memory, in the place of `cuda.bindings.runtime`, and what is used of `driver` and `nvrtc`.

What it stands for: each function takes and returns what the real one does (test_fakes.py compares the signatures);
the stream runs nothing before it is synchronized, so that a missing wait or a host array written too early shows; a
captured graph replays copies and engine runs from the addresses that it was captured with; device memory begins and
ends as NaN, and an access outside a live block fails; page-locked memory is told from other memory. Where it is given
the host build of the kernel that chooses tokens, NVRTC «compiles» it, and a launch runs it on the blocks that it names.

What it cannot show: that a driver captures what TensorRT enqueues, speed, and errors that come late.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from lora_drop_runtime.engines.trt.kernels import Choice
from numpy.typing import NDArray

Operation = Callable[[], None]
IMAGE = b"a compiled kernel"


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


def cuda_function(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Counts the call, makes it fail where a test wants it to, and puts the error code in front of the results."""

    @functools.wraps(function)
    def call(self: FakeCuda, *arguments: Any) -> tuple[Any, ...]:
        name = function.__name__
        self.calls[name] += 1
        self.called += 1
        error = self.fail.get(name, cudaError_t.cudaSuccess)
        if self.called == self.fail_at_call:
            error = cudaError_t.cudaErrorIllegalAddress
        results: Any = None
        if not error or any(
            word in name for word in ("Free", "Destroy", "Unregister", "Unload")
        ):  # these report older errors
            try:
                results = function(self, *arguments)
            except CudaFailure as failure:
                error = error or failure.error
        if error and name == "cudaStreamSynchronize":
            self.queue = []  # work that failed is not waited for again
        if error and name == "cudaStreamEndCapture":
            self.captured = None
        if error:
            results = (None,) * RESULTS.get(name, 0)
        elif results is None:
            results = ()
        return (error, *(results if isinstance(results, tuple) else (results,)))

    return call


class CudaFailure(Exception):
    def __init__(self, error: cudaError_t) -> None:
        self.error = error


RESULTS = {
    "cudaGetDeviceCount": 1,
    "cudaDeviceGetAttribute": 1,
    "cudaMalloc": 1,
    "cudaMemGetInfo": 2,
    "cudaStreamCreateWithFlags": 1,
    "cudaStreamEndCapture": 1,
    "cudaGraphInstantiate": 1,
    "cudaEventCreateWithFlags": 1,
    "cuModuleLoadData": 1,
    "cuModuleGetFunction": 1,
}


def bytes_of(choice: Choice) -> dict[str, int]:
    """What the kernel may read and write at each address, where a row has drawn nothing yet at least one number."""
    rows, vocab = choice.rows, choice.vocab
    sizes = dict.fromkeys(("next_token", "ids", "len_kept", "len_dropped", "tokens"), 8 * rows)
    sizes |= {"logits": 4 * rows * vocab, "uniforms": 8 * rows, "stops": rows * vocab, "seen": rows * vocab}
    sizes |= {"window": 8 * rows * choice.window_width, "drawn": 4 * rows, "over": 4 * rows}
    sizes |= dict.fromkeys(("top_p", "top_k"), 8 * rows)
    return sizes | dict.fromkeys(("temperature", "penalty", "new_tokens"), 4 * rows)


class FakeCuda:
    """One GPU.

    Args:
        capability: compute capability.
        memory_bytes: of the device.
        kernel: the host build of choose.cu (kernel_build.py); None stands for a machine without NVRTC.

    Attributes:
        fail: function → the error that its calls return.
        fail_at_call: the number (from 1) of the call that fails, whatever its function.
        users: objects that use device memory, in which none may be left when the stream goes.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaDeviceAttr = cudaDeviceAttr
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(
        self, capability: tuple[int, int] = (8, 9), memory_bytes: int = 1 << 28, kernel: ctypes.CDLL | None = None
    ) -> None:
        self.kernel = kernel
        self.events: dict[int, Operation | None] = {}  # the mark on the queue, until it is reached
        self.modules: set[int] = set()
        self.capability, self.memory_bytes = capability, memory_bytes
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.pinned: dict[int, int] = {}
        self.streams: set[int] = set()
        self.graphs: list[list[Operation]] = []
        self.executables: list[list[Operation]] = []
        self.queue: list[Operation] = []
        self.captured: list[Operation] | None = None
        self.capture_is_void = False
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self.calls: Counter[str] = Counter()
        self.called = 0
        self.fail: dict[str, cudaError_t] = {}
        self.fail_at_call: int | None = None
        self.mallocs: list[int] = []
        self._graveyard: list[NDArray[np.uint8]] = []  # freed memory stays, as NaN

    @property
    def live(self) -> dict[str, int]:
        """What was opened and not closed."""
        counts = {
            "blocks": len(self.blocks),
            "pinned": len(self.pinned),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "executables": len(self.executables),
            "events": len(self.events),
            "modules": len(self.modules),
            "users": len(self.users),
        }
        return {what: count for what, count in counts.items() if count}

    def view(self, address: int, size_bytes: int) -> NDArray[np.uint8]:
        """Device memory; fails outside a live block."""
        for start, block in self.blocks.items():
            if start <= address and address + size_bytes <= start + block.nbytes:
                return block[address - start : address - start + size_bytes]
        raise AssertionError(f"{size_bytes} bytes at {address:#x} are in no live block of device memory")

    def enqueue(self, operation: Operation) -> None:
        """Run at the next synchronization, or put into the graph that is being captured."""
        (self.queue if self.captured is None else self.captured).append(operation)

    # ── device and memory ──────────────────────────────────────────────────────────────────────────────────

    @cuda_function
    def cudaGetDeviceCount(self) -> int:
        return 1

    @cuda_function
    def cudaSetDevice(self, device: int) -> None:
        assert device == 0

    @cuda_function
    def cudaDeviceGetAttribute(self, attr: cudaDeviceAttr, device: int) -> int:
        return self.capability[attr - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]

    @cuda_function
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.memory_bytes - sum(block.nbytes for block in self.blocks.values()), self.memory_bytes

    @cuda_function
    def cudaMalloc(self, size: int) -> int:
        self._refuse_in_capture()
        assert size > 0
        if size > self.memory_bytes - sum(block.nbytes for block in self.blocks.values()):
            raise CudaFailure(cudaError_t.cudaErrorMemoryAllocation)
        whole = np.full(size + 256, 0xFF, np.uint8)
        begin = -whole.ctypes.data % 256
        block = whole[begin : begin + size]
        self.blocks[block.ctypes.data] = block
        self.mallocs.append(size)
        return block.ctypes.data

    @cuda_function
    def cudaFree(self, devPtr: int) -> None:
        self._refuse_in_capture()
        self._run_queue()  # the real one waits for the device
        block = self.blocks.pop(devPtr)
        block[...] = 0xFF
        self._graveyard.append(block)

    @cuda_function
    def cudaHostRegister(self, ptr: int, size: int, flags: int) -> None:
        assert ptr % 4096 == 0
        assert ptr not in self.pinned
        self.pinned[ptr] = size

    @cuda_function
    def cudaHostUnregister(self, ptr: int) -> None:
        del self.pinned[ptr]

    @cuda_function
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> None:
        self._check_stream(stream)
        self.enqueue(lambda: self.view(devPtr, count).fill(value))

    @cuda_function
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> None:
        self._check_stream(stream)
        if kind == cudaMemcpyKind.cudaMemcpyHostToDevice:
            if self._is_pinned(src, count):
                self.enqueue(lambda: np.copyto(self.view(dst, count), host(src, count)))
            else:  # staged before the call returns
                self._refuse_in_capture()
                staged = host(src, count).copy()
                self.enqueue(lambda: np.copyto(self.view(dst, count), staged))
        elif kind == cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            self.enqueue(lambda: np.copyto(self.view(dst, count), self.view(src, count).copy()))
        else:
            assert self._is_pinned(dst, count), "a copy out of the device that would make the host wait"
            self.enqueue(lambda: np.copyto(host(dst, count), self.view(src, count)))

    # ── stream and graphs ──────────────────────────────────────────────────────────────────────────────────

    @cuda_function
    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == self.cudaStreamNonBlocking
        stream = 0x57EA + len(self.streams)
        self.streams.add(stream)
        return stream

    @cuda_function
    def cudaStreamDestroy(self, stream: int) -> None:
        assert not self.users, "the stream goes before the execution contexts that use it"
        self.streams.remove(stream)

    @cuda_function
    def cudaStreamSynchronize(self, stream: int) -> None:
        self._check_stream(stream)
        self._refuse_in_capture()
        self._run_queue()

    @cuda_function
    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> None:
        self._check_stream(stream)
        assert self.captured is None
        self.captured, self.capture_is_void = [], False

    @cuda_function
    def cudaStreamEndCapture(self, stream: int) -> list[Operation]:
        self._check_stream(stream)
        assert self.captured is not None
        graph, self.captured = self.captured, None
        if self.capture_is_void:
            raise CudaFailure(cudaError_t.cudaErrorStreamCaptureInvalidated)
        self.graphs.append(graph)
        return graph

    @cuda_function
    def cudaGraphInstantiate(self, graph: list[Operation], flags: int) -> list[Operation]:
        executable = list(graph)
        self.executables.append(executable)
        return executable

    @cuda_function
    def cudaGraphDestroy(self, graph: list[Operation]) -> None:
        _remove(self.graphs, graph)

    @cuda_function
    def cudaGraphLaunch(self, graphExec: list[Operation], stream: int) -> None:
        self._check_stream(stream)
        assert any(graphExec is executable for executable in self.executables), "a graph that was destroyed"
        for operation in graphExec:
            self.enqueue(operation)

    @cuda_function
    def cudaGraphExecDestroy(self, graphExec: list[Operation]) -> None:
        _remove(self.executables, graphExec)

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[int, bytes]:
        return 0, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[int, bytes]:
        return 0, b"in words"

    # ── events ─────────────────────────────────────────────────────────────────────────────────────────────

    @cuda_function
    def cudaEventCreateWithFlags(self, flags: int) -> int:
        assert flags == self.cudaEventDisableTiming
        event = 0xE0 + self.called
        self.events[event] = None
        return event

    @cuda_function
    def cudaEventRecord(self, event: int, stream: int) -> None:
        self._check_stream(stream)
        assert self.captured is None, "the host cannot wait for an event inside a graph"

        def mark() -> None:
            """Its own object at each call."""

        self.events[event] = mark
        self.queue.append(mark)

    @cuda_function
    def cudaEventSynchronize(self, event: int) -> None:
        """Runs what stands before the mark, and nothing behind it."""
        self._refuse_in_capture()
        mark = self.events[event]
        if any(operation is mark for operation in self.queue):
            while (operation := self.queue.pop(0)) is not mark:
                operation()

    @cuda_function
    def cudaEventDestroy(self, event: int) -> None:
        del self.events[event]

    # ── the kernel: cuda.bindings.driver and nvrtc ─────────────────────────────────────────────────────────

    @cuda_function
    def cuModuleLoadData(self, image: bytes) -> int:
        assert image == IMAGE
        module = 0xC0DE + self.called
        self.modules.add(module)
        return module

    @cuda_function
    def cuModuleGetFunction(self, hmod: int, name: bytes) -> str:
        assert hmod in self.modules
        assert self.kernel is not None
        return name.decode()

    @cuda_function
    def cuLaunchKernel(
        self,
        f: str,
        gridDimX: int,
        gridDimY: int,
        gridDimZ: int,
        blockDimX: int,
        blockDimY: int,
        blockDimZ: int,
        sharedMemBytes: int,
        hStream: int,
        kernelParams: int,
        extra: int,
    ) -> None:
        self._check_stream(hStream)
        assert (f, gridDimY, gridDimZ, blockDimY, blockDimZ, extra) == ("choose_tokens", 1, 1, 1, 1, 0)
        place = ctypes.c_void_p.from_address(kernelParams).value
        assert place is not None
        choice = Choice.from_buffer_copy(host(place, ctypes.sizeof(Choice)).tobytes())
        assert gridDimX == choice.rows
        assert sharedMemBytes <= 48 * 1024, "more needs an attribute of the function"
        assert self.kernel is not None
        run = self.kernel.choose_tokens

        def operation() -> None:
            for name, size in bytes_of(choice).items():
                self.view(getattr(choice, name), size)
            run(ctypes.byref(choice), 0)

        self.enqueue(operation)

    @cuda_function
    def cuModuleUnload(self, hmod: int) -> None:
        self.modules.remove(hmod)

    def cuGetErrorName(self, error: cudaError_t) -> tuple[int, bytes]:
        return self.cudaGetErrorName(error)

    def cuGetErrorString(self, error: cudaError_t) -> tuple[int, bytes]:
        return self.cudaGetErrorString(error)

    def nvrtcCreateProgram(
        self, src: bytes, name: bytes, numHeaders: int, headers: list[bytes], includeNames: list[bytes]
    ) -> tuple[int, bytes]:
        if self.kernel is None:
            raise RuntimeError("libnvrtc.so was not found")
        return 0, src

    def nvrtcCompileProgram(self, prog: bytes, numOptions: int, options: list[bytes]) -> tuple[int]:
        assert numOptions == len(options)
        return (0,)

    def nvrtcGetCUBINSize(self, prog: bytes) -> tuple[int, int]:
        return 0, len(IMAGE)

    def nvrtcGetCUBIN(self, prog: bytes, cubin: bytearray) -> tuple[int]:
        cubin[:] = IMAGE
        return (0,)

    def nvrtcDestroyProgram(self, prog: bytes) -> tuple[int]:
        return (0,)

    def _run_queue(self) -> None:
        queue, self.queue = self.queue, []
        for operation in queue:
            operation()

    def _refuse_in_capture(self) -> None:
        if self.captured is not None:
            self.capture_is_void = True
            raise CudaFailure(cudaError_t.cudaErrorStreamCaptureUnsupported)

    def _check_stream(self, stream: int) -> None:
        assert stream in self.streams, "the stream is gone"

    def _is_pinned(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + length for start, length in self.pinned.items())


def host(address: int, size_bytes: int) -> NDArray[np.uint8]:
    """Host memory at an address."""
    return np.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), np.uint8)


def _remove(items: list[Any], item: Any) -> None:
    """By identity: two graphs may be equal."""
    (index,) = (i for i, other in enumerate(items) if other is item)
    del items[index]
