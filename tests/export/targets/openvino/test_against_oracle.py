"""Target openvino against the oracle, on every family, policy, surrogate and kind of site: tokens and logits by step.

The oracle decodes one token and one row at a time on the unmodified transformers model; here ragged rows run in one
call over paged caches.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lora_drop_export.check.verify import compare
from lora_drop_export.targets.openvino.attention import _Tables
from tests.export.test_against_oracle import PROMPTS, assert_same_run, new_tokens
from tests.export.test_halves import MIXED, six_layers
from tests.support.bundles import (
    first_layers,
    fitted_adapters,
    make_bundle,
    oracle_plan,
    rewritten,
    traced_family,
    traced_model,
)
from tests.support.models import FAMILIES, build, gemma3, llama

OPTIONS = {"targets": ("openvino",), "always_first": 1}
LAYERS = 4  # of a family: what each of them compiles and runs takes as long
LONG = [list(range(3, 3 + 40)), [5], list(range(60, 60 + 33))]  # more than a block, less, and one more than it

# Whose graphs have the operators of a Llama's, but for the tied weight: one policy each
AS_LLAMA = ("llama_tied", "mistral")


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    """Of the windows every family has two under each policy, in turns: it meets all four, the longest with one row."""
    source = first_layers(name, LAYERS)
    bundle = make_bundle(source, tmp_path / "b", drop_ratio=0.5, **OPTIONS)
    engine = OpenVinoEngine(bundle, threads=1)
    policies = ("skip", "backfill")
    if name in AS_LLAMA:
        policies = policies[AS_LLAMA.index(name) % 2 :][:1]
    for turn, policy in enumerate(policies, [*FAMILIES].index(name)):
        session = Session(bundle, engine, PeriodicSchedule(3), policy)
        for k in (0, 1, 3, 19)[turn % 2 :: 2]:
            assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS[: 1 if k == 19 else None], k)
        assert_same_run(session, source.model, oracle_plan(bundle), LONG[:1], 2)
    session.close()


# The other pairs are compared with target ort in tests/runtime/engines/openvino/test_engine.py
@pytest.mark.parametrize(
    ("surrogate", "policy"),
    [
        ("residual", "backfill"),
        ("residual", "fill"),
        ("recurrent", "skip"),
        ("anchor", "backfill"),
        ("anchor", "fill"),
        ("residual-delta", "skip"),
        ("residual-gated", "backfill"),
        ("residual-delta-gated", "fill"),
    ],
)
def test_a_plan_of_all_kinds_of_sites(surrogate, policy, tmp_path):
    """Adapters of each surrogate are exported and, which compiles anew, loaded; prompts are longer than a block."""
    options = OPTIONS | {"surrogate": surrogate, "drop_layers": MIXED, "rank": 4, "policy": policy}
    source, loaded = six_layers("llama"), policy == "backfill"
    adapters = fitted_adapters(source, tmp_path / "a", **options)
    bundle = make_bundle(source, tmp_path / "b", **options, adapters=None if loaded else adapters)
    with Session.open(bundle.root, threads=1) as session:
        if loaded:
            session.load_adapters(adapters)
        for k, prompts in ((3, PROMPTS), (2, LONG)):
            assert_same_run(session, source.model, oracle_plan(bundle, adapters), prompts, k)


@pytest.mark.parametrize("policy", ["skip", "backfill", "fill"])
def test_soft_caps_and_windows(policy, tmp_path):
    """Attention in plain operators, beside the operator that writes the caches; every other layer has a window."""
    source = six_layers("gemma2")
    windows = source.traced.windows
    sites = tuple(site for site in MIXED if policy != "skip" or site.endswith(".mlp") or not windows[int(site[0])])
    options = OPTIONS | {"surrogate": "recurrent", "drop_layers": sites, "policy": policy}
    adapters = fitted_adapters(source, tmp_path / "a", **options)
    bundle = make_bundle(source, tmp_path / "b", **options, adapters=adapters)
    with Session.open(bundle.root, threads=1) as session:
        for prompts in (PROMPTS, LONG):
            assert_same_run(session, source.model, oracle_plan(bundle, adapters), prompts, 3)


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_windows(policy, tmp_path):
    """Those of the operator itself, for attention without a soft cap; `skip` keeps the layer that has one."""
    source = traced_family("gemma3", gemma3(), "float32")
    options = OPTIONS | {"always_first": 0, "always_last": 0, "policy": policy}
    bundle = make_bundle(source, tmp_path / "b", drop_layers=(1,) if policy == "skip" else (0,), **options)
    with Session.open(bundle.root, threads=1) as session:
        for prompts in (PROMPTS, LONG):
            assert_same_run(session, source.model, oracle_plan(bundle), prompts, 3)


def test_graphs_without_tables_of_windows(tmp_path, monkeypatch):
    """Such as bundles had: they run as they did, and layers with a window give the very same from their last blocks."""
    source = traced_family("gemma3", gemma3(), "float32")
    options = OPTIONS | {"always_first": 0, "always_last": 0, "policy": "backfill", "drop_layers": (0,)}
    bundles = [make_bundle(source, tmp_path / "new", **options)]
    of = _Tables.of
    monkeypatch.setattr(_Tables, "of", lambda tables, layer, window: of(tables, layer, 0))
    bundles.append(make_bundle(source, tmp_path / "old", **options))
    logits, groups = [], []
    for bundle in bundles:
        engine = OpenVinoEngine(bundle, threads=1)
        groups.append(engine.table_groups)
        with Session(bundle, engine, PeriodicSchedule(2), "backfill") as session:
            found = [session.prefill(np.array(LONG[:1]), max_new_tokens=60).copy()]
            logits.append(found + [session.step([7]).copy() for _ in range(59)])
    assert groups == [[(0, 0), (1, 5)], [(0, 0), (1, 0)]]
    assert all(np.array_equal(*pair) for pair in zip(*logits, strict=True))


def big_code() -> GPTBigCodeForCausalLM:
    """All of a token's keys are one head, which no Reshape makes."""
    sizes = {"n_embd": 64, "n_head": 4, "n_inner": 96, "n_layer": 2, "n_positions": 64}
    return build(GPTBigCodeForCausalLM, GPTBigCodeConfig, seed=71, **sizes, multi_query=True)


def granite() -> GraniteMoeHybridForCausalLM:
    """Neither RoPE nor positions that are looked up; no layers of Mamba, and no experts."""
    own = {"position_embedding_type": "nope", "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    own |= {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
    return build(GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, seed=72, **own)


@pytest.mark.parametrize("builder", [big_code, granite])
def test_other_ways_to_attend(builder, tmp_path):
    source = traced_model(builder())
    for policy in ("fill", "backfill"):
        options = {"drop_layers": (1,), "always_first": 0, "always_last": 0, "policy": policy, "max_seq_len": 64}
        bundle = make_bundle(source, tmp_path / policy, **options, targets=("openvino",))
        assert compare(bundle, target="openvino", threads=1).passed


@pytest.mark.parametrize(("layers", "policy"), [((0,), "fill"), ((3,), "skip"), ((0, 1, 2, 3), "skip")])
def test_first_last_and_all_layers(layers, policy, tmp_path):
    """Logits are chosen before the last layer's MLP, which may be dropped; or no layer is kept. Without adapters."""
    source = first_layers("llama", LAYERS)
    options = OPTIONS | {"drop_layers": layers, "always_first": 0, "always_last": 0, "policy": policy}
    bundle = make_bundle(source, tmp_path / "b", **options)
    with Session.open(bundle.root, threads=1) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)


@pytest.mark.parametrize("sites", [("0", "1.mlp"), ("0.mlp", "1.mlp")], ids=",".join)
def test_what_an_if_makes_is_read_by_a_kept_attention(sites, tmp_path):
    """Qwen3's queries are wider than the residual stream, and the first call is the one that memory grows for."""
    source = first_layers("qwen3", 2)
    options = OPTIONS | {"always_first": 0, "always_last": 0, "policy": "backfill"}
    bundle = make_bundle(source, tmp_path / "b", drop_layers=sites, **options)
    with Session.open(bundle.root, threads=1) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), LONG, 3)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_mqa", "qwen2", "qwen3", "phi3"])
def test_fused_weights(name, tmp_path, monkeypatch):
    """Weights in the exporter's own order: q, k, v and gate, up are one product each."""
    source = rewritten(first_layers(name, LAYERS))
    adapters = fitted_adapters(source, tmp_path / "a", surrogate="recurrent", **OPTIONS)
    bundle = make_bundle(source, tmp_path / "b", adapters=adapters, **OPTIONS)
    with Session.open(bundle.root, threads=1) as session:
        monkeypatch.setattr("lora_drop_runtime.decoding.request.PREFILL_CHUNK", 2)
        assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, 1)


def test_layers_that_end_with_a_norm(tmp_path, monkeypatch):
    """The residual stream is what that gives, not a sum: its names outlive the norm, too."""
    inside = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *args, **more: self.input_layernorm(inside(self, *args, **more))
    )
    source = traced_model(llama(num_hidden_layers=3))
    options = {"drop_layers": (1,), "always_first": 0, "policy": "backfill"}
    bundle = make_bundle(source, tmp_path / "b", targets=("openvino",), **options)
    with Session.open(bundle.root, threads=1) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)


@pytest.mark.parametrize("policy", ["skip", "backfill", "lossless"])
def test_calls_of_one_width(policy, tmp_path):
    """Tokens that nobody reads bring small calls to the width of others: no row sees them, also after long prompts."""
    source = first_layers("qwen3", LAYERS)
    bundle = make_bundle(source, tmp_path / "b", drop_ratio=0.5, **OPTIONS)
    engine = OpenVinoEngine(bundle, threads=1)
    engine.pads_tokens = True
    with Session(bundle, engine, PeriodicSchedule(3), policy) as session:
        if policy == "lossless":
            with Session.open(bundle.root, k=0, threads=1) as full:
                for prompts in (PROMPTS, LONG):
                    ours, theirs = (one.generate(prompts, 24, stop_token_ids=()) for one in (session, full))
                    assert sum(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)) >= 2  # but a near-tie
        else:
            for prompts, k in ((PROMPTS, 3), (LONG[:1], 2), (PROMPTS[:1], 3)):
                assert_same_run(session, source.model, oracle_plan(bundle), prompts, k)
        assert policy == "skip" or session._running().slots._width > 1


def test_calls_of_one_width_of_a_dropped_last_layer(tmp_path):
    """A LoRA step's surrogate there hands on all tokens, those that nobody reads among them."""
    source = first_layers("llama", LAYERS)
    bundle = make_bundle(source, tmp_path / "b", drop_layers=(3,), always_last=0, **OPTIONS)
    engine = OpenVinoEngine(bundle, threads=1)
    engine.pads_tokens = True
    with Session(bundle, engine, PeriodicSchedule(3), "backfill") as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 1)
        assert session._running().slots._width > len(PROMPTS)


def test_the_neutral_graphs_are_left_as_they_were(tmp_path):
    """Gemma 2 has constants in the graph itself, which another target lowers behind this one."""
    source = first_layers("gemma2", LAYERS)
    options = OPTIONS | {"targets": ("openvino", "ort"), "policy": "backfill"}
    bundle = make_bundle(source, tmp_path / "b", drop_ratio=0.5, **options)
    for target in ("openvino", "ort"):
        with Session.open(bundle.root, target=target, threads=1) as session:
            assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"vocab_size": 130}),
        ("model", {"head_dim": 8}),
        ("model", {"dtype": "bfloat16"}),
        ("plan", {"sites": ["1"]}),
        ("plan", {"surrogate": "recurrent"}),
    ],
)
def test_another_manifest_is_refused(section, values, tmp_path):
    """When the bundle is opened, with a message of the graph and the manifest; not in a step."""
    bundle = make_bundle(first_layers("llama", LAYERS), tmp_path / "b", drop_layers=(2,), **OPTIONS)
    path = bundle.root / "lora_drop.json"
    manifest = json.loads(path.read_text())
    manifest[section] |= values
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="does not fit the bundle's manifest"):
        Session.open(bundle.root, threads=1)


def test_nothing_dropped(tmp_path):
    source = first_layers("llama", LAYERS)
    bundle = make_bundle(source, tmp_path / "b", drop_ratio=0.0, k=2, **OPTIONS)
    with Session.open(bundle.root, threads=1) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)
    assert new_tokens(2) == 7
