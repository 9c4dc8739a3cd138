"""Where a tensor lies in the bundle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in the bundle: file relative to its root, and bytes. `dtype` is a numpy/ONNX name.

    A quantized tensor has dtype `uint4` (two values a byte, the first in the low half) or `uint8`, the shape [N, K] of
    the values, and `blocks`: value = (q − zero_point) · scale for each block of `block_size` along K.
    """

    location: str
    offset_bytes: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Blocks:
    """Of a quantized tensor [N, K]: `scales` float32 and `zero_points` (the tensor's dtype), both [N, K / block_size].

    `symmetric`: every zero point is 2^(bits−1), which is what engines assume when they are given none.
    """

    block_size: int
    scales: StoredTensor
    zero_points: StoredTensor
    symmetric: bool


def bytes_read(tensor: StoredTensor) -> int:
    """Bytes that a step reads of a weight: of a quantized one with its scales, and zero points where it has some."""
    if tensor.blocks is None:
        return tensor.size_bytes
    blocks = tensor.blocks
    return tensor.size_bytes + blocks.scales.size_bytes + (0 if blocks.symmetric else blocks.zero_points.size_bytes)
