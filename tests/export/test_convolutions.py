"""Short convolutions of LFM2 and LFM3: on every engine of a CPU, layers of every kind dropped, against the oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime import Batch, Session
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_tools.inspect import describe
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM, PreTrainedModel

from lora_drop_export.check.verify import compare
from lora_drop_export.cli import main
from lora_drop_export.targets.trt.build import EngineBuilder
from tests.export.targets.trt.test_against_oracle import parse_alone
from tests.export.test_against_oracle import PROMPTS, assert_same_run
from tests.support import oracle
from tests.support.bundles import (
    Family,
    make_adapted_bundle,
    make_bundle,
    more_family,
    oracle_plan,
    traced_family,
    traced_model,
)
from tests.support.models import FEW, build, lfm2, quartered, skip_without

BOTH = ("ort", "openvino")
LONG = [list(range(3, 3 + 40)), [5], list(range(60, 60 + 33))]  # more than a block of openvino's, less, and one more
KINDS = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
ANY: dict[str, Any] = {"always_first": 0, "always_last": 0}


@functools.cache
def six() -> Family:
    """Convolutions with biases that are not zero, the first and the last layer among them."""
    return traced_family("lfm2.six", lfm2(num_hidden_layers=6, layer_types=KINDS, conv_bias=True), "float32")


def lfm2_moe() -> PreTrainedModel:
    """Experts behind a convolution; biases of the choice."""
    own = FEW | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}
    own |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return build(Lfm2MoeForCausalLM, Lfm2MoeConfig, seed=68, **own)


def lfm3() -> PreTrainedModel:
    """A layer of each kind and a convolution more; norms of what halves give, and a gate for each head."""
    skip_without("Lfm3Config")
    kinds = ["conv", "sliding_attention", "full_attention", "conv"]
    own = {"num_hidden_layers": 4, "layer_types": kinds, "conv_L_cache": 4, "sliding_window": 5, "head_dim": 16}
    return build(transformers.Lfm3ForCausalLM, transformers.Lfm3Config, seed=69, **own, tie_word_embeddings=True)


def test_oracle() -> None:
    """Its convolution is transformers' own."""
    model, tokens = six().model, torch.arange(3, 12)
    logits = oracle.decode_row(model, oracle.OraclePlan(()), tokens[:4].tolist(), tokens[4:].tolist(), 2)
    with torch.no_grad():
        whole = model(tokens[None], use_cache=False).logits[0, 3:]
    assert (torch.stack(logits) - whole).abs().max() < 3e-5 * whole.abs().max()


@pytest.mark.parametrize(
    ("policy", "surrogate", "sites"),
    [
        ("backfill", "residual", ("0", "3", "4")),
        ("backfill", "recurrent", ("1.attn", "3.mlp", "4", "5.attn")),
        ("fill", "anchor", ("1", "2.attn", "3.attn", "5.mlp")),
        ("skip", "residual", ("1.mlp", "4", "5.mlp")),
    ],
)
def test_plan(policy: str, surrogate: str, sites: tuple[str, ...], tmp_path: Path) -> None:
    """Prompts are ragged and grow, some beyond a block."""
    options = ANY | {"drop_layers": sites, "policy": policy, "surrogate": surrogate, "rank": 2, "k": 2}
    bundle = make_adapted_bundle(six(), tmp_path, targets=BOTH, **options)
    plan = oracle_plan(bundle, tmp_path / "adapters")
    assert "d 64, 4/2 of 16 heads, convolutions over 3 tokens" in describe(bundle)[0]
    for target in BOTH:
        with Session.open(bundle.root, target=target, policy=policy, threads=1) as session:
            for prompts, k in ((PROMPTS, 2), (LONG, 3)):
                assert_same_run(session, six().model, plan, prompts, k)


def test_lfm3(tmp_path: Path) -> None:
    source = traced_model(lfm3())
    options = ANY | {"drop_layers": ("0", "1.attn", "2.attn", "3.mlp"), "policy": "backfill", "rank": 2, "k": 2}
    bundle = make_adapted_bundle(source, tmp_path, targets=BOTH, **options)
    plan = oracle_plan(bundle, tmp_path / "adapters")
    for target in BOTH:
        with Session.open(bundle.root, target=target, threads=1) as session:
            for prompts in (PROMPTS, LONG):
                assert_same_run(session, source.model, plan, prompts, 2)


@pytest.mark.parametrize("target", BOTH)
def test_rows_join_and_leave(target: str, tmp_path: Path) -> None:
    """Beside others, and where another has been, a row has the tokens that it has alone."""
    options = ANY | {"drop_layers": ("1", "3"), "policy": "backfill", "k": 2, "max_seq_len": 64}
    bundle = make_bundle(six(), tmp_path / "b", targets=BOTH, **options)
    prompts = [[7, 3, 11, 19, 2], [5], list(range(20, 60)), [23, 29, 31], [8, 8]]
    counts, found = [9, 11, 13, 15, 17], dict[int, list[int]]()
    with Session.open(bundle.root, target=target, threads=1) as session:
        pairs = zip(prompts, counts, strict=True)
        alone = [session.generate([one], count, stop_token_ids=())[0].tolist() for one, count in pairs]
    with Batch.open(bundle.root, target=target, slots=2, threads=1, keep_prefixes=True) as batch:

        def tick() -> None:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]

        for prompt, count in zip(prompts, counts, strict=True):
            found[batch.add(prompt, count, stop_token_ids=())] = []
            tick()
            tick()
        while batch.rows:
            tick()
    assert [*found.values()] == alone


def test_int8_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On ort, whose convolution reads what it has written; on other targets they are refused before the trace."""
    options = ANY | {"drop_layers": ("1", "4"), "policy": "backfill", "kv_dtype": "int8", "k": 2}
    bundle = make_bundle(six(), tmp_path / "b", **options)
    assert compare(bundle, target="ort", threads=1).passed
    out = ["--out", str(tmp_path / "out"), "--kv-dtype", "int8"]
    assert main(["--model", str(six().directory), *out, "--target", "openvino"]) == 2
    printed = capsys.readouterr().err
    assert "no int8 caches for short convolutions" in printed
    assert "tracing" not in printed
    assert main(["--out", str(bundle.root), "--add-target", "openvino"]) == 2
    assert "no int8 caches for short convolutions" in capsys.readouterr().err


def test_experts(tmp_path: Path) -> None:
    source = traced_model(lfm2_moe())
    bundle = make_bundle(source, tmp_path / "b", targets=BOTH, drop_layers=(2,), policy="backfill", **ANY)
    for target in BOTH:
        with Session.open(bundle.root, target=target, threads=1) as session:
            assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)


def test_bfloat16(tmp_path: Path) -> None:
    """Of smaller weights: what gates multiply, rounding of large ones spoils, in PyTorch as well."""
    source = traced_family("lfm2.quartered", quartered(lfm2()), "bfloat16")
    options = ANY | {"drop_layers": (2,), "policy": "fill", "dtype": "bf16"}
    bundle = make_bundle(source, tmp_path / "b", targets=("openvino",), **options)
    assert compare(bundle, target="openvino", threads=1).passed


def test_graphs_of_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorRT-RTX's parser gets decodes right in ONNX Runtime; its engines are not run here."""
    monkeypatch.setattr(EngineBuilder, "build", parse_alone)
    sizes = {"max_seq_len": 64, "max_prompt_len": 48}
    options = ANY | {"drop_layers": ("1", "4", "5.mlp"), "policy": "backfill", "targets": ("tensorrt-rtx",), **sizes}
    bundle = make_bundle(six(), tmp_path / "b", **options)
    engine = OrtEngine(bundle, "tensorrt-rtx", threads=1)
    with Session(bundle, engine, PeriodicSchedule(2), "backfill") as session:
        for prompts in (PROMPTS, LONG):
            assert_same_run(session, six().model, oracle_plan(bundle), prompts, 2)
        engine.prefill_chunk = 3
        assert_same_run(session, six().model, oracle_plan(bundle), PROMPTS, 2)


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """As llama.cpp's converter does: it tells layers apart by their numbers of K/V heads."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    writer.add_token_merges(["t 0"])
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, np.ascontiguousarray(values[:, 0] if values.ndim == 3 else values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified in PyTorch by the file's epsilon of the norms, which older versions of transformers do not read."""
    source = more_family("lfm2")
    model = source.model
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
    write_gguf(model, tmp_path / "m.gguf")
    options = ["--drop-layers", "2", "--always-first", "0", "--always-last", "0", "--policy", "backfill"]
    options += ["--max-seq-len", "32", "--threads", "1"]
    assert main(["--model", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out"), *options]) == 0
    with Session.open(tmp_path / "out", threads=1) as session:
        assert_same_run(session, model, oracle.OraclePlan(("2",)), PROMPTS, 2)


def test_gguf_of_another_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal says the shape in the file and that of the model."""
    model = lfm2()
    model.config.conv_L_cache = 2
    write_gguf(model, tmp_path / "m.gguf")
    assert main(["--model", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out"), "--max-seq-len", "32"]) == 2
    shapes = "blk.0.shortconv.conv.weight is (64, 1, 3), the model's model.layers.0.conv.conv.weight is (64, 1, 2)."
    assert shapes in capsys.readouterr().err


@pytest.mark.parametrize(("option", "size"), [("hidden_size", 72), ("conv_L_cache", 1)])
def test_others_are_refused(option: str, size: int) -> None:
    with pytest.raises(ModelError, match="of another kind") as refused:
        traced_model(lfm2(**{option: size}))
    assert f"{option} is {size}" in refused.value.note


def test_a_dropped_convolution_is_refused_under_skip(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="always kept") as refused:
        make_bundle(six(), tmp_path / "b", drop_layers=(1,), policy="skip", **ANY)
    assert "short convolution" in refused.value.note
