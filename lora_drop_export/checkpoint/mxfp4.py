"""Experts in MXFP4, as GPT-OSS's checkpoints have them: blocks of 32 values of four bits with an exponent each.

Enters: `experts.gate_up_proj_blocks` [E, N, K/32, 16], two values a byte, the first in its low half, and
`experts.gate_up_proj_scales` [E, N, K/32], the exponent of a power of two plus 127. Leaves: the bundle's form [E·N, K]
(experts.py): the rows lie as there. A value is one of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6} times the block's power of two, so
bfloat16 holds it, and so do int8 blocks of 32, twice the value and half the power.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.errors import ModelError

from lora_drop_export.quantize.formats import Blocked, BlockFormat, dequantize, unpack

from .checkpoint import TensorSource
from .experts import ROWS, TURNED
from .foreign import CHECKPOINT_HINT
from .packed_config import refusal

METHOD = "mxfp4"  # as quantization_config has it
_BLOCK, _BIAS, _LARGEST = 32, 127, 254  # of an exponent; 255 stands for what is no number
_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)  # the sixteen values
_PARTS = ("_blocks", "_scales")


@dataclass(frozen=True, eq=False)
class Mxfp4Rows:
    """The matrices of a layer's experts, one below the other.

    Attributes:
        blocks: uint8 [E, N, K/32, 16]; `scales` uint8 [E, N, K/32].
    """

    name: str
    blocks: TensorPlace
    scales: TensorPlace
    dtype: str = "float32"

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, int]:
        experts, height, groups, _ = self.blocks.shape
        return experts * height, groups * _BLOCK

    @property
    def size_bytes(self) -> int:
        """Of the float32 values."""
        return 4 * self.shape[0] * self.shape[1]

    @property
    def native(self) -> BlockFormat:
        """The block format in which `native_rows` gives the values as they are."""
        return BlockFormat(8, _BLOCK, symmetric=True)

    def _flat(self, place: TensorPlace, begin: int, end: int) -> npt.NDArray[Any]:
        return dataclasses.replace(place, shape=(self.shape[0], *place.shape[2:])).rows(begin, end)

    def native_rows(self, begin: int, end: int) -> Blocked:
        """Rows `begin` to `end`: integers, scales and zero points.

        Raises:
            ModelError: an exponent stands for no number.
        """
        exponents = self._flat(self.scales, begin, end)
        if exponents.size and exponents.max() > _LARGEST:
            raise ModelError(
                "A quantized weight of the checkpoint is damaged.",
                note=f"{self.scales.name} has an exponent of 255, which stands for no number.",
                hint=CHECKPOINT_HINT,
            )
        packed = self._flat(self.blocks, begin, end)
        q = (_TWICE[unpack(packed.reshape(len(packed), self.shape[1] // 2), 4)] + 128).astype(np.uint8)
        scales = np.ldexp(np.float32(0.5), exponents.astype(np.int32) - _BIAS).astype(np.float32)
        return q, scales, np.full(scales.shape, 128, np.uint8)

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Rows `begin` to `end`, float32."""
        return dequantize(*self.native_rows(begin, min(end, self.shape[0])))

    def read(self) -> npt.NDArray[Any]:
        """All values, float32."""
        return self.rows(0, self.shape[0])


def _checked(name: str, blocks: TensorSource | None, scales: TensorSource | None) -> Mxfp4Rows:
    fits = (
        isinstance(blocks, TensorPlace)
        and isinstance(scales, TensorPlace)
        and (blocks.dtype, scales.dtype) == ("uint8", "uint8")
        and len(blocks.shape) == 4
        and blocks.shape == (*scales.shape, _BLOCK // 2)
    )
    if not fits:
        found = [f"{one.dtype} {list(one.shape)}" if one is not None else "missing" for one in (blocks, scales)]
        raise ModelError(
            "A quantized weight of the checkpoint is damaged.",
            note=f"{name}_blocks is {found[0]}, and {name}_scales {found[1]}; needed are uint8 [E, N, K/32, 16] and "
            "uint8 [E, N, K/32].",
            hint=CHECKPOINT_HINT,
        )
    assert isinstance(blocks, TensorPlace)
    assert isinstance(scales, TensorPlace)
    return Mxfp4Rows(f"{name}{ROWS}", blocks, scales)


def mxfp4_tensors(model_type: str, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors of such a checkpoint, the matrices of a layer's experts as one.

    Raises:
        ModelError: it is of another family, whose rows would lie otherwise; a part of a weight is missing or does not
            fit, there is none, or a weight is there in float, too.
    """
    if model_type not in TURNED:
        raise refusal(f"{METHOD} in a model of type {model_type!r:.80}")
    names = {full.removesuffix(part) for part in _PARTS for full in tensors if full.endswith(part)}
    if not names:
        raise ModelError(
            "The checkpoint does not hold the model that its config describes.",
            note=f"quantization_config says {METHOD}, and no tensor is called *_blocks.",
            hint=CHECKPOINT_HINT,
        )
    found = {full: tensor for full, tensor in tensors.items() if not full.endswith(_PARTS)}
    for name in sorted(names):
        if name in found:
            raise ModelError(
                "The checkpoint holds the matrices of experts twice.",
                note=f"{name} and {name}{_PARTS[0]} are the same ones.",
                hint=CHECKPOINT_HINT,
            )
        weight = _checked(name, *(tensors.get(f"{name}{part}") for part in _PARTS))
        found[weight.name] = weight
    return found
