"""Tensors whose integers are found before the weights are written, on disk meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_export.checkpoint.checkpoint import TensorSource
from lora_drop_export.quantize.formats import Blocked, BlockFormat, pack, unpack


@dataclass(frozen=True)
class RoundedTensor:
    """A checkpoint's tensor [N, K] with integers found for it; offers what the tensor offers, and `native_rows`.

    Attributes:
        source: the tensor; `read` and `rows` give its own values.
        native: the format of the integers.
        files: of packed integers [N, K · bits / 8], scales and zero points [N, K / block], as numpy saves them.
    """

    source: TensorSource
    native: BlockFormat
    files: tuple[Path, Path, Path]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes

    def read(self) -> npt.NDArray[Any]:
        return self.source.read()

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        return self.source.rows(begin, end)

    def native_rows(self, begin: int, end: int) -> Blocked:
        """Rows `begin` to `end`: integers uint8 [n, K], scales float32 and zero points uint8 [n, K / block]."""
        packed, scales, zero_points = (np.array(np.load(file, mmap_mode="r")[begin:end]) for file in self.files)
        return unpack(packed, self.native.bits), scales, zero_points


def store_rounded(source: TensorSource, form: BlockFormat, chunks: Iterable[Blocked], directory: Path) -> RoundedTensor:
    """Write a tensor's integers, scales and zero points, given a few rows at a time, into `directory`."""
    n, k = source.shape
    blocks = k // form.block_size
    shapes = ((n, k * form.bits // 8), np.uint8), ((n, blocks), np.float32), ((n, blocks), np.uint8)
    stem = len(list(directory.iterdir()))
    files = tuple(directory / f"{stem}.{part}.npy" for part in ("integers", "scales", "zero_points"))
    arrays = [
        np.lib.format.open_memmap(file, "w+", dtype=dtype, shape=shape)
        for file, (shape, dtype) in zip(files, shapes, strict=True)
    ]
    begin = 0
    for q, scales, zero_points in chunks:
        end = begin + len(q)
        packed = np.frombuffer(pack(q, form.bits), np.uint8).reshape(len(q), -1)
        for array, part in zip(arrays, (packed, scales, zero_points), strict=True):
            array[begin:end] = part
        begin = end
    assert begin == n
    return RoundedTensor(source, form, (files[0], files[1], files[2]))
