"""The matrices of a layer's experts: as a checkpoint holds them, as transformers has them, and as a bundle does.

    checkpoint      a matrix [N, K] for each expert, gate and up apart; or what transformers has
    transformers    `experts.gate_up_proj` [E, 2·I, d], gate above up, and `experts.down_proj` [E, d, I]; in the
                    families `TURNED` both are transposed, [E, d, 2·I] and [E, I, d], and gate and up in turns
    bundle          `experts.gate_up_proj.rows` [E·2I, d], a row of gate and one of up in turns, and
                    `experts.down_proj.rows` [E·d, I]; where the gate is GELU `experts.gate_up_proj.apart` [2E·I, d],
                    the gates of all experts and then their ups

Of experts without a gate, in the families `UNGATED`, a checkpoint has ups alone, and transformers `experts.up_proj`
[E, I, d]: they are the gates, too (decoder/experts.py).

Enters: the tensors of a checkpoint. Leaves: sources of the other two forms, read a few rows at a time.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.errors import ModelError

from lora_drop_export.quantize.choice import Quantization
from lora_drop_export.quantize.formats import Blocked, BlockFormat

from .checkpoint import Checkpoint, TensorSource
from .foreign import CHECKPOINT_HINT

ROWS, APART = ".rows", ".apart"  # end a name of the bundle's form
TURNED, UNGATED = ("gpt_oss",), ("nemotron_h",)
_Arrays = tuple[npt.NDArray[Any], ...]
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"  # the parameters of a module of experts


def _plain(name: str) -> str:
    """As transformers has it."""
    return name.removesuffix(ROWS).removesuffix(APART)


def _turns(name: str) -> int:
    """Matrices of an expert that one tensor holds."""
    return 2 if _plain(name).endswith(GATE_UP) else 1


def gate_up_of(experts: str, names: Container[str]) -> str:
    """The name among those of a bundle's form that gate and up of a module of experts have."""
    apart = f"{experts}.{GATE_UP}{APART}"
    return apart if apart in names else f"{experts}.{GATE_UP}{ROWS}"


def to_rows(stack: npt.NDArray[Any], name: str, turned: bool) -> npt.NDArray[Any]:
    """The bundle's form [E·N, K] of what transformers has, [E, N, K].

    Args:
        name: of the bundle's form.
        turned: it is that of `TURNED`, [E, K, N].
    """
    if turned:
        return np.ascontiguousarray(stack.swapaxes(1, 2)).reshape(-1, stack.shape[1])
    (experts, height, columns), turns = stack.shape, _turns(name)
    parts = stack.reshape(experts, turns, height // turns, columns)
    return (parts.swapaxes(0, 1) if name.endswith(APART) else parts.swapaxes(1, 2)).reshape(-1, columns)


def from_rows(rows: npt.NDArray[Any], experts: int, name: str, turned: bool) -> npt.NDArray[Any]:
    """What transformers has of the bundle's form, as `to_rows` has it."""
    (height, columns), turns = (len(rows) // experts, rows.shape[1]), _turns(name)
    if turned:
        return np.ascontiguousarray(rows.reshape(experts, height, columns).swapaxes(1, 2))
    if name.endswith(APART):
        parts = rows.reshape(turns, experts, height // turns, columns).swapaxes(0, 1)
    else:
        parts = rows.reshape(experts, height // turns, turns, columns).swapaxes(1, 2)
    return parts.reshape(experts, height, columns)


class _Made(abc.ABC):
    """What a source that is made of others has in common with the first of them."""

    @property
    @abc.abstractmethod
    def _first(self) -> TensorSource: ...

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def rows(self, begin: int, end: int) -> npt.NDArray[Any]: ...

    @property
    def file(self) -> Path:
        return self._first.file

    @property
    def dtype(self) -> str:
        return self._first.dtype

    def read(self) -> npt.NDArray[Any]:
        return self.rows(0, self.shape[0])


@functools.lru_cache(maxsize=1)
def _transposed(whole: Any, expert: int) -> npt.NDArray[Any]:
    """The matrix [N, K] of one expert in a tensor [E, K, N], of which some rows at a time are asked for."""
    return np.ascontiguousarray(whole.rows(expert, expert + 1)[0].T)


@dataclass(frozen=True, eq=False)
class SwappedExperts(_Made):
    """The matrices [E, N, K] of a tensor that holds them as [E, K, N]."""

    stored: TensorSource

    @property
    def _first(self) -> TensorSource:
        return self.stored

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        experts, columns, rows = self.stored.shape
        return experts, rows, columns

    @property
    def size_bytes(self) -> int:
        return self.stored.size_bytes

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Experts `begin` to `end`."""
        experts = range(begin, min(end, self.shape[0]))
        return np.stack([_transposed(self.stored, expert) for expert in experts])  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _Part(_Made):
    """Rows `begin` to `begin + N` of one expert in a tensor [E, ·, K], or [E, K, ·] where it is `turned`."""

    whole: TensorSource
    expert: int
    begin: int
    size: tuple[int, int]  # (N, K)
    turned: bool

    @property
    def _first(self) -> TensorSource:
        return self.whole

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def size_bytes(self) -> int:
        return self.whole.size_bytes * math.prod(self.size) // math.prod(self.whole.shape)

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        first, last = self.begin + begin, self.begin + min(end, self.size[0])
        if self.turned:
            return _transposed(self.whole, self.expert)[first:last]  # type: ignore[arg-type]
        if isinstance(self.whole, TensorPlace):  # which widens what it reads
            experts, height, columns = self.whole.shape
            flat = dataclasses.replace(self.whole, shape=(experts * height, columns))
            return flat.rows(self.expert * height + first, self.expert * height + last)
        return self.whole.rows(self.expert, self.expert + 1)[0, first:last]


def _cut(whole: TensorSource, turns: int, turned: bool) -> tuple[tuple[_Part, ...], ...]:
    """The matrices of each expert in what transformers has; gate and up are one where they lie in turns."""
    experts, height, columns = whole.shape
    if turned:
        turns, height, columns = 1, columns, height
    size = height // turns, columns
    return tuple(tuple(_Part(whole, e, n * size[0], size, turned) for n in range(turns)) for e in range(experts))


@dataclass(frozen=True, eq=False)
class ExpertRows(_Made):
    """The bundle's form of matrices that a checkpoint holds apart, or of what transformers has.

    Attributes:
        parts: of each expert the matrices [N, K] whose rows take turns, gate before up; gates and ups that are apart
            are those of twice as many experts.
    """

    name: str
    parts: tuple[tuple[TensorSource, ...], ...]

    @property
    def _first(self) -> TensorSource:
        return self.parts[0][0]

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self._first.shape
        return len(self.parts) * len(self.parts[0]) * rows, columns

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for expert in self.parts for part in expert)

    @property
    def tensors(self) -> list[TensorSource]:
        """The checkpoint's, that it is made of."""
        return [part.whole if isinstance(part, _Part) else part for expert in self.parts for part in expert]

    def _gathered(self, begin: int, end: int, read: Callable[[Any, int, int], _Arrays]) -> _Arrays:
        """Rows `begin` to `end` of what `read` gives for rows of a part."""
        turns, height = len(self.parts[0]), len(self.parts[0]) * self._first.shape[0]
        end = min(end, len(self.parts) * height)
        at = min(begin // height, len(self.parts) - 1)
        pieces = []
        for expert in range(at, max(at + 1, -(-end // height))):
            first, last = max(0, begin - expert * height), max(0, min(height, end - expert * height))
            found = [read(part, first // turns, -(-last // turns)) for part in self.parts[expert]]
            both = [np.stack(each, axis=1).reshape(-1, each[0].shape[1]) for each in zip(*found, strict=True)]
            skipped = first % turns
            pieces.append([array[skipped : skipped + last - first] for array in both])
        return tuple(np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*pieces, strict=True))

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Rows `begin` to `end`."""
        return self._gathered(begin, end, lambda part, first, last: (part.rows(first, last),))[0]


@dataclass(frozen=True, eq=False)
class KeptExpertRows(ExpertRows):
    """The same of matrices that have integers, in blocks of one size.

    Attributes:
        native: their format, as `native_rows` gives them.
    """

    native: BlockFormat

    @property
    def quantization(self) -> Quantization | None:
        """As the manifest has it, where these are not rounded again whatever is asked for."""
        found: Quantization | None = getattr(self._first, "quantization", None)
        return found

    def native_rows(self, begin: int, end: int) -> Blocked:
        """Rows `begin` to `end`: integers, scales and zero points."""
        q, scales, zero_points = self._gathered(begin, end, lambda part, first, last: part.native_rows(first, last))
        return q, scales, zero_points


@dataclass(frozen=True, eq=False)
class ExpertStack(_Made):
    """What transformers has, made of the bundle's form: [E, turns·N, K], or [E, K, turns·N]."""

    name: str
    stored: TensorSource
    experts: int
    turned: bool  # whether it is that of `TURNED`

    @property
    def _first(self) -> TensorSource:
        return self.stored

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.stored.shape
        height = rows // self.experts
        return self.experts, *((columns, height) if self.turned else (height, columns))

    @property
    def size_bytes(self) -> int:
        return self.stored.size_bytes

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Experts `begin` to `end`."""
        end, name = min(end, self.experts), self.stored.name
        pieces = _turns(name) if name.endswith(APART) else 1
        height = self.stored.shape[0] // self.experts // pieces
        places = [piece * self.experts * height for piece in range(pieces)]
        rows = [self.stored.rows(place + begin * height, place + end * height) for place in places]
        return from_rows(np.concatenate(rows), end - begin, name, self.turned)


@dataclass(frozen=True, eq=False)
class BiasesInTurns(_Made):
    """The biases of gate and up [E, I] as one [E, 2I], in turns."""

    name: str
    parts: tuple[TensorSource, TensorSource]

    @property
    def _first(self) -> TensorSource:
        return self.parts[0]

    @property
    def shape(self) -> tuple[int, ...]:
        experts, *width = self.parts[0].shape
        return experts, 2 * math.prod(width)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Of experts `begin` to `end`."""
        gate, up = (part.rows(begin, end) for part in self.parts)
        return np.stack([gate, up], axis=-1).reshape(len(gate), self.shape[1])


def _grouped(name: str, parts: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
    """The matrices of each expert as the form of this name has them."""
    return tuple((part,) for turn in zip(*parts, strict=True) for part in turn) if name.endswith(APART) else parts


def _rows_of(name: str, parts: tuple[tuple[TensorSource, ...], ...]) -> ExpertRows:
    """The bundle's form of matrices that lie apart, with their integers where all have some in blocks of one size."""
    parts = _grouped(name, parts)
    forms = {getattr(part, "native", None) for expert in parts for part in expert}
    if None in forms or len({(form.bits, form.block_size, form.floating) for form in forms}) > 1:  # type: ignore[union-attr]
        return ExpertRows(name, parts)
    form = next(iter(forms))
    assert form is not None
    return KeptExpertRows(name, parts, dataclasses.replace(form, symmetric=all(one.symmetric for one in forms)))  # type: ignore[union-attr]


def made_of(source: TensorSource) -> list[TensorSource]:
    """The checkpoint's tensors that one of its tensors is made of: itself, or the matrices of experts."""
    rows = source.stored if isinstance(source, ExpertStack) else source
    return rows.tensors if isinstance(rows, ExpertRows) else [source]


def _check_shapes(parts: tuple[tuple[TensorSource, ...], ...]) -> None:
    """Refuse what cannot be rows of one matrix, each expert as many: where they differ some would be left out."""
    first = parts[0][0]
    odd = next((one for expert in parts for one in expert if len(one.shape) != 2 or one.shape != first.shape), None)
    if odd is not None:
        other = "" if odd is first else f", and {first.name} is {first.shape}"
        raise ModelError(
            "The checkpoint's experts are not matrices of one shape.",
            note=f"{odd.name} is {odd.shape}{other}.",
            hint=CHECKPOINT_HINT,
        )


def stored_name(checkpoint: Checkpoint, name: str) -> str:
    """What transformers calls what a parameter of experts is read from: ups alone where there are no gates."""
    plain = _plain(name)
    ungated = checkpoint.config.model_type in UNGATED and plain.endswith(f".{GATE_UP}")
    return f"{plain.removesuffix(GATE_UP)}{UP}" if ungated else plain


def find_experts(checkpoint: Checkpoint, name: str, experts: int | None) -> TensorSource | None:
    """The tensor of experts that a parameter's name asks for, in the form that it asks for; None where it is none.

    Args:
        name: of a parameter, as a bundle or as transformers calls it.
        experts: E, where transformers' form is asked for.

    Raises:
        ModelError: the experts are not matrices of one shape.
    """
    tensors, plain = checkpoint.tensors, _plain(name)
    stored = tensors.get(f"{plain}{ROWS}") or tensors.get(f"{plain}{APART}")
    turned = checkpoint.config.model_type in TURNED
    if name == plain and stored is not None and experts and stored.shape[0] % experts == 0:
        return ExpertStack(name, stored, experts, turned)
    there, rows_name = stored_name(checkpoint, name), name if name != plain else f"{plain}{ROWS}"
    times = 1 if there == plain else 2  # ups are the gates, too
    if there in checkpoint.joined:
        parts = tuple(tuple(tensors[n] for n in expert) * times for expert in checkpoint.joined[there])
        _check_shapes(parts)
        rows = _rows_of(rows_name, parts)
    else:
        whole = tensors.get(checkpoint.renamed.get(there, there))
        if name == there or whole is None or len(whole.shape) != 3:
            return None
        parts = tuple(part * times for part in _cut(whole, _turns(there), turned))
        rows = ExpertRows(rows_name, _grouped(rows_name, parts))
    return rows if name != plain else ExpertStack(name, rows, len(parts), turned)
