"""The weights of a checkpoint in NVFP4: E2M1 values [N, K], a scale in E4M3 for 16 of them, and one for all.

Enters: `quantization_config` of config.json, the tensors of the files. Leaves: the same tensors, those that hold one
weight as one, under its name. Two values share a byte, the first in its low half; a value is its E2M1, one of
±{0, 0.5, 1, 1.5, 2, 3, 4, 6}, times the scale of its 16, and

    modelopt             weight, weight_scale [N, K/16]; times weight_scale_2
    compressed-tensors   weight_packed, weight_scale [N, K/16]; divided by weight_global_scale
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.errors import ModelError

from lora_drop_export.quantize.formats import FLOAT8, unpack

from .checkpoint import TensorSource
from .float8 import ACTIVATIONS, SmallFloats
from .foreign import CHECKPOINT_HINT
from .packed_config import damaged

_GROUP = 16
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True, eq=False)
class Float4Values(SmallFloats):
    """A weight [N, K] in E2M1.

    Attributes:
        whole: the scale of all values; `divides` says how it is meant.
    """

    whole: TensorPlace
    divides: bool

    @property
    def what(self) -> str:
        return "NVFP4"

    @property
    def shape(self) -> tuple[int, ...]:
        n, packed = self.values.shape
        return n, 2 * packed

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        whole = np.float32(self.whole.read().reshape(-1)[0])
        scales = self.scales.rows(begin, end)
        values = _VALUES[unpack(self.values.rows(begin, end), 4)].reshape(*scales.shape, _GROUP)
        with np.errstate(all="ignore"):  # whoever rounds what is no number says so
            scales = scales / whole if self.divides else scales * whole
            return (values * scales[..., None]).reshape(len(scales), -1)


def _weight(name: str, values: TensorPlace, scales: Any, whole: Any, divides: bool) -> Float4Values:
    n, packed = values.shape if len(values.shape) == 2 else (0, 0)
    groups = n, 2 * packed // _GROUP
    for part, one, fits, wanted in (
        ("values", values, values.dtype == "uint8" and packed and not 2 * packed % _GROUP, "uint8 [N, K/2], K of 16s"),
        ("scales", scales, getattr(scales, "dtype", "") == FLOAT8 and scales.shape == groups, f"E4M3 {list(groups)}"),
        ("scale", whole, getattr(whole, "dtype", "") == "float32" and math.prod(whole.shape) == 1, "one float32"),
    ):
        if not fits:
            there = "missing" if one is None else f"{one.dtype} {list(one.shape)}"
            raise damaged(name, f"needs {part} in {wanted}; what is there is {there}")
    return Float4Values(name, values, scales, whole, divides)


def float4_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors of such a checkpoint, a weight in NVFP4 as one.

    Args:
        config: `quantization_config`, one that is read.
        tensors: of the files, by name.

    Raises:
        ModelError: there is no weight in NVFP4, or a part of one is missing or does not fit.
    """
    divides = config["quant_method"] == "compressed-tensors"
    end, whole = ("weight_packed", "weight_global_scale") if divides else ("weight", "weight_scale_2")
    values = {
        name.removesuffix(f".{end}"): one
        for name, one in tensors.items()
        if name.endswith(f".{end}") and isinstance(one, TensorPlace) and one.dtype == "uint8"
    }
    if not values:
        raise ModelError(
            "The checkpoint does not hold the model that its config describes.",
            note=f"quantization_config says {config['quant_method']} of NVFP4, and no tensor *.{end} is uint8.",
            hint=CHECKPOINT_HINT,
        )
    parts = {f"{name}.{part}" for name in values for part in (end, "weight_scale", whole)}
    found = {name: one for name, one in tensors.items() if name not in parts and not name.endswith(ACTIVATIONS)}
    for name, one in values.items():
        scales = tensors.get(f"{name}.weight_scale"), tensors.get(f"{name}.{whole}")
        found[f"{name}.weight"] = _weight(f"{name}.weight", one, *scales, divides)
    return found
