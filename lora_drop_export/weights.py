"""Weights into the bundle, once.

Enters: where each tensor lies in the checkpoint, the wanted dtype. Leaves: files under `weights/` and, for each graph
initializer, its place there. A checkpoint already in the wanted dtype is copied (reflinked where the file system can),
linked or moved as it lies; otherwise one new file is written tensor by tensor. Knows no graph.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_runtime.safetensors_file import TensorRef, read_tensors

from .checkpoint import TORCH_DTYPES, Checkpoint
from .surgery import StoredTensor

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FORMER_NAMES = {"lm_head.weight": "embed_out.weight"}  # as GPT-NeoX checkpoints have it
_FICLONE = 0x40049409  # ioctl of btrfs and xfs: share the blocks of another file
_CHUNK_BYTES = 1 << 24

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


def resolve_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> dict[str, TensorRef]:
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


def weights_bytes(refs: Iterable[TensorRef], dtype: str, mode: str) -> int:
    """Disk space that `store_weights` will take, in bytes; nothing for hard links."""
    refs = list(refs)
    if is_stored_as(refs, dtype):
        return 0 if mode == "link" else sum(f.stat().st_size for f in {r.file for r in refs})
    width = 4 if dtype == "float32" else 2
    return sum(int(np.prod(r.shape)) * width for r in {r.name: r for r in refs}.values())


def store_weights(
    refs: Mapping[str, TensorRef], dtype: str, root: Path, mode: str, *, movable: bool, progress: Progress
) -> dict[str, StoredTensor]:
    """Put the weights under `root/weights` and return each initializer's place.

    Args:
        refs: initializer name → checkpoint tensor.
        mode: `copy` or `link` (hard link).
        movable: the files belong to this export and may be moved.

    Raises:
        InputError: a hard link was asked for but cannot be made.
    """
    directory = root / "weights"
    directory.mkdir()
    if not is_stored_as(refs.values(), dtype):
        if mode == "link":
            raise InputError(
                "The checkpoint's weights cannot be linked.",
                note=f"They are {_dtypes(refs.values())}, the bundle needs {dtype}: they have to be converted.",
                hint="Use --weights copy, or the --dtype of the checkpoint with a target that takes it.",
            )
        return _convert(refs, dtype, directory / "model.safetensors", progress)
    places = {}
    for file in sorted({ref.file for ref in refs.values()}):
        name = file.name if file.suffix == ".safetensors" else f"{file.name}.safetensors"  # hub blobs: a hash
        places[file] = f"weights/{name}"
        if movable:
            shutil.move(file, root / places[file])
        elif mode == "link":
            _link(file, root / places[file])
        else:
            copy_file(file, root / places[file], progress)
    return {
        name: StoredTensor(places[ref.file], ref.offset_bytes, ref.size_bytes, dtype, ref.shape)
        for name, ref in refs.items()
    }


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
    path = root / "weights" / "adapters.safetensors"
    entries = [(name, array.shape, _blocks(array, dtype)) for name, array in arrays.items()]
    _write_safetensors(path, dtype, entries, lambda *_: None)
    refs = read_tensors(path)

    def stored(site: str, part: str) -> StoredTensor:
        ref = refs[f"surrogate.{site}.lora_{part}"]
        return StoredTensor("weights/adapters.safetensors", ref.offset_bytes, ref.size_bytes, dtype, ref.shape)

    return {site: (stored(site, "A"), stored(site, "B")) for site in matrices}


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


def is_stored_as(refs: Iterable[TensorRef], dtype: str) -> bool:
    """Whether the checkpoint already has the wanted dtype and its files are taken as they lie."""
    return all(TORCH_DTYPES[ref.dtype] == dtype for ref in refs)


def _dtypes(refs: Iterable[TensorRef]) -> str:
    return ", ".join(sorted({TORCH_DTYPES[ref.dtype] for ref in refs}))


def _convert(refs: Mapping[str, TensorRef], dtype: str, path: Path, progress: Progress) -> dict[str, StoredTensor]:
    sources = {ref.name: ref for ref in refs.values()}  # a tied weight once
    entries = [(name, ref.shape, _blocks(ref, dtype)) for name, ref in sources.items()]
    _write_safetensors(path, dtype, entries, progress)
    written = read_tensors(path)
    return {
        name: StoredTensor(
            f"weights/{path.name}",
            written[ref.name].offset_bytes,
            written[ref.name].size_bytes,
            dtype,
            ref.shape,
        )
        for name, ref in refs.items()
    }


def _blocks(source: TensorRef | npt.NDArray[Any], dtype: str) -> Iterator[bytes]:
    """The tensor's bytes in the wanted dtype, a few rows at a time; InputError for a value that it cannot hold."""
    import ml_dtypes

    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shape = source.shape
    rows = max(1, _CHUNK_BYTES // (4 * max(1, int(np.prod(shape[1:])))))
    for begin in range(0, shape[0], rows):
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
    path: Path, dtype: str, entries: list[tuple[str, tuple[int, ...], Iterator[bytes]]], progress: Progress
) -> None:
    """A safetensors file from tensors given piece by piece; the library would want them all in memory."""
    width = 4 if dtype == "float32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in entries:
        begin, end = end, end + int(np.prod(shape)) * width
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _, blocks in entries:
            for block in blocks:
                file.write(block)
                done += len(block)
                progress(f"writing {name}", done, end)
