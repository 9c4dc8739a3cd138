"""The way back: a quantized tensor of a safetensors file read as float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lora_drop_runtime.bundle.safetensors_file import Blocks, TensorPlace
from lora_drop_runtime.dtypes import BY_NAME

from .choice import Quantization
from .formats import (
    FLOAT8,
    METADATA_KEY,
    Blocked,
    BlockFormat,
    Floats,
    dequantize,
    dequantize_floats,
    part_names,
    row_format,
    unpack,
)

_CHUNK_VALUES = 1 << 22  # read at once when dequantizing


@dataclass(frozen=True)
class DequantizedTensor:
    """A quantized tensor [N, K] that is read as float32; offers what TensorPlace offers, and `native_rows`.

    Attributes:
        stored: where it lies, with its blocks.
        quantization: as the manifest of its bundle has it, where that was read.
    """

    stored: TensorPlace
    quantization: Quantization | None = None
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

    @property
    def _blocks(self) -> Blocks:
        assert self.stored.blocks is not None
        return self.stored.blocks

    @property
    def native(self) -> BlockFormat:
        """The format in which `native_rows` gives the values."""
        if self._blocks.zero_points is None:
            return row_format(self.shape[1])
        return BlockFormat(BY_NAME[self.stored.dtype].bits, self._blocks.block_size, self._blocks.symmetric)

    def native_rows(self, begin: int, end: int) -> Blocked:
        """Rows `begin` to `end` as they lie: integers, scales and zero points, or the bits of E4M3 and scales."""
        blocks, form = self._blocks, self.native
        scales = np.asarray(blocks.scales.rows(begin, end), np.float32)
        if blocks.zero_points is None:
            bits = replace(self.stored, dtype="uint8").rows(begin, end)
            return bits, scales[:, None], np.zeros((len(bits), 1), np.uint8)
        q = unpack(self.stored.rows(begin, end), form.bits)
        if form.symmetric:
            return q, scales, np.full(scales.shape, form.middle, np.uint8)
        return q, scales, unpack(blocks.zero_points.rows(begin, end), form.bits)

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
            q, scales, zero_points = self.native_rows(first, last)
            if self.native.floating:
                values[first - begin : last - begin] = dequantize_floats(q, scales)
            else:
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
