"""The card, or its stand-in; the attention kernel's library for it; how long something on it takes.

Enters: a job. Leaves: a `Gpu`. Knows no case, no contestant and no engine.
"""

from __future__ import annotations

import ctypes
import importlib
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.errors import NoDeviceError

from gpu_check.job import Job, Skip

ELEMENT_BYTES = 2  # of bf16
COPY_REPEATS = 21


def cuda_runtime(job: Job) -> Any:
    """`cuda.bindings.runtime` with a GPU behind it, or what stands for both. Raises Skip."""
    if job.stand_in:
        from tests.support.fake_gpu import FakeGpu

        return FakeGpu()
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        raise Skip("cuda-bindings is not installed") from None
    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0 or count == 0:
        raise Skip(f"no NVIDIA GPU or driver: {getattr(error, 'name', error)}")
    return runtime


class Gpu:
    """The first GPU, with what times it.

    Attributes:
        cuda: the CUDA runtime.
        device: its memory, stream and graphs.
        multiprocessors, l2_bytes: of the card.
    """

    def __init__(self, job: Job) -> None:
        self.cuda = cuda_runtime(job)
        try:
            self.device = CudaDevice(self.cuda)
        except NoDeviceError as error:
            raise Skip(f"{error.fact} {error.note}") from None
        attributes = self.cuda.cudaDeviceAttr
        self.multiprocessors = self._attribute(attributes.cudaDevAttrMultiProcessorCount)
        self.l2_bytes = self._attribute(attributes.cudaDevAttrL2CacheSize)
        self.noise = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32).view(np.uint16)[1::2].copy()

    def _attribute(self, attribute: Any) -> int:
        return int(self.call("cudaDeviceGetAttribute", attribute, 0))

    def call(self, function: str, *arguments: Any) -> Any:
        """A function of the CUDA runtime; its error raised."""
        error, *values = getattr(self.cuda, function)(*arguments)
        if int(error) != 0:
            raise RuntimeError(f"{function}: {getattr(error, 'name', error)}")
        return values[0] if len(values) == 1 else tuple(values)

    @property
    def free_bytes(self) -> int:
        return int(self.call("cudaMemGetInfo")[0])

    @contextmanager
    def memory(self) -> Iterator[Callable[[int], int]]:
        """Device memory for the length of a `with`; yields what allocates bytes."""
        addresses: list[int] = []

        def allocate(size_bytes: int) -> int:
            addresses.append(self.device.malloc(size_bytes, "A measurement"))
            return addresses[-1]

        try:
            yield allocate
        finally:
            self.device.synchronize()
            for address in addresses:
                self.device.free(address)

    def random(self, allocate: Callable[[int], int], elements: int) -> int:
        """Normal numbers in bf16 (float32 cut off), the same few megabytes over and over."""
        address = allocate(elements * ELEMENT_BYTES)
        for start in range(0, elements, self.noise.size):
            self.device.upload(address + start * ELEMENT_BYTES, self.noise[: elements - start])
        return address

    def captured(self, enqueue: Callable[[], None]) -> Callable[[], float]:
        """Captures what `enqueue` puts on the device's stream; the result runs it once and returns the seconds."""
        enqueue()  # loads the kernels, which a capture does not allow
        self.device.synchronize()
        graph = self.device.capture(enqueue)
        stream = self.device.stream
        start, end = self.call("cudaEventCreate"), self.call("cudaEventCreate")

        def seconds() -> float:
            self.call("cudaEventRecord", start, stream)
            self.device.launch(graph)
            self.call("cudaEventRecord", end, stream)
            self.call("cudaEventSynchronize", end)
            return float(self.call("cudaEventElapsedTime", start, end)) / 1e3

        for _ in range(3):
            seconds()
        return seconds

    def copy_contestant(self, size_bytes: int) -> Callable[[], float]:
        """Seconds of one device-to-device copy. Its memory stays for the whole run."""
        source, to = (self.device.malloc(size_bytes, "A copy") for _ in range(2))
        return self.captured(lambda: self.device.copy_within(to, source, size_bytes))

    def copies_contestant(self, allocate: Callable[[int], int], size_bytes: int, count: int) -> Callable[[], float]:
        """Seconds of one of so many copies, each of memory of its own, that are captured together."""
        pairs = [(allocate(size_bytes), allocate(size_bytes)) for _ in range(count)]

        def enqueue() -> None:
            for to, source in pairs:
                self.device.copy_within(to, source, size_bytes)

        seconds = self.captured(enqueue)
        return lambda: seconds() / count

    def copy_rate(self, size_bytes: int) -> float:
        """Bytes a second that a copy reads and writes: each of its bytes counts twice."""
        seconds = self.copy_contestant(size_bytes)
        return 2 * size_bytes / statistics.median(seconds() for _ in range(COPY_REPEATS))


def kernels(job: Job, gpu: Gpu) -> ctypes.CDLL | Any:
    """The kernel library, built where `build` has not; over a stand-in its calls go into the stand-in's queue."""
    from gpu_check.build import library_of
    from plugins.kernels.binding import load_library

    library = load_library(library_of(job))
    if not job.stand_in:
        return library
    from tests.support.fake_gpu import QueuedKernels

    return QueuedKernels(library, gpu.cuda)
