"""The weights of a checkpoint that GPTQ, AWQ or compressed-tensors quantized, their integers as they lie.

Enters: `quantization_config` of config.json, the tensors of the files. Leaves: the same tensors, those that hold one
quantized weight as one `PackedTensor` under the parameter's name; of fp8 and NVFP4 see float8.py and float4.py. Forms
that graphs cannot hold are refused by name.

A weight [N, K] of b bits has G groups of K / G inputs, each with a scale and a zero point. A 32-bit word holds 32 / b
values, the first in its lowest bits:

    gptq                 qweight [K·b/32, N], qzeros [G, N·b/32] less one (but in gptq_v2), scales [G, N]
    awq                  qweight [K, N·b/32], qzeros [G, N·b/32], of each word columns 0 2 4 6 1 3 5 7; scales [G, N]
    compressed-tensors   weight_packed [N, K·b/32], weight_zero_point [N·b/32, G] where there is one,
                         weight_scale [N, G]; signed integers plus 2^(b−1)
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.dtypes import MODEL_DTYPES
from lora_drop_runtime.errors import ModelError

from lora_drop_export.quantize.choice import Quantization, kept_format
from lora_drop_export.quantize.dequantized import DequantizedTensor
from lora_drop_export.quantize.formats import Blocked, BlockFormat, Integers, dequantize, unpack

from .checkpoint import TensorSource
from .experts import KeptExpertRows
from .float4 import float4_tensors
from .float8 import Float8Tensor, float8_tensors
from .foreign import CHECKPOINT_HINT, refused
from .packed_config import BITS, check_config, damaged, gptq_format, in_float4, in_floats, refusal

_WORD_BITS = 32
_AWQ_COLUMNS = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where a word has columns 0, 1, 2, …


def _values(words: npt.NDArray[Any], bits: int) -> Integers:
    """The values in words [r, c], [r, c · 32 / bits]."""
    return unpack(np.ascontiguousarray(words).view(np.uint8), bits)


@dataclass(frozen=True, eq=False)
class PackedTensor(abc.ABC):
    """A quantized weight [N, K], read as float32; offers what TensorPlace offers, and `native_rows`.

    Attributes:
        name: of the parameter.
        parts: the tensors that hold it, by the end of their names.
        shape: (N, K).
        bits: of an integer.
    """

    name: str
    parts: Mapping[str, TensorPlace]
    shape: tuple[int, int]
    bits: int
    dtype: str = "float32"

    method: ClassVar[str]  # as quantization_config has it
    integers_in: ClassVar[str]  # the part that holds the integers

    @classmethod
    @abc.abstractmethod
    def made_of(cls, name: str, parts: Mapping[str, TensorPlace], config: Mapping[str, Any]) -> PackedTensor:
        """The weight of these parts, its shape and bits from theirs."""

    @abc.abstractmethod
    def _integers(self, begin: int, end: int) -> Integers:
        """Of rows `begin` to `end`, [n, K]."""

    @abc.abstractmethod
    def _scales(self) -> npt.NDArray[Any]:
        """[N, G], as stored: a view, of which `native_rows` reads some rows."""

    @abc.abstractmethod
    def _zero_points(self) -> Integers | None:
        """[N, G]; None where all lie in the middle."""

    @property
    def quantization(self) -> Quantization:
        """As the manifest has it."""
        form = self.native
        size = None if form.floating else form.block_size
        return Quantization(form.bits, size, f"{self.method} of the checkpoint", form.symmetric)

    @property
    def file(self) -> Path:
        return self.parts[self.integers_in].file

    @property
    def size_bytes(self) -> int:
        """Of the float32 values."""
        return 4 * self.shape[0] * self.shape[1]

    @functools.cached_property
    def native(self) -> BlockFormat:
        """The block format in which `native_rows` gives the integers. A group is one block, or several alike.

        Raises:
            ModelError: no block format of ours can hold it.
        """
        groups, zero_points = self._scales().shape[1], self._zero_points()
        middle = 1 << (self.bits - 1)
        symmetric = zero_points is None or bool((zero_points == middle).all())
        form = kept_format(self.bits, self.shape[1], groups, symmetric)
        if form is None:
            raise refusal(f"groups of {self.shape[1] / groups:g} in {self.name} {list(self.shape)}")
        return form

    def native_rows(self, begin: int, end: int) -> Blocked:
        """Rows `begin` to `end` in the `native` format: integers, scales and zero points, not rounded again."""
        q = self._integers(begin, min(end, self.shape[0]))
        scales = np.asarray(self._scales()[begin:end], np.float32)
        zero_points = self._zero_points()
        if zero_points is None:
            zero_points = np.full(scales.shape, self.native.middle, np.uint8)
        else:
            zero_points = zero_points[begin:end]
        blocks = self.shape[1] // self.native.block_size // scales.shape[1]
        return q, np.repeat(scales, blocks, axis=1), np.repeat(zero_points, blocks, axis=1)

    def read(self) -> npt.NDArray[Any]:
        """All values, float32."""
        return self.rows(0, self.shape[0])

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Rows `begin` to `end`, float32."""
        return dequantize(*self.native_rows(begin, end))


def _checked(tensor: PackedTensor, wanted: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]) -> None:
    """Refuse parts that do not fit the weight: part → (shape, dtypes)."""
    if tensor.bits not in BITS:
        raise refusal(f"{tensor.bits} bits in {tensor.name}")
    for part, (shape, dtypes) in wanted.items():
        place = tensor.parts.get(part)
        if place is None or place.shape != shape or place.dtype not in dtypes:
            found = "is missing" if place is None else f"is {place.dtype} {list(place.shape)}"
            raise damaged(tensor.name, f"needs {part}, {' or '.join(dtypes)} {list(shape)}, which {found}")


def _refuse_short_group(tensor: PackedTensor, groups: int, sizes: Iterable[Any]) -> None:
    """Refuse a last group of fewer inputs than the others: shapes alone would tell of groups of one size.

    Args:
        sizes: of groups, as the config has them.
    """
    inputs = tensor.shape[1]
    for size in sizes:
        if isinstance(size, int) and 0 < size < inputs and inputs % size and groups == -(-inputs // size):
            raise refusal(f"groups of {size} in {tensor.name} {list(tensor.shape)}, the last of {inputs % size}")


def _refuse_order(name: str, order: TensorPlace | None, groups: int, scattered: bool) -> None:
    """Refuse groups whose inputs lie scattered (`desc_act`, `actorder` group): blocks are of neighbours.

    Args:
        order: the group of each input.
        scattered: whether they are, as far as the config tells, where there is no order.
    """
    if order is None:
        if scattered:
            raise damaged(name, "has scattered inputs (desc_act, actorder), and nothing says of which groups they are")
        return
    found = np.asarray(order.read())
    if found.dtype.kind != "i" or found.ndim != 1 or not groups or len(found) % groups:
        raise damaged(name, f"says the groups of inputs as {order.dtype} {list(found.shape)}, and has {groups} groups")
    if not np.array_equal(found, np.arange(len(found)) // (len(found) // groups)):
        raise refusal(f"groups of scattered inputs (desc_act) in {name}")


@dataclass(frozen=True, eq=False)
class GptqTensor(PackedTensor):
    less_one: bool = True  # zero points are stored so

    method, integers_in = "gptq", "qweight"

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, TensorPlace], config: Mapping[str, Any]) -> PackedTensor:
        order, scales = parts.get("g_idx"), parts.get("scales")
        words = parts["qweight"].shape
        k = order.shape[0] if order is not None else words[0] * _WORD_BITS // int(config["bits"])
        groups, n = scales.shape if scales is not None else (0, 0)
        bits = words[0] * _WORD_BITS // k
        tensor = cls(f"{name}.weight", parts, (n, k), bits, less_one=gptq_format(config) == "gptq")
        packed = groups, n * bits // _WORD_BITS
        int32 = ("int32",)
        shapes = {"qweight": ((k * bits // _WORD_BITS, n), int32), "qzeros": (packed, int32)}
        _checked(tensor, shapes | {"scales": ((groups, n), MODEL_DTYPES)})
        _refuse_short_group(tensor, groups, [config.get("group_size")])
        _refuse_order(tensor.name, order, groups, bool(config.get("desc_act")))
        return tensor

    def _integers(self, begin: int, end: int) -> Integers:
        return _values(self.parts["qweight"].read()[:, begin:end].T, self.bits)

    def _scales(self) -> npt.NDArray[Any]:
        return self.parts["scales"].read().T

    def _zero_points(self) -> Integers | None:
        words = self.parts["qzeros"].read().view(np.uint32)
        if self.less_one:  # taken from words, so a 0 borrows from the next one
            words = words + np.uint32(0x11111111 if self.bits == 4 else 0x01010101)
        return _values(words, self.bits).T


class AwqTensor(PackedTensor):
    method, integers_in = "awq", "qweight"

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, TensorPlace], config: Mapping[str, Any]) -> PackedTensor:
        scales = parts.get("scales")
        groups, n = scales.shape if scales is not None else (0, 0)
        k = parts["qweight"].shape[0]
        tensor = cls(f"{name}.weight", parts, (n, k), 4)
        int32 = ("int32",)
        shapes = {"qweight": ((k, n * 4 // _WORD_BITS), int32), "qzeros": ((groups, n * 4 // _WORD_BITS), int32)}
        _checked(tensor, shapes | {"scales": ((groups, n), MODEL_DTYPES)})
        _refuse_short_group(tensor, groups, [config.get("group_size"), config.get("q_group_size")])
        return tensor

    def _columns(self, part: str, begin: int, end: int) -> Integers:
        """Columns of a part, whose words have them in an order of their own."""
        words = self.parts[part].read()[:, begin // 8 : -(-end // 8)]
        values = _values(words, 4).reshape(*words.shape, 8)[..., _AWQ_COLUMNS].reshape(len(words), -1)
        return values[:, begin % 8 : begin % 8 + end - begin]

    def _integers(self, begin: int, end: int) -> Integers:
        return np.ascontiguousarray(self._columns("qweight", begin, end).T)

    def _scales(self) -> npt.NDArray[Any]:
        return self.parts["scales"].read().T

    def _zero_points(self) -> Integers | None:
        return self._columns("qzeros", 0, self.shape[0]).T


class CompressedTensor(PackedTensor):
    method, integers_in = "compressed-tensors", "weight_packed"

    @classmethod
    def made_of(cls, name: str, parts: Mapping[str, TensorPlace], config: Mapping[str, Any]) -> PackedTensor:
        if parts.get("weight_shape") is None or parts["weight_shape"].shape != (2,):
            raise damaged(f"{name}.weight", "has no weight_shape of two numbers")
        n, k = (int(size) for size in parts["weight_shape"].read())
        rows, words = parts["weight_packed"].shape
        bits = next((bits for bits in BITS if n == rows and words == -(-k * bits // _WORD_BITS)), 0)
        if not bits:
            raise damaged(f"{name}.weight", f"is said to be {[n, k]}; packed it is {[rows, words]}")
        scales = parts.get("weight_scale")
        groups = scales.shape[-1] if scales is not None else 0
        tensor = cls(f"{name}.weight", parts, (n, k), bits)
        shapes: dict[str, Any] = {"weight_packed": ((rows, words), ("int32",))}
        weights = [group["weights"] for group in config["config_groups"].values()]
        if "weight_zero_point" in parts or not any(args.get("symmetric", True) for args in weights):
            shapes["weight_zero_point"] = (-(-n * bits // _WORD_BITS), groups), ("int32",)
        _checked(tensor, shapes | {"weight_scale": ((n, groups), MODEL_DTYPES)})
        _refuse_short_group(tensor, groups, [args.get("group_size") for args in weights])
        scattered = any(args.get("actorder") in (True, "group", "dynamic") for args in weights)
        _refuse_order(tensor.name, parts.get("weight_g_idx"), groups, scattered)
        return tensor

    def _integers(self, begin: int, end: int) -> Integers:
        return _values(self.parts["weight_packed"].rows(begin, end), self.bits)[:, : self.shape[1]]

    def _scales(self) -> npt.NDArray[Any]:
        return self.parts["weight_scale"].read()

    def _zero_points(self) -> Integers | None:
        place = self.parts.get("weight_zero_point")
        return None if place is None else _values(place.read().T, self.bits)[:, : self.shape[0]].T


# Of a quantized checkpoint or of a bundle: they are stored as they are
Kept = PackedTensor | Float8Tensor | DequantizedTensor | KeptExpertRows

_METHODS: dict[str, type[PackedTensor]] = {kind.method: kind for kind in (GptqTensor, AwqTensor, CompressedTensor)}
_PARTS = {
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
}


def packed_tensors(config: Any, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors of a quantized checkpoint, a quantized weight as one.

    Args:
        config: `quantization_config`.
        tensors: of the files, by name.

    Raises:
        ModelError: it is quantized in another form, or a part of a weight is missing or does not fit.
    """
    with refused("The checkpoint's quantization_config cannot be used.", "config.json"):
        check_config(config)
    if in_floats(config):
        return (float4_tensors if in_float4(config) else float8_tensors)(config, tensors)
    kind = _METHODS[config["quant_method"]]
    weights: dict[str, dict[str, TensorPlace]] = {}
    found: dict[str, TensorSource] = {}
    for full_name, tensor in tensors.items():
        name, _, part = full_name.rpartition(".")
        integers = tensors.get(f"{name}.{kind.integers_in}") if part in _PARTS else None
        if integers is not None and isinstance(tensor, TensorPlace):
            weights.setdefault(name, {})[part] = tensor
        else:
            found[full_name] = tensor
    if not weights:
        raise ModelError(
            "The checkpoint does not hold the model that its config describes.",
            note=f"quantization_config says {kind.method}, and no tensor is called *.{kind.integers_in}.",
            hint=CHECKPOINT_HINT,
        )
    for name, parts in weights.items():
        with refused("A quantized weight of the checkpoint cannot be read.", name):
            packed = kind.made_of(name, parts, config)
            assert packed.native
        found[packed.name] = packed
    return found
