"""The way back: a quantized tensor of a safetensors file read as float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lora_drop_runtime.bundle.safetensors_file import TensorRef

from .formats import METADATA_KEY, BlockFormat, Floats, dequantize, part_names, unpack

_CHUNK_VALUES = 1 << 22  # read at once when dequantizing


@dataclass(frozen=True)
class DequantizedRef:
    """A quantized tensor [N, K] of a safetensors file, read as float32; offers what TensorRef offers.

    Its parts there: q U8 [N, K · bits / 8], scales F32 [N, K / block], zero points U8.
    """

    form: BlockFormat
    q: TensorRef
    scales: TensorRef
    zero_points: TensorRef
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.q.name

    @property
    def file(self) -> Path:
        return self.q.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape[0], self.q.shape[1] * 8 // self.form.bits

    @property
    def size_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def read(self) -> Floats:
        """All values, float32."""
        return self.rows(0, self.shape[0])

    def rows(self, begin: int, end: int) -> Floats:
        """Rows `begin` to `end`, float32."""
        end = min(end, self.shape[0])
        values = np.empty((max(0, end - begin), self.shape[1]), np.float32)
        step = max(1, _CHUNK_VALUES // self.shape[1])
        for first in range(begin, end, step):
            last = min(end, first + step)
            q = unpack(self.q.rows(first, last), self.form.bits)
            scales = np.asarray(self.scales.rows(first, last))
            if self.form.symmetric:
                zero_points = np.full(scales.shape, self.form.middle, np.uint8)
            else:
                zero_points = unpack(self.zero_points.rows(first, last), self.form.bits)
            values[first - begin : last - begin] = dequantize(q, scales, zero_points)
        return values


def dequantized_tensors(path: Path, refs: Mapping[str, TensorRef]) -> dict[str, TensorRef | DequantizedRef]:
    """The tensors of a safetensors file, quantized ones as one that reads float32."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return dict(refs)
    found: dict[str, TensorRef | DequantizedRef] = dict(refs)
    for name, (bits, block_size, symmetric) in json.loads(text).items():
        q, scales, zero_points = (refs[part] for part in part_names(name))
        for part in part_names(name):
            del found[part]
        found[name] = DequantizedRef(BlockFormat(bits, block_size, symmetric), q, scales, zero_points)
    return found
