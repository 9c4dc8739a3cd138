"""The CUDA runtime as the little that an engine needs: memory, one stream, copies, captured graphs, a kernel, events.

Enters: sizes, addresses, host arrays. Leaves: addresses as integers, or a BundleError with CUDA's own words. Knows no
tensor and no TensorRT. It remembers what it handed out, so `close` frees everything, whatever went wrong before.

Page-locked host memory is anonymous pages of Python's that are registered with CUDA: numpy views of it stay valid after
`close`, where memory of cudaHostAlloc would be gone under them.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.errors import BundleError, NoDeviceError, first_line

Array = npt.NDArray[Any]
MIB = 2**20
ALIGNMENT = 256  # of every address that cudaMalloc gives and that TensorRT takes


def _bindings(part: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{part}")
    except ImportError as error:
        raise NoDeviceError(
            "A TensorRT bundle needs the CUDA bindings for Python.",
            note=f"cuda.bindings.{part} cannot be imported: {first_line(error)}.",
            hint="pip install cuda-bindings",
        ) from None


class CudaDevice:
    """The first visible GPU (CUDA_VISIBLE_DEVICES chooses) and one stream on it. Use from one thread.

    Args:
        runtime: `cuda.bindings.runtime`; in a test what stands for it, and for `driver` and `nvrtc` beside it.

    Attributes:
        stream: the address of the stream, as TensorRT takes it.
        compute_capability: for example `8.9`.
        nvrtc: `cuda.bindings.nvrtc`, which compiles kernels; its library may be missing.

    Raises:
        NoDeviceError: cuda-bindings is not installed, no driver or no GPU.
    """

    def __init__(self, runtime: Any = None) -> None:
        bindings = [_bindings(part) if runtime is None else runtime for part in ("runtime", "driver", "nvrtc")]
        self._cuda, self._driver, self.nvrtc = bindings
        runtime = self._cuda
        self._blocks: set[int] = set()  # addresses
        self._pinned: dict[int, Array] = {}
        self._graphs: list[Any] = []
        self._modules: list[Any] = []
        self._events: list[Any] = []
        self._stream: Any = None
        failed, count = runtime.cudaGetDeviceCount()
        if failed or not count:
            raise NoDeviceError(
                "There is no GPU that CUDA can use.",
                note=f"CUDA says: {self._words(failed)}." if failed else "CUDA counts 0 devices, needed is 1.",
                hint="Use a machine with an NVIDIA GPU and a current driver, or another --target of the bundle.",
            )
        self._call("cudaSetDevice", 0)
        major, minor = (
            self._call("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (
                runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor,
                runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.compute_capability = f"{major}.{minor}"
        self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def close(self) -> None:
        """Free everything. What CUDA says to it is ignored: after a failed kernel every call fails."""
        if self._stream is None:
            return
        self._cuda.cudaStreamSynchronize(self._stream)
        for graph in self._graphs:
            self._cuda.cudaGraphExecDestroy(graph)
        for event in self._events:
            self._cuda.cudaEventDestroy(event)
        for module in self._modules:
            self._driver.cuModuleUnload(module)
        for address in self._blocks:
            self._cuda.cudaFree(address)
        for address in self._pinned:
            self._cuda.cudaHostUnregister(address)
        self._cuda.cudaStreamDestroy(self._stream)
        self._graphs.clear()
        self._events.clear()
        self._modules.clear()
        self._blocks.clear()
        self._pinned.clear()
        self._stream = None

    # ── memory ─────────────────────────────────────────────────────────────────────────────────────────────

    def malloc(self, size_bytes: int, purpose: str) -> int:
        """At an address that is a multiple of 256. Raises NoDeviceError with the numbers when memory is out."""
        error, address = self._cuda.cudaMalloc(size_bytes)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            _, free, total = self._cuda.cudaMemGetInfo()
            raise NoDeviceError(
                "The GPU is out of memory.",
                note=f"{purpose} takes {size_bytes / MIB:,.1f} MiB; free are {free / MIB:,.1f} of {total / MIB:,.1f}.",
                hint="Ask for a smaller batch, free the GPU, or export with a smaller --max-seq-len or --dtype.",
            )
        self._check("cudaMalloc", error)
        self._blocks.add(address)
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)
        self._blocks.remove(address)

    def zero(self, address: int, size_bytes: int) -> None:
        """Asynchronous."""
        self._call("cudaMemsetAsync", address, 0, size_bytes, self._stream)

    def pin(self, size_bytes: int) -> Array:
        """Page-locked host memory, uint8 and zero."""
        block = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
        self._call("cudaHostRegister", block.ctypes.data, size_bytes, 0)
        self._pinned[block.ctypes.data] = block
        return block

    def unpin(self, block: Array) -> None:
        self._call("cudaHostUnregister", block.ctypes.data)
        del self._pinned[block.ctypes.data]

    def is_pinned(self, array: Array) -> bool:
        """Whether an array begins where page-locked memory does."""
        return array.ctypes.data in self._pinned

    def upload(self, address: int, array: Array) -> None:
        """Copy any contiguous array to the device and wait for it."""
        self.copy_in(address, array.ctypes.data, array.nbytes)  # on the stream, which cudaMemcpy would not wait for
        self.synchronize()

    def copy_in(self, address: int, host_address: int, size_bytes: int) -> None:
        """Host to device, asynchronous."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, host_address, size_bytes, kind, self._stream)

    def copy_out(self, host_address: int, address: int, size_bytes: int) -> None:
        """Device to host, asynchronous."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host_address, address, size_bytes, kind, self._stream)

    def copy_within(self, address: int, source_address: int, size_bytes: int) -> None:
        """Device to device, asynchronous."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", address, source_address, size_bytes, kind, self._stream)

    # ── the stream and its graphs ──────────────────────────────────────────────────────────────────────────

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def settle(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        if self._stream is not None:
            self._cuda.cudaStreamSynchronize(self._stream)

    def event(self) -> Any:
        """A mark to set on the stream; freed by `close`."""
        event = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        self._events.append(event)
        return event

    def mark(self, event: Any) -> None:
        """Set it behind what is on the stream now."""
        self._call("cudaEventRecord", event, self._stream)

    def wait(self, event: Any) -> None:
        """For all that stood before the mark."""
        self._call("cudaEventSynchronize", event)

    def load(self, image: bytes, name: str) -> Any:
        """A kernel of a compiled image."""
        module = self._call("cuModuleLoadData", image)
        self._modules.append(module)
        return self._call("cuModuleGetFunction", module, name.encode())

    def launch_kernel(
        self, function: Any, blocks: int, threads: int, shared_bytes: int, argument: ctypes.Structure
    ) -> None:
        """With one struct as its argument, which is copied at once; asynchronous."""
        places = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        address = ctypes.addressof(places)
        self._call("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, shared_bytes, self._stream, address, 0)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` puts on the stream, as a graph to launch; nothing of it runs now."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            error, graph = self._cuda.cudaStreamEndCapture(self._stream)  # the stream is of no use before that
            if not error:
                self._cuda.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.cudaGraphDestroy(graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Asynchronous."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def destroy(self, graph: Any) -> None:
        self._cuda.cudaGraphExecDestroy(graph)  # as in close
        self._graphs.remove(graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the CUDA runtime or driver; its first result is the error code."""
        error, *values = getattr(self._cuda if function.startswith("cuda") else self._driver, function)(*arguments)
        if error:
            self._check(function, error)
        return values[0] if values else None

    def _check(self, function: str, error: Any) -> None:
        if error:
            raise BundleError(
                "The GPU reported an error.",
                note=f"{function}: {self._words(error, function)}.",
                hint="Check that no other process has filled the GPU, and the driver with nvidia-smi; then try again.",
            )

    def _words(self, error: Any, function: str = "cuda") -> str:
        module, prefix = (self._cuda, "cuda") if function.startswith("cuda") else (self._driver, "cu")
        return " ".join(getattr(module, f"{prefix}GetError{part}")(error)[1].decode() for part in ("Name", "String"))


def device_compute_capability() -> str:
    """Of this machine's first GPU. Raises NoDeviceError, or BundleError without the CUDA bindings."""
    device = CudaDevice()
    device.close()
    return device.compute_capability
