"""Formats of quantized weights, and their bytes.

Enters: integers, scales and zero points of blocks along K, or E4M3 values with a scale for each row. Leaves: their
bytes exactly as ONNX holds UINT4, UINT8 and FLOAT8E4M3FN, and the way back: value = (q − zero_point) · scale, or
value = q · scale. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.dtypes import float32_from_float8

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.uint8]
# q [n, K], scales [n, K/block], zero points [n, K/block]; of E4M3 its bits are in q, and no zero point is read
Blocked = tuple[Integers, Floats, Integers]
METADATA_KEY = "lora_drop_quantization"
FLOAT8 = "float8_e4m3fn"


@dataclass(frozen=True)
class BlockFormat:
    """How one tensor is stored: `bits` 4 or 8, a scale per `block_size` values along K.

    `symmetric`: every zero point is 2^(bits−1). `floating`: in E4M3, a scale per row, no zero points (`row_format`).
    """

    bits: int
    block_size: int
    symmetric: bool
    floating: bool = False

    @property
    def dtype(self) -> str:
        """Of weights, as the manifest has it."""
        return FLOAT8 if self.floating else f"int{self.bits}"

    @property
    def stored_as(self) -> str:
        """The dtype of the values in a file."""
        return FLOAT8 if self.floating else f"uint{self.bits}"

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a tensor [N, K]: a scale for each block, or for each row."""
        n, k = shape
        return (n,) if self.floating else (n, k // self.block_size)

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


def row_format(k: int) -> BlockFormat:
    """E4M3, a scale for each row of K values: an output channel of a linear layer, a token of an embedding."""
    return BlockFormat(8, k, symmetric=True, floating=True)


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
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], 2 * data.shape[-1])


def dequantize(q: Integers, scales: Floats, zero_points: Integers) -> Floats:
    """float32 [n, K] of integers q [n, K], scales and zero points [n, K / block]."""
    n, k = q.shape
    blocks = q.reshape(n, scales.shape[1], k // scales.shape[1]).astype(np.float32)
    blocks -= zero_points[..., None].astype(np.float32)
    blocks *= scales[..., None]
    return blocks.reshape(n, k)


def dequantize_floats(bits: Integers, scales: Floats) -> Floats:
    """float32 [n, K] of the bits of E4M3 [n, K] and scales [n, 1]."""
    with np.errstate(over="ignore", invalid="ignore"):  # whoever rounds what is no number says so
        return float32_from_float8(bits) * scales


def quantization_metadata(formats: Mapping[str, BlockFormat]) -> dict[str, str]:
    """What a safetensors file says of its quantized tensors: name → [bits, block size, symmetric], as JSON."""
    if not formats:
        return {}
    return {METADATA_KEY: json.dumps({n: [f.bits, f.block_size, f.symmetric] for n, f in formats.items()})}


def part_names(name: str) -> tuple[str, str, str]:
    """Names of a quantized tensor's integers, scales and zero points in its file; E4M3 has no zero points."""
    return name, f"{name}.scales", f"{name}.zero_points"
