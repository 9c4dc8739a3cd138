"""The one table of dtypes: what a dtype is called elsewhere, and how large it is.

Enters: a name in any of these worlds. Leaves: the row. `name` is what the manifest, the graphs' tables and PyTorch say.
Other libraries' dtypes are given by their names and numbers: none of those libraries is imported here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Dtype:
    """One dtype; None where that world has none, or none that is read or written here.

    Attributes:
        name: as numpy and PyTorch have it.
        bits: of one value.
        onnx: number in onnx.TensorProto.DataType, which ONNX Runtime and onnx_ir share.
        numpy: of stored values, little-endian; numpy has no bfloat16, no float of 8 bits and nothing below 8 bits.
        safetensors: in the header of a file that is read or written.
        tensorrt: member of tensorrt.DataType.
        short: on the command line.
    """

    name: str
    bits: int
    onnx: int
    numpy: str | None = None
    safetensors: str | None = None
    tensorrt: str | None = None
    short: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of one value."""
        assert self.bits % 8 == 0, f"several values of {self.name} share a byte"
        return self.bits // 8


DTYPES = (
    Dtype("float64", 64, 11, numpy="<f8", safetensors="F64"),
    Dtype("float32", 32, 1, numpy="<f4", safetensors="F32", tensorrt="FLOAT", short="fp32"),
    Dtype("float16", 16, 10, numpy="<f2", safetensors="F16", tensorrt="HALF", short="fp16"),
    Dtype("bfloat16", 16, 16, safetensors="BF16", tensorrt="BF16", short="bf16"),
    Dtype("int64", 64, 7, numpy="<i8", safetensors="I64", tensorrt="INT64"),
    Dtype("int32", 32, 6, numpy="<i4", safetensors="I32", tensorrt="INT32"),
    Dtype("uint8", 8, 2, numpy="u1", safetensors="U8", tensorrt="UINT8"),
    Dtype("int8", 8, 3, numpy="i1", tensorrt="INT8", short="int8"),
    Dtype("float8_e4m3fn", 8, 17, safetensors="F8_E4M3", tensorrt="FP8", short="fp8"),
    Dtype("bool", 8, 9, numpy="?", safetensors="BOOL", tensorrt="BOOL"),
    Dtype("uint4", 4, 21),
    Dtype("int4", 4, 22, short="int4"),
)
BY_NAME = {row.name: row for row in DTYPES}
BY_SAFETENSORS = {row.safetensors: row for row in DTYPES if row.safetensors}
BY_TENSORRT = {row.tensorrt: row for row in DTYPES if row.tensorrt}
BY_SHORT = {row.short: row for row in DTYPES if row.short}
MODEL_DTYPES = ("float32", "float16", "bfloat16")  # of a checkpoint's weights, and of activations
# Of K/V caches, beside that of activations: the least and the largest entry
CACHE_DTYPES = {"int8": (-128, 127), "float8_e4m3fn": (-448, 448)}
WEIGHT_SHORTS = tuple(BY_SHORT)  # what weights may be stored in


def safetensors_name(dtype: str) -> str:
    """Of a dtype that safetensors files hold."""
    name = BY_NAME[dtype].safetensors
    assert name, f"{dtype} is in no file"
    return name


def long_name(short: str | None) -> str | None:
    """`fp16` of a command line → `float16`; what is no short name stays as it is."""
    return BY_SHORT[short].name if short in BY_SHORT else short


def short_name(name: str | None) -> str | None:
    """`float16` → `fp16`, as the command line has it; what has no short name stays as it is."""
    row = BY_NAME.get(name or "")
    return row.short if row is not None and row.short else name


def bfloat16_from_float32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def float32_from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def _float8_values() -> npt.NDArray[np.float32]:
    """E4M3FN (OCP 8-bit floating point, 2023): a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    small = exponent == 0  # subnormal: no leading 1
    values = np.where(small, mantissa / 8, 1 + mantissa / 8) * np.exp2(np.where(small, -6.0, exponent - 7))
    values[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -values, values).astype(np.float32)


def float32_from_float8(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Exact, of float8_e4m3fn."""
    return _float8_values()[bits]


def in_dtype(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Values in a model's dtype, bfloat16 as its bits."""
    values = np.ascontiguousarray(array, np.float32)
    return bfloat16_from_float32(values) if dtype == "bfloat16" else values.astype(dtype)
