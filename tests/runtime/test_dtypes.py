"""The table of dtypes against the libraries whose names and numbers it holds."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from lora_drop_runtime import dtypes
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.dtypes import BY_NAME, DTYPES, Dtype
from safetensors.torch import save_file

from tests.support import fake_trt

by_name = pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)
ONNX_NAMES = {"float64": "DOUBLE", "float32": "FLOAT", "float8_e4m3fn": "FLOAT8E4M3FN"}


@by_name
def test_onnx_numbers_are_those_of_onnx_and_onnx_ir(row: Dtype) -> None:
    expected = ONNX_NAMES.get(row.name, row.name.upper())
    assert onnx.TensorProto.DataType.Name(row.onnx) == expected
    assert ir.DataType(row.onnx).name == expected
    assert ir.DataType(row.onnx).itemsize * 8 == row.bits


@by_name
def test_numpy_dtypes_have_the_name_and_the_size(row: Dtype) -> None:
    if row.numpy is None:
        assert row.name in ("bfloat16", "float8_e4m3fn", "uint4", "int4")
        return
    assert np.dtype(row.numpy).name == row.name
    assert np.dtype(row.numpy).itemsize == row.size_bytes
    assert np.dtype(row.numpy).byteorder in "=<|"


@by_name
def test_safetensors_names_are_what_its_library_writes(row: Dtype, tmp_path: Path) -> None:
    """int8 is in no file that is read here; the table names only what is."""
    if row.safetensors is None:
        assert row.name in ("int8", "uint4", "int4")
        return
    values = torch.ones((2, 3)).to(getattr(torch, row.name))
    save_file({"w": values}, tmp_path / "w.safetensors")
    ref = read_tensors(tmp_path / "w.safetensors")["w"]
    assert ref.dtype == row.name
    assert ref.size_bytes == 6 * row.size_bytes
    assert ref.read().tolist() == [[1, 1, 1]] * 2


@by_name
def test_tensorrt_names(row: Dtype) -> None:
    """The library itself where it is installed, and the stand-in's, which is compared with it elsewhere."""
    trt = pytest.importorskip("tensorrt_rtx")
    if row.tensorrt is None:
        return
    kind = getattr(trt.DataType, row.tensorrt)
    assert kind.itemsize == row.size_bytes
    if row.name not in ("bfloat16", "float8_e4m3fn"):  # it says so with numpy's own dtypes
        assert np.dtype(trt.nptype(kind)).name == row.name


def test_the_stand_in_for_tensorrt_knows_no_other_names() -> None:
    assert {kind.name for kind in fake_trt.DataType} <= set(dtypes.BY_TENSORRT)


def test_short_names_in_the_order_of_the_help() -> None:
    assert list(dtypes.BY_SHORT) == ["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
    assert dtypes.WEIGHT_SHORTS == ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
    assert [dtypes.short_name(name) for name in dtypes.CACHE_DTYPES] == ["int8", "fp8"]
    assert [dtypes.long_name(short) for short in (*dtypes.BY_SHORT, "float16", "x", None)] == [
        *("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "int4", "float16", "x"),
        None,
    ]
    assert tuple(map(dtypes.safetensors_name, dtypes.MODEL_DTYPES)) == ("F32", "F16", "BF16")


def test_values_that_share_a_byte_have_no_size() -> None:
    with pytest.raises(AssertionError, match="share a byte"):
        _ = BY_NAME["uint4"].size_bytes
    with pytest.raises(AssertionError, match="in no file"):
        dtypes.safetensors_name("uint4")


def test_bfloat16_is_rounded_as_ml_dtypes_rounds() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    special = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00008000, 0x00018000, 1, 0], "u4")
    values = np.concatenate([bits, special]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(dtypes.bfloat16_from_float32(values), expected.view(np.uint16))
    np.testing.assert_array_equal(dtypes.float32_from_bfloat16(expected.view(np.uint16)), expected.astype(np.float32))
    assert np.isnan(dtypes.float32_from_bfloat16(dtypes.bfloat16_from_float32(np.array([np.nan], np.float32))))


def test_every_float8_is_what_pytorch_reads() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    expected = bits.view(torch.float8_e4m3fn).to(torch.float32).numpy()
    assert np.isnan(expected).sum() == 2
    np.testing.assert_array_equal(dtypes.float32_from_float8(bits.numpy()), expected)


@pytest.mark.parametrize("dtype", dtypes.MODEL_DTYPES)
def test_values_in_a_models_dtype(dtype: str) -> None:
    stored = dtypes.in_dtype(np.array([[1.5, -2.0]]), dtype)
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert stored.view(wanted).tolist() == [[1.5, -2.0]]
