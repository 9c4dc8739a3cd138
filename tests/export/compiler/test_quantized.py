"""Exports with quantized weights and caches: the bundle, its perplexity, what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from safetensors.numpy import save_file

from lora_drop_export.check.reference import Reference
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.compiler import export as exporter
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.quantize.formats import BlockFormat
from lora_drop_export.weights.store import store_weights
from tests.support.bundles import family, make_bundle
from tests.support.models import build
from tests.support.quantized import matrix

# ── the export ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int3"}, ("int3", "int4")),
        ({"quantization": "rtn"}, ("--quantization applies only to int4 and int8 weights", "not given")),
        (
            {"block_size": 32, "dtype": "float32"},
            ("--block-size applies only to int4 and int8 weights", "--dtype is fp32"),
        ),
        ({"dtype": "int4", "block_size": 16}, ("Unknown --block-size", "32, 64, 128, channel and auto")),
        (
            {"dtype": "float32", "block_size": "channel"},
            ("--block-size applies only to int4 and int8 weights", "--dtype is fp32"),
        ),
        (
            {"dtype": "int8", "block_size": "channel", "targets": ("openvino", "ort")},
            ("cannot take a scale for each channel", "works only with openvino; ort was asked for", "--block-size 128"),
        ),
        ({"dtype": "int8", "quantization": "awq"}, ("Unknown --quantization", "rtn")),
        ({"head_dtype": "int8"}, ("--head-dtype applies only to int4 weights", "not given")),
        ({"dtype": "int8", "head_dtype": "int8"}, ("--head-dtype applies only to int4 weights", "int8")),
        ({"dtype": "int4", "head_dtype": "fp16"}, ("Unknown --head-dtype", "int8")),
        (
            {"dtype": "int4", "head_dtype": "int8", "targets": ("ort", "tensorrt-rtx")},
            ("The target cannot take int8 weights", "tensorrt-rtx was asked for"),
        ),
        (
            {"activation_dtype": "bfloat16", "dtype": "float32"},
            ("applies only to quantized weights", "is bf16; --dtype is fp32"),
        ),
        ({"activation_dtype": "int8", "dtype": "int4"}, ("Unknown --activation-dtype", "fp16")),
        (
            {"activation_dtype": "float16", "dtype": "int4", "targets": ("openvino",)},
            ("cannot compute in fp16 with quantized weights", "openvino was asked for"),
        ),
        ({"dtype": "bfloat16", "kv_dtype": "int8", "targets": ("openvino",)}, ("int8 caches work only", "bf16")),
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


def test_head_of_eight_bits_is_told_from_layers(tmp_path):
    """A model of bytes may have as many tokens as a layer has outputs."""
    llama = transformers.LlamaForCausalLM
    model = build(llama, transformers.LlamaConfig, seed=1, vocab_size=64, num_hidden_layers=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    options = ExportOptions(dtype="int4", head_dtype="int8", drop_ratio=0, targets=("none",), max_seq_len=64)
    found = exporter.export(str(tmp_path / "model"), tmp_path / "b", options).manifest.quantization["departures"]
    assert [one["weights"] for one in found if "bits" in one] == ["lm_head.weight"]


@pytest.mark.parametrize("name", ["llama_tied", "llama"])
def test_head_of_eight_bits(name, tmp_path):
    """And the embedding; the rest has four, and the manifest names what has not."""
    bundle = make_bundle(name, tmp_path / "b", dtype="int4", head_dtype="int8", targets=("none",))
    stored = open_checkpoint(str(bundle.root / "weights"), tmp_path / "scratch")
    finer = set()
    for weight, ref in family(name).checkpoint.tensors.items():
        values, back = np.asarray(ref.read()), np.asarray(stored.tensors[weight].read())
        if values.ndim == 2 and np.abs(back - values).max() < np.abs(values).max() / 127:
            finer.add(weight)
    both = {"model.embed_tokens.weight", "lm_head.weight"}
    assert finer == both & set(family(name).checkpoint.tensors)
    named = {one["weights"]: one["bits"] for one in bundle.manifest.quantization["departures"] if "bits" in one}
    assert named == dict.fromkeys(["lm_head.weight"] if name == "llama_tied" else both, 8)


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
            found = model(torch.tensor(ids)[None], labels=torch.tensor(ids)[None])
        ours, likeliest = Reference(checkpoint, exported.manifest.plan, {}).on_text(ids)
        assert ours == pytest.approx(float(found.loss.exp()), rel=1e-4)
        assert likeliest.tolist() == found.logits[0, :-1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("options", "found", "said"),
    [
        ({"dtype": "int4"}, 10.31, True),
        ({"dtype": "int4", "quantization": "rtn"}, 10.31, True),
        ({"dtype": "int4"}, 10.29, False),
        ({"dtype": "int4", "quantization": "gptq"}, 10.31, False),
    ],
    ids=str,
)
def test_what_costs_less_is_said(options, found, said, tmp_path, monkeypatch, capsys):
    """Where integers found without a text cost more than 3 % of perplexity."""
    checkpoint, bundle = family("llama").checkpoint, make_bundle("llama", tmp_path / "b", dtype="int4")
    measured = {"tokens": 9, "float": 10.0, "int4": found, "agreement": 0.9}
    monkeypatch.setattr(exporter, "report_perplexity", lambda *_, **__: measured)
    after = exporter._with_perplexity(bundle, checkpoint, ExportOptions(**options), Console())
    assert after.manifest.quantization["perplexity"] == measured
    assert ("over 3 %: --quantization gptq" in capsys.readouterr().err) is said


def test_perplexity_of_more_tokens_than_opt_is_wide(tmp_path):
    """OPT puts the tokens of all rows behind each other before its MLP, where other models have a row's in a row."""
    config = {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
    model = build(transformers.OPTForCausalLM, transformers.OPTConfig, 61, **config)
    model.save_pretrained(tmp_path / "opt")
    checkpoint = open_checkpoint(str(tmp_path / "opt"), tmp_path / "scratch")
    ids = torch.tensor(np.random.default_rng(3).integers(0, 131, 100))
    with torch.no_grad():
        found = model(ids[None], labels=ids[None])
    for surrogate in ("residual", "residual-delta"):
        plan = DropPlan(2, ("1",), surrogate=surrogate, always_first=0, always_last=0)
        ours, likeliest = Reference(checkpoint, plan, {}).on_text(ids.numpy())
        assert ours == pytest.approx(float(found.loss.exp()), rel=1e-4)
        assert likeliest.tolist() == found.logits[0, :-1].argmax(-1).tolist()


def test_target_that_cannot_take_them_is_not_added(tmp_path):
    made = make_bundle("llama_tied", tmp_path / "b", dtype="int8", targets=("none",))
    with pytest.raises(InputError, match="cannot take int8 weights"):
        add_target(made.root, ["tensorrt-rtx"])


# ── int8 caches ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options",
    [
        {"kv_dtype": "int4"},
        {"kv_dtype": "int8", "targets": ("tensorrt-rtx",)},
        {"kv_dtype": "int8", "dtype": "bfloat16", "targets": ("openvino",)},
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
