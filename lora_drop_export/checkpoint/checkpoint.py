"""A model as it lies on disk: its config, and where each tensor's values come from."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.errors import InputError

_FINGERPRINT_VALUES = 64
_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})\.safetensors")


def shards_of(name: str) -> list[str]:
    """All files of which one of this name is one, such as model-00001-of-00003.safetensors; none of another name."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return []
    return [f"{match[1]}{number:05}-of-{match[2]}.safetensors" for number in range(1, int(match[2]) + 1)]


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
        joined: what the model calls the matrices of a layer's experts → their names in `tensors`, those of each expert
            together, where the checkpoint has them apart (experts.py).
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
    joined: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    trust_remote_code: bool = False
    owned: bool = False
    bundle: Bundle | None = None

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What the bundle's manifest says of quantized weights; empty for weights in float, and where there is none."""
        return {} if self.bundle is None else self.bundle.manifest.quantization

    def _stamps(self) -> dict[Path, tuple[int, int, int] | None]:
        """What tells that a file of the tensors was written to or replaced; None of one that is gone."""
        stamps: dict[Path, tuple[int, int, int] | None] = {}
        for file in sorted({ref.file for ref in self.tensors.values()}):
            stamps[file] = None
            with contextlib.suppress(OSError):
                found = file.stat()
                stamps[file] = found.st_ino, found.st_size, found.st_mtime_ns
        return stamps

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """A block that reads the tensors.

        Raises:
            InputError: their files were changed meanwhile, so that what was read is of no one model.
        """
        before = self._stamps()
        try:
            yield
        except Exception:  # what was read may be nonsense
            self._refuse_change(before)
            raise
        self._refuse_change(before)

    def _refuse_change(self, before: Mapping[Path, tuple[int, int, int] | None]) -> None:
        now = self._stamps()
        changed = next((file for file in before if now[file] != before[file]), None)
        if changed is not None:
            raise InputError(
                "The checkpoint changed while it was read.",
                note=f"{changed} was {'removed' if now[changed] is None else 'written or replaced'} meanwhile.",
                hint="Run the command again once nothing writes there.",
            ) from None

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
