"""Quantized weights: what the bytes mean, that no integer of the checkpoint changes, and what is read back."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from lora_drop_export.check.reference import Reference
from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.quantize import formats as quantize
from lora_drop_export.quantize.formats import BlockFormat, Quantization, block_formats, pack, unpack
from lora_drop_export.quantize.rounding import quantize_rows
from lora_drop_export.weights.store import store_weights, weights_bytes
from lora_drop_export.weights.stored import StoredTensor, bytes_read
from tests.support.bundles import family, make_bundle

FORMATS = [
    BlockFormat(bits, size, symmetric) for bits in (4, 8) for size in (16, 32, 128) for symmetric in (True, False)
]


def matrix(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Gaussian rows of different sizes, with a few blocks that are awkward to scale."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, k)) * np.exp(generator.standard_normal((n, 1)))
    x[0, :16], x[1, :128], x[2, :128] = 0, 0.25, -3
    x[3, :128] = np.abs(x[3, :128]) + 1
    return x.astype(np.float32)


def store(arrays: dict[str, np.ndarray], root: Path, formats: dict[str, BlockFormat], **options: Any) -> Any:
    root.mkdir(exist_ok=True)
    save_file(arrays, root / "source.safetensors")
    refs = read_tensors(root / "source.safetensors")
    return store_weights(refs, "float32", root, "copy", formats=formats, **options)


def data(root: Path, tensor: StoredTensor) -> bytes:
    with (root / tensor.location).open("rb") as file:
        file.seek(tensor.offset_bytes)
        return file.read(tensor.size_bytes)


# ── numbers ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_onnx(bits):
    """Packed as onnx's own helper packs UINT4 and UINT8, and unpacked again."""
    q = np.random.default_rng(1).integers(0, 2**bits, (3, 8)).astype(np.uint8)
    kind = {4: onnx.TensorProto.UINT4, 8: onnx.TensorProto.UINT8}[bits]
    theirs = onnx.helper.make_tensor("q", kind, q.shape, q.reshape(-1))
    assert pack(q, bits) == bytes(theirs.int32_data)
    assert np.array_equal(unpack(np.frombuffer(pack(q, bits), np.uint8), bits), q.reshape(-1))


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
        (4, 32, False, (8, 100), None),
        (4, 32, False, (64,), None),
        (4, 32, False, (8, 64, 64), None),
    ],
)
def test_block_size(bits, asked, symmetric, shape, wanted):
    form = Quantization(bits, asked, "rtn", symmetric).format_of(shape)
    assert (form and (form.block_size, form.symmetric)) == wanted


# ── in the file ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", [f for f in FORMATS if f.block_size < 128], ids=str)
def test_stored_and_read_back(tmp_path, monkeypatch, form):
    """Places, sizes and bytes in one file; the checkpoint reads float32 from it, in whatever pieces."""
    monkeypatch.setattr("lora_drop_export.weights.store._CHUNK_BYTES", 4 * 96 * 3)  # three rows at a time
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
    assert bytes_read(tensor) == q.size * form.bits // 8 + scales.nbytes + (
        0 if form.symmetric else zero_points.size * form.bits // 8
    )
    # the safetensors library takes the file, and it is all there is
    held = load_file(tmp_path / "weights/model.safetensors")
    assert set(held) == {"w", "w.scales", "w.zero_points", "norm"}
    refs = read_tensors(tmp_path / "source.safetensors")
    assert sum(a.nbytes for a in held.values()) == weights_bytes(refs, "float32", "copy", formats={"w": form})
    path = tmp_path / "weights/model.safetensors"
    read = quantize.dequantized_tensors(path, read_tensors(path))
    assert set(read) == {"w", "norm"}
    wanted = quantize.dequantize(q, scales, zero_points)
    assert (read["w"].shape, read["w"].dtype) == ((7, k), "F32")
    monkeypatch.setattr(quantize, "_CHUNK_VALUES", 2 * k)
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
    count = sum(len(q) for q, _, _ in quantize.quantized_blocks(source, BlockFormat(4, 32, False), "rtn", 256))
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
    found = quantize.quantizable(source.traced.graph.graph)
    table = next(name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in source.traced.parameters)
    assert found == wanted | {table}  # a tied table has the head's name


# ── GGUF ───────────────────────────────────────────────────────────────────────────────────────────────────────

HEADS, KV_HEADS, WIDTH, INNER, VOCABULARY = 4, 2, 128, 160, 37


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A Llama of two layers whose tensors have many formats, as llama.cpp's converter lays them out."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 64),
        ("embedding_length", WIDTH),
        ("block_count", 2),
        ("feed_forward_length", INNER),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("rope.dimension_count", WIDTH // HEADS),
        ("vocab_size", VOCABULARY),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_name("tiny")
    generator = np.random.default_rng(6)
    kinds = gguf.GGMLQuantizationType

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        values = generator.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (VOCABULARY, WIDTH), kinds.Q8_0)
    add("output_norm.weight", (WIDTH,), kinds.F32)
    for layer in range(2):
        for name, shape, kind in (
            ("attn_q", (WIDTH, WIDTH), kinds.Q4_0),
            ("attn_k", (WIDTH // 2, WIDTH), kinds.Q4_0),
            ("attn_v", (WIDTH // 2, WIDTH), (kinds.Q4_0, kinds.Q4_1)[layer]),
            ("attn_output", (WIDTH, WIDTH), kinds.Q5_0),
            ("ffn_gate", (INNER, WIDTH), kinds.F16),
            ("ffn_up", (INNER, WIDTH), kinds.BF16),
            ("ffn_down", (WIDTH, INNER), kinds.Q8_0),
            ("attn_norm", (WIDTH,), kinds.F32),
            ("ffn_norm", (WIDTH,), kinds.F32),
        ):
            add(f"blk.{layer}.{name}.weight", shape, kind)
    writer.add_tensor("rope_freqs.weight", np.ones(16, np.float32))  # of no parameter
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def opened(gguf_file, tmp_path_factory) -> Checkpoint:
    return open_checkpoint(str(gguf_file), tmp_path_factory.mktemp("scratch"), log=lambda _: None)


def test_gguf_as_transformers_reads_it(gguf_file, opened):
    """Every parameter bit by bit, whole and by rows."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype="float32")
    parameters = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    assert set(opened.tensors) == set(parameters)
    for name, values in parameters.items():
        ref = opened.tensors[name]
        assert (ref.shape, ref.dtype, ref.size_bytes) == (values.shape, "F32", values.nbytes)
        assert ref.read().tobytes() == values.tobytes(), name
        assert ref.rows(3, 18).tobytes() == values[3:18].tobytes(), name
        assert ref.rows(len(values) - 1, len(values) + 5).tobytes() == values[-1:].tobytes(), name
    assert opened.config.num_key_value_heads == KV_HEADS


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 4),
        ("model.layers.0.self_attn.k_proj.weight", 4),
        ("model.layers.0.self_attn.v_proj.weight", 4),
        ("model.layers.1.mlp.down_proj.weight", 8),
        ("model.embed_tokens.weight", 8),
    ],
)
def test_gguf_integers_are_taken(tmp_path, opened, name, bits):
    """What is stored dequantizes to gguf's own values, bit by bit: nothing was rounded twice."""
    ref: Any = opened.tensors[name]
    assert ref.native == BlockFormat(bits, 32, True)
    stored = store_weights({name: ref}, "float32", tmp_path, "copy", formats={name: ref.native})
    path = tmp_path / stored[name].location
    read = quantize.dequantized_tensors(path, read_tensors(path))[name]
    assert np.array_equal(read.read(), ref.read())
    assert len(np.unique(unpack(np.frombuffer(data(tmp_path, stored[name]), np.uint8), bits))) > 10


def test_gguf_formats_that_are_not_ours(opened):
    for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "input_layernorm"):
        assert opened.tensors[f"model.layers.1.{part}.weight"].native is None  # type: ignore[attr-defined]
    assert opened.tensors["model.layers.1.self_attn.v_proj.weight"].native is None  # type: ignore[attr-defined]


def test_tensor_that_is_not_only_rows_in_another_order(opened):
    """What a family adds, transposes or shuffles otherwise is converted as a whole, and right."""
    ref: Any = opened.tensors["model.layers.0.mlp.up_proj.weight"]
    plain = ref.read()
    for change, shape in (
        (lambda w: w + 1, (INNER, WIDTH)),
        (lambda w: w.T, (WIDTH, INNER)),
        (lambda w: w[:, ::-1], (INNER, WIDTH)),
        (lambda w: w.reshape(2, INNER // 2, WIDTH)[::-1].reshape(INNER, WIDTH), (INNER, WIDTH)),
    ):
        processor = SimpleNamespace(
            process=lambda weights, name, change=change, **_: SimpleNamespace(weights=change(weights), name=name)
        )
        conversion = dataclasses.replace(ref.conversion, processor=processor)
        changed = dataclasses.replace(ref, conversion=conversion, shape=shape)
        assert np.array_equal(changed.read(), change(plain))
        assert np.array_equal(changed.rows(5, 90), change(plain)[5:90])


# ── the export ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int4", "targets": ("ort", "tensorrt-rtx")}, ("cannot take quantized weights", "tensorrt-rtx")),
        ({"dtype": "int3"}, ("int3", "int4")),
        ({"quantization": "rtn"}, ("--quantization is of quantized weights", "not given")),
        ({"block_size": 32, "dtype": "float32"}, ("--block-size is of quantized weights", "float32")),
        ({"dtype": "int4", "block_size": 64}, ("Unknown --block-size", "32 and 128")),
        ({"dtype": "int8", "quantization": "gptq"}, ("Unknown --quantization", "rtn")),
    ],
)
def test_refusals(options, words):
    with pytest.raises(InputError) as error:
        ExportOptions(**options)
    for word in words:
        assert word in str(error.value)
    assert "Hint: " in str(error.value)


def test_link_is_refused(tmp_path):
    save_file({"w": matrix(4, 64)}, tmp_path / "source.safetensors")
    refs = read_tensors(tmp_path / "source.safetensors")
    with pytest.raises(InputError, match="cannot be linked") as error:
        store_weights(refs, "float32", tmp_path, "link", formats={"w": BlockFormat(4, 32, True)})
    assert "the bundle needs int4" in str(error.value)


@pytest.fixture(scope="module", params=["int4", "int8"])
def exported(request, tmp_path_factory) -> Bundle:
    return make_bundle("llama_tied", tmp_path_factory.mktemp("bundle") / "b", dtype=request.param, targets=("none",))


def test_bundle(exported):
    """The manifest says what is stored; the float values are the model's but for rounding, norms are the same."""
    source, model = family("llama_tied"), exported.manifest.model
    bits = {"int4": 4, "int8": 8}[model.weight_dtype]
    assert model.dtype == "float32"
    assert model.fingerprint == source.checkpoint.fingerprint()
    assert exported.manifest.quantization["bits"] == bits
    assert Bundle.open(exported.root).manifest == exported.manifest
    stored = open_checkpoint(str(exported.root / "weights"), exported.root / "scratch")
    assert set(stored.tensors) == set(source.checkpoint.tensors)
    for name, ref in source.checkpoint.tensors.items():
        values, back = np.asarray(ref.read()), np.asarray(stored.tensors[name].read())
        if "norm" in name:
            assert np.array_equal(back, values)
        else:
            assert 0 < np.abs(back - values).max() < 2 ** (1 - bits) * np.abs(values).max()
    # bytes that a step reads: the q, scales and zero points of every matrix of a layer, its norms in float32
    layer = [ref.shape for name, ref in source.checkpoint.tensors.items() if ".layers.2." in name]
    wanted = 0
    for shape in layer:
        size = 32 if bits == 8 or shape[-1] % 64 == 0 else 16
        values = int(np.prod(shape))
        zero_points = values // size * bits / 8 if bits == 4 else 0
        wanted += 4 * values if len(shape) == 1 else values * bits / 8 + 4 * values // size + zero_points
    assert model.layer_bytes[2] == wanted


def test_perplexity_is_the_models(tmp_path, exported):
    """Layer by layer, with rows of the table and parts of the head, as transformers computes it in one go."""
    source = family("llama_tied")
    ids = np.random.default_rng(3).integers(0, 131, 150)  # more than one piece of the head's tokens
    stored = open_checkpoint(str(exported.root / "weights"), tmp_path)
    for checkpoint in (source.checkpoint, stored):
        model = copy.deepcopy(source.model)
        values = {name: torch.tensor(np.asarray(ref.read())) for name, ref in checkpoint.tensors.items()}
        model.load_state_dict(values, strict=False)
        model.tie_weights()
        with torch.no_grad():
            loss = model(torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss
        ours = Reference(checkpoint, exported.manifest.plan, {}).perplexity(ids)
        assert ours == pytest.approx(float(loss.exp()), rel=1e-4)


def test_target_that_cannot_take_them_is_not_added(exported):
    with pytest.raises(InputError, match="cannot take quantized weights"):
        add_target(exported.root, ["tensorrt-rtx"])


# ── int8 caches ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        {"kv_dtype": "int4"},
        {"kv_dtype": "int8", "targets": ("tensorrt-rtx",)},
        {"kv_dtype": "int8", "dtype": "float16"},
    ],
)
def test_caches_that_no_target_takes_are_refused(options):
    with pytest.raises(InputError, match=r"kv-dtype|int8 caches") as refused:
        ExportOptions(**options)
    assert refused.value.note
    assert refused.value.hint


def test_cache_scales_are_the_largest_magnitudes(tmp_path):
    """Of K after RoPE and of V, per channel, over what transformers itself caches for the same tokens."""
    from transformers import DynamicCache

    source = family("qwen2")
    ids = np.random.default_rng(3).integers(0, 131, 40)
    layers = source.checkpoint.config.num_hidden_layers
    found = Reference(source.checkpoint, DropPlan(layers, ()), {}).largest_kv(ids)
    cache = DynamicCache()
    with torch.no_grad():
        source.model(torch.tensor(ids)[None], past_key_values=cache, use_cache=True)
    assert len(found) == 2 * layers
    for layer in range(layers):
        for part, entries in (("key", cache.layers[layer].keys), ("value", cache.layers[layer].values)):
            expected = entries[0].abs().amax(1, keepdim=True).numpy()  # [Hkv, 1, D]
            np.testing.assert_allclose(found[f"kv_scales.{layer}.{part}"], expected, rtol=1e-4, atol=1e-6)


def test_caches_take_a_quarter(tmp_path):
    """Bytes of valid entries and of the buffers, as the session counts them."""
    counted = []
    for kv_dtype in (None, "int8"):
        bundle = make_bundle("llama", tmp_path / str(kv_dtype), kv_dtype=kv_dtype, drop_layers=(4,))
        with Session.open(bundle.root, threads=1) as session:
            session.generate([[7, 3, 11]], 6, stop_token_ids=())
            counted.append(session.kv_bytes())
    assert counted[0] == {name: 4 * size for name, size in counted[1].items()}


def test_old_onnx_runtime_is_named(tmp_path, monkeypatch):
    import onnxruntime

    bundle = make_bundle("llama", tmp_path / "b", kv_dtype="int8", drop_layers=(4,))
    monkeypatch.setattr(onnxruntime, "__version__", "1.28.3")
    with pytest.raises(BundleError, match="too old") as refused:
        Session.open(bundle.root)
    assert "1.29" in refused.value.note
