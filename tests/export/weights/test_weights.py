"""Weights in the bundle: where they lie, that they are there once, and that no bit of them changes on the way."""

from __future__ import annotations

import errno
import filecmp
import itertools
import json
import os
import shutil
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import TensorRef, read_tensors
from lora_drop_runtime.decoding.session import Session
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lora_drop_export.decoder.trace
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from lora_drop_export.weights.store import copy_file
from lora_drop_export.weights.write import CHUNK_BYTES, stored_blocks
from tests.support.bundles import Family, family, make_bundle
from tests.support.models import SIZES

GRAPHS = ("refresh.onnx", "lora.onnx", "ort/steps.onnx")
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Place = tuple[str, int, int]


@pytest.fixture(autouse=True)
def traced(monkeypatch) -> Callable[[Family], None]:
    """Exports take the trace of `llama`, made once, or of the family that is set."""

    def use(source: Family) -> None:
        monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)

    use(family("llama"))
    return use


@pytest.fixture
def model(tmp_path) -> Path:
    """The tiny Llama's directory, in float32 and one file."""
    return shutil.copytree(family("llama").directory, tmp_path / "model")


def export(model: object, out: Path, *arguments: object) -> Bundle:
    assert main([str(a) for a in ("--model", model, "--out", out, "--max-seq-len", 64, *arguments)]) == 0
    return Bundle.open(out)


def tokens(bundle: Bundle | Path) -> list[list[int]]:
    with Session.open(bundle if isinstance(bundle, Path) else bundle.root) as session:
        return [row.tolist() for row in session.generate([[7, 3, 11, 19], [5]], 11)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[list[int]]:
    """What the tiny Llama generates."""
    return tokens(make_bundle("llama", tmp_path_factory.mktemp("expected") / "b"))


def save(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def cast(model: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Stores a checkpoint in another dtype and returns its tensors."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    save(tensors, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return tensors


def external(graph: Path) -> dict[str, Place]:
    """Initializer → (location, offset, length) of a graph's external tensors."""
    proto = onnx.load(graph, load_external_data=False)
    places = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            places[tensor.name] = entry["location"], int(entry["offset"]), int(entry["length"])
    return places


def inline_bytes(graph: Path) -> int:
    proto = onnx.load(graph, load_external_data=False)
    tensors = [a.t for node in proto.graph.node for a in node.attribute if a.HasField("t")]
    tensors += [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    return sum(tensor.ByteSize() for tensor in tensors)


def stored_bytes(bundle: Bundle) -> int:
    return sum(f.stat().st_size for f in bundle.root.glob("weights/*.safetensors"))


# ── in the graphs ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("rank", [0, 3])
def test_graphs_share_one_copy(tmp_path, name, rank):
    bundle = make_bundle(name, tmp_path / "b", rank=rank, drop_layers=(3, 5))
    tensors = load_file(family(name).directory / "model.safetensors")
    places = {graph: external(bundle.root / graph) for graph in GRAPHS}
    refresh, lora = places["refresh.onnx"], places["lora.onnx"]
    # The joined graph reads the same bytes, under other names where it reads several tensors as one
    begins = {place[:2] for place in (refresh | lora).values()}
    ends = {(file, begin + length) for file, begin, length in (refresh | lora).values()}
    for file, begin, length in places["ort/steps.onnx"].values():
        assert (file, begin) in begins
        assert (file, begin + length) in ends
    # The LoRA step names what the refresh names, at the same place, but for dropped layers and surrogates
    surrogates = {f"surrogate.{i}.lora_{part}" for i in (3, 5) for part in "AB" if rank}
    kept = {name for name in refresh if not name.startswith(("model.layers.3.", "model.layers.5."))}
    assert set(lora) == kept | surrogates
    assert all(lora[name] == refresh[name] for name in kept)
    # All of it lies in the bundle, and is the checkpoint's, byte for byte
    for tensor_name, (location, offset, length) in (refresh | lora).items():
        file = bundle.root / location
        assert file.parent == bundle.root / "weights"
        assert ".." not in location
        assert offset + length <= file.stat().st_size
        if tensor_name not in surrogates:
            alias = tensor_name if tensor_name in tensors else "model.embed_tokens.weight"
            assert tensor_name == alias or name == "llama_tied"
            with file.open("rb") as opened:
                opened.seek(offset)
                assert opened.read(length) == tensors[alias].numpy().tobytes()
    # Once on disk: places are the same or apart, and beside them there are only headers
    spans = sorted(set((refresh | lora).values()))
    for (file, begin, length), (next_file, next_begin, _) in itertools.pairwise(spans):
        assert file != next_file or begin + length <= next_begin
    held = sum(length for _, _, length in spans)
    assert held == sum(t.numel() * 4 for t in tensors.values()) + len(surrogates) * rank * SIZES["hidden_size"] * 4
    assert held <= stored_bytes(bundle) < held + 16384
    assert all(inline_bytes(bundle.root / graph) < 16384 for graph in GRAPHS)


def test_tied_weights_whatever_the_checkpoint_stores(tmp_path, traced):
    """The table under its own name, under the head's, or under both."""
    source = family("llama_tied")
    traced(source)
    whole = load_file(source.directory / "model.safetensors")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    assert head not in whole
    rest = {name: tensor for name, tensor in whole.items() if name != table}
    results = []
    for index, names in enumerate([(table,), (head,), (table, head)]):
        model = shutil.copytree(source.directory, tmp_path / f"model{index}")
        save(rest | {name: whole[table].clone() for name in names}, model)
        bundle = export(model, tmp_path / f"out{index}")
        places = external(bundle.root / "refresh.onnx")
        assert len({places[name] for name in (table, head) if name in places}) == 1
        results.append(tokens(bundle))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_checkpoint_without_the_prefix(tmp_path, traced, name):
    """As `AutoModel.save_pretrained` writes it: layers.0… in place of model.layers.0…."""
    traced(family(name))
    whole = load_file(family(name).directory / "model.safetensors")
    model = shutil.copytree(family(name).directory, tmp_path / "model")
    save({key.removeprefix("model."): tensor for key, tensor in whole.items()}, model)
    assert "layers.0.mlp.up_proj.weight" in read_tensors(model / "model.safetensors")
    bundle = export(model, tmp_path / "out")
    assert tokens(bundle) == tokens(make_bundle(name, tmp_path / "other"))
    assert filecmp.cmp(model / "model.safetensors", bundle.root / "weights/model.safetensors", shallow=False)


# ── taken as they lie ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", ["ort", "none"])
@pytest.mark.parametrize("mode", ["copy", "link"])
def test_copied_or_linked(tmp_path, model, expected, target, mode):
    source = model / "model.safetensors"
    before = source.read_bytes()
    bundle = export(model, tmp_path / "out", "--weights", mode, "--target", target)
    stored = bundle.root / "weights" / "model.safetensors"
    assert bundle.manifest.model.dtype == "float32"
    assert stored.read_bytes() == before
    assert source.read_bytes() == before
    if mode == "link":
        assert stored.stat().st_ino == source.stat().st_ino
        assert stored.stat().st_nlink == 2
    else:
        assert stored.stat().st_ino != source.stat().st_ino
        assert stored.stat().st_nlink == source.stat().st_nlink == 1
    if target == "ort":
        assert tokens(bundle) == expected
    shutil.rmtree(model)
    if target == "ort":
        assert tokens(bundle) == expected
    assert not bundle.check_hashes()


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_sharded(tmp_path, expected, mode):
    model = tmp_path / "model"
    family("llama").model.save_pretrained(model, max_shard_size="200KB")
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 3
    bundle = export(model, tmp_path / "out", "--weights", mode)
    assert sorted(f.name for f in bundle.root.glob("weights/*.safetensors")) == [f.name for f in shards]
    for shard in shards:
        stored = bundle.root / "weights" / shard.name
        assert filecmp.cmp(shard, stored, shallow=False)
        assert (stored.stat().st_ino == shard.stat().st_ino) == (mode == "link")
    assert tokens(bundle) == expected


@pytest.mark.parametrize("mode", ["copy", "link"])
@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
@pytest.mark.parametrize("by_name", [True, False])
def test_hub_cache(tmp_path, monkeypatch, expected, mode, shard_size, by_name):
    """snapshots/<revision>/model.safetensors is a symbolic link to ../../blobs/<hash>."""
    family("llama").model.save_pretrained(tmp_path / "files", max_shard_size=shard_size)
    repository = tmp_path / "hub" / "models--tiny--llama"
    snapshot, blobs = repository / "snapshots" / ("c0ffee" * 6), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted((tmp_path / "files").iterdir())):
        blob = blobs / f"{index:064x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    bundle = export("tiny/llama" if by_name else snapshot, tmp_path / "out", "--weights", mode)
    assert bundle.manifest.model.name == ("tiny/llama" if by_name else snapshot.name)
    assert not any(path.is_symlink() for path in bundle.root.rglob("*"))
    stored = sorted(bundle.root.glob("weights/*.safetensors"))
    assert len(stored) == len(list(snapshot.glob("*.safetensors")))
    for file in stored:
        blob = blobs / file.stem
        assert filecmp.cmp(blob, file, shallow=False)
        assert (file.stat().st_ino == blob.stat().st_ino) == (mode == "link")
    assert tokens(bundle) == expected


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EXDEV, "another file system"), (errno.EPERM, "not permitted"), (errno.EMLINK, "links")]
)
def test_link_that_cannot_be_made(tmp_path, model, monkeypatch, capsys, code, reason):
    def fail(source: object, target: object, **_: Any) -> None:
        raise OSError(code, os.strerror(code), source, None, target)

    monkeypatch.setattr("os.link", fail)
    arguments = ["--model", str(model), "--out", str(tmp_path / "out"), "--weights", "link"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "cannot be linked" in message
    assert reason in message
    assert "--weights copy" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert main([*arguments[:-1], "copy"]) == 0


@pytest.fixture
def other_file_system(tmp_path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no other file system here")
    with tempfile.TemporaryDirectory(dir=shared, prefix="lora-drop-test-") as directory:
        yield Path(directory)


def test_other_file_system(tmp_path, model, other_file_system, expected, capsys):
    bundle = export(model, other_file_system / "out")
    assert filecmp.cmp(model / "model.safetensors", bundle.root / "weights/model.safetensors", shallow=False)
    assert tokens(bundle) == expected
    arguments = ["--model", str(model), "--out", str(other_file_system / "linked"), "--weights", "link"]
    assert main(arguments) == 2
    assert "another file system" in capsys.readouterr().err
    assert [path.name for path in other_file_system.iterdir()] == ["out"]
    # The bundle itself can be moved across file systems
    moved = Path(shutil.move(bundle.root, tmp_path / "moved"))
    assert not bundle.root.exists()
    assert tokens(moved) == expected


def test_copy_is_whole(tmp_path):
    """More than one piece of it, with the progress that a bar needs."""
    content = np.random.default_rng(1).bytes(2 * CHUNK_BYTES + 12345)
    (tmp_path / "a").write_bytes(content)
    reported: list[tuple[int, int]] = []
    copy_file(tmp_path / "a", tmp_path / "b", lambda _, done, total: reported.append((done, total)))
    assert (tmp_path / "b").read_bytes() == content
    if reported:  # nothing is reported where the file system shares blocks
        assert reported[-1] == (len(content), len(content))
        assert [done for done, _ in reported] == sorted({done for done, _ in reported})


# ── converted ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
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
    source = family("llama").model
    float32 = type(source)(source.config).eval()
    float32.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.no_grad(), Session.open(bundle.root) as session:
        theirs = float32(torch.tensor([[7, 3, 11, 19]])).logits[:, -1].numpy()
        np.testing.assert_allclose(session.prefill([[7, 3, 11, 19]]), theirs, rtol=0, atol=3e-5 * np.abs(theirs).max())


def stored_tensor(path: Path, tensor: torch.Tensor) -> TensorRef:
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


def sparse_tensor(path: Path, dtype: str, shape: tuple[int, int], width: int) -> TensorRef:
    """A large safetensors file of zeros that takes no room."""
    size = shape[0] * shape[1] * width
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    return read_tensors(path)["x"]


@pytest.mark.parametrize("shape", [(1 << 19, 128), (128, 1 << 19), (15, (1 << 22) + 1)])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "array"])
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
    torch.save(family("llama").model.state_dict(), model / "pytorch_model.bin")
    shutil.copy(family("llama").directory / "config.json", model)
    for mode in ("copy", "link"):
        bundle = export(model, tmp_path / mode, "--weights", mode)
        assert tokens(bundle) == expected
        assert not (bundle.root / "scratch").exists()
        assert sorted(f.name for f in model.iterdir()) == ["config.json", "pytorch_model.bin"]


# ── the dtype of `--target none` ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bfloat16_trace():
    return lora_drop_export.decoder.trace.trace(family("llama").checkpoint, "bfloat16")


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


# ── the bundle as a whole ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments", [(), ("--weights", "link", "--rank", 2), ("--target", "none")])
def test_bundle_can_be_moved(tmp_path, model, monkeypatch, arguments):
    """No absolute path and no symbolic link in it; it opens elsewhere, by a relative path, and through a link."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    (model / "LICENSE").write_text("do as you like\n")
    bundle = export(model, tmp_path / "out", *arguments)
    assert (bundle.root / "tokenizer" / "tokenizer.json").is_file()
    assert (bundle.root / "tokenizer" / "LICENSE").is_file()
    repository = Path(__file__).resolve().parents[3]
    traces = [str(p).encode() for p in (tmp_path, tempfile.gettempdir(), repository, Path.home())]
    for path in bundle.root.rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            content = path.read_bytes()
            assert not [trace for trace in (*traces, tmp_path.name.encode()) if trace in content], path
    assert bundle.manifest.model.name == "model"
    moved = Path(shutil.move(bundle.root, tmp_path / "elsewhere"))
    shutil.rmtree(model)
    assert not Bundle.open(moved).check_hashes()
    if bundle.manifest.targets:
        before = tokens(make_bundle("llama", tmp_path / "b", rank=bundle.manifest.plan.rank))
        assert tokens(moved) == before
        monkeypatch.chdir(tmp_path)
        assert tokens(Path("elsewhere")) == before
        monkeypatch.chdir(moved)
        assert tokens(Path(".")) == before
        (tmp_path / "alias").symlink_to("elsewhere")
        assert tokens(tmp_path / "alias") == before


def test_model_given_by_a_relative_path(tmp_path, model, monkeypatch):
    monkeypatch.chdir(model)
    assert export(".", tmp_path / "out").manifest.model.name == "model"
    monkeypatch.chdir(tmp_path)
    assert export("model/", Path("engines"), "--weights", "link").manifest.model.name == "model"
    assert Bundle.open(tmp_path / "engines")


# ── fingerprints ───────────────────────────────────────────────────────────────────────────────────────────────


def fingerprint(directory: Path) -> str:
    return open_checkpoint(str(directory), directory / "scratch").fingerprint()


def test_fingerprint_is_of_values_not_of_storage(tmp_path, model):
    rounded = cast(model, torch.bfloat16)
    in_bfloat16 = fingerprint(model)
    cast(model, torch.float32)
    assert fingerprint(model) == in_bfloat16
    loaded = type(family("llama").model).from_pretrained(model, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert fingerprint(tmp_path / "shards") == in_bfloat16
    save({name: rounded[name] for name in reversed(list(rounded))}, model)
    assert fingerprint(model) == in_bfloat16


def test_fingerprint_changes_with_the_weights(model):
    whole = load_file(model / "model.safetensors")
    seen = {fingerprint(model)}
    for name in whole:
        changed = whole | {name: whole[name].clone()}
        changed[name].view(-1)[0] += 0.5
        save(changed, model)
        seen.add(fingerprint(model))
    for changed in (
        {name: t for name, t in whole.items() if name != "lm_head.weight"},
        whole | {"lm_head.weight": whole["lm_head.weight"][:-1]},
        {name.replace("layers.3.", "layers.9."): t for name, t in whole.items()},
    ):
        save(changed, model)
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(whole) + 3


def test_fingerprint_is_the_bundles(tmp_path, model):
    """The manifest has the checkpoint's, also when the weights were converted."""
    cast(model, torch.bfloat16)
    assert export(model, tmp_path / "out").manifest.model.fingerprint == fingerprint(model)
