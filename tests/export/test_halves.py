"""Halves of layers and policy `fill`, exported and run, against the oracle; what is left of the LoRA step."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from lora_drop_runtime.bundle.manifest import ADAPTERS_NAME
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.engine import STANDING_SLOTS
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from lora_drop_export.check.verify import compare
from lora_drop_export.targets.trt.options import BuilderOptions
from tests.export.test_against_oracle import PROMPTS, assert_same_run
from tests.support import oracle
from tests.support.bundles import (
    Family,
    family,
    first_layers,
    make_bundle,
    more_family,
    oracle_plan,
    save_adapters,
)

MIXED = ("1.attn", "2.mlp", "3", "4.attn", "4.mlp")
OPTIONS = {"always_first": 1}


def six_layers(name: str) -> Family:
    """Of which MIXED leaves the first and the last."""
    return first_layers(name, 6)


def _run(bundle, adapters, name, prompts, k, policy=None):
    with Session.open(bundle.root, threads=1, policy=policy) as session:
        if adapters is not None:
            session.load_adapters(adapters)
        assert_same_run(session, six_layers(name).model, oracle_plan(bundle, adapters), prompts, k)


def _fitted(bundle, directory):
    model = bundle.manifest.model
    return save_adapters(directory, bundle.manifest.plan, model.hidden_size, model.fingerprint)


def test_what_follows_the_mlp(tmp_path):
    """In Gemma 4 the stream goes through an input of each layer, and is scaled, after both halves."""
    options = {"drop_layers": ("1.attn",), "always_first": 0, "policy": "fill"}
    assert compare(make_bundle(more_family("gemma4"), tmp_path / "b", **options)).passed


@pytest.mark.parametrize("policy", ["skip", "backfill", "fill"])
@pytest.mark.parametrize("surrogate", ["residual", "recurrent", "anchor", "residual-delta"])
def test_a_plan_of_all_kinds_of_sites(surrogate, policy, tmp_path):
    options = OPTIONS | {"surrogate": surrogate, "drop_layers": MIXED, "rank": 4, "policy": policy}
    bundle = make_bundle(six_layers("llama"), tmp_path / "b", **options)
    _run(bundle, _fitted(bundle, tmp_path / "a"), "llama", PROMPTS, 3)


@pytest.mark.parametrize(
    ("sites", "rank", "policy", "target", "weights"),
    [
        ((1, 2, 3, 4), 4, "backfill", "ort", ["1.lora_A", "1.lora_B"]),
        ((1, 2, 3, 4), 8, "backfill", "ort", ["1.lora_BA"]),
        ((1, 2, 4), 16, "skip", "ort", ["1.lora_BA", "4.lora_A", "4.lora_B"]),
        ((1, 2, 4), 16, "skip", "openvino", ["1.lora_BA", "4.lora_A", "4.lora_B"]),
        ((1, 2), 16, "fill", "ort", ["1.lora_A", "1.lora_B", "2.lora_A", "2.lora_B"]),
        (MIXED, 8, "fill", "ort", ["1.attn.lora_A", "1.attn.lora_B", "2.mlp.lora_A", "2.mlp.lora_B"]),
    ],
)
def test_neighbours_share_a_surrogate(sites, rank, policy, target, weights, tmp_path):
    """Loaded into a session, and exported with; the oracle runs one adapter after the other.

    Which of them are one is no target's matter: each gets weights in both forms.
    """
    source = six_layers("llama")
    options = OPTIONS | {"drop_layers": sites, "policy": policy, "targets": (target,)}
    bundle = make_bundle(source, tmp_path / "b", rank=rank, **options)
    model = bundle.manifest.model
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, model.hidden_size, model.fingerprint, rank=rank)
    stored = sorted(name.removeprefix("surrogate.") for name in read_tensors(bundle.root / "weights" / ADAPTERS_NAME))
    assert stored[: len(weights)] == weights
    assert len(stored) == len(weights) or sites is MIXED
    with_them = make_bundle(source, tmp_path / "c", adapters=adapters, **options)
    _run(bundle, adapters, "llama", PROMPTS, 3)
    with Session.open(with_them.root, threads=1) as session:
        assert_same_run(session, source.model, oracle_plan(with_them, adapters), PROMPTS, 3)


@pytest.mark.parametrize(
    ("name", "policy"),
    [("qwen3", "skip"), ("gemma2", "skip"), ("llama_bias", "fill"), ("gemma2", "fill"), ("phi3", "fill")],
)
def test_families(name, policy, tmp_path):
    sites = MIXED
    if name == "gemma2" and policy == "skip":  # every other layer has a window
        windows = six_layers(name).traced.windows
        sites = tuple(site for site in MIXED if site.endswith(".mlp") or not windows[int(site[0])])
    options = OPTIONS | {"surrogate": "recurrent", "drop_layers": sites, "rank": 4, "policy": policy}
    bundle = make_bundle(six_layers(name), tmp_path / "b", **options)
    _run(bundle, _fitted(bundle, tmp_path / "a"), name, PROMPTS[:1] if name != "qwen3" else PROMPTS, 2)


@pytest.mark.parametrize("sites", [("4",), ("4.attn",), ("4.mlp",)])
def test_fill_alone(sites, tmp_path):
    """Long enough for several cycles, without adapters."""
    bundle = make_bundle(six_layers("llama_tied"), tmp_path / "b", drop_layers=sites, policy="fill")
    _run(bundle, None, "llama_tied", PROMPTS[:1], 3)


def test_graphs_of_tensorrt(tmp_path):
    """TensorRT-RTX builds engines of halves under `fill`, and the ONNX that its parser got decodes right."""
    options = {"targets": ("tensorrt-rtx",), "k": 2, "max_seq_len": 40, "max_prompt_len": 24, "policy": "fill"}
    options["builder"] = BuilderOptions(compute_capabilities=("8.9",))
    bundle = make_bundle(six_layers("llama"), tmp_path / "b", **options, **OPTIONS, drop_layers=MIXED)
    assert bundle.target("tensorrt-rtx")[1].slots == dict.fromkeys(("kept", "dropped"), 39 + STANDING_SLOTS)
    with Session(bundle, OrtEngine(bundle, "tensorrt-rtx", threads=1), PeriodicSchedule(2)) as session:
        assert_same_run(session, six_layers("llama").model, oracle_plan(bundle), PROMPTS, 2)


def test_k_0_is_the_full_schedule(tmp_path):
    bundle = make_bundle(six_layers("llama"), tmp_path / "b", drop_layers=MIXED, policy="fill", **OPTIONS)
    _run(bundle, None, "llama", PROMPTS, 0)


def test_static_flexidepth(tmp_path):
    """Attentions without an adapter, MLPs with one."""
    sites = tuple(f"{i}.{half}" for i in (1, 3) for half in ("attn", "mlp"))
    source, options = six_layers("llama"), {"drop_layers": sites, "policy": "fill", "surrogate": "recurrent"}
    room = make_bundle(source, tmp_path / "room", rank=4, targets=("none",), **options, **OPTIONS)
    plan = room.manifest.plan
    object.__setattr__(plan, "bare_sites", ("1.attn", "3.attn"))
    adapters = _fitted(room, tmp_path / "a")
    bundle = make_bundle(source, tmp_path / "b", **options, **OPTIONS, adapters=adapters)
    assert bundle.manifest.plan.adapted_sites == ("1.mlp", "3.mlp")
    _run(bundle, adapters, "llama", PROMPTS, 3)
    with Session.open(bundle.root, threads=1) as session:
        session.load_adapters(adapters)
    assert set(oracle_plan(bundle, adapters).adapters) == {"1.mlp", "3.mlp"}


def _reads(bundle):
    """Names of the weights that the LoRA step reads."""
    return {tensor.name for tensor in onnx.load(bundle.root / "lora.onnx", load_external_data=False).graph.initializer}


@pytest.mark.parametrize("policy", ["skip", "fill"])
def test_what_is_left_of_a_half(policy, tmp_path):
    options = {"drop_layers": ("3.attn", "4.mlp", "5"), "policy": policy}
    bundle = make_bundle("llama", tmp_path / "b", targets=("none",), **options)
    read = _reads(bundle)

    def left(layer):
        return {name.split(f"layers.{layer}.")[1] for name in read if f"layers.{layer}." in name}

    mlp = {"post_attention_layernorm.weight", *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))}
    attention = {"input_layernorm.weight", *(f"self_attn.{p}_proj.weight" for p in "qkvo")}
    filled = {"input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}
    filled = filled if policy == "fill" else set()
    assert (left(3), left(4), left(5)) == (mlp | filled, attention, filled)
    outputs = {value.name for value in onnx.load(bundle.root / "lora.onnx", load_external_data=False).graph.output}
    assert ("present_key.5" in outputs) == (policy == "fill")
    model = bundle.manifest.model
    own = {name: p.numel() * 4 for name, p in family("llama").model.named_parameters()}
    kv = ("input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    assert model.attention_bytes[3] == sum(own[f"model.layers.3.{name}"] for name in attention)
    assert model.kv_bytes[3] == sum(own[f"model.layers.3.{name}"] for name in kv)


def test_another_policy_is_refused(tmp_path):
    for own, asked in (("fill", "skip"), ("fill", "backfill"), ("skip", "fill")):
        root = tmp_path / own
        if not root.exists():
            make_bundle("llama", root, drop_layers=(4,), policy=own)
        with pytest.raises(PlanError, match=f"policy {asked}"):
            Session.open(root, policy=asked)


def test_fill_keeps_as_much_as_the_full_schedule(tmp_path):
    bundle = make_bundle("llama", tmp_path / "b", drop_layers=("3", "4.attn", "5.mlp"), policy="fill")
    with Session.open(bundle.root, k=3, threads=1) as session:
        session.prefill(np.array([[1, 2, 3]]), max_new_tokens=6)
        for step in range(5):
            session.step(np.array([step]))
        kv, entry = session.kv_bytes(), bundle.manifest.model.token_kv_bytes([0])
    assert (kv["kept"], kv["dropped"]) == (8 * 6 * entry, 8 * 2 * entry)


def test_the_oracle_tells_halves_from_layers():
    """Each kind of site gives other logits, and `fill` others than `skip`."""
    model, tokens = family("llama").model, [5, 6, 7, 8, 9, 10]
    plans = [oracle.OraclePlan(sites) for sites in (("4",), ("4.attn",), ("4.mlp",))]
    plans.append(oracle.OraclePlan(("4",), fill=True))
    last = [oracle.decode_row(model, plan, [1, 2, 3], tokens, 3)[-1] for plan in plans]
    for i, one in enumerate(last):
        assert all((one - other).abs().max() > 1e-4 for other in last[:i])
