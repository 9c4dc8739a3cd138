"""The parallel run of a text against the oracle, which decodes it one token at a time, and against its own model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import transformers
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_tools.fit.learner import together
from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
from lora_drop_tools.teacher_forcing.layout import Layout
from transformers import PreTrainedModel

from tests.export.test_recurrences import OTHERS, falcon_h1, granite_hybrid, nemotron_h
from tests.support import oracle
from tests.support.covering import covering_array
from tests.support.models import (
    FAMILIES,
    GEMMA2_WINDOW,
    MORE_FAMILIES,
    build,
    falcon,
    falcon_grouped,
    falcon_heads,
    gemma4,
    gemma4_experts,
    gpt_neo,
    gptj,
    quartered,
    qwen3_5,
    stablelm_parallel,
)

TOLERANCE = 3e-5  # of the row's largest |logit|: float32 sums in another order
PROMPT, TOKENS = 5, 17


def random_adapters(plan: DropPlan, width: int, rank: int = 3) -> dict[str, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(rank, plan.form.feature_size(width)), (width, rank), *[(rank, width)] * plan.form.gated]
    return {
        site: tuple(torch.randn(shape, generator=generator) * 0.2 for shape in shapes) for site in plan.adapted_sites
    }


@functools.cache
def made(name: str) -> tuple[PreTrainedModel, TeacherForcing]:
    """The oracle's model, which it does not change, and what is tested, on a copy."""
    others = {"gemma4": lambda: gemma4(hidden_size_per_layer_input=0, num_kv_shared_layers=0)}
    others |= {make.__name__: make for make in (granite_hybrid, nemotron_h, falcon_h1)}
    model = (FAMILIES | MORE_FAMILIES | others)[name]()
    return model, TeacherForcing(copy.deepcopy(model))


def assert_as_the_oracle(name: str, plan: DropPlan, policy: str, k: int, prompt: int = PROMPT, rows: int = 1) -> None:
    model, forcing = made(name)
    ids = torch.randint(0, 131, (rows, TOKENS), generator=torch.Generator().manual_seed(3))
    matrices = random_adapters(plan, 64)
    adapters = {site: (a, b, 1.0, *gates) for site, (a, b, *gates) in matrices.items()}
    theirs = oracle.OraclePlan(plan.sites, plan.surrogate, adapters, fill=policy == "fill")
    found = [oracle.decode_row(model, theirs, row[:prompt].tolist(), row[prompt:].tolist(), k, policy) for row in ids]
    layout = Layout.of(TOKENS, prompt, PeriodicSchedule(k))
    exact = forcing.exact(ids)
    if plan.form.of_runs:  # they have their place where a run ends
        matrices = together(matrices, plan.surrogate_runs)
    with torch.no_grad():
        hidden = forcing.decode(exact, ids, layout, plan, matrices, POLICIES[policy])
        ours = forcing.logits(hidden if policy == "backfill" else hidden[:, layout.lora])
        refreshes = forcing.logits(exact[-1].output if policy == "backfill" else hidden)
    for row in range(rows):
        wanted = torch.stack(found[row])  # after the prompt, then after each token
        for at, position in enumerate(layout.lora.tolist()):
            expected = wanted[position - prompt + 1]
            assert (ours[row, at] - expected).abs().max() < TOLERANCE * expected.abs().max(), (row, position)
        for position in [p for p in layout.full.tolist() if p >= prompt - 1]:
            expected = wanted[position - prompt + 1]
            assert (refreshes[row, position] - expected).abs().max() < TOLERANCE * expected.abs().max()


POLICY_NAMES = ("skip", "backfill", "fill")  # lossless has the stream of backfill
FORMS = oracle.FORMS
MIXED = ("3.mlp", "4", "5.attn", "6.attn", "6.mlp")
HALVES = {
    "whole": ("3", "4", "6"),
    "both halves": ("3.attn", "3.mlp", "4.attn", "4.mlp"),
    "attentions": ("3.attn", "4.attn", "6.attn"),
    "MLPs": ("3.mlp", "4.mlp", "6.mlp"),
}
PLANS = covering_array({"surrogate": FORMS, "halves": HALVES, "policy": POLICY_NAMES}, seed=0)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *((name, "fill") for name in FAMILIES),  # the keys and values of what is dropped are a family's own
        *zip(FAMILIES, itertools.cycle(("skip", "backfill")), strict=False),
        ("gemma2", "skip"),
        ("gemma2", "backfill"),
    ],
)
def test_family(name: str, policy: str) -> None:
    windowed = (0, 2, 4, 6) if name == "gemma2" else ()
    sites = ("3", "4.mlp", "5.attn") if policy == "skip" else ("3", "4", "5.attn", "6.mlp")
    assert_as_the_oracle(name, DropPlan(8, sites, windowed_layers=windowed, rank=3, policy=policy), policy, 3)


@pytest.mark.parametrize(("policy", "sites"), [("skip", ("1",)), ("backfill", ("0", "4")), ("fill", ("3", "4"))])
def test_layers_of_different_heads(policy: str, sites: tuple[str, ...]) -> None:
    plan = DropPlan(5, sites, windowed_layers=(0, 3), rank=3, policy=policy, always_last=0, always_first=0)
    assert_as_the_oracle("gemma4", plan, policy, 3)


@pytest.mark.parametrize(("policy", "sites"), [("skip", ("1",)), ("backfill", ("1.mlp",)), ("fill", ("1.attn",))])
def test_experts(policy: str, sites: tuple[str, ...]) -> None:
    plan = DropPlan(2, sites, rank=3, policy=policy, always_last=0, always_first=0)
    assert_as_the_oracle("qwen2_moe", plan, policy, 3)


@pytest.mark.parametrize(
    ("policy", "sites"), [("skip", ("0.mlp", "1.attn")), ("backfill", ("0",)), ("fill", ("0", "1"))]
)
def test_attention_sinks(policy: str, sites: tuple[str, ...]) -> None:
    plan = DropPlan(2, sites, windowed_layers=(0,), rank=3, policy=policy, always_last=0, always_first=0)
    assert_as_the_oracle("gpt_oss", plan, policy, 3)


@pytest.mark.parametrize(
    ("policy", "sites"), [("skip", ("0.mlp", "1")), ("backfill", ("0", "2.attn")), ("fill", ("0", "1", "2"))]
)
def test_convolutions(policy: str, sites: tuple[str, ...]) -> None:
    plan = DropPlan(3, sites, windowed_layers=(0, 2), rank=3, policy=policy, always_last=0, always_first=0)
    assert_as_the_oracle("lfm2", plan, policy, 3)


@pytest.mark.parametrize(
    ("policy", "sites"), [("skip", ("0.mlp", "1")), ("backfill", ("0", "2.attn")), ("fill", ("0", "1", "2"))]
)
def test_recurrent_states(policy: str, sites: tuple[str, ...]) -> None:
    plan = DropPlan(3, sites, windowed_layers=(0, 2), rank=3, policy=policy, always_last=0, always_first=0)
    assert_as_the_oracle("qwen3_5", plan, policy, 3, rows=2)


@pytest.mark.parametrize(
    ("name", "policy", "sites"),
    [
        ("granite_hybrid", "backfill", ("0", "3.attn")),
        ("granite_hybrid", "fill", ("0", "1", "2.attn")),
        ("nemotron_h", "skip", ("2", "3")),
        ("nemotron_h", "fill", ("0", "1", "2")),
        ("falcon_h1", "backfill", ("0", "2.attn", "3.mlp")),
        ("falcon_h1", "fill", ("1", "2.attn")),
    ],
)
def test_mamba(name: str, policy: str, sites: tuple[str, ...]) -> None:
    """Alone, in layers of one half each, and beside attention."""
    layers, windowed = {"nemotron_h": (6, (0, 4)), "falcon_h1": (4, (0, 1, 2, 3))}.get(name, (4, (0, 1, 3)))
    plan = DropPlan(layers, sites, windowed_layers=windowed, rank=3, policy=policy, always_last=0, always_first=0)
    assert_as_the_oracle(name, plan, policy, 3)


@pytest.mark.parametrize("make", [qwen3_5, *OTHERS])
def test_recurrent_states_in_half_precision(make: Callable[[], PreTrainedModel]) -> None:
    """Rules are in float32, products in the model's dtype; rounding costs about what it costs transformers' own."""
    model, ids = quartered(make()), torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(3))
    low = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        wanted, theirs = (one(ids, use_cache=False).logits.float() for one in (model, low))
        forcing = TeacherForcing(low)
        assert len(forcing.windows()) == len(forcing)
        ours = forcing.logits(forcing.exact(ids)[-1].output)
    assert (ours.float() - wanted).abs().max() < 3 * (theirs - wanted).abs().max()


def test_layers_that_need_more_than_the_stream_are_refused() -> None:
    for own, words in (({}, "K and V of other layers"), ({"num_kv_shared_layers": 0}, "an input of their own")):
        with pytest.raises(ModelError, match="cannot be run one by one") as refused:
            TeacherForcing(gemma4(**own))
        assert words in refused.value.note


@pytest.mark.parametrize(("surrogate", "halves", "policy"), [tuple(plan.values()) for plan in PLANS])
def test_plan(surrogate: str, halves: str, policy: str) -> None:
    plan = DropPlan(8, HALVES[halves], surrogate=surrogate, rank=3, policy=policy)
    assert_as_the_oracle("llama", plan, policy, 5)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("surrogate", FORMS)
def test_mixed_plan(surrogate: str, policy: str) -> None:
    """Each kind of site in one plan, with every surrogate under every policy."""
    plan = DropPlan(8, MIXED, surrogate=surrogate, rank=3, policy=policy)
    assert_as_the_oracle("llama", plan, policy, 5, rows=2)
    assert_as_the_oracle("llama", plan, policy, 1)
    bare = dataclasses.replace(plan, bare_sites=MIXED[::2])
    assert_as_the_oracle("qwen2", bare, policy, 3, prompt=1)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("surrogate", FORMS)
def test_the_first_and_the_last_layer(surrogate: str, policy: str) -> None:
    options = {"surrogate": surrogate, "rank": 3, "always_first": 0, "always_last": 0, "policy": policy}
    ends = DropPlan(8, ("0.attn", "1", "7.attn", "7.mlp"), **options)
    assert_as_the_oracle("qwen2", ends, policy, 3, prompt=1)
    everything = DropPlan(8, tuple(range(8)), **options)
    assert_as_the_oracle("llama_tied", everything, policy, 2)


@pytest.mark.parametrize("model", [gptj, stablelm_parallel, falcon, falcon_grouped])
def test_halves_that_run_beside_each_other_are_refused(model: Callable[[], PreTrainedModel]) -> None:
    forcing = TeacherForcing(model())
    first = DropPlan(2, ("1",), always_first=0, always_last=0)
    forcing.check_halves(first)
    with pytest.raises(ModelError, match=r"(?s)no halves.*layer 1.*Name whole layers"):
        forcing.check_halves(dataclasses.replace(first, sites=("1.attn",)))


@pytest.mark.parametrize("builder", [gpt_neo, falcon, falcon_grouped, falcon_heads])
def test_attention_in_code_of_its_own(builder: Callable[[], PreTrainedModel]) -> None:
    model = builder()
    ids = torch.randint(0, 131, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits  # before its attention is exchanged
        forcing = TeacherForcing(model)
        ours = forcing.logits(forcing.exact(ids)[-1].output)
    assert (ours - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert forcing.windows() == ((4, 0) if builder is gpt_neo else (0, 0))


def test_halves_whose_stream_has_another_shape_are_refused() -> None:
    """OPT puts the tokens of all rows behind each other before its MLP."""
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
    forcing = TeacherForcing(build(transformers.OPTForCausalLM, transformers.OPTConfig, 61, **sizes))
    for site in ("1.attn", "1.mlp"):
        with pytest.raises(ModelError, match=r"(?s)no halves.*layer 1.*Name whole layers"):
            forcing.check_halves(DropPlan(2, (site,), always_first=0, always_last=0))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_has_halves(name: str) -> None:
    made(name)[1].check_halves(DropPlan(8, ("3.attn", "5.mlp")))


def test_layers_that_read_the_stream_between_their_halves_again_have_halves() -> None:
    """In Gemma 4 a router does, and what a layer gives is scaled with the stream in it."""
    forcing = TeacherForcing(gemma4_experts())
    forcing.check_halves(DropPlan(2, ("0.attn", "1.mlp"), always_first=0, always_last=0))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_exact_stream_is_the_model(name: str) -> None:
    model, forcing = made(name)
    ids = torch.randint(0, 131, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits
        ours = forcing.logits(forcing.exact(ids)[-1].output)
    assert (ours - expected).abs().max() < TOLERANCE * expected.abs().max()
    windows = (GEMMA2_WINDOW, 0) * 4 if name == "gemma2" else (0,) * 8
    assert forcing.windows() == windows


def test_layout() -> None:
    layout = Layout.of(10, 3, PeriodicSchedule(2))  # three prompt tokens, LoRA, LoRA, refresh, …
    assert layout.is_lora.tolist() == [False] * 3 + [True, True, False, True, True, False, True]
    assert layout.lora.tolist() == [3, 4, 6, 7, 9]
    assert layout.full.tolist() == [0, 1, 2, 5, 8]
    assert layout.anchor.tolist() == [2, 2, 5, 5, 8]
    assert layout.segment_begin.tolist() == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("surrogate", FORMS)
def test_gradients_are_those_of_finite_differences(surrogate: str, policy: str) -> None:
    model = FAMILIES["llama"]().double()
    plan = DropPlan(8, ("3", "4.mlp", "6.attn"), surrogate=surrogate, rank=3, policy=policy)
    ids = torch.randint(0, 131, (1, 9), generator=torch.Generator().manual_seed(3))
    pairs = {site: tuple(m.double().requires_grad_() for m in pair) for site, pair in random_adapters(plan, 64).items()}
    forcing = TeacherForcing(model)
    layout, exact = Layout.of(9, 2, PeriodicSchedule(2)), forcing.exact(ids)

    def loss() -> torch.Tensor:
        hidden = forcing.decode(exact, ids, layout, plan, pairs, POLICIES[policy])
        return forcing.logits(hidden).log_softmax(-1)[..., 0].sum()

    loss().backward()
    for site, part, at in (
        ("3", 0, (1, 5)),
        ("3", 1, (7, 2)),
        ("4.mlp", 0, (0, 9)),
        ("6.attn", 0, (2, 60)),
        ("6.attn", 1, (11, 0)),
    ):
        matrix, step = pairs[site][part], 3e-3  # the norms compute in float32 whatever the dtype
        with torch.no_grad():
            before = matrix[at].item()
            matrix[at] = before + step
            above = loss().item()
            matrix[at] = before - step
            below = loss().item()
            matrix[at] = before
        assert matrix.grad[at].item() == pytest.approx((above - below) / (2 * step), rel=5e-3, abs=1e-3)
