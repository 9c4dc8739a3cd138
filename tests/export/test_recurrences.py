"""Recurrent states of Qwen3.5, Mamba 2 and others on both CPU engines: layers of every kind dropped, and the oracle."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
import transformers
from lora_drop_runtime import Batch, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import MOST_PENDING
from lora_drop_runtime.decoding.paged_states import PagedStates
from lora_drop_runtime.decoding.request import Request
from lora_drop_runtime.decoding.slots import Run, _RecurrentStates
from lora_drop_runtime.errors import BundleError, InputError, ModelError
from lora_drop_runtime.plan.schedule import LastLogits, StepKind
from lora_drop_tools.inspect import describe
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lora_drop_export.check.verify import compare
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.decoder.context import is_mlp
from lora_drop_export.decoder.recurrences import exchange_recurrences
from lora_drop_export.decoder.trace import trace
from tests.export.test_against_oracle import PROMPTS, assert_same_run
from tests.runtime.decoding.test_batch import interrupted
from tests.support import oracle
from tests.support.bundles import Family, make_adapted_bundle, make_bundle, oracle_plan, traced_family, traced_model
from tests.support.models import build, quartered, qwen3_5, remembering, skip_without

LONG = [list(range(3, 3 + 40)), [5], list(range(60, 60 + 33))]
ANY: dict[str, Any] = {"always_first": 0, "always_last": 0}
TARGETS = ("ort", "openvino")
SLOTS = ("slots.py", "paged_states.py")  # the ends of the names of files in which an interrupt may come


@functools.cache
def eight() -> Family:
    return traced_family("qwen3_5.eight", qwen3_5(num_hidden_layers=8, layer_types=None), "float32")


def qwen3_next() -> PreTrainedModel:
    """q, k, v and a gate in one product; experts behind each layer."""
    own: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    own |= {"shared_expert_intermediate_size": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2}
    own |= {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return remembering(build(transformers.Qwen3NextForCausalLM, transformers.Qwen3NextConfig, seed=72, **own))


def qwen3_5_moe() -> PreTrainedModel:
    skip_without("Qwen3_5MoeTextConfig")
    own: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    own |= {"shared_expert_intermediate_size": 32, "num_hidden_layers": 4, "linear_num_key_heads": 4}
    own |= {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return remembering(build(transformers.Qwen3_5MoeForCausalLM, transformers.Qwen3_5MoeTextConfig, seed=73, **own))


def olmo_hybrid() -> PreTrainedModel:
    """q, k and v are made apart, and β is up to 2; no RoPE, and other names of norms."""
    skip_without("OlmoHybridConfig")
    own: dict[str, Any] = {"num_hidden_layers": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4}
    own |= {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_allow_neg_eigval": True}
    model = remembering(build(transformers.OlmoHybridForCausalLM, transformers.OlmoHybridConfig, seed=74, **own))
    if not hasattr(model.model.layers[0].linear_attn, "conv1d"):
        pytest.skip("this version of transformers has its convolutions apart")
    return model


def granite_hybrid() -> PreTrainedModel:
    """Mamba 2 with heads in groups, and experts behind it; no RoPE, and halves that count less than the stream."""
    own: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]}
    own |= {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 24, "mamba_expand": 2}
    own |= {"shared_intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    own |= {"residual_multiplier": 0.6, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
    config = transformers.GraniteMoeHybridConfig
    return remembering(build(transformers.GraniteMoeHybridForCausalLM, config, seed=75, **own))


def bamba() -> PreTrainedModel:
    """Mamba 2 as in Granite, in layers that give a pair; a part of a head turns."""
    own: dict[str, Any] = {"num_hidden_layers": 4, "attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_d_head": 16}
    own |= {"mamba_n_groups": 2, "mamba_d_state": 24, "mamba_expand": 2}
    return remembering(build(transformers.BambaForCausalLM, transformers.BambaConfig, seed=76, **own))


def nemotron_h() -> PreTrainedModel:
    """Layers that are Mamba 2, an attention or an MLP alone."""
    own: dict[str, Any] = {"hybrid_override_pattern": "M-*-M-", "head_dim": 16}
    own |= {"mamba_num_heads": 8, "mamba_head_dim": 12}
    own |= {"n_groups": 2, "ssm_state_size": 24, "num_hidden_layers": None}
    return remembering(build(transformers.NemotronHForCausalLM, transformers.NemotronHConfig, seed=77, **own))


def nemotron_h_moe() -> PreTrainedModel:
    """Experts without a gate, in a latent space; routers choose groups first."""
    own: dict[str, Any] = {"hybrid_override_pattern": "ME*E", "head_dim": 16}
    own |= {"mamba_num_heads": 8, "mamba_head_dim": 12}
    own |= {"n_groups": 2, "ssm_state_size": 24, "num_hidden_layers": None, "n_routed_experts": 8, "n_group": 2}
    own |= {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 32}
    own |= {"moe_latent_size": 32, "routed_scaling_factor": 2.5}
    return remembering(build(transformers.NemotronHForCausalLM, transformers.NemotronHConfig, seed=79, **own))


def falcon_h1(**options: Any) -> PreTrainedModel:
    """Mamba 2 beside attention in each layer, and many numbers that scale one or the other; a norm of its output."""
    own: dict[str, Any] = {"num_hidden_layers": 4, "head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 12}
    own |= {"mamba_d_ssm": 96, "mamba_n_groups": 2, "mamba_d_state": 24, "mamba_rms_norm": True}
    own |= {"ssm_multipliers": [0.9, 0.8, 1.7, 1.6, 0.5], "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7}
    own |= {"attention_in_multiplier": 0.8, "attention_out_multiplier": 0.9, "key_multiplier": 0.6}
    own |= {"mlp_multipliers": [0.7, 0.6], "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5}
    return remembering(build(transformers.FalconH1ForCausalLM, transformers.FalconH1Config, seed=78, **own | options))


def falcon_h1_plain() -> PreTrainedModel:
    return falcon_h1(mamba_rms_norm=False)


def kimi_linear(name: str = "KimiLinear") -> PreTrainedModel:
    """Each row of a state forgets at a pace of its own; latent attention, and experts behind a dense layer."""
    skip_without(f"{name}Config")
    own: dict[str, Any] = {"num_hidden_layers": 4, "moe_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 24}
    own |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_local_experts": 8, "n_group": 2}
    own |= {
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
    }
    own |= {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}
    classes = (getattr(transformers, f"{name}{end}") for end in ("ForCausalLM", "Config"))
    return remembering(build(*classes, seed=80, **own))


def bailing_hybrid() -> PreTrainedModel:
    """The same with another gate; the latent attention turns a part of a head."""
    return kimi_linear("BailingHybrid")


OF_HALVES, KIMI = [nemotron_h, nemotron_h_moe], [kimi_linear, bailing_hybrid]
OTHERS = [qwen3_next, qwen3_5_moe, olmo_hybrid, granite_hybrid, bamba, *OF_HALVES, falcon_h1, falcon_h1_plain, *KIMI]


@pytest.mark.parametrize("make", [qwen3_5, *OTHERS])
def test_oracle(make: Any) -> None:
    """Its rules are transformers' own."""
    model, tokens = quartered(make()), torch.arange(3, 20)
    logits = oracle.decode_row(model, oracle.OraclePlan(()), tokens[:4].tolist(), tokens[4:].tolist(), 2)
    with torch.no_grad():
        whole = model(tokens[None], use_cache=False).logits[0, 3:]
    assert (torch.stack(logits) - whole).abs().max() < 3e-5 * whole.abs().max()


@pytest.mark.parametrize(
    ("policy", "surrogate", "sites"),
    [
        ("backfill", "residual", ("0", "3", "4")),
        ("backfill", "recurrent", ("1.attn", "3.mlp", "4", "7.attn")),
        ("fill", "anchor", ("1", "2.attn", "3.attn", "5.mlp")),
        ("skip", "residual", ("1.mlp", "3", "7.attn")),
    ],
)
def test_plan(policy: str, surrogate: str, sites: tuple[str, ...], tmp_path: Path) -> None:
    """Prompts are ragged; cycles are short, and as long as the states allow."""
    options = ANY | {"drop_layers": sites, "policy": policy, "surrogate": surrogate, "rank": 2, "k": 2}
    bundle = make_adapted_bundle(eight(), tmp_path, targets=TARGETS, **options)
    plan = oracle_plan(bundle, tmp_path / "adapters")
    assert "d 64, 4/2 heads, 6 layers with states of 4 × 16 × 24, convolutions over 4 tokens" in describe(bundle)[0]
    for target in TARGETS:
        assert compare(bundle, target=target, threads=1).passed
        with Session.open(bundle.root, policy=policy, target=target, threads=1) as session:
            for prompts, k in ((PROMPTS, 2), (LONG, 3)):
                assert_same_run(session, eight().model, plan, prompts, k)


@functools.cache
def traced(make: Any) -> Family:
    return traced_model(quartered(make()))


@pytest.mark.parametrize("policy", ["fill", "backfill"])
def test_attention_with_a_gate(policy: str, tmp_path: Path) -> None:
    """Queries and gate are made by one product, of which a LoRA step needs neither."""
    options = ANY | {"drop_layers": ("3",), "policy": policy, "k": 1, "targets": ("openvino",)}
    assert compare(make_bundle(traced(qwen3_next), tmp_path / "b", **options), target="openvino", threads=1).passed


@pytest.mark.parametrize("make", [make for make in OTHERS if make is not falcon_h1])
def test_other_family(make: Any, tmp_path: Path) -> None:
    source, sites = traced(make), ("0", "2", "3") if make in OF_HALVES else ("0", "2.attn", "3.mlp")
    options = ANY | {"drop_layers": sites, "policy": "backfill", "rank": 2, "k": 2}
    bundle = make_adapted_bundle(source, tmp_path, targets=TARGETS, **options)
    plan = oracle_plan(bundle, tmp_path / "adapters")
    for target in TARGETS:
        with Session.open(bundle.root, target=target, threads=1) as session:
            for prompts in (PROMPTS, LONG):
                assert_same_run(session, source.model, plan, prompts, 2)


def test_experts_without_a_gate(tmp_path: Path) -> None:
    """In integers too, of a checkpoint with a matrix for each expert; of another activation they are refused."""
    source = traced(nemotron_h_moe)
    assert any(name.endswith("mixer.experts.7.up_proj.weight") for name in source.checkpoint.tensors)
    options = ANY | {"drop_layers": ("1",), "policy": "backfill", "dtype": "int4", "block_size": 32, "k": 2}
    rounded = make_bundle(source, tmp_path / "int4", **options)
    assert compare(rounded, target="ort", threads=1).passed
    again = open_checkpoint(str(rounded.root), tmp_path / "scratch", trust_remote_code=False, log=print)
    assert [ref for ref in again.tensors if ref.endswith("experts.gate_up_proj.rows")]
    other = nemotron_h_moe().config
    other.mlp_hidden_act = "gelu"
    with pytest.raises(ModelError, match="experts without a gate"):
        traced_model(transformers.NemotronHForCausalLM(other))


def test_layers_of_a_config_that_does_not_say_them() -> None:
    """As that of a Nemotron H with code of its own."""
    assert [is_mlp(nemotron_h().config, layer) for layer in range(3)] == [False, True, False]
    assert not is_mlp(SimpleNamespace(model_type="nemotron_h"), 1)


def test_a_form_that_is_not_known() -> None:
    """As OLMo hybrid's with an older transformers, which has its convolutions apart."""
    model = qwen3_5()
    del model.model.layers[0].linear_attn.conv1d
    with pytest.raises(ModelError, match="have a form that is not known"):
        exchange_recurrences(model)


@pytest.mark.parametrize(
    ("make", "name", "parameter"),
    [
        (nemotron_h_moe, "backbone.layers.1.mixer.experts.2.up_proj.weight", r"gate_up_proj \(8, 96, 32\)"),
        (kimi_linear, "model.layers.0.self_attn.k_conv1d.weight", r"conv1d.weight \(192, 1, 4\)"),
    ],
)
def test_a_missing_part_of_a_parameter(make: Any, name: str, parameter: str, tmp_path: Path) -> None:
    """Of experts without a gate, and of a convolution."""
    make().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    checkpoint = open_checkpoint(str(tmp_path / "model"), tmp_path / "scratch", trust_remote_code=False, log=print)
    with pytest.raises(ModelError, match=rf"Of parameter .*{parameter} {re.escape(name)} is missing"):
        trace(checkpoint, "float32")


@pytest.mark.parametrize("policy", ["fill", "skip"])
def test_mamba(policy: str, tmp_path: Path) -> None:
    """In integers as well: the one product that makes all of its inputs is rounded, too. On openvino it is there once,
    though what goes into the rule and the gate of its output lie in different Ifs."""
    source, skips = traced(granite_hybrid), policy == "skip"
    sites = ("0.mlp", "2") if skips else ("0", "1.attn", "2.attn", "3.mlp")
    same = ANY | {"drop_layers": sites, "policy": policy, "k": 2, "targets": TARGETS}
    bundle = make_adapted_bundle(source, tmp_path, **same, rank=2)
    plan = oracle_plan(bundle, tmp_path / "adapters")
    rounded = make_bundle(source, tmp_path / "int4", **same, dtype="int4", block_size=32)
    for target in TARGETS:
        with Session.open(bundle.root, target=target, threads=1) as session:
            assert_same_run(session, source.model, plan, LONG, 2)
        assert compare(rounded, target=target, threads=1).passed
    assert not [one for one in rounded.manifest.quantization.get("departures", ()) if "in_proj" in one["weights"]]
    names = [name for name in _weights_of(bundle) if name.endswith("in_proj.weight")]
    assert sorted(names) == [f"model.layers.{layer}.mamba.in_proj.weight" for layer in (0, 1, 3)]


def _weights_of(bundle: Bundle) -> list[str]:
    """The names of the weights that each node of OpenVINO's graph and of what lies in its Ifs reads."""
    graphs, found = [onnx.load(bundle.root / "openvino" / "steps.onnx", load_external_data=False).graph], []
    while graphs:
        for node in graphs.pop().node:
            values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            graphs += [value for value in values.values() if isinstance(value, onnx.GraphProto)]
            found += [values["name"].decode()] if node.op_type == "Weight" else []
    return found


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    options = ANY | {"drop_layers": ("1", "3", "5"), "policy": "backfill", "k": 2, "max_seq_len": 128}
    made = make_bundle(eight(), tmp_path_factory.mktemp("recurrent") / "b", targets=(request.param,), **options)
    with Batch.open(made.root, slots=1, threads=1):  # the models that OpenVINO compiles for it stay for all others
        yield made


def _alone(bundle: Bundle, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    with Session.open(bundle.root, threads=1) as session:
        pairs = zip(prompts, counts, strict=True)
        return [session.generate([one], count, stop_token_ids=())[0].tolist() for one, count in pairs]


@pytest.mark.parametrize("keeps", [False, True])
def test_rows_join_and_leave(keeps: bool, bundle: Bundle) -> None:
    """Beside others, where another has been, and behind what it has said, a row has the tokens that it has alone."""
    prompts = [[7, 3, 11, 19, 2], [5], list(range(20, 60)), [23, 29, 31], [8, 8]]
    counts, found = [9, 11, 13, 15, 17], dict[int, list[int]]()
    alone = _alone(bundle, prompts, counts)
    prompts += [[*prompt, *said, 4, 9] for prompt, said in zip(prompts[3:], alone[3:], strict=True)]
    counts += [6, 7]
    alone += _alone(bundle, prompts[5:], counts[5:])
    reused = []
    with Batch.open(bundle.root, slots=3, threads=1, keep_prefixes=keeps) as batch:

        def tick() -> None:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                if event.finished:
                    reused.append(event.reused)

        for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            while number == 5 and batch.rows:
                tick()
            found[batch.add(prompt, count, stop_token_ids=())] = []
            tick()
            tick()
        while batch.rows:
            tick()
    assert [*found.values()] == alone
    assert bool(sum(reused)) == keeps


def test_prompts_that_come_together(bundle: Bundle) -> None:
    """The first runs what all have in common, and the others wait for it."""
    head = list(range(10, 60))
    prompts = [[*head, 7, 3, 8], [*head, 7, 3, 8], [5], [*head, 9, 9]]
    alone, found, reused = _alone(bundle, prompts, [6] * 4), dict[int, list[int]](), dict[int, int]()
    with Batch.open(bundle.root, slots=4, threads=1, keep_prefixes=True) as batch:
        for prompt in prompts:
            found[batch.add(prompt, 6, stop_token_ids=())] = []
        assert batch.waiting == 2
        while batch.rows:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                if event.finished:
                    reused[event.row] = event.reused
    assert [*found.values()] == alone
    assert [reused[row] for row in range(4)] == [0, 50, 0, 50]


@pytest.mark.parametrize("ticks", [1, 2, 3, 4, 5, 6])
def test_a_prompt_goes_on_behind_a_row_amid_its_steps(ticks: int, bundle: Bundle) -> None:
    """The row goes on as well, with what its LoRA steps have left."""
    first = list(range(10, 60))
    (said,) = _alone(bundle, [first], [24])
    prompts = [first, [*first, 7, 3, 8], [*first, *said[:3], 9], [*first, *said[:6], 9]]
    alone, found, reused = _alone(bundle, prompts, [24, 6, 6, 6]), dict[int, list[int]](), 0
    with Batch.open(bundle.root, slots=4, threads=1, keep_prefixes=True) as batch:

        def tick() -> None:
            nonlocal reused
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                reused += event.reused if event.finished else 0

        for number, prompt in enumerate(prompts):
            found[batch.add(prompt, 6 if number else 24, stop_token_ids=())] = []
            for _ in range(ticks):
                tick()
        while batch.rows:
            tick()
    assert [*found.values()] == alone
    assert reused


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_prompts_that_begin_alike(slots: int, bundle: Bundle) -> None:
    """The second one leaves what it has where it parts from the first, and all others go on behind that."""
    head = list(range(10, 60))
    prompts = [[*head, *(100 + number, 7, 3)[: 2 + number % 2], 5] for number in range(6)] + [[4, 9], [*head, 9, 9]]
    alone, found, reused = _alone(bundle, prompts, [6] * 8), dict[int, list[int]](), []
    with Batch.open(bundle.root, slots=slots, threads=1, keep_prefixes=True) as batch:
        for prompt in prompts:
            found[batch.add(prompt, 6, stop_token_ids=())] = []
            for _ in range(3):
                for event in batch.tick():
                    found[event.row] += [] if event.token is None else [event.token]
                    reused += [(event.row, event.reused)] if event.finished else []
        while batch.rows:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                reused += [(event.row, event.reused)] if event.finished else []
    assert [*found.values()] == alone
    behind = {row for row, count in reused if count == len(head)}
    assert 2 in behind
    assert behind == {2, 3, 4, 5, 7} or (slots < 5 and behind < {2, 3, 4, 5, 7})  # where no slot is free it goes


@pytest.mark.parametrize("then", ["cancel", "add", "go on"])
@pytest.mark.parametrize("count", [*range(1, 120, 9), None])
def test_rows_go_on_behind_an_interrupt(count: int | None, then: str, bundle: Bundle) -> None:
    """Wherever in a tick, and behind a step that has run, whose logits nobody got: None."""
    prompts, found = [[5], [7, 3, 11], [6, 8], [9, 4]], dict[int, list[int]]()
    alone = _alone(bundle, prompts, [7] * 4)
    with Batch.open(bundle.root, slots=3, threads=1, keep_prefixes=True) as batch:
        ends = dict[int, str]()

        def tick() -> None:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                if event.finished:
                    ends[event.row] = event.finished

        def add(prompt: list[int]) -> int:
            found[row := batch.add(prompt, 7, stop_token_ids=())] = []
            return row

        for prompt in prompts[:2]:
            add(prompt)
        for _ in range(3):
            tick()
        with (
            mock.patch.object(batch._slots, "logits", side_effect=KeyboardInterrupt)
            if count is None
            else interrupted(count, SLOTS),
            contextlib.suppress(KeyboardInterrupt),
        ):
            tick()
        if then == "cancel":
            batch.cancel(0)
        elif then == "add":
            add(prompts[2])
        while batch.rows:
            tick()
        add(prompts[3])
        while batch.rows:
            tick()
    wanted = [*alone[: 3 if then == "add" else 2], alone[3]]
    for row, tokens in found.items():
        assert tokens == wanted[row][: len(tokens)]
        assert ends[row] == "length" or (ends[row], then, row) == ("cancelled", "cancel", 0)


def test_prefix(bundle: Bundle) -> None:
    """A request goes on behind the one before where that has its states, and begins anew where they are of more."""
    first = [7, 3, 11, 19, 2]
    (said,) = _alone(bundle, [first], [8])
    behind, other = [*first, *said, 4, 9, 5], [7, 3, 11, 20, 1]
    expected = _alone(bundle, [behind, other], [6, 6])
    with Session.open(bundle.root, threads=1) as session:
        session.generate([first], 8, stop_token_ids=())
        assert session._request is not None
        with mock.patch.object(Request, "prefill", autospec=True, side_effect=Request.prefill) as prefill:
            again = session.generate([behind], 6, stop_token_ids=(), reuse_prefix=True)[0].tolist()
            assert prefill.call_count == 1
        assert again == expected[0]
        assert session.generate([other], 6, stop_token_ids=(), reuse_prefix=True)[0].tolist() == expected[1]


@pytest.mark.parametrize(("before", "rows"), [(1, 2), (2, 1), (3, 1)])
def test_prefix_of_a_request_of_other_rows(before: int, rows: int, bundle: Bundle) -> None:
    """The states that are taken over are the row's, however many rows the two requests have."""
    first = [[7, 3, 11, 19, 2], [5, 6, 8], [23, 29]][:before]
    with Session.open(bundle.root, threads=1) as session:
        said = session.generate(first, 2, stop_token_ids=())
        prompts = [[*first[0], *said[0].tolist(), 4 + row, 9] for row in range(rows)]
        again = session.generate(prompts, 6, stop_token_ids=(), reuse_prefix=True)
    assert [row.tolist() for row in again] == _alone(bundle, prompts, [6] * rows)


def test_truncate(bundle: Bundle) -> None:
    """Back to what the states have, and no further."""
    prompt, behind = [7, 3, 11, 19, 2], [4, 9, 5]
    with Session.open(bundle.root, threads=1) as session:
        session.prefill(np.array([prompt]))
        for token in (30, 31):
            session.step(np.array([token]))
        session.truncate(6)
        logits = session.step(np.array([behind[0]])).copy()
        assert np.abs(logits - session.prefill(np.array([[*prompt, 30, behind[0]]]))).max() < 1e-4
        for token in behind:
            session.step(np.array([token]))  # the third is a refresh
        with pytest.raises(InputError, match="do not go back that far"):
            session.truncate(8)


def test_fork(bundle: Bundle) -> None:
    prompts = np.array([[7, 3, 11, 19, 2], [5, 6, 7, 8, 9]])
    tokens = [np.array([n, n + 1]) for n in range(10, 18)]
    with Session.open(bundle.root, threads=1) as session:
        session.prefill(prompts)
        expected = [session.step(one).copy() for one in tokens]
        session.prefill(prompts)
        for n in range(2):
            session.step(tokens[n])
        with session.fork() as other:
            for n in range(2, 8):
                assert np.array_equal(other.step(tokens[n]), expected[n])
        for n in range(2, 8):
            assert np.array_equal(session.step(tokens[n]), expected[n])


@pytest.mark.parametrize("k", [0, 2, MOST_PENDING])
def test_interrupted_step_can_be_repeated(k: int, bundle: Bundle) -> None:
    """A refresh that ran and was not counted leaves the states before it."""
    prompt, tokens = np.array([[7, 3, 11, 19, 2]]), [np.array([n]) for n in range(10, 18 + k)]
    with Session.open(bundle.root, threads=1) as session:
        session.prefill(prompt, k=k)
        expected = [session.step(one).copy() for one in tokens]
        session.prefill(prompt, k=k)
        request = session._running()
        for token, wanted in zip(tokens, expected, strict=True):
            with mock.patch.object(request, "took", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                session.step(token)
            request.is_torn = False
            assert np.array_equal(session.step(token), wanted)


@contextlib.contextmanager
def _interrupted_behind(name: str) -> Iterator[None]:
    """Let an interrupt come behind each call of a method of the states, of either kind."""

    def then_interrupted(real: Any) -> Any:
        def interrupted(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            raise KeyboardInterrupt

        return interrupted

    with contextlib.ExitStack() as stack:
        for kind in (_RecurrentStates, PagedStates):
            stack.enter_context(mock.patch.object(kind, name, then_interrupted(getattr(kind, name))))
        yield


@pytest.mark.parametrize("name", ["ready", "ran"])
@pytest.mark.parametrize("size", [3, 60])
def test_interrupted_tick_can_be_repeated(size: int, name: str, bundle: Bundle) -> None:
    """Also where a row has joined meanwhile, and where a run has more tokens than entries are kept."""
    prompts, counts = [[7, 3, 11, 19, 2], [*range(9, 9 + size)], [5, 8]], [13, 16, 9]
    alone, found = _alone(bundle, prompts, counts), dict[int, list[int]]()
    with Batch.open(bundle.root, slots=3, threads=1) as batch:

        def tick() -> None:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]

        for prompt, count in zip(prompts, counts, strict=True):
            found[batch.add(prompt, count, stop_token_ids=())] = []
            for _ in range(9 if len(found) == 1 else 1):
                with _interrupted_behind(name), contextlib.suppress(KeyboardInterrupt):
                    tick()
                tick()
            with _interrupted_behind(name), contextlib.suppress(KeyboardInterrupt):
                tick()
        while batch.rows:
            tick()
    assert [*found.values()] == alone


def test_a_run_in_several_calls_is_not_repeated(bundle: Bundle) -> None:
    """Each call writes over the states before the one before it: behind an interrupt the row cannot go on."""
    if "ort" not in bundle.manifest.targets:
        pytest.skip("over paged caches all of a run is one call")
    with Session.open(bundle.root, k=0, threads=1) as session:
        session.prefill(np.array([[7, 3, 11]]))
        states, run = session._running().slots._states, Run(StepKind.REFRESH, [5, 6], 3, 3)  # type: ignore[union-attr]
        states.ready(StepKind.REFRESH, [run], [0])
        states.ran(1, {0: run._replace(tokens=[5])})
        states.ran(1, {0: run.behind(1)})
        with pytest.raises(InputError, match="A run in several calls was interrupted"):
            states.ready(StepKind.REFRESH, [run], [0])


def test_fork_of_an_interrupted_step(bundle: Bundle) -> None:
    prompt, token = np.array([[7, 3, 11, 19, 2]]), np.array([5])
    with Session.open(bundle.root, k=0, threads=1) as session:
        session.prefill(prompt)
        expected = session.step(token).copy()
        session.prefill(prompt)
        with _interrupted_behind("ran"), pytest.raises(KeyboardInterrupt):
            session.step(token)
        with session.fork() as other:
            assert np.array_equal(other.step(token), expected)


def test_most_lora_steps(bundle: Bundle) -> None:
    with Session.open(bundle.root, k=MOST_PENDING + 1, threads=1) as session:
        session.prefill(np.array([[7, 3]]))
        for _ in range(MOST_PENDING):
            session.step(np.array([5]))
        with pytest.raises(InputError, match="Too many LoRA steps follow each other"):
            session.step(np.array([5]))
        with pytest.raises(InputError, match="Too many LoRA steps follow each other"):
            next(session.stream([7, 3], MOST_PENDING + 2))
        assert len(session.generate([[7, 3]], MOST_PENDING + 1, stop_token_ids=())[0]) == MOST_PENDING + 1
        session.prefill(np.array([[7, 3]]), k=MOST_PENDING)
        for _ in range(2 * MOST_PENDING):
            session.step(np.array([5]))


def test_most_lora_steps_of_a_row(bundle: Bundle) -> None:
    """A row that would go beyond them is refused, or fails alone."""

    class Never:
        def kind(self, step: int, last: LastLogits | None) -> StepKind:
            return StepKind.LORA

    prompts, most = [[7, 3, 11], [5]], MOST_PENDING
    (alone,) = _alone(bundle, prompts[1:], [40])
    with Batch.open(bundle.root, slots=2, threads=1) as batch:
        with pytest.raises(InputError, match="Too many LoRA steps follow each other"):
            batch.add(prompts[0], most + 2, k=most + 1)
        batch.add(prompts[0], most + 1, k=most + 1, stop_token_ids=())
        batch.add(prompts[1], 40, stop_token_ids=())
        batch.add(prompts[0], 40, k=Never(), stop_token_ids=())
        events = []
        while batch.rows:
            events += batch.tick()
    ends = {event.row: event for event in events if event.finished}
    assert [ends[row].finished for row in range(3)] == ["length", "length", "failed"]
    assert isinstance(ends[2].error, InputError)
    assert [sum(event.row == row and event.token is not None for event in events) for row in (0, 2)] == [most + 1] * 2
    assert [event.token for event in events if event.row == 1] == alone


@pytest.fixture(scope="module", params=TARGETS)
def drafting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Bundle, dict[tuple[int, ...], list[int]]]]:
    """A bundle whose drafts are accepted now and then, and behind some prompts what transformers writes."""
    sharp = falcon_h1(lm_head_multiplier=200.0)  # so that drafts are sure enough
    source = traced_model(quartered(sharp))
    options = ANY | {"drop_layers": ("1", "2.attn"), "policy": "lossless", "k": 3, "max_seq_len": 128}
    bundle = make_bundle(source, tmp_path_factory.mktemp("drafting") / "b", targets=(request.param,), **options)
    wanted = {}
    for prompt in LONG:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = source.model.generate(ids, max_new_tokens=50, do_sample=False, use_cache=False, eos_token_id=None)
        wanted[tuple(prompt)] = made[0, len(prompt) :].tolist()
    with Batch.open(bundle.root, slots=1, threads=1):
        yield bundle, wanted


@pytest.mark.parametrize("draft", ["lora", "ngram", "both"])
@pytest.mark.parametrize("k", [1, 3, 31])
def test_lossless(k: int, draft: str, drafting: Any) -> None:
    """What is not accepted leaves the states again, of each row for itself."""
    bundle, wanted = drafting
    with Session.open(bundle.root, k=k, draft=draft, threads=1) as session:
        rows = session.generate(LONG, 50, stop_token_ids=())
        assert [list(row) for row in rows] == [wanted[tuple(prompt)] for prompt in LONG]
        statistics = session.statistics()
    assert 0 < statistics.accepted < statistics.drafted


def test_lossless_rows(drafting: Any) -> None:
    """Rows of their own k join, leave, move, and go on behind what others have said."""
    bundle, wanted = drafting
    prompts, found, reused = [[*prompt] for prompt in wanted], dict[int, list[int]](), 0
    asked = [(prompt, wanted[tuple(prompt)][:count]) for count in (50, 37, 21) for prompt in prompts]
    asked += [([*prompt, *wanted[tuple(prompt)][:20]], wanted[tuple(prompt)][20:]) for prompt in prompts]
    with Batch.open(bundle.root, slots=3, draft="both", threads=1, keep_prefixes=True) as batch:
        for number, (prompt, expected) in enumerate(asked):
            found[batch.add(prompt, len(expected), k=(3, 1, 2, 0)[number % 4], stop_token_ids=())] = []
        while batch.rows:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                reused += event.reused if event.finished else 0
    assert [*found.values()] == [expected for _, expected in asked]
    assert reused


@pytest.mark.parametrize("count", range(1, 400, 23))
def test_lossless_rows_go_on_behind_an_interrupt(count: int, drafting: Any) -> None:
    bundle, wanted = drafting
    found, ends = dict[int, list[int]](), dict[int, str]()
    with Batch.open(bundle.root, slots=3, draft="both", threads=1) as batch:

        def tick() -> None:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                if event.finished:
                    ends[event.row] = event.finished

        for prompt in wanted:
            found[batch.add(list(prompt), 30, stop_token_ids=())] = []
        for _ in range(7):
            tick()
        with interrupted(count, (*SLOTS, "drafter.py")):
            for _ in range(3):
                tick()
        while batch.rows:
            tick()
    for (row, tokens), expected in zip(found.items(), wanted.values(), strict=True):
        assert tokens == expected[: len(tokens)]
        assert ends[row] == "length" or ends[row] == "failed"


@pytest.mark.parametrize("told", [1, 2, 3, 5, 8, 13, 21, 34])
def test_what_stays_of_a_lossless_stream(told: int, drafting: Any) -> None:
    """Wherever its reader leaves it: it goes on, in a fork as well, and is cut back as far as the states allow."""
    bundle, wanted = drafting
    (prompt, said), *_ = wanted.items()
    with Session.open(bundle.root, draft="both", threads=1) as session:
        stream = session.stream([list(prompt)], 50, stop_token_ids=())
        assert [next(stream) for _ in range(told)] == said[:told]
        stream.close()
        steps = [np.array([token]) for token in said[told - 1 : told + 3]]
        with session.fork() as other:
            for one, after in zip(steps, said[told:], strict=False):
                assert int(other.step(one)[0].argmax()) == after
        session.truncate(len(prompt) + told - 1)
        for one, after in zip(steps, said[told:], strict=False):
            assert int(session.step(one)[0].argmax()) == after
        again = session.generate([[*prompt, *said[:20]]], 30, stop_token_ids=(), reuse_prefix=True)
        assert [list(row) for row in again] == [said[20:50]]


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_quantized(dtype: str, tmp_path: Path) -> None:
    """What decides how a state changes stays in float; the other products over one tensor are one."""
    options = ANY | {"drop_layers": ("1", "4", "3.mlp"), "policy": "backfill", "dtype": dtype, "block_size": 32, "k": 2}
    bundle = make_bundle(eight(), tmp_path / "b", targets=TARGETS, **options)
    for target in TARGETS:
        assert compare(bundle, target=target, threads=1).passed
    steps = onnx.load(bundle.root / "ort" / "steps.onnx", load_external_data=False)
    names = {one.name for one in steps.graph.initializer if ".4.linear_attn." in one.name and "proj" in one.name}
    shared = "model.layers.4.linear_attn.in_proj"
    assert {f"{shared}_a.weight", f"{shared}_b.weight"} < names
    assert any("in_proj_qkv+in_proj_z" in name for name in names), names


@pytest.mark.parametrize(("make", "kernel"), [(qwen3_5, "GatedDeltaNet"), (granite_hybrid, "PagedSelectiveSSM")])
def test_openvino_has_kernels_for_the_rules(make: Any, kernel: str, tmp_path: Path) -> None:
    """And runs no loop over tokens, of kept layers and of dropped ones."""
    source = eight() if make is qwen3_5 else traced(make)
    options = ANY | {"drop_layers": ("1",), "policy": "backfill", "targets": ("openvino",)}
    bundle = make_bundle(source, tmp_path / "b", **options)
    with Session.open(bundle.root, threads=1) as session:
        nodes = session._engine.compiled.model.get_runtime_model().get_ops()  # type: ignore[attr-defined]
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
    assert kinds.count(kernel) == len(bundle.manifest.model.recurrent_layers)
    assert {"TensorIterator", "Loop"}.isdisjoint(kinds)


def test_a_layer_that_the_manifest_does_not_name(bundle: Bundle, tmp_path: Path) -> None:
    """Nothing would be bound to its inputs: OpenVINO would read where nothing is, and ONNX Runtime says so."""
    root = tmp_path / "b"
    shutil.copytree(bundle.root, root)
    said = json.loads((root / "lora_drop.json").read_text())
    said["model"]["recurrent_layers"] = said["model"]["recurrent_layers"][:-1]
    (root / "lora_drop.json").write_text(json.dumps(said))
    with pytest.raises(BundleError), Session.open(root, threads=1) as session:
        session.generate([[5, 6, 7]], 4)


def test_neutral_graphs(bundle: Bundle) -> None:
    """Plain ONNX: no other domain than its own, and its own shapes."""
    for name in ("refresh", "lora"):
        model = onnx.load(bundle.root / f"{name}.onnx", load_external_data=False)
        assert {(one.domain, one.version) for one in model.opset_import} == {("", 27)}
        assert not {node.domain for node in model.graph.node} - {""}
        assert sum(node.op_type == "LinearAttention" for node in model.graph.node) == (6 if name == "refresh" else 4)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
