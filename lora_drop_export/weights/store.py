"""Weights into the bundle, once.

Enters: where each tensor lies in the checkpoint, the wanted dtype or block formats. Leaves: files under `weights/` and,
for each graph initializer, its place there. A checkpoint already in the wanted dtype is copied (reflinked where the
file system can) or linked as it lies; otherwise one new file is written a few rows at a time, with tensors that an
engine wants as one matrix back to back. Knows no graph.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import TensorRef, read_tensors
from lora_drop_runtime.errors import InputError, ModelError

from lora_drop_export.checkpoint.open import TORCH_DTYPES, Checkpoint, TensorSource
from lora_drop_export.graphs.refresh import Blocks, StoredTensor
from lora_drop_export.quantize.formats import BlockFormat, pack, part_names, quantization_metadata, quantized_blocks

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ADAPTERS_NAME, KV_SCALES_NAME = "adapters.safetensors", "kv_scales.safetensors"  # beside the checkpoint's own files
_FORMER_NAMES = {"lm_head.weight": "embed_out.weight"}  # as GPT-NeoX checkpoints have it
_FICLONE = 0x40049409  # ioctl of btrfs and xfs: share the blocks of another file
_CHUNK_BYTES = 1 << 24
_ALIGNMENT = 64  # of the data in a file that is written here
Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


def resolve_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> dict[str, TensorSource]:
    """For each parameter of the traced model, the checkpoint tensor that holds it.

    Raises:
        ModelError: a parameter is not in the checkpoint, or has another shape there.
    """
    partners: dict[str, list[str]] = {}
    for name, first in tied.items():
        partners.setdefault(name, []).append(first)
        partners.setdefault(first, []).append(name)
    refs = {}
    for name, shape in shapes.items():
        spellings = [
            spelling
            for candidate in [name, *partners.get(name, [])]
            for spelling in (
                candidate,
                candidate.partition(".")[2],
                f"model.{candidate}",
                _FORMER_NAMES.get(candidate, candidate),
            )
        ]
        ref = next((checkpoint.tensors[s] for s in spellings if s in checkpoint.tensors), None)
        if ref is None or ref.shape != shape:
            raise ModelError(
                "The checkpoint does not hold the model that its config describes.",
                note=f"Parameter {name} {shape} is " + ("missing." if ref is None else f"{ref.shape} there."),
                hint="Quantized and fused checkpoints must be converted to plain float tensors first.",
            )
        if ref.dtype not in TORCH_DTYPES:
            raise ModelError(
                "The checkpoint holds a weight that is not floating point.",
                note=f"{name} is {ref.dtype}; float are {', '.join(TORCH_DTYPES)}.",
                hint="Use the unquantized checkpoint.",
            )
        refs[name] = ref
    return refs


def weights_bytes(
    refs: Mapping[str, TensorSource],
    dtype: str,
    mode: str,
    *,
    owned: bool = False,
    formats: Mapping[str, BlockFormat] = MappingProxyType({}),
) -> int:
    """Disk space that `store_weights` will take, in bytes; nothing for hard links."""
    if is_taken_as_it_lies(refs.values(), dtype, owned=owned, formats=formats):
        return 0 if mode == "link" else sum(f.stat().st_size for f in {r.file for r in refs.values()})
    return sum(entry.size_bytes for entry in _entries(_Order.of(refs, ()), dtype, formats))


def store_weights(
    refs: Mapping[str, TensorSource],
    dtype: str,
    root: Path,
    mode: str,
    *,
    owned: bool = False,
    groups: Sequence[tuple[str, ...]] = (),
    formats: Mapping[str, BlockFormat] = MappingProxyType({}),
    method: str = "rtn",
    progress: Progress = lambda *_: None,
) -> dict[str, StoredTensor]:
    """Put the weights under `root/weights` and return each initializer's place.

    Args:
        refs: initializer name → checkpoint tensor.
        dtype: of the weights that are not quantized.
        mode: `copy` or `link` (hard link).
        owned: the checkpoint has no files of the user's to take as they lie.
        groups: initializer names whose data shall lie back to back, in that order, where a file is written.
        formats: initializer name → block format of those that are quantized (quantize.block_formats).
        method: of the quantization.

    Raises:
        InputError: a hard link was asked for but cannot be made, or a value does not fit the dtype.
    """
    directory = root / "weights"
    directory.mkdir()
    if not is_taken_as_it_lies(refs.values(), dtype, owned=owned, formats=formats):
        if mode == "link" and (formats or not is_stored_as(refs.values(), dtype)):
            wanted = f"int{next(iter(formats.values())).bits}" if formats else dtype
            raise InputError(
                "The checkpoint's weights cannot be linked.",
                note=f"They are {_dtypes(refs.values())}, the bundle needs {wanted}: they have to be converted.",
                hint="Use --weights copy, or the --dtype of the checkpoint with a target that takes it.",
            )
        return _write(_Order.of(refs, groups), refs, dtype, formats, method, directory / "model.safetensors", progress)
    places = {}
    for file in sorted({ref.file for ref in refs.values()}):
        name = file.name if file.suffix == ".safetensors" else f"{file.name}.safetensors"  # hub blobs: a hash
        places[file] = f"weights/{name}"
        if mode == "link":
            _link(file, root / places[file])
        else:
            copy_file(file, root / places[file], progress)
    stored = {}
    for name, ref in refs.items():
        assert isinstance(ref, TensorRef)
        stored[name] = StoredTensor(places[ref.file], ref.offset_bytes, ref.size_bytes, dtype, ref.shape)
    return stored


def bytes_read(tensor: StoredTensor) -> int:
    """Bytes that a step reads of a weight: of a quantized one with its scales, and zero points where it has some."""
    if tensor.blocks is None:
        return tensor.size_bytes
    blocks = tensor.blocks
    return tensor.size_bytes + blocks.scales.size_bytes + (0 if blocks.symmetric else blocks.zero_points.size_bytes)


def store_adapters(
    matrices: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], dtype: str, root: Path
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Write `weights/adapters.safetensors` with A and s·B of every site."""
    if not matrices:
        return {}
    arrays = {
        f"surrogate.{site}.lora_{part}": array
        for site, pair in matrices.items()
        for part, array in zip("AB", pair, strict=True)
    }
    stored = store_arrays(arrays, ADAPTERS_NAME, dtype, root)
    return {site: (stored[f"surrogate.{site}.lora_A"], stored[f"surrogate.{site}.lora_B"]) for site in matrices}


def store_arrays(arrays: Mapping[str, npt.NDArray[Any]], file: str, dtype: str, root: Path) -> dict[str, StoredTensor]:
    """Write small arrays to `weights/file` and return their places; `read_arrays` is the way back."""
    path = root / "weights" / file
    entries = [_Entry(name, _SAFETENSORS[dtype], array.shape) for name, array in arrays.items()]
    chunks = ((name, block) for name, array in arrays.items() for block in _blocks(array, dtype))
    _write_safetensors(path, entries, chunks, lambda *_: None)
    return {
        name: StoredTensor(f"weights/{file}", ref.offset_bytes, ref.size_bytes, dtype, ref.shape)
        for name, ref in read_tensors(path).items()
    }


def read_arrays(root: Path, file: str) -> dict[str, npt.NDArray[Any]]:
    """What `store_arrays` wrote to `weights/file`; nothing where there is no such file."""
    path = root / "weights" / file
    return {name: ref.read() for name, ref in read_tensors(path).items()} if path.is_file() else {}


def copy_file(source: Path, target: Path, progress: Progress) -> None:
    """Copy, sharing blocks where the file system can."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            return
        except OSError:
            pass
        size, done = source.stat().st_size, 0
        while copied := os.sendfile(writer.fileno(), reader.fileno(), None, _CHUNK_BYTES):
            done += copied
            progress(f"copying {source.name}", done, size)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        reason = "they lie on another file system" if error.errno == errno.EXDEV else str(error.strerror)
        raise InputError(
            "The checkpoint's weights cannot be linked.",
            note=f"{source} to {target.parent}: {reason}.",
            hint="Use --weights copy, or an --out on the checkpoint's file system.",
        ) from None


def is_stored_as(refs: Iterable[TensorSource], dtype: str) -> bool:
    """Whether the checkpoint's values already have the wanted dtype."""
    return all(TORCH_DTYPES[ref.dtype] == dtype for ref in refs)


def is_taken_as_it_lies(
    refs: Iterable[TensorSource],
    dtype: str,
    *,
    owned: bool = False,
    formats: Mapping[str, BlockFormat] = MappingProxyType({}),
) -> bool:
    """Whether the checkpoint's files go into the bundle as they are."""
    refs = list(refs)
    files = all(isinstance(ref, TensorRef) for ref in refs)
    return files and not owned and not formats and is_stored_as(refs, dtype)


def _dtypes(refs: Iterable[TensorSource]) -> str:
    return ", ".join(sorted({TORCH_DTYPES[ref.dtype] for ref in refs}))


@dataclass(frozen=True)
class _Order:
    """The tensors of a file to write, a tied one once, in the order of their data.

    `groups` lists the first initializer name of each tensor; the members of a group that was asked for stand together.
    """

    sources: dict[str, TensorSource]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, refs: Mapping[str, TensorSource], groups: Sequence[tuple[str, ...]]) -> _Order:
        together = {name: group for group in groups for name in group}
        first: dict[str, str] = {}  # the checkpoint's name → initializer
        ordered: list[tuple[str, ...]] = []
        placed: set[str] = set()
        for name in refs:
            new = tuple(n for n in together.get(name, (name,)) if first.setdefault(refs[n].name, n) == n)
            new = tuple(n for n in new if n not in placed)
            placed.update(new)
            if new:
                ordered.append(new)
        return cls({name: refs[name] for group in ordered for name in group}, tuple(ordered))


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors file to be written; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[self.dtype]


def _entries(order: _Order, dtype: str, formats: Mapping[str, BlockFormat]) -> list[_Entry]:
    """Where the data go: of a quantized group first all integers, then all scales; zero points end the file.

    They alone may have odd sizes, so that everything before them is aligned.
    """
    front, back = [], []
    for group in order.groups:
        integers, scales = [], []
        for name in group:
            source, form = order.sources[name], formats.get(name)
            if form is None:
                integers.append(_Entry(source.name, _SAFETENSORS[dtype], source.shape))
                continue
            n, k = source.shape
            names = part_names(source.name)
            blocks = k // form.block_size
            integers.append(_Entry(names[0], "U8", (n, k * form.bits // 8)))
            scales.append(_Entry(names[1], "F32", (n, blocks)))
            row_bits = blocks * form.bits
            whole = row_bits % 8 == 0
            back.append(_Entry(names[2], "U8", (n, row_bits // 8) if whole else ((n * row_bits + 7) // 8,)))
        front += integers + scales
    return front + back


def _write(
    order: _Order,
    refs: Mapping[str, TensorSource],
    dtype: str,
    formats: Mapping[str, BlockFormat],
    method: str,
    path: Path,
    progress: Progress,
) -> dict[str, StoredTensor]:
    """One new file with all tensors, in the given order."""

    def chunks() -> Iterator[tuple[str, bytes]]:
        for name, source in order.sources.items():
            form = formats.get(name)
            if form is None:
                yield from ((source.name, block) for block in _blocks(source, dtype))
                continue
            names = part_names(source.name)
            for q, scales, zero_points in quantized_blocks(source, form, method, _chunk_rows(source.shape)):
                yield names[0], pack(q, form.bits)
                yield names[1], scales.astype("<f4", copy=False).tobytes()
                if not form.symmetric:
                    yield names[2], pack(zero_points, form.bits)
            if form.symmetric:
                count = source.shape[0] * (source.shape[1] // form.block_size)
                yield names[2], pack(np.full(count, form.middle, np.uint8), form.bits)

    metadata = quantization_metadata({source.name: formats[n] for n, source in order.sources.items() if n in formats})
    _write_safetensors(path, _entries(order, dtype, formats), chunks(), progress, metadata)
    written = read_tensors(path)
    location = f"weights/{path.name}"

    def place(entry: str, stored_as: str, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(location, written[entry].offset_bytes, written[entry].size_bytes, stored_as, shape)

    first = {source.name: name for name, source in order.sources.items()}
    stored = {}
    for name, ref in refs.items():
        form = formats.get(first[ref.name])
        if form is None:
            stored[name] = place(ref.name, dtype, ref.shape)
            continue
        names = part_names(ref.name)
        kind = f"uint{form.bits}"
        grid = ref.shape[0], ref.shape[1] // form.block_size
        blocks = Blocks(form.block_size, place(names[1], "float32", grid), place(names[2], kind, grid), form.symmetric)
        stored[name] = dataclasses.replace(place(names[0], kind, ref.shape), blocks=blocks)
    return stored


def _chunk_rows(shape: tuple[int, ...]) -> int:
    return max(1, _CHUNK_BYTES // (4 * max(1, math.prod(shape[1:]))))


def _blocks(source: TensorSource | npt.NDArray[Any], dtype: str) -> Iterator[bytes]:
    """The tensor's bytes in the wanted dtype, a few rows at a time; InputError for a value that it cannot hold."""
    import ml_dtypes

    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rows = _chunk_rows(source.shape)
    for begin in range(0, source.shape[0], rows):
        part = source[begin : begin + rows] if isinstance(source, np.ndarray) else source.rows(begin, begin + rows)
        try:
            with np.errstate(over="raise"):
                converted = np.ascontiguousarray(part).astype(wanted)
        except FloatingPointError:
            raise InputError(
                "A weight is too large for the dtype.",
                note=f"{getattr(source, 'name', 'An adapter')} has values that are infinite as {dtype}.",
                hint="Use --dtype bf16 or fp32.",
            ) from None
        yield converted.tobytes()


def _write_safetensors(
    path: Path,
    entries: Sequence[_Entry],
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
