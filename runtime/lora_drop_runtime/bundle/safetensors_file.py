"""Where the tensors of a safetensors file lie.

Enters: a path. Leaves: name → (dtype, shape, byte offset, byte length), so that a graph can point into the
file and a tensor can be mapped without reading the rest. The safetensors library does not tell offsets.
Format: 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.dtypes import BY_SAFETENSORS, float32_from_bfloat16
from lora_drop_runtime.errors import BundleError

_NUMPY = {name: row.numpy for name, row in BY_SAFETENSORS.items() if row.numpy}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorRef:
    """One tensor inside a file; `dtype` is the safetensors name (`F32`, `BF16`, …)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int

    def read(self) -> npt.NDArray[Any]:
        """The values, memory-mapped where numpy knows the dtype; bf16 is widened to float32 (exact)."""
        if not self.size_bytes:
            return np.zeros(self.shape, _NUMPY.get(self.dtype, "<f4"))
        if self.dtype == "BF16":
            bits: npt.NDArray[Any] = np.memmap(self.file, "<u2", "r", self.offset_bytes, self.shape)
            return float32_from_bfloat16(bits)
        if self.dtype not in _NUMPY:
            raise BundleError(
                "A tensor has a dtype that cannot be read.",
                note=f"{self.name} in {self.file.name} is {self.dtype}; known are BF16, {', '.join(_NUMPY)}.",
                hint="Convert the checkpoint to float32, float16 or bfloat16 first.",
            )
        return np.memmap(self.file, _NUMPY[self.dtype], "r", self.offset_bytes, self.shape)

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Rows `begin` to `end` along the first axis."""
        count = max(1, self.shape[0])
        row_bytes = self.size_bytes // count
        end = min(end, self.shape[0])
        part = TensorRef(
            self.name,
            self.file,
            self.dtype,
            (end - begin, *self.shape[1:]),
            self.offset_bytes + begin * row_bytes,
            (end - begin) * row_bytes,
        )
        return part.read()


def _not_whole(path: Path, reason: str) -> BundleError:
    return BundleError(
        "A file is not a whole safetensors file.",
        note=f"{path} {reason}.",
        hint="Copy or download the file again.",
    )


def _read_header(path: Path) -> tuple[bytes, int]:
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(prefix) != 8 or len(header) != length or not header.startswith(b"{"):
        raise _not_whole(path, f"announces a header of {length} bytes")
    return header, 8 + length


def _parse_header(header: bytes, path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Name → dtype, shape, begin and end of the data."""
    try:
        return {
            name: (entry["dtype"], tuple(entry["shape"]), *map(int, entry["data_offsets"]))
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError):
        raise _not_whole(path, "has a header that does not say where its tensors lie") from None


def read_tensors(path: Path) -> dict[str, TensorRef]:
    """The tensors of one file. Raises BundleError when the file is not whole."""
    header, data_start = _read_header(path)
    file_bytes = path.stat().st_size
    refs = {}
    for name, (dtype, shape, begin, end) in _parse_header(header, path).items():
        if data_start + end > file_bytes:
            raise BundleError(
                "A weights file is truncated.",
                note=f"{path} has {file_bytes} bytes, tensor {name} ends at {data_start + end}.",
                hint="Copy or download the file again.",
            )
        refs[name] = TensorRef(name, path, dtype, shape, data_start + begin, end - begin)
    return refs


def header_sha256(path: Path) -> str:
    """Hash of the header: a cheap identity of a file too large to hash at every opening."""
    return hashlib.sha256(_read_header(path)[0]).hexdigest()
