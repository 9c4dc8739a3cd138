"""GGUF files: as transformers reads them, and no integer of the checkpoint changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError, ModelError

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.quantize.dequantized import dequantized_tensors
from lora_drop_export.quantize.formats import BlockFormat, dequantize, unpack
from lora_drop_export.weights.resolve import find_tensor, resolve_tensors
from lora_drop_export.weights.store import store_weights
from tests.support.quantized import data

HEADS, KV_HEADS, WIDTH, INNER, VOCABULARY = 4, 2, 128, 160, 37
FLOAT32 = gguf.GGMLQuantizationType.F32


Tensors = list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]]


def write(path: Path, arch: str, fields: dict[str, Any], tensors: Tensors, seed: int) -> dict[str, np.ndarray]:
    """A file of these fields, beside those of a small model, and of random tensors; returns these as they are there.

    RoPE's factors are 1.
    """
    writer, generator, written = gguf.GGUFWriter(path, arch), np.random.default_rng(seed), {}
    usual = {
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "vocab_size": VOCABULARY,
    }
    adding = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (usual | fields).items():
        adding[type(value)](f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_name("tiny")
    for name, shape, kind in tensors:
        values = np.ones(shape) if name == "rope_freqs.weight" else generator.standard_normal(shape)
        packed = gguf.quants.quantize(values.astype(np.float32), kind)
        written[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A Llama of two layers whose tensors have many formats, as llama.cpp's converter lays them out."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    kinds = gguf.GGMLQuantizationType
    tensors = [
        ("token_embd.weight", (VOCABULARY, WIDTH), kinds.Q8_0),
        ("output_norm.weight", (WIDTH,), kinds.F32),
    ]
    for layer in range(2):
        tensors += [
            (f"blk.{layer}.{name}.weight", shape, kind)
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
            )
        ]
    tensors.append(("rope_freqs.weight", (16,), kinds.F32))  # of no parameter
    write(path, "llama", {"block_count": 2, "rope.dimension_count": WIDTH // HEADS}, tensors, seed=6)
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
        assert (ref.shape, ref.dtype, ref.size_bytes) == (values.shape, "float32", values.nbytes)
        assert ref.read().tobytes() == values.tobytes(), name
        assert ref.rows(3, 18).tobytes() == values[3:18].tobytes(), name
        assert ref.rows(len(values) - 1, len(values) + 5).tobytes() == values[-1:].tobytes(), name
    assert opened.config.num_key_value_heads == KV_HEADS


@pytest.mark.parametrize("name", ["tiny.gguf", "link.gguf"])
def test_a_file_is_parsed_once(name, gguf_file, tmp_path, monkeypatch):
    """Also by transformers, several times on its own; afterwards gguf is as it was, and the next file another."""
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    read, made = [], []
    init, table = reader.__init__, gguf.TensorNameMap.__init__
    monkeypatch.setattr(reader, "__init__", lambda self, path, *rest: (read.append(path), init(self, path, *rest))[1])
    monkeypatch.setattr(gguf.TensorNameMap, "__init__", lambda self, *rest: (made.append(rest), table(self, *rest))[1])
    if name == "link.gguf":  # as the hub's cache has files
        (tmp_path / name).symlink_to(gguf_file)
    path = gguf_file.with_name(name) if name == "tiny.gguf" else tmp_path / name
    for count in (1, 2):
        found = open_checkpoint(str(path), tmp_path / f"scratch{count}", log=lambda _: None)
        assert (len(read), len(made), found.name) == (count, count, name)
        assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)


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
    read = dequantized_tensors(path, read_tensors(path))[name]
    assert np.array_equal(read.read(), ref.read())
    assert len(np.unique(unpack(np.frombuffer(data(tmp_path, stored[name]), np.uint8), bits))) > 10


def test_a_scale_that_is_no_number_is_refused(gguf_file, tmp_path, opened):
    """Integers that are taken as they are are not looked at, their scales are."""
    name = "model.layers.0.self_attn.q_proj.weight"
    ref: Any = opened.tensors[name]
    content = bytearray(gguf_file.read_bytes())
    content[ref.offset_bytes : ref.offset_bytes + 2] = np.float16(np.nan).tobytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="cannot be quantized") as error:
        store_weights(
            {name: dataclasses.replace(ref, file=damaged)}, "float32", tmp_path, "copy", formats={name: ref.native}
        )
    assert name in error.value.note


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


def test_a_tensor_that_cannot_be_converted_is_refused(opened):
    """Of another size than its head count allows; the fingerprint reads it before shapes are compared."""
    ref: Any = opened.tensors["model.layers.0.self_attn.q_proj.weight"]
    odd = dataclasses.replace(ref, shape=(2, 2), stored_shape=(2, 2), stored_dtype=np.dtype(np.float32), kind=FLOAT32)
    for read in (odd.read, lambda: odd.rows(0, 1)):
        with pytest.raises(ModelError, match="does not fit the model that its config describes") as error:
            read()
        assert "blk.0.attn_q.weight: ValueError: cannot reshape" in error.value.note


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_transposed_matrix_is_refused(kind, tmp_path):
    """It has as many values as the parameter, in rows of another length."""
    kinds, path = gguf.GGMLQuantizationType, tmp_path / "tiny.gguf"
    write(path, "llama", {"block_count": 1}, [("blk.0.ffn_down.weight", (INNER, WIDTH), kinds[kind])], seed=9)
    checkpoint = open_checkpoint(str(path), tmp_path / "scratch", log=lambda _: None)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ModelError, match="does not hold the model that its config describes") as error:
        resolve_tensors(checkpoint, {name: (WIDTH, INNER)}, {})
    assert error.value.note == f"Parameter {name} {(WIDTH, INNER)} is {(INNER, WIDTH)} there."


def test_rows_of_no_values_take_no_memory(opened):
    """A file of a few bytes may have any number of them."""
    ref: Any = opened.tensors["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ModelError, match="does not fit the model that its config describes"):
        dataclasses.replace(ref, shape=(2**40, 0), stored_shape=(2**40, 0)).rows(0, 1)


@pytest.mark.parametrize("arch", ["qwen2moe", "qwen3moe"])
def test_experts_are_read_as_transformers_reads_them(arch, tmp_path):
    """Whose gate and up are two tensors of all experts; their integers are taken, those of other files rounded."""
    from transformers import AutoModelForCausalLM

    kinds, path, experts, inner, shared = gguf.GGMLQuantizationType, tmp_path / "tiny.gguf", 3, 64, 96
    fields = {"block_count": 1, "attention.key_length": WIDTH // HEADS}
    fields |= {"expert_count": experts, "expert_used_count": 2}
    fields |= {"expert_feed_forward_length": inner, "expert_shared_feed_forward_length": shared}
    in_floats = {
        "token_embd.weight": (VOCABULARY, WIDTH),
        "output.weight": (VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_v.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate_inp.weight": (experts, WIDTH),
    }
    if arch == "qwen3moe":
        in_floats |= {f"blk.0.attn_{part}_norm.weight": (WIDTH // HEADS,) for part in ("q", "k")}
    else:
        in_floats |= {f"blk.0.ffn_{part}_shexp.weight": (shared, WIDTH) for part in ("gate", "up")}
        in_floats |= {"blk.0.ffn_down_shexp.weight": (WIDTH, shared), "blk.0.ffn_gate_inp_shexp.weight": (WIDTH,)}
        in_floats |= {f"blk.0.attn_{part}.bias": (width,) for part, width in (("q", WIDTH), ("k", 64), ("v", 64))}
    tensors = [(name, shape, kinds.F32) for name, shape in in_floats.items()]
    tensors += [(f"blk.0.ffn_{part}_exps.weight", (experts, inner, WIDTH), kinds.Q4_0) for part in ("gate", "up")]
    tensors.append(("blk.0.ffn_down_exps.weight", (experts, WIDTH, inner), kinds.Q4_1))
    written = write(path, arch, fields, tensors, seed=7)

    checkpoint = open_checkpoint(str(path), tmp_path / "scratch", log=lambda _: None)
    assert (checkpoint.config.num_experts, checkpoint.config.moe_intermediate_size) == (experts, inner)
    prefix = "model.layers.0.mlp.experts"
    gate, up, down = (written[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    whole: Any = find_tensor(checkpoint, f"{prefix}.gate_up_proj", experts=experts)
    assert np.array_equal(whole.read(), np.concatenate([gate, up], axis=1))
    rows: Any = find_tensor(checkpoint, f"{prefix}.gate_up_proj.rows")
    assert rows.native == BlockFormat(4, 32, True)
    assert np.array_equal(dequantize(*rows.native_rows(5, 150)), np.stack([gate, up], axis=2).reshape(-1, WIDTH)[5:150])
    others: Any = find_tensor(checkpoint, f"{prefix}.down_proj.rows")
    assert not hasattr(others, "native")
    assert np.array_equal(others.read(), down.reshape(-1, inner))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert resolve_tensors(checkpoint, shapes, {}).keys() == shapes.keys()


def test_gpt_oss(tmp_path):
    """Sinks, biases of experts, gate and up apart, and a RoPE that transformers cannot read."""
    from transformers import AutoModelForCausalLM

    kinds, path, experts, inner, head = gguf.GGMLQuantizationType, tmp_path / "tiny.gguf", 3, 64, WIDTH // HEADS
    fields: dict[str, Any] = {"block_count": 2, "attention.key_length": head, "feed_forward_length": inner}
    fields |= {"expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": inner}
    fields |= {"attention.sliding_window": 5, "rope.freq_base": 1000.0, "rope.scaling.type": "yarn"}
    fields |= {"rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 32}
    sizes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (WIDTH,), "post_attention_norm.weight": (WIDTH,)}
    for part, width in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("output", WIDTH)):
        sizes |= {f"attn_{part}.weight": (width, WIDTH), f"attn_{part}.bias": (width,)}
    sizes |= {"attn_sinks.weight": (HEADS,), "ffn_gate_inp.weight": (experts, WIDTH), "ffn_gate_inp.bias": (experts,)}
    packed = {"ffn_down_exps": (experts, WIDTH, inner)}
    packed |= {f"ffn_{part}_exps": (experts, inner, WIDTH) for part in ("gate", "up")}
    tensors = [(f"{name}.weight", (VOCABULARY, WIDTH), kinds.F32) for name in ("token_embd", "output")]
    tensors.append(("output_norm.weight", (WIDTH,), kinds.F32))
    for block in range(2):
        tensors += [(f"blk.{block}.{name}", shape, kinds.F32) for name, shape in sizes.items()]
        tensors += [(f"blk.{block}.{name}.weight", shape, kinds.MXFP4) for name, shape in packed.items()]
        tensors += [(f"blk.{block}.{name}.bias", shape[:2], kinds.F32) for name, shape in packed.items()]
    written = write(path, "gpt-oss", fields, tensors, seed=8)

    said: list[str] = []
    checkpoint = open_checkpoint(str(path), tmp_path / "scratch", log=said.append)
    assert not any("left out" in line for line in said)
    config = checkpoint.config
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
    }
    assert (config.sliding_window, config.head_dim, config.num_local_experts) == (5, head, experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: source.read() for name, source in resolve_tensors(checkpoint, shapes, {}).items()}
    prefix, block = "model.layers.1", "blk.1"
    assert np.array_equal(found[f"{prefix}.self_attn.sinks"], written[f"{block}.attn_sinks.weight"])
    assert np.array_equal(found[f"{prefix}.mlp.router.bias"], written[f"{block}.ffn_gate_inp.bias"])
    gate, up, down = (written[f"{block}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    both = found[f"{prefix}.mlp.experts.gate_up_proj"]
    assert np.array_equal(both[..., ::2], gate.swapaxes(1, 2))
    assert np.array_equal(both[..., 1::2], up.swapaxes(1, 2))
    assert np.array_equal(found[f"{prefix}.mlp.experts.down_proj"], down.swapaxes(1, 2))
    gate, up, down = (written[f"{block}.ffn_{part}_exps.bias"] for part in ("gate", "up", "down"))
    both = found[f"{prefix}.mlp.experts.gate_up_proj_bias"]
    assert np.array_equal(both[:, ::2], gate)
    assert np.array_equal(both[:, 1::2], up)
    assert np.array_equal(found[f"{prefix}.mlp.experts.down_proj_bias"], down)

    one = next(n for n, (name, _, _) in enumerate(tensors) if name == "blk.1.ffn_up_exps.bias")
    tensors[one] = (tensors[one][0], (experts, inner - 1), kinds.F32)
    write(path, "gpt-oss", fields, tensors, seed=8)
    with pytest.raises(ModelError) as error:
        open_checkpoint(str(path), tmp_path / "scratch", log=lambda _: None)
    assert error.value.note == (
        "model.layers.1.mlp.experts.gate_proj_bias is (3, 64), and model.layers.1.mlp.experts.up_proj_bias is (3, 63)."
    )
