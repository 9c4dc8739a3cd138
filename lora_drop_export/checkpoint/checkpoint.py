"""A model as it lies on disk: its config, and where each tensor's values come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.dtypes import BY_NAME

_FINGERPRINT_VALUES = 64


class TensorSource(Protocol):
    """What can be asked of a checkpoint's tensor: a place in a safetensors file, or one that is dequantized.

    `dtype` is that of the values that `read` and `rows` give; `rows` are along the first axis.
    """

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size_bytes(self) -> int: ...
    def read(self) -> npt.NDArray[Any]: ...
    def rows(self, begin: int, end: int) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk.

    Attributes:
        name: hub id, or the own name of the directory or file.
        directory: holds config.json, the tokenizer files and the licence.
        config: the transformers config.
        tensors: tensor name → where its values come from; files are real paths, symbolic links resolved.
        renamed: what the model calls a tensor → its name in `tensors`, where transformers renames on loading.
        trust_remote_code: the user lets the code that the checkpoint brings run.
        owned: True when the user has no safetensors files that could be taken as they lie: the tensors come from a GGUF
            file, or from files that were made for this export.
        bundle: that holds the tensors.
    """

    name: str
    directory: Path
    config: Any
    tensors: Mapping[str, TensorSource]
    renamed: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False
    owned: bool = False
    bundle: Bundle | None = None

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What the bundle's manifest says of quantized weights; empty for weights in float, and where there is none."""
        return {} if self.bundle is None else self.bundle.manifest.quantization

    def fingerprint(self) -> str:
        """Identity of the base weights, the same for float32, float16 and bfloat16 copies of equal values.

        SHA-256 over each tensor's name, shape and first 64 values as float32; over the dtype of one that cannot be
        read, which the model may have no place for.
        """
        if self.bundle is not None:
            return self.bundle.manifest.model.fingerprint
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            ref = self.tensors[name]
            digest.update(f"{name}{ref.shape}".encode())
            if ref.dtype not in BY_NAME:
                digest.update(ref.dtype.encode())
                continue
            rows = ref.rows(0, 1) if ref.shape else ref.read()
            digest.update(np.asarray(rows, np.float32).reshape(-1)[:_FINGERPRINT_VALUES].tobytes())
        return digest.hexdigest()
