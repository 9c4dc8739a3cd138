"""Weights converted: no value changes that need not, and memory stays small."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime.bundle.safetensors_file import TensorPlace, read_tensors
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from safetensors.torch import load_file, save_file

from lora_drop_export.cli import main
from lora_drop_export.weights.write import CHUNK_BYTES, stored_blocks
from tests.support.stored_weights import TORCH, cast, export, save, short, stored_bytes, tokens

pytestmark = pytest.mark.usefixtures("traced")

# ── converted ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "sharded"), [(torch.bfloat16, True), (torch.float16, False)])
def test_converted_for_ort(tmp_path, model, dtype, sharded):
    """float32 is torch's, bit by bit, in one file, each tensor once."""
    tensors = cast(model, dtype)
    if sharded:
        names = sorted(tensors)
        for index in range(3):
            save_file({name: tensors[name] for name in names[index::3]}, model / f"part-{index}.safetensors")
        weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (model / "model.safetensors").unlink()
    bundle = export(model, tmp_path / "out")
    assert bundle.manifest.model.dtype == "float32"
    assert [f.name for f in bundle.root.glob("weights/*.safetensors")] == ["model.safetensors"]
    stored = load_file(bundle.root / "weights" / "model.safetensors")
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name].view(torch.int32), tensor.to(torch.float32).view(torch.int32)), name
    held = sum(t.numel() * 4 for t in tensors.values())
    assert held < stored_bytes(bundle) < held + 16384
    # And it is this model that runs
    source = short().model
    float32 = type(source)(source.config).eval()
    float32.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.no_grad(), Session.open(bundle.root) as session:
        theirs = float32(torch.tensor([[7, 3, 11, 19]])).logits[:, -1].numpy()
        np.testing.assert_allclose(session.prefill([[7, 3, 11, 19]]), theirs, rtol=0, atol=3e-5 * np.abs(theirs).max())


def stored_tensor(path: Path, tensor: torch.Tensor) -> TensorPlace:
    save_file({"x": tensor}, path)
    return read_tensors(path)["x"]


def assert_same_values(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Bit by bit, but for what a NaN carries."""
    integers = {4: torch.int32, 2: torch.int16}[theirs.element_size()]
    numbers = ~theirs.isnan()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.view(integers)[numbers], theirs.view(integers)[numbers])


@pytest.mark.parametrize("source", ["F16", "BF16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_every_16_bit_value(tmp_path, source, target):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensor = bits.view(TORCH[source]).reshape(256, 256)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        data = b"".join(stored_blocks(stored_tensor(tmp_path / "x.safetensors", tensor), target))
    theirs = tensor.to(getattr(torch, target))
    ours = torch.frombuffer(bytearray(data), dtype=theirs.dtype).reshape(256, 256)
    assert_same_values(ours, theirs)


@pytest.mark.parametrize("target", ["bfloat16", "float16"])
def test_narrowed(tmp_path, target):
    """Rounded to the nearest, ties to even, as torch does."""
    values = torch.randn(1000, 64, generator=torch.Generator().manual_seed(4)) * 10
    values[0] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11, 1e-30, -1e-42, 0.0, -0.0, 65504.0] * 8)
    ref = stored_tensor(tmp_path / "x.safetensors", values)
    theirs = values.to(getattr(torch, target))
    ours = torch.frombuffer(bytearray(b"".join(stored_blocks(ref, target))), dtype=theirs.dtype).reshape(values.shape)
    assert_same_values(ours, theirs)


@pytest.mark.parametrize(
    ("target", "largest", "too_large"), [("float16", 65519.0, 65520.0), ("bfloat16", 3.3895e38, 3.397e38)]
)
def test_what_would_be_infinite_is_refused(target, largest, too_large):
    """Of finite values; what is infinite stays so."""
    for sign in (1, -1):
        values = np.array([[1, sign * largest], [np.inf, np.nan]], np.float32)
        kept = torch.frombuffer(bytearray(b"".join(stored_blocks(values, target))), dtype=getattr(torch, target))
        assert kept.isfinite().tolist() == [True, True, False, False]
        values[0, 1] = sign * too_large
        with pytest.raises(InputError, match=f"infinite as {target}"):
            list(stored_blocks(values, target))


def sparse_tensor(path: Path, dtype: str, shape: tuple[int, int], width: int) -> TensorPlace:
    """A large safetensors file of zeros that takes no room."""
    size = shape[0] * shape[1] * width
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    return read_tensors(path)["x"]


TALL, WIDE, ODD = (1 << 19, 128), (128, 1 << 19), (15, (1 << 22) + 1)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("F32", TALL), ("F32", ODD), ("BF16", ODD), ("F16", WIDE), ("array", TALL)],
)
def test_conversion_streams(tmp_path, shape, kind):
    """A 256 MiB tensor goes through in small pieces: one piece in memory, not the tensor."""
    width = 4 if kind in ("F32", "array") else 2
    source: Any = (
        np.broadcast_to(np.float32(1), shape)
        if kind == "array"
        else sparse_tensor(tmp_path / "x.safetensors", kind, shape, width)
    )
    target = "bfloat16" if width == 4 else "float32"
    total = 0
    tracemalloc.start()
    for block in stored_blocks(source, target):
        assert len(block) <= max(CHUNK_BYTES, 4 * shape[1])
        total += len(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == shape[0] * shape[1] * (2 if width == 4 else 4)
    assert peak < 6 * CHUNK_BYTES < shape[0] * shape[1] * 2


def test_bin_checkpoint(tmp_path, expected):
    """A checkpoint from before safetensors is converted, and what was made for it does not stay."""
    model = tmp_path / "model"
    model.mkdir()
    torch.save(short().model.state_dict(), model / "pytorch_model.bin")
    shutil.copy(short().directory / "config.json", model)
    bundle = export(model, tmp_path / "copy")
    assert tokens(bundle) == expected
    assert not (bundle.root / "scratch").exists()
    assert sorted(f.name for f in model.iterdir()) == ["config.json", "pytorch_model.bin"]
    arguments = ["--model", str(model), "--out", str(tmp_path / "link"), "--weights", "link"]
    assert main(arguments) == 2  # there is nothing of the user's to link


# ── the dtype of `--target none` ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bfloat16_trace():
    return short(dtype="bfloat16").traced


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_graphs_only_keep_the_checkpoints_dtype(tmp_path, model, monkeypatch, bfloat16_trace, mode):
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: bfloat16_trace)
    cast(model, torch.bfloat16)
    bundle = export(model, tmp_path / "out", "--target", "none", "--weights", mode, "--rank", 2)
    assert bundle.manifest.model.dtype == "bfloat16"
    stored = bundle.root / "weights" / "model.safetensors"
    assert filecmp.cmp(model / "model.safetensors", stored, shallow=False)
    assert (stored.stat().st_ino == (model / "model.safetensors").stat().st_ino) == (mode == "link")
    for graph in ("refresh.onnx", "lora.onnx"):
        proto = onnx.load(bundle.root / graph, load_external_data=False)
        big = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {t.data_type for t in big} == {onnx.TensorProto.BFLOAT16}
        caches = [v for v in (*proto.graph.input, *proto.graph.output) if "key" in v.name or "value" in v.name]
        assert {v.type.tensor_type.elem_type for v in caches} == {onnx.TensorProto.BFLOAT16}
    assert not bundle.check_hashes()


def test_mixed_checkpoint_takes_the_dtype_of_most(tmp_path, model, bfloat16_trace, monkeypatch):
    """Norms in float32 among bfloat16 matrices: converted into one file."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: bfloat16_trace)
    tensors = cast(model, torch.bfloat16)
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save(mixed, model)
    bundle = export(model, tmp_path / "out", "--target", "none")
    assert bundle.manifest.model.dtype == "bfloat16"
    stored = load_file(bundle.root / "weights" / "model.safetensors")
    assert {name: t.dtype for name, t in stored.items()} == dict.fromkeys(tensors, torch.bfloat16)
    assert all(torch.equal(stored[name].view(torch.int16), t.view(torch.int16)) for name, t in tensors.items())


def test_asked_for_dtype(tmp_path, model, bfloat16_trace, monkeypatch):
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: bfloat16_trace)
    bundle = export(model, tmp_path / "out", "--target", "none", "--dtype", "bf16")
    stored = load_file(bundle.root / "weights" / "model.safetensors")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(stored[name].view(torch.int16), tensor.to(torch.bfloat16).view(torch.int16))
        wanted = tensor.numpy().astype(ml_dtypes.bfloat16).view(np.int16)
        assert np.array_equal(stored[name].view(torch.int16).numpy(), wanted)
