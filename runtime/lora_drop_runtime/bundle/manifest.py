"""The manifest, `lora_drop.json`, as frozen classes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind

from .graph_io import DEVICE_TARGETS, CacheShape, GraphIO, graph_io

FORMAT_VERSION = 2
MANIFEST_NAME = "lora_drop.json"
VERIFY_NAME = "verify.json"
TARGETS = ("ort", *DEVICE_TARGETS)
ATTENTION_FORMS = ("native", "plugin")  # of the device targets
WEIGHT_SHARINGS = ("inputs", "constants")
QUANTIZED_DTYPES = ("int4", "int8")  # of weights
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
        return 2 * self.kv_heads * self.head_dim * BY_NAME[self.kv_dtype or self.dtype].size_bytes


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


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError(f"{data!r} stands where a JSON object is needed")
    return data


def _from_dict(cls: type[Any], data: Any) -> Any:
    """A frozen dataclass from JSON, whose lists become tuples."""
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in _object(data).items()})


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
