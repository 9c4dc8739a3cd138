"""Weights into the bundle, once.

Enters: where each tensor lies in the checkpoint, the wanted dtype or block formats. Leaves: files under `weights/` and,
for each graph initializer, its place there. A checkpoint already in the wanted dtype is copied (reflinked where the
file system can) or linked as it lies; otherwise one new file is written a few rows at a time, with tensors that an
engine wants as one matrix back to back. Knows no graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from lora_drop_runtime.bundle.manifest import ADAPTERS_NAME, KV_SCALES_NAME
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.dtypes import short_name
from lora_drop_runtime.errors import InputError

from lora_drop_export.checkpoint.checkpoint import TensorSource, shards_of
from lora_drop_export.console import Progress
from lora_drop_export.quantize.formats import BlockFormat

from .layout import Order, file_entries
from .write import CHUNK_BYTES, write

if sys.platform != "win32":
    import fcntl

_FICLONE = 0x40049409  # ioctl of btrfs and xfs: share the blocks of another file


def is_stored_as(refs: Iterable[TensorSource], dtype: str) -> bool:
    """Whether the checkpoint's values already have the wanted dtype."""
    return all(ref.dtype == dtype for ref in refs)


def is_taken_as_it_lies(
    refs: Iterable[TensorSource],
    dtype: str,
    *,
    owned: bool = False,
    formats: Mapping[str, BlockFormat] = MappingProxyType({}),
) -> bool:
    """Whether the checkpoint's files go into the bundle as they are."""
    refs = list(refs)
    files = all(isinstance(ref, TensorPlace) for ref in refs)
    return files and not owned and not formats and is_stored_as(refs, dtype)


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
    return sum(entry.size_bytes for entry in file_entries(Order.of(refs, ()), dtype, formats))


def _dtypes(refs: Iterable[TensorSource]) -> str:
    return ", ".join(sorted({ref.dtype for ref in refs}))


def _not_linked(source: Path, number: int | None) -> InputError:
    """The error of a link that the system refuses with this number."""
    is_far = number == errno.EXDEV
    reason = "it lies on another file system than --out" if is_far else os.strerror(number or errno.EIO)
    if number == errno.EPERM and not os.access(source, os.W_OK):  # Linux's fs.protected_hardlinks
        reason += "; the system may want files that are linked to be yours or writable to you"
    return InputError(
        "The checkpoint's weights cannot be linked.",
        note=f"{source}: {reason}.",
        hint="Use --weights copy, or an --out on the checkpoint's file system." if is_far else "Use --weights copy.",
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise _not_linked(source, error.errno) from None


def check_linkable(
    refs: Iterable[TensorSource], root: Path, dtype: str, mode: str, *, owned: bool = False, quantized: bool = False
) -> None:
    """Refuse hard links that cannot be made. One is made of each file, and removed.

    Args:
        refs: of the checkpoint.
        root: of the bundle that is being written.
        dtype: that the bundle stores.
        mode: `copy` is never refused.
        owned: the checkpoint has no files of the user's to take as they lie.
        quantized: the bundle's weights are.

    Raises:
        InputError: the weights have to be converted, or the system refuses.
    """
    if mode != "link":
        return
    refs = list(refs)
    if quantized:
        raise InputError(
            "The checkpoint's weights cannot be linked.",
            note=f"Only weights in float are; the bundle needs {short_name(dtype)}.",
            hint="Use --weights copy.",
        )
    if not is_stored_as(refs, dtype):
        raise InputError(
            "The checkpoint's weights cannot be linked.",
            note=f"They are {_dtypes(refs)}, the bundle needs {short_name(dtype)}: they have to be converted.",
            hint="Use --weights copy, or the --dtype of the checkpoint with a target that takes it.",
        )
    if owned or not all(isinstance(ref, TensorPlace) for ref in refs):
        raise InputError(
            "The checkpoint's weights cannot be linked.",
            note="They do not lie in safetensors files, or not in the bundle's form: they have to be converted.",
            hint="Use --weights copy.",
        )
    trial = root / "linked"
    for file in sorted({ref.file for ref in refs if isinstance(ref, TensorPlace)}):
        _link(file, trial)
        trial.unlink()


def copy_file(source: Path, target: Path, progress: Progress) -> None:
    """Copy, sharing blocks where the file system can."""
    with source.open("rb") as reader, target.open("wb") as writer:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
                return
        size, done = source.stat().st_size, 0
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)
            done += len(chunk)
            progress(f"copying {source.name}", done, size)


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
) -> dict[str, TensorPlace]:
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
    wanted = next(iter(formats.values())).dtype if formats else dtype
    check_linkable(refs.values(), root, wanted, mode, owned=owned, quantized=bool(formats))
    if not is_taken_as_it_lies(refs.values(), dtype, owned=owned, formats=formats):
        return write(Order.of(refs, groups), refs, dtype, formats, method, directory / "model.safetensors", progress)
    places = {}
    taken = {ADAPTERS_NAME, KV_SCALES_NAME}  # our own are written there, which a link would carry into the checkpoint
    files = sorted({ref.file for ref in refs.values()})
    names = {file.name for file in files}
    for file in files:
        name = file.name if file.suffix == ".safetensors" else f"{file.name}.safetensors"  # hub blobs: a hash
        if not names.issuperset(shards_of(name)):  # one that the decoder needs nothing of, such as a vision tower's
            name = f"{name.rpartition('-of-')[0]}.safetensors"
        while name in taken:
            name = f"model.{name}"
        taken.add(name)
        places[file] = f"weights/{name}"
        if mode == "link":
            _link(file, root / places[file])
        else:
            copy_file(file, root / places[file], progress)
    stored = {}
    for name, ref in refs.items():
        assert isinstance(ref, TensorPlace)
        stored[name] = dataclasses.replace(ref, file=Path(places[ref.file]))
    return stored
