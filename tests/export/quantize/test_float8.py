"""E4M3 weights: PyTorch's own float8_e4m3fn is the reference of values, scales and bytes."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file
from safetensors.torch import load_file

from lora_drop_export.quantize import dequantized
from lora_drop_export.quantize.choice import Quantization, departures
from lora_drop_export.quantize.dequantized import dequantized_tensors
from lora_drop_export.quantize.formats import BlockFormat, row_format
from lora_drop_export.quantize.rounding import has_native, round_to_float8
from lora_drop_export.weights.store import store_weights, weights_bytes
from tests.support.quantized import matrix

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS, COLUMNS = 9, 160


def rows() -> np.ndarray:
    """Of many sizes, with zeros, values halfway between two of E4M3, and rows whose scale is a subnormal float16."""
    x = matrix(ROWS, COLUMNS, 4)
    x[4] = 0
    x[5] = np.resize(np.array([448, 17, 19, 21, -17, 0.5, 3 / 512, 1 / 1024], np.float32), COLUMNS)
    x[6] *= 1e-4 / np.abs(x[6]).max()
    x[7] = np.float32(1e-6)
    return x


def reference_scales(x: np.ndarray, kind: torch.dtype) -> torch.Tensor:
    """The least value of the dtype that is not below absmax / 448, found among the neighbours of the nearest."""
    needed = torch.from_numpy(x).abs().amax(1, keepdim=True) / 448
    nearest = needed.to(kind)
    bits = nearest.view(torch.int32 if kind == torch.float32 else torch.int16)
    above = (bits + 1).view(kind)
    scales = torch.where(nearest.float() >= needed, nearest, above)
    return torch.where(needed == 0, torch.ones_like(scales), scales)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_as_pytorch_rounds(dtype):
    x = rows()
    bits, scales, _ = round_to_float8(x, dtype)
    expected = reference_scales(x, HALVES[dtype])
    np.testing.assert_array_equal(scales, expected.float().numpy())
    theirs = (torch.from_numpy(x) / expected.float()).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(bits, theirs.view(torch.uint8).numpy())
    values = theirs.float() * expected.float()
    assert torch.isfinite(values).all()
    # 3 bits of mantissa: half a step is 1/16 of a normal value, or half the least subnormal, 2^-10
    error = (values - torch.from_numpy(x)).abs()
    assert (error <= torch.maximum(torch.from_numpy(x).abs() / 16, expected.float() / 1024) * 1.0001).all()


def stored(tmp_path, x, dtype):
    save_file({"w": x, "norm": np.arange(5, dtype=np.float32)}, tmp_path / "source.safetensors")
    refs = read_tensors(tmp_path / "source.safetensors")
    formats = {"w": row_format(x.shape[1])}
    places = store_weights(refs, dtype, tmp_path, "copy", formats=formats)
    path = tmp_path / "weights/model.safetensors"
    held = load_file(path)
    assert sum(a.nbytes for a in held.values()) == weights_bytes(refs, dtype, "copy", formats=formats)
    return places, path, held


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_and_read_back(tmp_path, monkeypatch, dtype):
    """PyTorch reads the file as float8_e4m3fn [N, K] and a scale for each row; our reader gives the same values."""
    monkeypatch.setattr("lora_drop_export.weights.write.CHUNK_BYTES", 4 * COLUMNS * 2)  # two rows at a time
    x = rows()
    places, path, held = stored(tmp_path, x, dtype)
    assert set(held) == {"w", "w.scales", "norm"}
    assert (held["w"].dtype, held["w.scales"].dtype) == (torch.float8_e4m3fn, HALVES[dtype])
    assert (held["w"].shape, held["w.scales"].shape) == ((ROWS, COLUMNS), (ROWS,))
    expected = reference_scales(x, HALVES[dtype])
    assert torch.equal(held["w.scales"], expected[:, 0])
    theirs = (torch.from_numpy(x) / expected.float()).to(torch.float8_e4m3fn)
    assert torch.equal(held["w"].view(torch.uint8), theirs.view(torch.uint8))
    assert (places["w"].dtype, places["w"].shape) == ("float8_e4m3fn", x.shape)
    assert places["w"].bytes_read == x.size + 2 * ROWS
    read = dequantized_tensors(path, read_tensors(path))
    assert set(read) == {"w", "norm"}
    values = (theirs.float() * expected.float()).numpy()
    monkeypatch.setattr(dequantized, "_CHUNK_VALUES", 2 * COLUMNS)
    assert (read["w"].shape, read["w"].dtype) == (x.shape, "float32")
    np.testing.assert_array_equal(read["w"].read(), values)
    np.testing.assert_array_equal(read["w"].rows(3, 8), values[3:8])
    np.testing.assert_array_equal(read["w"].rows(8, 12), values[8:])


def test_dequantized_as_onnx_does(tmp_path):
    """DequantizeLinear of onnx's reference evaluator, over the stored bytes, gives the values that are read back."""
    _, path, held = stored(tmp_path, rows(), "float16")
    node = onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=0)
    names = [("q", onnx.TensorProto.FLOAT8E4M3FN), ("s", onnx.TensorProto.FLOAT)]
    inputs = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in names]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, outputs))
    q = held["w"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    (theirs,) = ReferenceEvaluator(model).run(None, {"q": q, "s": held["w.scales"].float().numpy()})
    np.testing.assert_array_equal(dequantized_tensors(path, read_tensors(path))["w"].read(), theirs)


def test_odd_sizes_leave_the_others_aligned(tmp_path):
    arrays = {"a": matrix(4, 128)[:3, :5].copy(), "b": np.ones(4, np.float32), "c": matrix(4, 128)}
    save_file(arrays, tmp_path / "source.safetensors")
    formats = {"a": row_format(5), "c": row_format(128)}
    places = store_weights(read_tensors(tmp_path / "source.safetensors"), "float32", tmp_path, "copy", formats=formats)
    for place in (places["b"], places["c"], places["a"].blocks.scales, places["c"].blocks.scales):
        assert place.offset_bytes % 4 == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number_is_refused(tmp_path, value):
    x = rows()
    x[2, 5] = value
    with pytest.raises(InputError, match="w has values that are infinite or not a number"):
        stored(tmp_path, x, "float16")


def test_a_scale_too_large_for_its_dtype_is_refused(tmp_path):
    x = rows()
    x[2, 5] = 448 * 70000.0
    with pytest.raises(InputError, match="values that are infinite as float16"):
        stored(tmp_path, x, "float16")


def test_formats():
    """Any width has a row's scale; integers of as many bits in blocks as wide as a row are something else."""
    asked = Quantization.of("float8_e4m3fn")
    assert (asked.dtype, asked.bits, asked.block_size, asked.symmetric) == ("float8_e4m3fn", 8, None, True)
    assert asked.format_of((4, 33)) == row_format(33) != BlockFormat(8, 33, symmetric=True)
    assert asked.format_of((4, 4, 4)) is None
    assert not has_native(SimpleNamespace(native=BlockFormat(8, 32, symmetric=True)), row_format(32))
    shapes = {"a.0.w": (4, 32), "a.1.w": (4, 48), "b": (4, 8), "norm": (4,)}
    formats = {name: asked.format_of(shape) for name, shape in shapes.items() if name.startswith("a")}
    assert departures(shapes, formats, {}, asked) == [
        {"weights": "b", "count": 1, "block_size": None, "symmetric": None}
    ]
