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

Opening checks format version, presence and sizes. A checkpoint file is recorded by size and the hash of its
safetensors header, every other file by size and content; `check_hashes` reads them all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.drop_plan import DropPlan, StepKind

from .graph_io import DEVICE_TARGETS, CacheShape, GraphIO, graph_io
from .safetensors_file import header_sha256

FORMAT_VERSION = 2
MANIFEST_NAME = "lora_drop.json"
VERIFY_NAME = "verify.json"
TARGETS = ("ort", *DEVICE_TARGETS)
ATTENTION_FORMS = ("native", "plugin")  # of the device targets
WEIGHT_SHARINGS = ("inputs", "constants")
QUANTIZED_DTYPES = {"int4": 4, "int8": 8}  # bits of a weight
QUANTIZATIONS = ("search", "rtn")
BLOCK_SIZES = (32, 128)


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime and the cost formulas need to know of the model.

    `fingerprint` identifies the base weights whatever dtype they are stored in; `windows` holds each layer's
    sliding window in positions, 0 for none; `dtype` is of activations and, unless `kv_dtype` is `int8`, of caches;
    `weight_dtype` is `int4` or `int8` where linear layers are quantized; the byte counts are as stored in the bundle.
    """

    name: str
    model_type: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    dtype: str
    windows: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    head_bytes: int
    embedding_row_bytes: int
    weight_dtype: str = "float32"
    kv_dtype: str | None = None

    @property
    def cache(self) -> CacheShape:
        return CacheShape(self.kv_heads, self.head_dim, self.dtype, self.kv_dtype)

    @property
    def token_kv_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        width = 1 if self.kv_dtype == "int8" else DTYPE_BYTES[self.dtype]
        return 2 * self.kv_heads * self.head_dim * width


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Limits:
    """Largest request the bundle accepts: tokens of a row (prompt + new), of a prompt, rows of a batch."""

    max_seq_len: int
    max_prompt_len: int
    max_batch: int


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids from the generation config: where generation stops, and what pads a batch."""

    eos: tuple[int, ...] = ()
    pad: int = 0


@dataclass(frozen=True)
class FileRecord:
    """`sha256` covers the content, or only the safetensors header where `header_only`."""

    size_bytes: int
    sha256: str
    header_only: bool = False


@dataclass(frozen=True)
class WeightInput:
    """A weight that is an engine's input: the bytes of its parts (file, offset, size), one after the other."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size for _, _, size in self.parts)


@dataclass(frozen=True)
class Manifest:
    """`quantization`: bits, block size, method, and what it cost in perplexity; empty for weights as they were."""

    model: ModelFacts
    plan: DropPlan
    limits: Limits
    special_tokens: SpecialTokens
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verification: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def io(self, kind: StepKind, target: str | None = None) -> GraphIO:
        model = self.model
        return graph_io(kind, self.plan, model.cache, model.hidden_size, model.vocab_size, target)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Manifest:
        try:
            data = json.loads(text)
            version = data["format_version"]
        except (ValueError, KeyError, TypeError):
            raise BundleError(
                "The bundle's manifest is damaged.",
                note=f"{path} is not a manifest in JSON.",
                hint="Export the model again.",
            ) from None
        if version != FORMAT_VERSION:
            raise BundleError(
                "The bundle has another format version than this runtime reads.",
                note=f"{path} says version {version}, this runtime reads version {FORMAT_VERSION}.",
                hint="Export the model again with this version, or install the version that wrote it.",
            )
        try:
            return cls(
                model=_from_dict(ModelFacts, data["model"]),
                plan=_from_dict(DropPlan, data["plan"]),
                limits=_from_dict(Limits, data["limits"]),
                special_tokens=_from_dict(SpecialTokens, data["special_tokens"]),
                targets={name: _object(entry) for name, entry in _object(data["targets"]).items()},
                files={name: FileRecord(**_object(record)) for name, record in _object(data["files"]).items()},
                versions=_object(data["versions"]),
                verification=_object(data["verification"]),
                quantization=_object(data["quantization"]),
            )
        except (KeyError, TypeError) as error:
            raise BundleError(
                "The bundle's manifest is damaged.",
                note=f"{path}: {error}.",
                hint="Export the model again.",
            ) from None


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

    def target(self, name: str | None) -> tuple[str, dict[str, Any]]:
        """A target's entry; the first one when `name` is None."""
        targets = self.manifest.targets
        chosen = name or next(iter(targets), None)
        if chosen is None or chosen not in targets:
            held = ", ".join(targets) or "none (exported with --target none)"
            raise BundleError(
                "The bundle cannot run on that target." if name else "The bundle has no target to run on.",
                note=f"{f'{name!r} was asked for; ' if name else ''}the bundle at {self.root} has {held}.",
                hint=f"Known targets are {', '.join(TARGETS)}; export with --target {TARGETS[0]}.",
            )
        return chosen, targets[chosen]

    def weight_inputs(self, target: str) -> dict[str, WeightInput]:
        """A target's table of weights that are engine inputs; empty when they lie inside the engines."""
        name = self.target(target)[1].get("weights")
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
            if record_file(self.root / name, header_only=record.header_only) != record
        ]


def record_file(path: Path, *, header_only: bool = False) -> FileRecord:
    """Size and hash of a file as the manifest keeps them."""
    if header_only:
        return FileRecord(path.stat().st_size, header_sha256(path), True)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def _from_dict(cls: type[Any], data: Any) -> Any:
    """A frozen dataclass from JSON, whose lists become tuples."""
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in _object(data).items()})


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError(f"{data!r} stands where a JSON object is needed")
    return data
