"""Writes a safetensors file a few rows at a time, converting or quantizing on the way."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import Blocks, TensorPlace, read_tensors
from lora_drop_runtime.errors import InputError

from lora_drop_export.checkpoint.checkpoint import TensorSource
from lora_drop_export.console import Progress
from lora_drop_export.quantize.formats import BlockFormat, pack, part_names, quantization_metadata
from lora_drop_export.quantize.rounding import quantized_blocks

from .layout import Entry, Order, file_entries

CHUNK_BYTES = 1 << 24
_ALIGNMENT = 64  # of the data in a file that is written here


def _chunk_rows(shape: tuple[int, ...]) -> int:
    return max(1, CHUNK_BYTES // (4 * max(1, math.prod(shape[1:]))))


def _converted(part: npt.NDArray[Any], wanted: np.dtype[Any]) -> npt.NDArray[Any]:
    """Raises FloatingPointError for a finite value that would be infinite."""
    with np.errstate(over="raise"):
        converted = np.ascontiguousarray(part).astype(wanted)
    # ml_dtypes, whose bfloat16 is no kind of numpy's, sets no flag
    narrows = wanted.kind == "V" and wanted.itemsize < part.dtype.itemsize
    if narrows and (np.isinf(converted) & np.isfinite(part)).any():
        raise FloatingPointError
    return converted


def stored_blocks(source: TensorSource | npt.NDArray[Any], dtype: str) -> Iterator[bytes]:
    """The tensor's bytes in the wanted dtype, a few rows at a time; InputError for a value that it cannot hold."""
    import ml_dtypes

    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rows = _chunk_rows(source.shape)
    for begin in range(0, source.shape[0] if source.shape else 1, rows):
        if not source.shape:  # one number, such as a constant of an activation function
            part = source if isinstance(source, np.ndarray) else source.read()
        else:
            part = source[begin : begin + rows] if isinstance(source, np.ndarray) else source.rows(begin, begin + rows)
        try:
            converted = _converted(part, wanted)
        except FloatingPointError:
            raise InputError(
                "A weight is too large for the dtype.",
                note=f"{getattr(source, 'name', 'An adapter or scale')} has values that are infinite as {dtype}.",
                hint="Use --dtype fp32." if dtype == "bfloat16" else "Use --dtype bf16 or fp32.",
            ) from None
        yield converted.tobytes()


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    chunks: Iterable[tuple[str, bytes]],
    progress: Progress,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A safetensors file from tensors given piece by piece; the library would want them all in memory.

    Args:
        entries: in the order of their data.
        chunks: entry name and the next bytes of its data; entries may alternate.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    at = {}
    for entry in entries:
        begin, end = end, end + entry.size_bytes
        at[entry.name] = begin
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, data in chunks:
            file.seek(8 + len(text) + at[name])
            file.write(data)
            at[name] += len(data)
            done += len(data)
            progress(f"writing {name}", done, end)
    assert all(at[entry.name] == header[entry.name]["data_offsets"][1] for entry in entries)


def write(
    order: Order,
    refs: Mapping[str, TensorSource],
    dtype: str,
    formats: Mapping[str, BlockFormat],
    method: str,
    path: Path,
    progress: Progress,
) -> dict[str, TensorPlace]:
    """One new file with all tensors, in the given order."""

    def chunks() -> Iterator[tuple[str, bytes]]:
        for name, source in order.sources.items():
            form = formats.get(name)
            if form is None:
                yield from ((source.name, block) for block in stored_blocks(source, dtype))
                continue
            names = part_names(source.name)
            for q, scales, zero_points in quantized_blocks(source, form, method, _chunk_rows(source.shape), dtype):
                yield names[0], pack(q, form.bits)
                yield from ((names[1], block) for block in stored_blocks(scales, dtype))
                if not form.symmetric:
                    yield names[2], pack(zero_points, form.bits)
            if form.symmetric and not form.floating:
                count = source.shape[0] * (source.shape[1] // form.block_size)
                yield names[2], pack(np.full(count, form.middle, np.uint8), form.bits)

    metadata = quantization_metadata({source.name: formats[n] for n, source in order.sources.items() if n in formats})
    write_safetensors(path, file_entries(order, dtype, formats), chunks(), progress, metadata)
    written = read_tensors(path)

    def place(entry: str, stored_as: str, shape: tuple[int, ...]) -> TensorPlace:
        return dataclasses.replace(written[entry], file=Path("weights", path.name), dtype=stored_as, shape=shape)

    first = {source.name: name for name, source in order.sources.items()}
    stored = {}
    for name, ref in refs.items():
        form = formats.get(first[ref.name])
        if form is None:
            stored[name] = place(ref.name, dtype, ref.shape)
            continue
        names = part_names(ref.name)
        kind, grid = form.stored_as, form.scales_shape(ref.shape)
        zero_points = None if form.floating else place(names[2], kind, grid)
        blocks = Blocks(form.block_size, place(names[1], dtype, grid), zero_points, form.symmetric)
        stored[name] = dataclasses.replace(place(names[0], kind, ref.shape), blocks=blocks)
    return stored
