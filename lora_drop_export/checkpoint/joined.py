"""Tensors that checkpoints have apart and transformers' model has as one: convolutions, as in OLMo hybrid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint, TensorSource

_PARTS = {"conv1d.weight": tuple(f"{part}_conv1d.weight" for part in "qkv")}


@dataclass(frozen=True, eq=False)
class JoinedRows:
    """The rows of several tensors, one behind the other."""

    name: str
    parts: tuple[TensorSource, ...]

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    def read(self) -> npt.NDArray[Any]:
        return np.concatenate([part.read() for part in self.parts])

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        return self.read()[begin:end]  # a few kilobytes


def _parts_of(checkpoint: Checkpoint, name: str) -> dict[str, TensorSource | None]:
    """The parts in which checkpoints may have a parameter, as far as this one has them; none of another parameter."""
    apart = [
        f"{name.removesuffix(whole)}{part}" for whole in _PARTS if name.endswith(f".{whole}") for part in _PARTS[whole]
    ]
    return {part: checkpoint.tensors.get(checkpoint.renamed.get(part, part)) for part in apart}


def find_joined(checkpoint: Checkpoint, name: str) -> TensorSource | None:
    """The tensor of a parameter that the checkpoint has in parts; None where it has not all of them, in one form."""
    found = _parts_of(checkpoint, name)
    parts = tuple(part for part in found.values() if part is not None and part.shape)
    alike = len({(part.dtype, part.shape[1:]) for part in parts}) == 1
    return JoinedRows(name, parts) if alike and len(parts) == len(found) else None


def missing_of_joined(checkpoint: Checkpoint, name: str) -> list[str]:
    """The parts that the checkpoint lacks of a parameter of which it has others."""
    found = _parts_of(checkpoint, name)
    lacking = [part for part, tensor in found.items() if tensor is None]
    return lacking if len(lacking) < len(found) else []
