"""Layers whose heads differ, and layers that take the K and V of others, on every target: as Gemma 4 has both."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_drop_runtime.bundle.graph_io import Heads
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.decoding.slots import valid_kv_bytes
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_tools.inspect import describe
from lora_drop_tools.shared import costs

from lora_drop_export.decoder.anatomy import kv_sources
from lora_drop_export.targets.trt.build import EngineBuilder
from tests.export.targets.trt.test_against_oracle import parse_alone
from tests.export.test_against_oracle import assert_same_run
from tests.support.bundles import PROMPTS, make_bundle, more_family, oracle_plan, plan_of, save_adapters
from tests.support.models import gemma4

ENTRY = 4  # bytes


def bundle_of(directory: Path, **options: Any) -> Any:
    options = {"always_first": 0, "always_last": 0, "rank": 2, "max_seq_len": 64, "max_prompt_len": 40, **options}
    return make_bundle(more_family("gemma4"), directory / "b", **options)


@pytest.mark.parametrize(
    ("target", "policy", "sites"),
    [
        ("ort", "skip", ("1", "2.mlp", "4")),
        ("ort", "backfill", ("0.mlp", "3", "4")),
        ("openvino", "skip", ("1", "2.mlp", "4")),
        ("openvino", "backfill", ("1", "3", "4")),
        ("openvino", "fill", ("1", "3", "4")),
        ("ort", "fill", ("1", "3", "4")),
        ("tensorrt-rtx", "backfill", ("2.mlp", "3", "4")),
    ],
)
@pytest.mark.parametrize("surrogate", ["residual", "residual-delta"])
def test_against_the_oracle(target, policy, sites, surrogate, tmp_path, monkeypatch):
    monkeypatch.setattr(EngineBuilder, "build", parse_alone)
    bundle = bundle_of(tmp_path, targets=(target,), policy=policy, drop_layers=sites, surrogate=surrogate)
    model, plan = bundle.manifest.model, bundle.manifest.plan
    adapters = save_adapters(tmp_path / "a", plan, model.hidden_size, model.fingerprint, rank=2)
    if target == "tensorrt-rtx":  # ONNX Runtime runs what its parser got
        opened = Session(bundle, OrtEngine(bundle, target, threads=1), PeriodicSchedule(2), policy)
    else:
        opened = Session.open(bundle.root, k=2, threads=1)
    with opened as session:
        session.load_adapters(adapters)
        assert_same_run(session, more_family("gemma4").model, oracle_plan(bundle, adapters), PROMPTS, 2)


def test_bytes_are_those_of_each_layer(tmp_path):
    bundle = bundle_of(tmp_path, policy="skip", drop_layers=("4",))
    model = bundle.manifest.model
    wide, narrow = Heads(4, 1, 32), Heads(4, 2, 16)
    assert model.heads == model.layer_heads == (narrow, wide, wide, narrow, wide)
    assert model.kv_bytes[3:] == (0, 0)  # they make none of their own
    assert 0 < model.kv_bytes[1] < model.attention_bytes[1] < model.layer_bytes[1]
    with Session.open(bundle.root, k=3, threads=1) as session:
        session.generate([[1, 2, 3, 4, 5]], max_new_tokens=8)
        steps, refreshes = 7, 1
        of_one = 2 * ENTRY * 32
        kept, dropped = (5 + steps) * 4 * of_one, (5 + refreshes) * of_one
        kv = session.kv_bytes()
        assert (kv["kept"], kv["dropped"]) == (kept, dropped)
    assert costs.kv_base_bytes(bundle.manifest, 10) == 10 * 5 * of_one
    assert costs.kv_saving(bundle.manifest, 3) == pytest.approx(1 / 5 * 3 / 4)
    heavy = Heads(4, 1, 64)  # those above have the same bytes
    manifest = dataclasses.replace(
        bundle.manifest, model=dataclasses.replace(model, layer_heads=(narrow, heavy, heavy, narrow, heavy))
    )
    assert costs.kv_base_bytes(manifest, 10) == 10 * 8 * of_one
    assert costs.kv_saving(manifest, 3) == pytest.approx(2 / 8 * 3 / 4)
    assert valid_kv_bytes(manifest, 5, 3) == {"kept": 5 * 6 * of_one, "dropped": 3 * 2 * of_one}
    told = "\n".join(describe(bundle))
    assert "4/2 of 16 and 4/1 of 32 heads" in told


def test_sources_of_k_and_v_are_kept():
    own = more_family("gemma4")
    assert own.traced.kv_sources == kv_sources(own.model.config) == (0, 2)
    options = {"always_first": 0, "always_last": 0, "policy": "backfill"}
    assert plan_of(own, **options, drop_ratio=1.0).sites == ("1", "3", "4")
    assert plan_of(own, **options, drop_layers=("0.mlp", "2.mlp", "3")).sites == ("0.mlp", "2.mlp", "3")
    for site in ("2", "2.attn"):
        with pytest.raises(PlanError, match="always kept") as refused:
            plan_of(own, **options, drop_layers=(site,))
        assert "Layer 2 is named, but other layers take its K and V" in refused.value.note
        assert "2.mlp" in refused.value.hint


def test_norms_and_rope_are_single_nodes():
    """Gemma 4 writes both otherwise than Llama. Norms of values, which have no weights, stay what they are, and so does
    those of keys that are a layer's values."""
    kinds = Counter(node.op_type for node in more_family("gemma4").traced.graph.graph)
    assert kinds["RotaryEmbedding"] == 5 + 3  # of queries, and of keys that a layer makes
    assert kinds["RMSNormalization"] == 5 * 6 + 1 + 2  # of layers, of layer 0's keys, before all layers and behind them
    assert kinds["Pow"] == kinds["ReduceMean"] == 3
    assert "Neg" not in kinds


def test_where_k_and_v_come_from():
    types = ["sliding_attention"] * 2 + ["full_attention"] * 4
    config = gemma4(num_hidden_layers=6, layer_types=types, num_kv_shared_layers=0).config
    assert kv_sources(config) == ()
    config.num_kv_shared_layers = 2  # all of them full
    assert kv_sources(config) == (3,)
    with torch.device("meta"):
        assert kv_sources(type(config)(num_hidden_layers=12, num_kv_shared_layers=6)) == (4, 5)
