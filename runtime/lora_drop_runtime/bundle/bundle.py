"""The bundle on disk and its manifest.

Enters: a bundle directory. Leaves: a `Bundle` whose files are all there and whole.

    lora_drop.json               the manifest, this module's `Manifest` as JSON
    refresh.onnx  lora.onnx      neutral step graphs (graph_io.py); weights external, relative to the bundle's root
    weights/*.safetensors        the checkpoint as it lay, or converted; adapters.safetensors
    tokenizer/                   tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
    ort/                         lowered graphs
    tensorrt[-rtx]/              lowered graphs, the engines built from them, weights.json (`WeightInput`)
                                 timing.cache (tensorrt), *_context.onnx: EPContext nodes (tensorrt-rtx)
    verify.json                  the last comparison with the reference, step by step

Opening checks format version, presence and sizes. Every file but the manifest is recorded by its size and the hash of
its content; `check_unchanged` reads them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.errors import BundleError

from .manifest import ENTRIES, MANIFEST_NAME, FileRecord, Manifest, TargetEntry


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


@dataclass(frozen=True)
class Bundle:
    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest and check that every file is there with its size.

        Raises:
            BundleError: no bundle there, another format version, a missing or truncated file.
        """
        root = Path(path)
        manifest_path = root / MANIFEST_NAME
        if not manifest_path.is_file():
            raise BundleError(
                "There is no bundle here.",
                note=f"{root} has no {MANIFEST_NAME}." if root.is_dir() else f"{root} is not a directory.",
                hint="Make one with: lora-drop-export --model MODEL --out DIR",
            )
        manifest = Manifest.from_json(manifest_path.read_bytes(), manifest_path)
        for name, record in manifest.files.items():
            file = root / name
            if not file.is_file():
                raise BundleError(
                    "A file of the bundle is missing.",
                    note=f"{file} is recorded in the manifest with {record.size_bytes} bytes.",
                    hint="Copy the whole bundle again, or export the model again.",
                )
            size = file.stat().st_size
            if size != record.size_bytes:
                raise BundleError(
                    "A file of the bundle has the wrong size.",
                    note=f"{file} has {size} bytes, the manifest says {record.size_bytes}.",
                    hint="Copy the whole bundle again, or export the model again.",
                )
        return cls(root, manifest)

    def target(self, name: str | None) -> tuple[str, TargetEntry]:
        """A target's entry; the first one when `name` is None."""
        targets = self.manifest.targets
        chosen = name or next(iter(targets), None)
        if chosen is None or chosen not in targets:
            held = ", ".join(targets) or "none (exported with --target none)"
            raise BundleError(
                "The bundle cannot run on that target." if name else "The bundle has no target to run on.",
                note=f"{f'{name!r} was asked for; ' if name else ''}the bundle at {self.root} has {held}.",
                hint=f"Known targets are {', '.join(ENTRIES)}; export with --target {next(iter(ENTRIES))}.",
            )
        return chosen, targets[chosen]

    def weight_inputs(self, target: str) -> dict[str, WeightInput]:
        """A target's table of weights that are engine inputs; empty when they lie inside the engines."""
        name = self.target(target)[1].weight_table
        if name is None:
            return {}
        table = json.loads((self.root / name).read_bytes())
        return {
            key: WeightInput(entry["dtype"], tuple(entry["shape"]), tuple((f, o, n) for f, o, n in entry["parts"]))
            for key, entry in table.items()
        }

    def mapped_parts(self, weight: WeightInput) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of a weight's parts, in order, mapped where they lie."""
        for file, offset, size in weight.parts:
            yield np.memmap(self.root / file, np.uint8, "r", offset, (size,))

    def check_hashes(self) -> list[str]:
        """Names of the files whose hash is not the recorded one. Reads the whole bundle."""
        return [
            name
            for name, record in self.manifest.files.items()
            if not record.header_only and record_file(self.root / name) != record
        ]

    def check_unchanged(self) -> None:
        """Hash every file.

        Raises:
            BundleError: a hash is not the recorded one, or the manifest does not record that of the whole file.
        """
        wrong = self.check_hashes()
        if wrong:
            raise BundleError(
                "A file of the bundle has changed.",
                note=f"{wrong[0]} does not have the recorded hash"
                + (f", nor have {len(wrong) - 1} others." if wrong[1:] else "."),
                hint="Copy the bundle again, or export the model again.",
            )
        partly = [name for name, record in self.manifest.files.items() if record.header_only]
        if partly:
            raise BundleError(
                "The bundle does not record the hash of every file.",
                note=f"Version 0.1 wrote it, which recorded of {', '.join(partly)} only the header. All others are as "
                "they were.",
                hint="Export the model again, and the whole of it is recorded.",
            )
