"""The weights of a checkpoint in fp8: E4M3 values [N, K], and a scale for each row, for all, or for each block.

Enters: `quantization_config` of config.json, the tensors of the files. Leaves: the same tensors, those that hold one
weight as one, under its name; a value is its E4M3 times its scale. Those with a scale for each row or for all of them
can be taken as they are by a target that has fp8.

    compressed-tensors   weight, weight_scale [N, 1], of one value, or [N/b, K/c] for blocks of b rows and c columns
    fbgemm_fp8           weight, weight_scale [N, 1]
    modelopt             weight, weight_scale of one value
    fp8                  weight, weight_scale_inv [N/b, K/c] or of one value, as float32 or as E8M0, powers of two;
                         experts of a layer may be one tensor [E, N, K] with scales [E, N/b, K/c]

Blocks at the ends may be smaller. What such checkpoints say of activations and caches is left out. Values of four bits
see float4.py.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.dtypes import MODEL_DTYPES, float32_from_float8
from lora_drop_runtime.errors import ModelError

from lora_drop_export.quantize.choice import Quantization
from lora_drop_export.quantize.formats import FLOAT8, Blocked, BlockFormat, Floats, dequantize_floats, row_format

from .checkpoint import TensorSource
from .foreign import CHECKPOINT_HINT
from .packed_config import damaged, float8_blocks

_POWERS = "F8_E8M0"  # as files have it: a power of two, its exponent plus 127; 255 stands for what is no number
_BIAS, _LARGEST = 127, 254
# End names of what engines round activations and caches by
ACTIVATIONS = (".input_scale", "activation_scale", ".input_global_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True, eq=False)
class SmallFloats(abc.ABC):
    """A weight in floats of 8 or 4 bits, read as float32.

    Attributes:
        name: of the parameter.
        values: their bits.
        scales: as stored.
    """

    name: str
    values: TensorPlace
    scales: TensorPlace

    @property
    @abc.abstractmethod
    def what(self) -> str:
        """As messages call it."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Rows `begin` to `end` along the first axis, float32."""

    @property
    def dtype(self) -> str:
        return "float32"

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def size_bytes(self) -> int:
        """Of the float32 values."""
        return 4 * math.prod(self.shape)

    def read(self) -> npt.NDArray[Any]:
        """All values, float32."""
        return self.rows(0, self.shape[0])


@dataclass(frozen=True, eq=False)
class Float8Values(SmallFloats):
    """A weight [N, K], or those of experts [E, N, K], in E4M3.

    Attributes:
        grid: the shape of the scales of one matrix, (n, k).
        block: rows and columns that share one.
    """

    grid: tuple[int, int]
    block: tuple[int, int]

    @property
    def what(self) -> str:
        return "fp8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def _scales(self) -> Floats:
        """[..., n, k]."""
        if self.scales.dtype == _POWERS:
            exponents = dataclasses.replace(self.scales, dtype="uint8").read()
            if exponents.size and exponents.max() > _LARGEST:
                raise damaged(self.name, f"has a scale of 255 in {self.scales.name}, which stands for no number")
            found = np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS)
        else:
            found = self.scales.read()
        scales: Floats = np.asarray(found, np.float32).reshape(*self.shape[:-2], *self.grid)
        return scales

    def _bits(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        return dataclasses.replace(self.values, dtype="uint8").rows(begin, end)

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        end = min(end, self.shape[0])
        values, scales = float32_from_float8(self._bits(begin, end)), self._scales()
        high, wide = self.block
        first, last = (0, self.shape[-2]) if len(self.shape) == 3 else (begin, max(begin, end))
        scales = scales[begin:end] if len(self.shape) == 3 else scales
        scales = scales[..., first // high : -(-last // high), :].repeat(high, axis=-2)
        scales = scales[..., first % high : first % high + last - first, :]
        with np.errstate(over="ignore", invalid="ignore"):  # whoever rounds what is no number says so
            for column in range(self.grid[1]):
                values[..., column * wide : (column + 1) * wide] *= scales[..., column : column + 1]
        return values


@dataclass(frozen=True, eq=False)
class Float8Tensor(Float8Values):
    """A weight [N, K] with a scale for each row, or one for all: targets may take it as it is.

    Attributes:
        method: as quantization_config has it.
    """

    method: str

    @property
    def quantization(self) -> Quantization:
        """As the manifest has it."""
        return Quantization(8, None, f"{self.method} of the checkpoint", symmetric=True)

    @property
    def native(self) -> BlockFormat:
        """The format in which `native_rows` gives the values."""
        return row_format(self.shape[1])

    @property
    def widened(self) -> Float8Values:
        """The same values, which nobody takes as they are."""
        return Float8Values(self.name, self.values, self.scales, self.grid, self.block)

    def native_rows(self, begin: int, end: int) -> Blocked:
        """Rows `begin` to `end`: the bits of E4M3, scales [n, 1], and zero points that nobody reads."""
        scales = np.ascontiguousarray(np.broadcast_to(self._scales(), (self.shape[0], 1))[begin:end])
        return self._bits(begin, end), scales, np.zeros(scales.shape, np.uint8)

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        return dequantize_floats(*self.native_rows(begin, end)[:2])


def _weight(
    name: str, values: TensorPlace, scales: TensorSource | None, blocks: set[tuple[int, int]], method: str
) -> Float8Values:
    """The weight of these values.

    Args:
        blocks: rows and columns that share a scale, as the config has them.
    """
    shape = values.shape
    if len(shape) not in (2, 3):
        raise damaged(name, f"is {list(shape)}, which is no matrix")
    *experts, n, k = shape
    grids = {(1, 1): (n, k), (n, 1): (1, k)} | {(-(-n // high), -(-k // wide)): (high, wide) for high, wide in blocks}
    found = None
    if isinstance(scales, TensorPlace) and scales.dtype in (*MODEL_DTYPES, _POWERS):
        wanted = {(*experts, *grid): grid for grid in grids}
        wanted |= {tuple(experts): (1, 1), (*experts, n): (n, 1)} | ({} if experts else {(1,): (1, 1)})
        found = wanted.get(scales.shape)
    if found is None:
        there = "is missing" if scales is None else f"is {scales.dtype} {list(scales.shape)}"
        shapes = " or ".join(str([*experts, *grid]) for grid in grids)
        raise damaged(name, f"needs scales {shapes} in {', '.join(MODEL_DTYPES)} or {_POWERS}; what is there {there}")
    assert isinstance(scales, TensorPlace)
    if not experts and grids[found] in ((1, k), (n, k)):
        return Float8Tensor(name, values, scales, found, grids[found], method)
    return Float8Values(name, values, scales, found, grids[found])


def float8_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors of such a checkpoint, a weight in fp8 as one.

    Args:
        config: `quantization_config`, one that is read.
        tensors: of the files, by name.

    Raises:
        ModelError: there is no weight in fp8, or its scales are missing or do not fit.
    """
    method = config["quant_method"]
    end = "_scale_inv" if method == "fp8" else "_scale"
    values = {name: one for name, one in tensors.items() if isinstance(one, TensorPlace) and one.dtype == FLOAT8}
    if not values:
        raise ModelError(
            "The checkpoint does not hold the model that its config describes.",
            note=f"quantization_config says {method}, and no tensor is in fp8.",
            hint=CHECKPOINT_HINT,
        )
    scales, blocks = {f"{name}{end}" for name in values}, float8_blocks(config)
    found = {name: one for name, one in tensors.items() if name not in scales and not name.endswith(ACTIVATIONS)}
    for name, one in values.items():
        found[name] = _weight(name, one, tensors.get(f"{name}{end}"), blocks, method)
    return found
