"""The attention kernel on a device: arrays in its memory, a call in a CUDA graph, a cache of more than 2³¹ elements.

Enter: the CUDA runtime (`cuda.bindings.runtime`, or fake_gpu.py), a library for it, a case. Leaves: an assertion.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np

from plugins.kernels.binding import UPDATED
from tests.support.kernel_calls import GUARD, GUARD_BYTES, make_arrays, make_call
from tests.support.kernel_cases import Case
from tests.support.kernel_reference import Arrays, check


def done(result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime returned; its error raised."""
    error, *values = result
    assert int(error) == 0, str(error)
    return values[0] if len(values) == 1 else values


class DeviceMemory:
    """An array between guards on the GPU."""

    def __init__(self, cuda: Any, array: np.ndarray) -> None:
        self.cuda = cuda
        self.like = array
        image = np.full(array.nbytes + 2 * GUARD_BYTES, GUARD, np.uint8)
        image[GUARD_BYTES : GUARD_BYTES + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.pointer = done(cuda.cudaMalloc(image.nbytes))
        self.nbytes = image.nbytes
        self.address = int(self.pointer) + GUARD_BYTES
        to_device(cuda, self.pointer, image)

    def write(self, array: np.ndarray) -> None:
        to_device(self.cuda, self.address, array)

    def read(self) -> tuple[np.ndarray, bool]:
        done(self.cuda.cudaDeviceSynchronize())
        image = np.empty(self.nbytes, np.uint8)
        to_host(self.cuda, image, self.pointer)
        end = self.nbytes - GUARD_BYTES
        intact = (image[:GUARD_BYTES] == GUARD).all() and (image[end:] == GUARD).all()
        return image[GUARD_BYTES:end].view(self.like.dtype).reshape(self.like.shape).copy(), bool(intact)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self.cuda.cudaFree(self.pointer)


def to_device(cuda: Any, address: int, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array)
    done(cuda.cudaMemcpy(address, array.ctypes.data, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice))


def to_host(cuda: Any, array: np.ndarray, address: int) -> None:
    """Into a contiguous array."""
    done(cuda.cudaMemcpy(array.ctypes.data, address, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost))


# ── one graph, replayed while the lengths grow ─────────────────────────────────────────────────────────────────

REPLAYED = ("splits", "counts_in_prefill", "everything")


def growing(case: Case) -> list[Case]:
    """A case from empty caches up to its own lengths, in caches of the same size."""
    fractions = (0.0, 0.1, 0.5, 1.0)
    steps = [replace(case, lengths=tuple(int(n * f) for n in case.lengths), seed=i) for i, f in enumerate(fractions)]
    return [replace(step, spare_slots=step.spare_slots + case.slots - step.slots) for step in steps]


def check_replays(cuda: Any, library: ctypes.CDLL, case: Case) -> None:
    """Captured at one length, replayed at others: the launch shapes know the sizes alone."""
    steps = growing(case)
    first = make_arrays(steps[0])
    workspace_bytes = library.lora_drop_workspace_bytes(make_call(case, lambda _: None), case.multiprocessors)
    first["workspace"] = np.zeros(workspace_bytes, np.uint8)
    held = {key: DeviceMemory(cuda, array) for key, array in first.items() if array is not None}
    call = make_call(steps[0], lambda key: held[key].address if key in held else None)

    stream = done(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
    # Plainly first: a capture allows no loading of kernels. What it writes is written over below
    assert library.lora_drop_attention(call, workspace_bytes, case.multiprocessors, int(stream)) == 0
    done(cuda.cudaStreamSynchronize(stream))
    done(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    assert library.lora_drop_attention(call, workspace_bytes, case.multiprocessors, int(stream)) == 0
    graph = done(cuda.cudaStreamEndCapture(stream))
    executable = done(cuda.cudaGraphInstantiate(graph, 0))
    for step in steps:
        arrays = make_arrays(step)
        for key, array in arrays.items():
            if array is not None:
                held[key].write(array)
        done(cuda.cudaDeviceSynchronize())  # the stream does not wait for copies of pageable memory
        done(cuda.cudaGraphLaunch(executable, stream))
        after = {key: held[key].read()[0] for key in UPDATED}
        check(step, arrays, after)
    done(cuda.cudaGraphExecDestroy(executable))
    done(cuda.cudaGraphDestroy(graph))
    done(cuda.cudaStreamDestroy(stream))


# ── caches whose last row begins past 2³¹ elements ─────────────────────────────────────────────────────────────

FAR_SLOTS = 1 << 24
FAR = Case("past_2_31_elements", lengths=(70, 5, 130), kv_heads=1, dtype="f16", kv_dtype="i8")
FAR_BYTES = 2 * len(FAR.lengths) * FAR_SLOTS * FAR.head_dim


def check_far(cuda: Any, library: ctypes.CDLL) -> None:
    """Row 2 begins at element 2³¹. Of each row's slots the first few are filled and looked at."""
    arrays = make_arrays(FAR)
    small = {key: value for key, value in arrays.items() if value is not None and not key.endswith("_cache")}
    held = {key: DeviceMemory(cuda, array) for key, array in small.items()}
    caches = {name: done(cuda.cudaMalloc(FAR_BYTES // 2)) for name in ("key_cache", "value_cache")}
    workspace = None
    try:
        addresses = {key: memory.address for key, memory in held.items()} | {k: int(p) for k, p in caches.items()}
        call = make_call(FAR, addresses.get)
        call.slots = FAR_SLOTS
        workspace_bytes = library.lora_drop_workspace_bytes(call, FAR.multiprocessors)
        workspace = done(cuda.cudaMalloc(max(workspace_bytes, 1)))
        call.workspace = int(workspace)
        stride = FAR_SLOTS * FAR.head_dim
        assert (len(FAR.lengths) - 1) * stride >= 2**31
        for name, pointer in caches.items():
            for row in range(len(FAR.lengths)):
                to_device(cuda, int(pointer) + row * stride, arrays[name][row])
        assert library.lora_drop_attention_problem(call) is None
        assert library.lora_drop_attention(call, workspace_bytes, FAR.multiprocessors, None) == 0
        done(cuda.cudaDeviceSynchronize())
        after: Arrays = {"output": held["output"].read()[0]}
        for name, pointer in caches.items():
            after[name] = np.empty_like(arrays[name])
            for row in range(len(FAR.lengths)):
                to_host(cuda, after[name][row], int(pointer) + row * stride)
        check(FAR, arrays, after)
    finally:
        for pointer in (*caches.values(), workspace):
            if pointer is not None:
                cuda.cudaFree(pointer)
