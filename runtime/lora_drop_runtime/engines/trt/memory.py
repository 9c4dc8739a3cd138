"""The memory of a session on the GPU and beside it: weights, a block per buffer, page-locked arrays.

Enters: names and shapes. Leaves: device buffers and numpy arrays whose addresses stay, as long as none has to grow.
Knows no engine and no step: who holds addresses is told before one of them is freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lora_drop_runtime.bundle.bundle import Bundle, WeightInput
from lora_drop_runtime.engines.engine import Array, DeviceBuffer
from lora_drop_runtime.errors import BundleError

from .cuda_device import ALIGNMENT, CudaDevice


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class SessionMemory:
    """What a session holds, one block for each name.

    Args:
        device: whose memory it is; it frees all of it when it is closed.
        before_freeing: called before memory that steps may use is freed or unlocked.

    Attributes:
        weights: the weights that are engine inputs.
    """

    def __init__(self, device: CudaDevice, before_freeing: Callable[[], None]) -> None:
        self._device = device
        self._before_freeing = before_freeing
        self._blocks: dict[str, tuple[int, int]] = {}  # name → address, bytes
        self._pinned: dict[str, Array] = {}
        self.weights: dict[str, DeviceBuffer] = {}

    def beside(self, before_freeing: Callable[[], None]) -> SessionMemory:
        """Another session's, over the same weights."""
        other = SessionMemory(self._device, before_freeing)
        other.weights = self.weights
        return other

    def upload_weights(self, bundle: Bundle, weights: Mapping[str, WeightInput]) -> None:
        """All weights that are inputs into one device block, straight from the mapped files."""
        address = 0
        if weights:
            total = sum(_aligned(weight.size_bytes) for weight in weights.values())
            address = self._device.malloc(total, "The weights")
        for name, weight in weights.items():
            self.weights[name] = DeviceBuffer(name, address, weight.shape, weight.dtype)
            for part in bundle.mapped_parts(weight):
                self._device.upload(address, part)
                address += part.nbytes
            address += _aligned(weight.size_bytes) - weight.size_bytes

    def pinned(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """A page-locked array with whatever was in it. A larger one of the same name takes the smaller one's place."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._pinned.get(name)
        if block is None or block.nbytes < size:
            if block is not None:
                self._before_freeing()
                del self._pinned[name]
                self._device.unpin(block)
            block = self._pinned[name] = self._device.pin(max(size, 1))
        return block[:size].view(dtype).reshape(shape)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: str, *, begins: bool = False) -> DeviceBuffer:
        """A device buffer, zeroed when it is new. A larger one of the same name takes the smaller one's place.

        Args:
            begins: a request that only begins: where memory is out all buffers are given back. Else those of rows that
                run stay.
        """
        buffer = DeviceBuffer(name, 0, shape, dtype)
        address, size = self._blocks.get(name, (0, 0))
        if buffer.nbytes > size:
            if address:
                self._before_freeing()
                del self._blocks[name]
                self._device.free(address)
            size = _aligned(buffer.nbytes)
            try:
                address = self._device.malloc(size, f"The buffer {name}")
            except BundleError:
                if begins:  # the request is over: what it has got so far must not be in a smaller one's way
                    self._free_buffers()
                raise
            self._blocks[name] = address, size
            self._device.zero(address, size)
        return replace(buffer, address=address)

    @property
    def weights_bytes(self) -> int:
        return sum(_aligned(buffer.nbytes) for buffer in self.weights.values())

    @property
    def buffers_bytes(self) -> int:
        return sum(size for _, size in self._blocks.values())

    def free(self) -> None:
        """Give back all but the weights, which others beside it use."""
        self._free_buffers()
        while self._pinned:
            self._device.unpin(self._pinned.popitem()[1])

    def close(self) -> None:
        """Forget everything; the device frees it."""
        self.weights.clear()
        self._blocks.clear()
        self._pinned.clear()

    def _free_buffers(self) -> None:
        self._before_freeing()
        while self._blocks:
            _, (address, _) = self._blocks.popitem()
            self._device.free(address)
