"""The way back: a quantized tensor of a safetensors file read as float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lora_drop_runtime.bundle.safetensors_file import Blocks, TensorPlace
from lora_drop_runtime.dtypes import BY_NAME

from .formats import FLOAT8, METADATA_KEY, Floats, dequantize, dequantize_floats, part_names, unpack

_CHUNK_VALUES = 1 << 22  # read at once when dequantizing


@dataclass(frozen=True)
class DequantizedTensor:
    """A quantized tensor [N, K] that is read as float32; offers what TensorPlace offers.

    `stored` is where it lies, with its blocks.
    """

    stored: TensorPlace
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def size_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def read(self) -> Floats:
        """All values, float32."""
        return self.rows(0, self.shape[0])

    def rows(self, begin: int, end: int) -> Floats:
        """Rows `begin` to `end`, float32."""
        blocks = self.stored.blocks
        assert blocks is not None
        bits = BY_NAME[self.stored.dtype].bits
        end = min(end, self.shape[0])
        values = np.empty((max(0, end - begin), self.shape[1]), np.float32)
        step = max(1, _CHUNK_VALUES // self.shape[1])
        for first in range(begin, end, step):
            last = min(end, first + step)
            if blocks.zero_points is None:
                stored = replace(self.stored, dtype="uint8").rows(first, last)
                scales = np.asarray(blocks.scales.rows(first, last), np.float32)
                values[first - begin : last - begin] = dequantize_floats(stored, scales[:, None])
                continue
            q = unpack(self.stored.rows(first, last), bits)
            scales = np.asarray(blocks.scales.rows(first, last), np.float32)
            if blocks.symmetric:
                zero_points = np.full(scales.shape, 1 << (bits - 1), np.uint8)
            else:
                zero_points = unpack(blocks.zero_points.rows(first, last), bits)
            values[first - begin : last - begin] = dequantize(q, scales, zero_points)
        return values


def dequantized_tensors(path: Path, places: Mapping[str, TensorPlace]) -> dict[str, TensorPlace | DequantizedTensor]:
    """The tensors of a safetensors file, quantized ones as one that reads float32.

    There a quantized tensor is three: q uint8 [N, K · bits / 8], scales [N, K / block] and zero points uint8; or two:
    q float8_e4m3fn [N, K] and scales [N].
    """
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    found: dict[str, TensorPlace | DequantizedTensor] = dict(places)
    for name, (bits, block_size, symmetric) in json.loads(text or "{}").items():
        if places[name].dtype == FLOAT8:
            q, scales = (places[part] for part in part_names(name)[:2])
            del found[scales.name]
            found[name] = DequantizedTensor(replace(q, blocks=Blocks(block_size, scales, None, symmetric)))
            continue
        q, scales, zero_points = (places[part] for part in part_names(name))
        for part in part_names(name):
            del found[part]
        kind = f"uint{bits}"
        blocks = Blocks(block_size, scales, replace(zero_points, dtype=kind, shape=scales.shape), symmetric)
        shape = (q.shape[0], q.shape[1] * 8 // bits)
        found[name] = DequantizedTensor(replace(q, dtype=kind, shape=shape, blocks=blocks))
    return found
