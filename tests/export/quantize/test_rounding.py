"""Quantized numbers: what the bytes mean, and how far they lie from the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from lora_drop_runtime.bundle.manifest import CHANNEL
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

from lora_drop_export.check.verify import compare
from lora_drop_export.quantize import formats as quantize
from lora_drop_export.quantize.choice import Quantization, block_formats
from lora_drop_export.quantize.dequantized import dequantized_tensors
from lora_drop_export.quantize.formats import pack, unpack
from lora_drop_export.quantize.rounding import ROUNDINGS, Rounding, quantize_rows, quantized_blocks
from tests.support.bundles import family, make_bundle
from tests.support.quantized import FORMATS, matrix


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_onnx(bits):
    """Packed as onnx's own helper packs UINT4 and UINT8, and unpacked again."""
    q = np.random.default_rng(1).integers(0, 2**bits, (3, 8)).astype(np.uint8)
    kind = {4: onnx.TensorProto.UINT4, 8: onnx.TensorProto.UINT8}[bits]
    theirs = onnx.helper.make_tensor("q", kind, q.shape, q.reshape(-1))
    assert pack(q, bits) == bytes(theirs.int32_data)
    assert np.array_equal(unpack(np.frombuffer(pack(q, bits), np.uint8), bits), q.reshape(-1))


def test_what_is_rounded_is_no_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that was cut meanwhile ended the export by SIGBUS, without a word and with its folder left."""
    file = tmp_path / "model.safetensors"
    save_file({"w": matrix(8, 32)}, file)

    def changed_meanwhile(rows: np.ndarray, form: object, method: str) -> np.ndarray:
        with file.open("r+b") as opened:
            opened.seek(-rows.nbytes, 2)
            opened.write(bytes(rows.nbytes))
        return rows

    monkeypatch.setattr("lora_drop_export.quantize.rounding.quantize_rows", changed_meanwhile)
    (rows,) = quantized_blocks(read_tensors(file)["w"], FORMATS[0], "search", 8)
    assert np.array_equal(rows, matrix(8, 32))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("method", ["rtn", "search"])
def test_error_is_that_of_rounding(form, method):
    """Each value within half a step of what its block's range needs, where search does not clip on purpose."""
    x = matrix(8, 256)
    q, scales, zero_points = quantize_rows(x, form, method)
    assert q.dtype == zero_points.dtype == np.uint8
    assert scales.dtype == np.float32
    assert q.max() < 2**form.bits
    assert zero_points.max() < 2**form.bits
    assert not form.symmetric or (zero_points == 2 ** (form.bits - 1)).all()
    for row in range(len(x)):
        for block in range(256 // form.block_size):
            part = slice(block * form.block_size, (block + 1) * form.block_size)
            values, scale, zero = (
                x[row, part].astype(np.float64),
                float(scales[row, block]),
                int(zero_points[row, block]),
            )
            back = (q[row, part].astype(int) - zero) * scale
            if form.symmetric:
                step = np.abs(values).max() / 2 ** (form.bits - 1)
            else:
                step = (max(0, values.max()) - min(0, values.min())) / (2**form.bits - 1)
            # the value at the end of the range that symmetric integers do not reach is off by a whole step
            assert np.abs(back - values).max() <= (1.01 if method == "rtn" else 2) * step + 1e-6
            assert np.sqrt(np.mean((back - values) ** 2)) <= 0.6 * step + 1e-6


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_search_is_better_than_rounding(form):
    x = matrix(64, 256, 3)
    weights = np.abs(x).reshape(-1, form.block_size)
    weights = weights + np.sqrt((x.reshape(-1, form.block_size) ** 2).mean(1, keepdims=True))
    errors = {}
    for method in ("rtn", "search"):
        error = quantize.dequantize(*quantize_rows(x, form, method)) - x
        errors[method] = (weights * error.reshape(-1, form.block_size) ** 2).sum(1)
    assert (errors["search"] <= errors["rtn"] * 1.0001 + 1e-9).all()
    assert errors["search"].sum() < 0.97 * errors["rtn"].sum() or form.bits == 8


def _least_errors(x, form):
    """Of each block, over ranges from a level less to a level more than its own: each with the scale that fits best."""
    middle, most = 2 ** (form.bits - 1), 2**form.bits - 1
    weights = np.abs(x) + np.sqrt((x**2).mean(1, keepdims=True))
    found = []
    for change in np.arange(-10, 11) / 10:
        if form.symmetric:
            largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
            steps = -middle / largest * (1 + change / middle)
            zero = np.full_like(steps, middle)
        else:
            low = np.minimum(x.min(1, keepdims=True), 0)
            steps = most / (np.maximum(x.max(1, keepdims=True), 0) - low) * (1 + change / most)
            zero = np.clip(np.rint(-low * steps), 0, most)
        q = np.clip(np.rint(x * steps), -zero, most - zero)
        scale = (weights * x * q).sum(1, keepdims=True) / (weights * q * q).sum(1, keepdims=True)
        found.append((weights * (x - scale * q) ** 2).sum(1))
    return weights, np.min(found, 0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_search_takes_the_least_of_its_errors(form):
    x = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    back = quantize.dequantize(*quantize_rows(x, form, "search"))
    blocks = x.reshape(-1, form.block_size).astype(np.float64)
    weights, least = _least_errors(blocks, form)
    errors = (weights * (back.reshape(-1, form.block_size) - blocks) ** 2).sum(1)
    np.testing.assert_allclose(errors, least, rtol=0.01 if form.bits == 4 else 0.1)


def test_weights_that_become_one_matrix_have_one_format():
    """One of them may have integers of its own in the checkpoint; those are taken where all have them."""
    names, asked = ("q", "k", "v"), Quantization(4, 32)
    own = quantize.BlockFormat(4, 32, symmetric=True)
    shapes = dict.fromkeys((*names, "o"), (64, 256))
    some = block_formats(shapes, {"q": own, "v": own, "o": own}, [names], asked)
    assert some == dict.fromkeys(names, quantize.BlockFormat(4, 32, symmetric=False)) | {"o": own}
    assert block_formats(shapes, dict.fromkeys(shapes, own), [names], asked) == dict.fromkeys(shapes, own)


@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_magnitude_does_not_matter(form, method):
    """The integers are the same whatever power of two the weights are multiplied by; what is next to nothing is 0."""
    x = matrix(8, 256)
    q, scales, zero_points = quantize_rows(x, form, method)
    for power in (-100, -60, 45, 100):
        found = quantize_rows(np.ldexp(x, power), form, method)
        assert np.array_equal(found[0], q)
        assert np.array_equal(found[1], np.ldexp(scales, power))
        assert np.array_equal(found[2], zero_points)
    least = np.ldexp(x, -133)  # beyond float32's normal numbers
    assert np.abs(quantize.dequantize(*quantize_rows(least, form, method)) - least).max() <= 1e-36


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dequantized_as_onnx_does(form):
    """DequantizeLinear of onnx's reference evaluator gives the same float32 values, bit by bit."""
    x = matrix(6, 256)
    q, scales, zero_points = quantize_rows(x, form, "search")
    node = onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1, block_size=form.block_size)
    names = [("q", onnx.TensorProto.UINT8), ("s", onnx.TensorProto.FLOAT), ("z", onnx.TensorProto.UINT8)]
    inputs = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in names]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, outputs))
    (theirs,) = ReferenceEvaluator(model).run(None, {"q": q, "s": scales, "z": zero_points})
    assert quantize.dequantize(q, scales, zero_points).tobytes() == theirs.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("bits", "asked", "symmetric", "shape", "wanted"),
    [
        (4, 32, False, (8, 576), (32, False)),
        (4, 128, False, (8, 576), (32, False)),  # 64 divides, but gives 9 blocks
        (4, 128, True, (8, 576), (64, True)),
        (4, 128, False, (8, 896), (64, False)),
        (4, 32, False, (8, 96), (16, False)),
        (4, 32, False, (8, 16), (16, True)),  # one block, no smaller one
        (8, 128, True, (8, 4864), (128, True)),
        (8, 32, False, (8, 96), (32, False)),
        (4, CHANNEL, True, (8, 576), (576, True)),
        (8, CHANNEL, True, (8, 97), (97, True)),
        (4, CHANNEL, True, (8, 97), None),  # no whole bytes
        (4, CHANNEL, True, (64,), None),
        (4, 32, False, (8, 100), None),
        (4, 32, False, (64,), None),
        (4, 32, False, (8, 64, 64), None),
    ],
)
def test_block_size(bits, asked, symmetric, shape, wanted):
    form = Quantization(bits, asked, "rtn", symmetric).format_of(shape)
    assert (form and (form.block_size, form.symmetric)) == wanted


def _to_zero_or_max(blocks, form):
    """A rounding that nobody wants: each value becomes 0 or the block's largest magnitude, with its sign."""
    scale = np.abs(blocks).max(0)
    q = np.where(np.abs(blocks) * 2 >= scale, np.sign(blocks), 0) + form.middle
    return q.astype(np.uint8), scale.astype(np.float32), np.full(len(scale), form.middle, np.uint8)


def test_a_new_rounding_is_a_row_of_the_table(monkeypatch, tmp_path):
    """It is exported and verified, and the weights in the bundle are what it makes of the checkpoint's."""
    monkeypatch.setitem(ROUNDINGS, "coarse", Rounding(_to_zero_or_max, zero_points=True))
    bundle = make_bundle("llama", tmp_path / "b", dtype="int4", quantization="coarse")
    weights = dequantized_tensors(
        bundle.root / "weights" / "model.safetensors", read_tensors(bundle.root / "weights" / "model.safetensors")
    )
    name = "model.layers.2.mlp.up_proj.weight"
    theirs = family("llama").model.get_parameter(name).detach().numpy().reshape(96, 2, 32)  # blocks of 32
    largest = np.abs(theirs).max(2, keepdims=True)
    expected = np.where(2 * np.abs(theirs) >= largest, np.sign(theirs) * largest, 0)
    np.testing.assert_allclose(weights[name].read(), expected.reshape(96, 64), rtol=1e-6)
    assert compare(bundle).passed
