"""Where the tensors of a safetensors file lie.

Enters: a path. Leaves: name → (dtype, shape, byte offset, byte length), so that a graph can point into the
file and a tensor can be mapped without reading the rest. The safetensors library does not tell offsets.
Format: 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.dtypes import BY_NAME, BY_SAFETENSORS, float32_from_bfloat16, float32_from_float8
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.files import is_file, reading_hint

from .typed_json import parse_json, typed

_MAX_HEADER_BYTES = 100_000_000
_MOST_AXES, _MOST_VALUES = 32, 2**59  # of an array in numpy
# Bits → values, of what numpy does not know
_WIDENED: Mapping[str, Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]] = MappingProxyType(
    {"bfloat16": float32_from_bfloat16, "float8_e4m3fn": float32_from_float8}
)


@dataclass(frozen=True)
class Blocks:
    """How a quantized tensor [N, K] is read: value = (q − zero_point) · scale for each block along K.

    Attributes:
        block_size: values that share a scale; K in float8_e4m3fn.
        scales: in the dtype of activations, [N, K / block_size]; [N] in float8_e4m3fn.
        zero_points: of the tensor's own dtype, [N, K / block_size]; None in float8_e4m3fn.
        symmetric: every zero point is 2^(bits−1), so that nobody needs to read them.
    """

    block_size: int
    scales: TensorPlace
    zero_points: TensorPlace | None
    symmetric: bool


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes lie, and what they are: of a checkpoint, of a bundle, of a graph's initializer.

    Attributes:
        name: in its file.
        file: a path that can be read; of a tensor in a bundle relative to the bundle's root.
        dtype: a name of dtypes.py, or what the file says where that table has none. `uint4` holds two values a byte,
            the first in the low half; such a tensor is read as its bytes [N, K / 2].
        shape: of the values.
        offset_bytes, size_bytes: of the data in the file.
        blocks: of a quantized tensor.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    blocks: Blocks | None = None

    @property
    def location(self) -> str:
        """The file as ONNX's external data name it."""
        return self.file.as_posix()

    @property
    def bytes_read(self) -> int:
        """What a step reads of a weight: of a quantized one with its scales, and zero points where they differ."""
        if self.blocks is None:
            return self.size_bytes
        blocks = self.blocks
        read = self.size_bytes + blocks.scales.size_bytes
        return read if blocks.symmetric or blocks.zero_points is None else read + blocks.zero_points.size_bytes

    def read(self) -> npt.NDArray[Any]:
        """The values, memory-mapped where numpy knows the dtype; bfloat16 and float8 are widened to float32 (exact)."""
        return self.rows(0, self.shape[0]) if self.shape else self._mapped((), 0)

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Rows `begin` to `end` along the first axis."""
        end = min(end, self.shape[0])
        row_bytes = self.size_bytes // max(1, self.shape[0])
        row = (row_bytes,) if self.dtype == "uint4" else self.shape[1:]
        return self._mapped((max(0, end - begin), *row), begin * row_bytes)

    def _mapped(self, shape: tuple[int, ...], skipped_bytes: int) -> npt.NDArray[Any]:
        known = BY_NAME.get(self.dtype)
        bits_as = {"bfloat16": "<u2", "float8_e4m3fn": "u1", "uint4": "u1"}.get(self.dtype)
        widened = _WIDENED.get(self.dtype)
        numpy = bits_as or (known.numpy if known else None)
        if numpy is None:
            raise BundleError(
                "A tensor has a dtype that cannot be read.",
                note=f"{self.name} in {self.file.name} is {self.dtype}; known are {', '.join(BY_SAFETENSORS)}.",
                hint="Convert the checkpoint to float32, float16 or bfloat16 first.",
            )
        if not math.prod(shape):
            return np.zeros(shape, np.float32 if widened else numpy)
        file = str(self.file)  # a path would be resolved for each tensor
        values: npt.NDArray[Any] = np.memmap(file, numpy, "r", self.offset_bytes + skipped_bytes, shape)
        return widened(values) if widened else values


def _not_whole(path: Path, reason: str) -> BundleError:
    return BundleError(
        "A file is not a whole safetensors file.",
        note=f"{path} {reason}.",
        hint="Copy or download the file again.",
    )


def _read_header(path: Path) -> tuple[bytes, int]:
    if not is_file(path):
        raise _not_whole(path, "is no ordinary file")
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        hint = reading_hint(error, "Check its permissions, or copy it again.")
        raise BundleError("A file cannot be read.", note=f"{path}: {error.strerror}.", hint=hint) from None
    if len(prefix) != 8 or len(header) != length or not header.startswith(b"{"):
        raise _not_whole(path, f"announces a header of {length} bytes")
    return header, 8 + length


@dataclass(frozen=True)
class _Entry:
    """A tensor as a header has it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _parse_header(header: bytes, path: Path) -> dict[str, _Entry]:
    try:
        data = parse_json(header)
        data.pop("__metadata__", None)
        entries: dict[str, _Entry] = {
            name: typed(_Entry, entry, f"tensor {name!r:.80}") for name, entry in data.items()
        }
    except ValueError as error:
        raise _not_whole(path, f"has a header that does not say where its tensors lie: {error}") from None
    return entries


def _check_extent(path: Path, name: str, entry: _Entry) -> None:
    """Whether a shape is one, and the bytes are as many as it needs; of an unknown dtype that cannot be said."""
    begin, end = entry.data_offsets
    if len(entry.shape) > _MOST_AXES or math.prod(filter(None, entry.shape)) > _MOST_VALUES:
        raise _not_whole(path, f"has a shape for tensor {name!r:.80} that no array has")
    known = BY_SAFETENSORS.get(entry.dtype)
    needed = end - begin if known is None else math.prod(entry.shape) * known.size_bytes
    if needed != end - begin:
        raise _not_whole(
            path, f"has {end - begin} bytes for tensor {name!r:.80}, {entry.dtype} {list(entry.shape)} needs {needed}"
        )
    if end < begin:
        raise _not_whole(path, f"says that tensor {name!r:.80} ends before it begins")


def read_tensors(path: Path) -> dict[str, TensorPlace]:
    """The tensors of one file. Raises BundleError when the file is not whole."""
    header, data_start = _read_header(path)
    file_bytes = path.stat().st_size
    places = {}
    for name, entry in _parse_header(header, path).items():
        begin, end = entry.data_offsets
        if data_start + end > file_bytes:
            raise BundleError(
                "A weights file is truncated.",
                note=f"{path} has {file_bytes} bytes, tensor {name!r:.80} ends at {data_start + end}.",
                hint="Copy or download the file again.",
            )
        _check_extent(path, name, entry)
        known = BY_SAFETENSORS.get(entry.dtype)
        dtype = known.name if known else entry.dtype
        places[name] = TensorPlace(name, path, dtype, entry.shape, data_start + begin, end - begin)
    return places
