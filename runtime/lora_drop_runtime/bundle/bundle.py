"""The bundle on disk and its manifest.

Enters: a bundle directory. Leaves: a `Bundle` whose files are all there and whole.

    lora_drop.json               the manifest, this module's `Manifest` as JSON
    refresh.onnx  lora.onnx      neutral step graphs (graph_io.py); weights external, relative to the bundle's root
    weights/*.safetensors        the checkpoint as it lay, or converted; adapters.safetensors
    tokenizer/                   tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
    ort/  openvino/              lowered graphs
    tensorrt[-rtx]/              lowered graphs, the engines built from them, weights.json (`WeightInput`)
                                 timing.cache (tensorrt), *_context.onnx: EPContext nodes (tensorrt-rtx)
    verify.json                  the last comparison with the reference, step by step

Opening checks the manifest's every value, and presence and size of the files, which are ordinary ones inside the
directory. Every file but the manifest is recorded by its size and the hash of its content; `check_unchanged` reads them
all. What the manifest does not record is not run: not as a graph or an engine, not as weights that a graph names, not
from the folders that are read as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.errors import BundleError, LoraDropError, wrong_type
from lora_drop_runtime.files import is_directory, is_file, is_utf8, read_bounded, reading_hint, refuse_locked

from .graph_files import graph_files
from .manifest import ENTRIES, MANIFEST_NAME, FileRecord, Manifest, TargetEntry
from .manifest_reader import read_manifest
from .typed_json import parse_json, typed

MOST_MANIFEST_BYTES = 64 << 20
# By their names in them, also by transformers
READ_AS_A_WHOLE = ("tokenizer", "tokenizer/additional_chat_templates", "weights")


@dataclass(frozen=True)
class WeightInput:
    """A weight that is an engine's input: the bytes of its parts (file, offset, size), one after the other."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size for _, _, size in self.parts)


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file as the manifest keeps them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def _damaged_file(fact: str, note: str) -> BundleError:
    return BundleError(fact, note=note, hint="Copy the whole bundle again, or export the model again.")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(
            "A file of the bundle cannot be read.",
            note=f"{file}: {error.strerror}.",
            hint=reading_hint(error, "Check its permissions; or copy the whole bundle again."),
        ) from None


def _check_name(name: str) -> None:
    """Refuse a file's name that means another place on some system."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or re.search(r"[\\:\0]", name) or not is_utf8(name):
        raise _damaged_file(
            "A file of the bundle has a name that leads out of it.",
            f"The manifest records {name!r:.60}; needed is a path such as weights/model.safetensors.",
        )


def _check_file(root: Path, real_root: str, name: str, record: FileRecord) -> None:
    """Whether a recorded file lies inside the bundle, may be read, is an ordinary one and has its size."""
    _check_name(name)
    file = root / name
    with _reading(file):
        try:
            real, status = os.path.realpath(file), file.stat()
            if not os.access(file, os.R_OK):  # an engine says a number alone, of the graph that it reads
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _damaged_file(
                "A file of the bundle is missing.",
                f"{file} is recorded in the manifest with {record.size_bytes} bytes: {error.strerror}.",
            ) from None
    if os.path.commonpath((real_root, real)) != real_root:
        raise _damaged_file("A file of the bundle leads out of it.", f"{file} is a link to {real}.")
    if not stat.S_ISREG(status.st_mode):
        raise _damaged_file("A file of the bundle is no ordinary file.", f"{file} is a directory or a device.")
    if status.st_size != record.size_bytes:
        raise _damaged_file(
            "A file of the bundle has the wrong size.",
            f"{file} has {status.st_size} bytes, the manifest says {record.size_bytes}.",
        )


def _check_recorded(root: Path, manifest: Manifest) -> None:
    """Whether all is recorded that would be read: what targets name, and what lies in folders that are read whole.

    The manifest is not: who changes it would write through a hard link to it.
    """
    if MANIFEST_NAME in manifest.files:
        raise _damaged_file("The bundle's manifest records itself.", f"It is {root / MANIFEST_NAME}.")
    for target, entry in manifest.targets.items():
        for name in entry.files:
            if name not in manifest.files:
                raise _damaged_file(
                    "A target of the bundle names a file that the manifest does not record.",
                    f"Target {target!r} names {name!r:.60}.",
                )
    for folder in READ_AS_A_WHOLE:
        for file in sorted((root / folder).glob("*")):
            name = f"{folder}/{file.name}"
            if not file.name.startswith(".") and not file.is_dir() and name not in manifest.files:
                raise BundleError(
                    "There is a file in the bundle that its manifest does not record.",
                    note=f"{file} would be read, and nobody knows whose it is.",
                    hint="Move it out of the bundle, or export the model again.",
                )


@dataclass(frozen=True)
class Bundle:
    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest and check that every file is there with its size.

        Raises:
            BundleError: no bundle there, another format version, a missing or truncated file, one that may not be read
                or is a link out of the bundle, or one that the manifest does not record.
            PlanError: the manifest's plan is impossible.
        """
        if not isinstance(path, str | os.PathLike):
            raise wrong_type("The bundle", path, "the path of its directory", 'Use for example "engines/".')
        root = Path(path)
        with contextlib.suppress(OSError):  # no working directory
            root = root.absolute()  # it may be another one when files are read later
        manifest_path = root / MANIFEST_NAME
        if not is_file(manifest_path):
            refuse_locked(manifest_path)
            state = f"has no {MANIFEST_NAME}" if is_directory(root) else "is not a directory"
            raise BundleError(
                "There is no bundle here.",
                note=f"{root!s:.200} {state}.",
                hint="Make one with: lora-drop-export --model MODEL --out DIR",
            )
        manifest = read_manifest(read_bounded(manifest_path, MOST_MANIFEST_BYTES), manifest_path)
        real_root = os.path.realpath(root)
        for name, record in manifest.files.items():
            _check_file(root, real_root, name, record)
        _check_recorded(root, manifest)
        return cls(root, manifest)

    def file(self, name: str) -> Path:
        """Where a recorded file lies.

        Raises:
            BundleError: the manifest does not record it.
        """
        if name not in self.manifest.files:
            raise _damaged_file("The manifest does not record a file that is to be read.", f"It is {name!r:.60}.")
        return self.root / name

    def _check_part(self, reader: str, location: str, offset_bytes: int, size_bytes: int) -> None:
        """Whether a part of a file that another one names is there."""
        record = self.manifest.files.get(location)
        if record is None or offset_bytes + size_bytes > record.size_bytes:
            state = "is not in the manifest" if record is None else f"has {record.size_bytes} bytes"
            raise _damaged_file(
                "A file of the bundle names weights that are not there.",
                f"{reader} reads {size_bytes} bytes at {offset_bytes} of {location!r:.60}, which {state}.",
            )

    def graph(self, name: str) -> bytes:
        """A recorded ONNX graph, unchanged, whose tensors and engines lie in recorded files.

        Raises:
            BundleError: it has changed, is no graph, or names another file.
        """
        path = self.file(name)
        with _reading(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise _damaged_file("A graph of the bundle has changed.", f"{path} does not have the recorded hash.")
        try:
            parts = graph_files(data, name[: name.rfind("/") + 1])
        except ValueError as error:
            raise _damaged_file("A graph of the bundle is damaged.", f"{path}: {error}.") from None
        for part in parts:
            self._check_part(name, part.location, part.offset_bytes, part.size_bytes or 0)
        return data

    def target(self, name: str | None) -> tuple[str, TargetEntry]:
        """A target's entry; the first one when `name` is None."""
        targets = self.manifest.targets
        chosen = name or next(iter(targets), None)
        if chosen is None or chosen not in targets:
            held = ", ".join(targets) or "none (exported with --target none)"
            named = name if name in ENTRIES else next(iter(targets or ENTRIES))
            raise BundleError(
                "The bundle cannot run on that target." if name else "The bundle has no target to run on.",
                note=f"{f'{name!r} was asked for; ' if name else ''}the bundle at {self.root} has {held}.",
                hint=f"Known targets are {', '.join(ENTRIES)}; "
                f"{'use' if named in targets else 'export with'} --target {named}.",
            )
        return chosen, targets[chosen]

    def weight_inputs(self, target: str) -> dict[str, WeightInput]:
        """A target's table of weights that are engine inputs; empty when they lie inside the engines."""
        name = self.target(target)[1].weight_table
        if name is None:
            return {}
        with _reading(self.file(name)):
            data = self.file(name).read_bytes()
        try:
            table = typed(Mapping[str, WeightInput], parse_json(data), "the table")
            for weight, entry in table.items():
                known = BY_NAME.get(entry.dtype)
                if known is None or math.prod(entry.shape) * known.bits != 8 * entry.size_bytes:
                    raise ValueError(f"{weight} is {entry.dtype} {entry.shape} of {entry.size_bytes} bytes")
        except ValueError as error:
            raise _damaged_file("A target's table of weights is damaged.", f"{self.root / name}: {error}.") from None
        for entry in table.values():
            for part in entry.parts:
                self._check_part(name, *part)
        weights: dict[str, WeightInput] = table
        return weights

    def mapped_parts(self, weight: WeightInput) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of a weight's parts, in order, mapped where they lie."""
        for file, offset, size in weight.parts:
            with _reading(self.root / file):
                part = np.memmap(self.root / file, np.uint8, "r", offset, (size,))
            yield part

    def mapped_part(
        self, files: dict[str, npt.NDArray[np.uint8]], reader: str, location: str, offset: int, size: int
    ) -> npt.NDArray[np.uint8]:
        """Bytes of a recorded file that a graph, `reader`, names; mapped where they lie.

        Args:
            files: those that are mapped already, each once; takes another one.

        Raises:
            BundleError: they are not there.
        """
        if min(offset, size) < 0:
            raise _damaged_file("A graph of the bundle is damaged.", f"{reader} reads {size} bytes at {offset}.")
        self._check_part(reader, location, offset, size)
        if not size:
            return np.zeros(0, np.uint8)
        if location not in files:
            with _reading(self.root / location):
                files[location] = np.memmap(self.root / location, np.uint8, "r")
        return files[location][offset : offset + size]

    def written(self, name: str) -> tuple[int, int, int]:
        """What no other file at the place of a recorded one has, nor the same one once it is written again.

        Raises:
            BundleError: there is none.
        """
        file = self.root / name
        with _reading(file):
            found = file.stat()
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def is_in_place(self) -> bool:
        """Whether its weights still lie at its place, for who reads them long after it was opened."""
        path = self.root / MANIFEST_NAME
        try:
            there = read_manifest(read_bounded(path, MOST_MANIFEST_BYTES), path)
        except LoraDropError:
            return False
        return there.identity == self.manifest.identity

    def check_in_place(self) -> None:
        """Raise BundleError where `is_in_place` is false."""
        if not self.is_in_place():
            raise BundleError(
                "The bundle is no longer what was opened.",
                note=f"{self.root} was moved, removed or exported again since then, or its weights have changed.",
                hint="Open it again.",
            )

    def check_hashes(self, leave_out: tuple[str, ...] = ()) -> list[str]:
        """Names of the files whose hash is not the recorded one. Reads the whole bundle.

        Args:
            leave_out: beginnings of names of files that are not read.
        """
        files = {name: record for name, record in self.manifest.files.items() if not name.startswith(leave_out)}
        changed = []
        for name, record in files.items():
            with _reading(self.root / name):
                if record_file(self.root / name) != record:
                    changed.append(name)
        return changed

    def check_unchanged(self, leave_out: tuple[str, ...] = ()) -> None:
        """Hash every file, but for those as in `check_hashes`.

        Raises:
            BundleError: a hash is not the recorded one.
        """
        wrong = self.check_hashes(leave_out)
        if wrong:
            raise BundleError(
                "A file of the bundle has changed.",
                note=f"{wrong[0]} does not have the recorded hash"
                + (f", nor have {len(wrong) - 1} others." if wrong[1:] else "."),
                hint="Copy the bundle again, or export the model again.",
            )
