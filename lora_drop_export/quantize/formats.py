"""Weight-only quantization, a few rows at a time.

Enters: rows of a float32 matrix [N, K], a `BlockFormat`. Leaves: unsigned integers, scales and zero points of blocks
along K, and their bytes exactly as ONNX holds UINT4 and UINT8: value = (q − zero_point) · scale. Two methods:

    rtn       the scale spans each block's range, values are rounded to the nearest
    search    the scale that has the least weighted squared error among many, solved again for the integers it gives

Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.manifest import BLOCK_SIZES
from lora_drop_runtime.dtypes import BY_NAME

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.uint8]
Blocked = tuple[Integers, Floats, Integers]  # q [n, K], scales [n, K/block], zero points [n, K/block]
METADATA_KEY = "lora_drop_quantization"
_BLOCK_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class BlockFormat:
    """How one tensor is stored: `bits` 4 or 8, a scale per `block_size` values along K.

    `symmetric`: every zero point is 2^(bits−1).
    """

    bits: int
    block_size: int
    symmetric: bool

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Quantization:
    """What the user asked for: bits, the largest block size, the method, and whether zero points may be used."""

    bits: int
    block_size: int = 32
    method: str = "search"
    symmetric: bool = False

    @classmethod
    def of(cls, dtype: str, block_size: int | None = None, method: str | None = None) -> Quantization:
        """With the defaults for what is not given."""
        bits = BY_NAME[dtype].bits
        default = "search" if bits == 4 else "rtn"  # 8 bits leave nothing to search for
        method = method or default
        return cls(bits, block_size or BLOCK_SIZES[0], method, symmetric=bits == 8 or method == "rtn")

    def format_of(self, shape: tuple[int, ...]) -> BlockFormat | None:
        """The format of a matrix [N, K]; None when no block size divides K.

        4-bit zero points need an even number of blocks a row, so that rows begin at whole bytes: a smaller block
        makes it even, or the tensor is symmetric.
        """
        if len(shape) != 2:
            return None
        sizes = [size for size in _BLOCK_SIZES if size <= self.block_size and shape[1] % size == 0]
        if not sizes:
            return None
        if self.symmetric or self.bits == 8:
            return BlockFormat(self.bits, sizes[0], self.symmetric)
        even = [size for size in sizes if shape[1] // size % 2 == 0]
        return BlockFormat(4, even[0], False) if even else BlockFormat(4, sizes[0], True)


def pack(q: Integers, bits: int) -> bytes:
    """The bytes of ONNX's UINT4 or UINT8: two 4-bit values a byte, the first in the low half."""
    flat = q.reshape(-1)
    if bits == 8:
        return flat.tobytes()
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def unpack(data: npt.NDArray[np.uint8], bits: int) -> Integers:
    """The values of packed bytes [..., n], [..., n · 8 / bits]."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def dequantize(q: Integers, scales: Floats, zero_points: Integers) -> Floats:
    """float32 [n, K] of q [n, K], scales and zero points [n, K / block]."""
    n, k = q.shape
    blocks = q.reshape(n, scales.shape[1], -1).astype(np.float32)
    blocks -= zero_points[..., None].astype(np.float32)
    blocks *= scales[..., None]
    return blocks.reshape(n, k)


def block_formats(
    shapes: Mapping[str, tuple[int, ...]],
    native: Mapping[str, BlockFormat],
    groups: Iterable[tuple[str, ...]],
    quantization: Quantization,
) -> dict[str, BlockFormat]:
    """The format of each weight that is quantized; those of a group are alike.

    Args:
        shapes: name → [N, K] of the weights that may be quantized.
        native: the formats that some have in the checkpoint; taken where it is what was asked for.
        groups: names that will be one matrix; names outside `shapes` have no part in this.
    """

    def taken(name: str) -> bool:
        form = native.get(name)
        return form is not None and (form.bits, form.block_size) == (quantization.bits, quantization.block_size)

    together = {name: group for group in groups for name in group}
    formats = {}
    for name, shape in shapes.items():
        members = together.get(name, (name,))
        form = native[name] if all(map(taken, members)) else quantization.format_of(shape)
        if form is not None:
            formats[name] = form
    return formats


def quantization_metadata(formats: Mapping[str, BlockFormat]) -> dict[str, str]:
    """What a safetensors file says of its quantized tensors: name → [bits, block size, symmetric], as JSON."""
    if not formats:
        return {}
    return {METADATA_KEY: json.dumps({n: [f.bits, f.block_size, f.symmetric] for n, f in formats.items()})}


def part_names(name: str) -> tuple[str, str, str]:
    """Names of a quantized tensor's integers, scales and zero points in its file."""
    return name, f"{name}.scales", f"{name}.zero_points"
