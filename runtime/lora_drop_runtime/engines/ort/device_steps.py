"""Steps on a GPU: what the host writes goes there in one copy, and a decode step is a CUDA graph.

Enters: arrays of a step, and what its buffers are bound to. Leaves: device buffers, and the number of a graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from lora_drop_runtime.engines.engine import Array, DeviceBuffer

from .device_memory import DeviceMemory

ALIGNMENT = 256  # of what is bound in the block, as cudaMalloc gives it


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class HostInputs:
    """The arrays that a step reads of the host, side by side in one block on the device; called before each run.

    Attributes:
        buffers: where each of them lies.
    """

    def __init__(self, memory: DeviceMemory, arrays: Mapping[str, Array], value: Any = None) -> None:
        """Args:
        value: the block, if there is one; of `size` bytes at least.
        """
        self._memory = memory
        self._host = np.zeros(self.size(arrays), np.uint8)
        self.value = memory.block(self._host) if value is None else value
        self.buffers: dict[str, DeviceBuffer] = {}
        self._copies, begin = [], 0
        for name, array in arrays.items():
            view = self._host[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
            self._copies.append((view, array))
            self.buffers[name] = DeviceBuffer(name, self.value.data_ptr() + begin, array.shape, array.dtype.name)
            begin += _aligned(array.nbytes)

    @staticmethod
    def size(arrays: Mapping[str, Array]) -> int:
        """Bytes of the block."""
        return sum(_aligned(array.nbytes) for array in arrays.values())

    def __call__(self) -> None:
        for view, array in self._copies:
            view[...] = array
        self._memory.fill(self.value, self._host)


class CudaGraphs:
    """The CUDA graphs of an engine's sessions, which ONNX Runtime captures when a step first runs under a new number.

    A graph holds the addresses and shapes that its step was bound to: bound to the same, a step runs the same graph.
    The provider gives none back before its session ends.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def number(self, bound: Hashable) -> int:
        """Of the graph of a step that is bound so; a new one where there is none."""
        return self._numbers.setdefault(bound, len(self._numbers) + 1)
