"""Quantized weights in the file: read back, back to back, streamed; and which weights they are."""

from __future__ import annotations

import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError
from safetensors.numpy import load_file

from lora_drop_export.graphs.match import quantizable
from lora_drop_export.quantize import dequantized
from lora_drop_export.quantize.formats import BlockFormat, Quantization, block_formats, dequantize, pack
from lora_drop_export.quantize.rounding import quantize_rows, quantized_blocks
from lora_drop_export.weights.store import weights_bytes
from tests.support.bundles import family
from tests.support.quantized import FORMATS, data, matrix, store

# ── in the file ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", [f for f in FORMATS if f.block_size < 128], ids=str)
def test_stored_and_read_back(tmp_path, monkeypatch, form):
    """Places, sizes and bytes in one file; the checkpoint reads float32 from it, in whatever pieces."""
    monkeypatch.setattr("lora_drop_export.weights.write.CHUNK_BYTES", 4 * 96 * 3)  # three rows at a time
    k = 96 if form.symmetric else 64  # 96 has an odd number of blocks of 32
    arrays = {"w": matrix(7, k), "norm": np.arange(5, dtype=np.float32)}
    stored = store(arrays, tmp_path, {"w": form}, method="rtn")
    q, scales, zero_points = quantize_rows(arrays["w"], form, "rtn")
    tensor = stored["w"]
    assert (tensor.dtype, tensor.shape, tensor.blocks.block_size) == (f"uint{form.bits}", (7, k), form.block_size)
    assert tensor.blocks.symmetric == form.symmetric
    assert data(tmp_path, tensor) == pack(q, form.bits)
    assert data(tmp_path, tensor.blocks.scales) == scales.tobytes()
    assert data(tmp_path, tensor.blocks.zero_points) == pack(zero_points, form.bits)
    assert tensor.blocks.zero_points.shape == tensor.blocks.scales.shape == (7, k // form.block_size)
    assert data(tmp_path, stored["norm"]) == arrays["norm"].tobytes()
    assert tensor.bytes_read == q.size * form.bits // 8 + scales.nbytes + (
        0 if form.symmetric else zero_points.size * form.bits // 8
    )
    # the safetensors library takes the file, and it is all there is
    held = load_file(tmp_path / "weights/model.safetensors")
    assert set(held) == {"w", "w.scales", "w.zero_points", "norm"}
    refs = read_tensors(tmp_path / "source.safetensors")
    assert sum(a.nbytes for a in held.values()) == weights_bytes(refs, "float32", "copy", formats={"w": form})
    path = tmp_path / "weights/model.safetensors"
    read = dequantized.dequantized_tensors(path, read_tensors(path))
    assert set(read) == {"w", "norm"}
    wanted = dequantize(q, scales, zero_points)
    assert (read["w"].shape, read["w"].dtype) == ((7, k), "float32")
    monkeypatch.setattr(dequantized, "_CHUNK_VALUES", 2 * k)
    assert read["w"].read().tobytes() == wanted.tobytes()
    assert read["w"].rows(2, 7).tobytes() == wanted[2:7].tobytes()
    assert read["w"].rows(6, 9).tobytes() == wanted[6:].tobytes()


@pytest.mark.parametrize("quantized", [False, True])
def test_groups_lie_back_to_back(tmp_path, quantized):
    arrays = {name: matrix(n, 64, n) for name, n in [("a", 4), ("q", 8), ("o", 6), ("k", 5), ("v", 7)]}
    arrays |= {f"{name}.bias": np.ones(len(arrays[name]), np.float32) for name in "qkv"}
    formats = {name: BlockFormat(4, 32, False) for name in "aoqkv"} if quantized else {}
    stored = store(arrays, tmp_path, formats, owned=True, groups=[("q", "k", "v"), ("q.bias", "k.bias", "v.bias")])
    parts = [lambda name: stored[name]]
    if quantized:
        parts += [lambda name: stored[name].blocks.scales, lambda name: stored[name].blocks.zero_points]
    runs = [[part(name) for name in "qkv"] for part in parts]
    runs.append([stored[f"{name}.bias"] for name in "qkv"])
    for run in runs:
        for tensor, following in itertools.pairwise(run):
            assert tensor.offset_bytes + tensor.size_bytes == following.offset_bytes
    for name, array in arrays.items():
        assert quantized or data(tmp_path, stored[name]) == array.tobytes()
    if not quantized:  # as it lies: groups have no say
        taken = store(arrays, tmp_path / "taken", {}, groups=[("v", "q")])
        assert (tmp_path / "taken/weights/source.safetensors").read_bytes() == (
            tmp_path / "taken/source.safetensors"
        ).read_bytes()
        assert taken["v"].offset_bytes + taken["v"].size_bytes != taken["q"].offset_bytes


def test_group_is_alike():
    """One Q4_0 tensor among others is quantized like them, three of them are taken as they are."""
    native = BlockFormat(4, 32, True)
    shapes = dict.fromkeys("qkv", (8, 64))
    asked = Quantization(4, 32, "search", symmetric=False)
    groups = [("q", "k", "v")]
    assert set(block_formats(shapes, {"q": native}, groups, asked).values()) == {BlockFormat(4, 32, False)}
    assert set(block_formats(shapes, dict.fromkeys("qkv", native), groups, asked).values()) == {native}
    assert block_formats(shapes, {"q": native}, [], asked)["q"] == native
    wide = Quantization(4, 128, "search", symmetric=True)
    assert block_formats({"q": (8, 128)}, {"q": native}, [], wide)["q"] == BlockFormat(4, 128, True)


def test_streams(tmp_path):
    """A 64 MiB matrix goes through in small pieces."""
    x = np.broadcast_to(np.float32(1), (1 << 14, 1024))
    source = SimpleNamespace(name="x", shape=x.shape, rows=lambda begin, end: x[begin:end])
    tracemalloc.start()
    count = sum(len(q) for q, _, _ in quantized_blocks(source, BlockFormat(4, 32, False), "rtn", 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(x)
    assert peak < 16 << 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number_is_refused(tmp_path, value):
    x = matrix(4, 128)
    x[2, 5] = value
    with pytest.raises(InputError, match="w has values that are infinite or not a number"):
        store({"w": x}, tmp_path, {"w": BlockFormat(4, 32, True)})


# ── which weights ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "phi3", "gemma2"])
def test_linear_weights_and_the_table(name):
    source = family(name)
    modules = dict(source.model.named_modules())
    wanted = {
        parameter
        for parameter in source.traced.parameters
        if type(modules[parameter.rpartition(".")[0]]).__name__ == "Linear" and parameter.endswith("weight")
    }
    found = quantizable(source.traced.graph.graph)
    table = next(name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in source.traced.parameters)
    assert found == wanted | {table}  # a tied table has the head's name
