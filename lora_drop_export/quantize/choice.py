"""What the user asked for, and the format that each weight then gets.

Enters: a quantization, shapes. Leaves: block formats. Knows no graph: which weights may be quantized is asked of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from lora_drop_runtime.bundle.manifest import CHANNEL
from lora_drop_runtime.dtypes import BY_NAME

from .formats import FLOAT8, BlockFormat, row_format
from .rounding import ROUNDINGS

CALIBRATED = "gptq"  # rounds by what the layers' inputs are (quantize/gptq.py)
BLOCK_SIZES = (32, 64, 128)  # that can be asked for; the first is the default
_BLOCK_SIZES = (128, 64, 32, 16)  # that a weight may get


def _rows_are_whole(form: BlockFormat, k: int) -> bool:
    """Whether the zero points of each row of K values begin at a whole byte, where they are read."""
    return form.symmetric or k // form.block_size * form.bits % 8 == 0


def _largest_blocks(bits: int, most: int, symmetric: bool, widths: Sequence[int]) -> BlockFormat | None:
    """The largest blocks, `most` values at most, in which rows of all these widths can be stored; symmetric ones where
    none with zero points can."""
    sizes = [size for size in _BLOCK_SIZES if size <= most and not any(width % size for width in widths)]
    forms = [BlockFormat(bits, size, kind) for kind in (symmetric, True) for size in sizes]
    return next((form for form in forms if all(_rows_are_whole(form, width) for width in widths)), None)


@dataclass(frozen=True)
class Quantization:
    """What the user asked for, or the checkpoint has: bits, the largest block size, the method, and whether zero points
    may be used. `CHANNEL` is a scale for each row, and never has zero points; None is E4M3, a scale for each row.
    """

    bits: int
    block_size: int | Literal["channel"] | None = 32
    method: str = "search"
    symmetric: bool = False

    @classmethod
    def of(
        cls, dtype: str, block_size: int | Literal["channel"] | None = None, method: str | None = None
    ) -> Quantization:
        """With the defaults for what is not given. `dtype` is one of the manifest's QUANTIZED_DTYPES."""
        if dtype == FLOAT8:
            return cls(BY_NAME[dtype].bits, None, "rtn", symmetric=True)
        bits = BY_NAME[dtype].bits
        default = "search" if bits == 4 else "rtn"  # 8 bits leave nothing to search for
        chosen = cls(bits, block_size or BLOCK_SIZES[0], method or default)
        has_points = bits == 4 and chosen.block_size != CHANNEL and ROUNDINGS[chosen.rounding].zero_points
        return replace(chosen, symmetric=not has_points)

    @property
    def dtype(self) -> str:
        """Of weights, as the manifest has it."""
        return FLOAT8 if self.block_size is None else f"int{self.bits}"

    @property
    def calibrated(self) -> bool:
        """Whether a text is needed."""
        return self.method == CALIBRATED

    @property
    def rounding(self) -> str:
        """The row of `ROUNDINGS` for weights that nothing is known of but themselves."""
        return "search" if self.calibrated else self.method

    def whole_format(self, k: int) -> BlockFormat:
        """The format of rows of K values where the block size divides K."""
        if self.block_size is None:
            return row_format(k)
        return BlockFormat(self.bits, k if self.block_size == CHANNEL else self.block_size, self.symmetric)

    def format_of(self, shape: tuple[int, ...]) -> BlockFormat | None:
        """The format of a matrix [N, K]; None when no block size divides K, or a row is no whole bytes. E4M3 takes any.

        Where 4-bit zero points do not fit, a smaller block makes them, or the tensor is symmetric.
        """
        if len(shape) != 2:
            return None
        if self.block_size is None:
            return row_format(shape[1])
        if self.block_size == CHANNEL:
            return None if shape[1] * self.bits % 8 else self.whole_format(shape[1])
        return _largest_blocks(self.bits, self.block_size, self.symmetric, shape[1:])


def common_format(forms: Sequence[BlockFormat], widths: Sequence[int]) -> BlockFormat | None:
    """The largest blocks in which matrices with rows of these widths can be stored alike, none larger than theirs."""
    smallest, symmetric = min(form.block_size for form in forms), any(form.symmetric for form in forms)
    return _largest_blocks(forms[0].bits, smallest, symmetric, widths)


def kept_format(bits: int, k: int, groups: int, symmetric: bool) -> BlockFormat | None:
    """The largest blocks that a row of K values in equal groups can be stored in as it is; None where there are none.

    A group larger than a block becomes several with the same scale.
    """
    if not groups or k % groups:
        return None
    sizes = [size for size in _BLOCK_SIZES if k // groups % size == 0]
    forms = (BlockFormat(bits, size, symmetric) for size in sizes)
    return next((form for form in forms if _rows_are_whole(form, k)), None)


def block_formats(
    shapes: Mapping[str, tuple[int, ...]],
    native: Mapping[str, BlockFormat],
    groups: Iterable[tuple[str, ...]],
    quantization: Quantization | None,
    given: Mapping[str, BlockFormat] = MappingProxyType({}),
) -> dict[str, BlockFormat]:
    """The format of each weight that is quantized; those of a group are alike, those that are given aside.

    Args:
        shapes: name → [N, K] of the weights that may be quantized.
        native: the formats that some have in the checkpoint; taken where it is what was asked for.
        groups: names that will be one matrix; names outside `shapes` have no part in this.
        quantization: of all others; None leaves them in float.
        given: the formats of some, whatever was asked for: of a head, and of what a checkpoint has quantized.
    """

    def taken(name: str) -> bool:
        form = native.get(name)
        return form is not None and (form.bits, form.block_size) == asked

    asked = None if quantization is None else (quantization.bits, quantization.block_size)
    together = {name: group for group in groups for name in group}
    formats = {}
    for name, shape in shapes.items():
        form = given.get(name)
        if form is None and quantization is not None:
            members = together.get(name, (name,))
            form = native[name] if all(map(taken, members)) else quantization.format_of(shape)
        if form is not None:
            formats[name] = form
    return formats


def departures(
    shapes: Mapping[str, tuple[int, ...]],
    formats: Mapping[str, BlockFormat],
    native: Mapping[str, BlockFormat],
    quantization: Quantization,
) -> list[dict[str, Any]]:
    """What became of matrices that are not stored as was asked for, those of all layers together.

    Args:
        shapes: name → shape of every weight.
        formats: of those that are quantized.
        native: formats of the checkpoint; one that was kept is no departure.

    Returns:
        `weights` (a name, * for the layer), `count`, and `block_size` and `symmetric`, None for weights left in float;
        `bits` where they are others.
    """
    found: dict[tuple[str, BlockFormat | None], int] = {}
    for name, shape in shapes.items():
        form = formats.get(name)
        if (
            len(shape) > 1
            and not name.endswith("bias")  # of all experts
            and form != quantization.whole_format(shape[-1])
            and (form is None or form != native.get(name))
        ):
            key = re.sub(r"\.\d+\.", ".*.", name), form
            found[key] = found.get(key, 0) + 1
    return [
        {
            "weights": name,
            "count": count,
            "block_size": None if form is None else form.block_size,
            "symmetric": None if form is None else form.symmetric,
        }
        | ({} if form is None or form.bits == quantization.bits else {"bits": form.bits})
        for (name, form), count in found.items()
    ]
