"""Fitting: the regression against numpy's own least squares, distillation against one process, files, refusals."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError, LoraDropError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_runtime.plan.surrogate import SURROGATES
from lora_drop_tools.cli import main
from lora_drop_tools.fit.distill import DistillOptions, Divergence, Workers, _rate, distill, run_batch
from lora_drop_tools.fit.fit import fit
from lora_drop_tools.fit.learner import Learner, apart, together, unfolded
from lora_drop_tools.fit.partial import Partial, check_place
from lora_drop_tools.fit.settings import FitSettings
from lora_drop_tools.fit.stages import Report
from lora_drop_tools.teacher_forcing.closed_form import Moments, Site, balanced, batches_of, solve, walk
from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
from lora_drop_tools.teacher_forcing.layout import Layout
from transformers import PreTrainedTokenizerFast

from lora_drop_export.decoder import loaded as torch_model
from tests.support import oracle
from tests.support.bundles import family, make_bundle, more_family, oracle_plan, rewritten
from tests.support.covering import covering_array
from tests.support.models import FAMILIES
from tests.support.tokenizers import with_tokenizer

STREAMS = ("skip", "backfill", "fill")  # lossless has the stream of backfill
SMALL = {"window": 32, "batch": 2, "rank": 3, "closed_form_tokens": 512, "steps": 4}


# ── the regression ─────────────────────────────────────────────────────────────────────────────────────────────


def moments(x: np.ndarray, y: np.ndarray) -> Moments:
    found = Moments()
    found.add(torch.from_numpy(x), torch.from_numpy(y))
    return found


def test_the_solution_is_the_best_of_its_rank() -> None:
    """Without noise and with little ridge: the projection of the least-squares fit on its leading directions."""
    random = np.random.default_rng(1)
    x = random.standard_normal((400, 12)) @ random.standard_normal((12, 12))
    y = x @ random.standard_normal((12, 12)) + random.standard_normal((400, 12))
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    for rank in (1, 3, 12):
        solution = solve(Site(moments(x, y), moments(x, y)), rank)
        assert solution.ridge == 1e-4
        u, s, v = np.linalg.svd(fitted, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ v[:rank]
        ours = x @ (solution.b @ solution.a).double().numpy().T
        assert np.abs(ours - expected).max() < 2e-3 * np.abs(expected).max()
        assert solution.left == pytest.approx(((y - ours) ** 2).sum() / (y**2).sum(), rel=1e-4)
        assert solution.a.shape == (rank, 12)
        assert solution.b.shape == (12, rank)


def test_noise_that_does_not_generalise_is_left_alone() -> None:
    random = np.random.default_rng(2)
    pure = [(random.standard_normal((20, 16)), random.standard_normal((20, 16))) for _ in range(2)]
    solution = solve(Site(moments(*pure[0]), moments(*pure[1])), 16)
    assert solution.left == 1.0
    assert not solution.b.any()


def test_balancing_keeps_the_product() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 3) * 100
    scale = torch.rand(5) + 0.1
    even = balanced(a, b, scale)
    assert torch.allclose(even[1] @ even[0], b @ a, rtol=1e-4, atol=1e-4)
    assert torch.allclose((even[0] * scale).norm(dim=1), even[1].norm(dim=0), rtol=1e-4)


LINEAR = {  # what is dropped of layer 4, and which of its halves are made linear
    "whole": (("4",), ("attn", "mlp")),
    "both": (("4.attn", "4.mlp"), ("attn", "mlp")),
    "attention": (("4.attn",), ("attn",)),
    "MLP": (("4.mlp",), ("mlp",)),
}


def make_linear(layer: torch.nn.Module, half: str, weight: torch.Tensor) -> None:
    """Let a half add `x Wᵀ`, x being the residual stream before its norm."""
    norm, last = {"attn": ("input_layernorm", "self_attn.o_proj"), "mlp": ("post_attention_layernorm", "mlp")}[half]
    seen: list[torch.Tensor] = []
    layer.get_submodule(norm).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    layer.get_submodule(last).register_forward_hook(lambda *_: seen.pop() @ weight.T)


def answer(run: Sequence[str], made: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix that a surrogate has to find: both halves' in turn for a whole layer."""
    if len(run) == 1 and "." in run[0]:
        return made[run[0].partition(".")[2]]
    return made["attn"] + made["mlp"] + made["mlp"] @ made["attn"]


EXACT = covering_array({"surrogate": ("residual", "residual-delta"), "halves": LINEAR, "policy": STREAMS}, seed=0)


@pytest.mark.parametrize(
    ("surrogate", "halves", "policy", "each"),
    [
        *((*plan.values(), False) for plan in EXACT),
        *(("recurrent", "both", policy, False) for policy in STREAMS),
        *(("anchor", "attention", policy, False) for policy in STREAMS),
        ("residual", "both", "backfill", True),  # the sites of all others are runs of their own
        ("residual", "both", "fill", True),
    ],
)
def test_a_site_that_a_surrogate_can_be_is_found(surrogate: str, halves: str, policy: str, each: bool) -> None:
    """A dropped site is given weights that make it linear in its input; a full-rank fit then leaves nothing.

    Those that start from the input alone, as decoded by the oracle. What others leave is less than their base leaves.
    """
    model, (names, linear) = FAMILIES["llama"](), LINEAR[halves]
    plan = DropPlan(8, names, surrogate=surrogate, rank=64, policy=policy)
    exactly = surrogate.startswith("residual")
    if exactly:
        made = {half: torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * 0.05 for half in linear}
        for half in linear:
            make_linear(model.model.layers[4], half, made[half])
    forcing = TeacherForcing(copy.deepcopy(model))
    random = torch.Generator().manual_seed(0)

    def text(number: int) -> tuple[torch.Tensor, Layout]:
        return torch.randint(0, 131, (8, 40), generator=random), Layout.of(40, 5 + number % 4, PeriodicSchedule(3))

    sites: dict[str, Site] = {}

    def choose(name: str, site: Site):
        sites[name] = site
        solution = solve(site, 64)
        return solution.a, solution.b

    runs = [(site,) for site in plan.sites] if each else plan.surrogate_runs
    found = walk(forcing, batches_of(forcing, map(text, range(6))), plan, POLICIES[policy], runs, choose)
    assert list(found) == [run[-1] for run in runs]
    ids, _ = text(0)
    pairs = apart(found, runs, 64)
    adapters = {name: (a, b, 1.0) for name, (a, b) in pairs.items()}
    theirs = oracle.OraclePlan(plan.sites, surrogate, adapters, fill=policy == "fill")
    for name, (a, b) in found.items():
        site = sites[name]
        assert site.fit.error((b @ a).T.double()) <= site.fit.yy + 1e-6
        assert exactly or not b.any() or site.fit.error((b @ a).T.double()) < site.fit.yy
    if exactly:
        for run in runs:
            a, b = found[run[-1]]
            wanted = torch.nn.functional.pad(answer(run, made), (0, a.shape[1] - 64))  # the change adds nothing
            assert (b @ a - wanted).abs().max() < 2e-3, run
        full, fitted = (
            oracle.decode_row(model, theirs, ids[0, :5].tolist(), ids[0, 5:22].tolist(), k, policy) for k in (0, 3)
        )
        for a, b in zip(full, fitted, strict=True):
            assert (a - b).abs().max() < 2e-2


@pytest.mark.parametrize(("batches", "unseen"), [(1, 1), (2, 4), (5, 4), (6, 4), (13, 8)])
def test_some_texts_choose_the_ridge_however_few_there_are(batches: int, unseen: int) -> None:
    forcing, plan = TeacherForcing(FAMILIES["llama"]()), DropPlan(8, ("3",), rank=4, policy="backfill")
    layout, random = Layout.of(12, 4, PeriodicSchedule(3)), torch.Generator().manual_seed(0)
    texts = [(torch.randint(0, 131, (4, 12), generator=random), layout) for _ in range(batches)]
    found: list[Site] = []
    walk(forcing, batches_of(forcing, texts), plan, POLICIES["backfill"], [("3",)], lambda _, site: found.append(site))
    assert found[0].held_out.tokens == unseen * len(layout.lora)
    assert found[0].fit.tokens == (4 * batches - unseen) * len(layout.lora)


# ── distillation ───────────────────────────────────────────────────────────────────────────────────────────────


def test_divergence_against_plain_formulas() -> None:
    """KL, agreement and perplexity from the oracle's logits."""
    model, plan, k = FAMILIES["qwen2"](), DropPlan(8, ("3", "5.attn")), 2
    ids = torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(4))
    ids[0, 9] = 0  # a token like any other, behind a LoRA step
    layout = Layout.of(17, 5, PeriodicSchedule(k))
    forcing = TeacherForcing(copy.deepcopy(model))
    for policy in ("backfill", "skip", "fill"):
        sums = run_batch(forcing, ids, layout, plan, {}, POLICIES[policy])
        expected = Divergence()
        for row in ids.tolist():
            theirs = oracle.OraclePlan(plan.sites, fill=policy == "fill")
            full = oracle.decode_row(model, theirs, row[:5], row[5:], 0)
            ours = oracle.decode_row(model, theirs, row[:5], row[5:], k, policy)
            for position in range(5, 17):
                if policy == "backfill" and (position - 4) % 3 == 0:
                    continue  # a refresh: exact
                p, q = (logits[position - 4].double().log_softmax(0) for logits in (full, ours))
                expected.tokens += 1
                expected.kl += float((p.exp() * (p - q)).sum())
                expected.same += int(p.argmax() == q.argmax())
                if position < 16:
                    expected.followed += 1
                    expected.nats_full -= float(p[row[position + 1]])
                    expected.nats_decoded -= float(q[row[position + 1]])
        assert vars(sums) == pytest.approx(vars(expected), rel=1e-4)
        perplexity = math.exp(expected.nats_decoded / expected.followed)
        assert sums.figures()["perplexity"] == pytest.approx(perplexity, rel=1e-3)


def setting(policy: str = "backfill"):
    model = FAMILIES["llama"]()
    forcing = TeacherForcing(model)
    plan = DropPlan(8, ("3", "4.mlp", "5.attn"), rank=4, policy=policy)
    random = torch.Generator().manual_seed(1)
    stock = [torch.randint(0, 131, (2, 24), generator=random) for _ in range(64)]

    class Stock:
        def __call__(self, number: int) -> tuple[torch.Tensor, Layout]:
            return stock[number % 64], Layout.of(24, 4 + number % 4, PeriodicSchedule(3))

        def state(self) -> dict[str, Any]:
            return {}

        def load(self, state: Mapping[str, Any]) -> None:
            assert state == {}

    texts = Stock()
    pairs = {site: (torch.randn(4, 64, generator=random) / 8, torch.zeros(64, 4)) for site in plan.sites}
    scales = {site: torch.ones(64) for site in plan.sites}
    return forcing, texts, plan, Learner(pairs, scales, plan.surrogate_runs, "cpu"), POLICIES[policy]


@pytest.mark.parametrize("policy", STREAMS)
def test_distillation_lowers_the_loss_and_leaves_the_model_alone(policy: str) -> None:
    forcing, texts, plan, learner, policy = setting(policy)
    before = copy.deepcopy(forcing.model.state_dict())

    def loss() -> float:
        return sum(run_batch(forcing, *texts(number), plan, learner.pairs(), policy).kl for number in range(4))

    at_first = loss()
    distill(forcing, texts, plan, [policy], learner, DistillOptions(20, 2e-2), Workers())
    assert loss() < 0.97 * at_first
    assert all(torch.equal(value, before[name]) for name, value in forcing.model.state_dict().items())
    assert all(parameter.grad.any() for parameter in learner.all())


def test_a_step_has_the_mean_gradient_of_its_batches_and_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    forcing, texts, plan, learner, policy = setting()
    for number in (3, 4):  # behind the three of the closed form
        run_batch(forcing, *texts(number), plan, learner.surrogates(), policy, True)
    expected = [parameter.grad / 2 for parameter in learner.all()]
    clipped: list[tuple[list[torch.Tensor], float]] = []

    def noted(parameters: Sequence[torch.nn.Parameter], most: float) -> None:
        clipped.append(([parameter.grad.clone() for parameter in parameters], most))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    distill(forcing, texts, plan, [policy], learner, DistillOptions(1, 1e-2, accumulate=2, first=3), Workers())
    ((ours, most),) = clipped
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)
    assert most == 1.0


def test_the_rate_rises_for_a_tenth_of_the_steps_and_falls_to_a_tenth() -> None:
    rates = [_rate(step, DistillOptions(40, 1e-3)) for step in range(40)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4 + 18] == pytest.approx(0.55)  # halfway down
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert 0.1 < rates[-1] < 0.102
    assert _rate(0, DistillOptions(1, 1e-3)) == 1


@pytest.mark.parametrize(("count", "rank"), [(1, 4), (1, 16), (3, 4), (3, 9), (5, 2)])
@pytest.mark.parametrize("kept", [2, 12, 16])
@pytest.mark.parametrize("features", [16, 32])
def test_a_map_as_adapters_one_behind_the_other(count: int, rank: int, kept: int, features: int) -> None:
    """Of more singular values than the adapters have room for the largest stay; the map may have no inverse.

    Features that are not the stream are the same for all adapters.
    """
    generator = np.random.default_rng(count * rank)
    a, b = generator.standard_normal((kept, features)) / 4, generator.standard_normal((16, kept)) / 4
    total = np.eye(features)
    pairs = unfolded(a, b, count, rank)
    for next_a, next_b in pairs:
        assert (next_a.shape, next_b.shape) == ((rank, features), (16, rank))
        total[:16] += next_b @ (next_a @ total)
    assert len(pairs) == count
    u, sizes, v = np.linalg.svd(b @ a, full_matrices=False)
    sizes[count * rank :] = 0
    np.testing.assert_allclose((total - np.eye(features))[:16], u * sizes @ v, atol=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_map_that_forgets_what_it_gets(share: float) -> None:
    """I − I, whole or of half of the features: what is inverted on the way has no inverse."""
    gone = (np.arange(16) < 16 * share).astype(float)
    total = np.eye(16)
    for a, b in unfolded(-np.diag(gone), np.eye(16), 4, 5):
        total = total + b @ (a @ total)
    np.testing.assert_allclose(total, np.diag(1 - gone), atol=1e-9)


@pytest.mark.parametrize("rank", [3, 16, 40])
@pytest.mark.parametrize("surrogate", [name for name in SURROGATES if name.startswith("residual")])
def test_runs_are_learned_as_one(surrogate: str, rank: int) -> None:
    """What is learned decodes as the adapters do, before a step and after one, whatever form it has."""
    forcing, texts, _, _, policy = setting()
    plan = DropPlan(8, ("3", "4.attn", "4.mlp", "6"), rank=rank, surrogate=surrogate, policy="backfill")
    random, features = torch.Generator().manual_seed(2), plan.form.feature_size(64)
    shapes = (rank, features), (64, rank), *((rank, 64) for _ in range(plan.form.gated))
    pairs = {site: tuple(torch.randn(shape, generator=random) / 9 for shape in shapes) for site in plan.sites}
    scales = {site: torch.rand(features, generator=random) + 0.5 for site in plan.sites}
    learner = Learner(pairs, scales, plan.surrogate_runs, "cpu")
    factors = [1 if 3 * rank >= 64 else 2, 2]
    assert [len(parts) for parts in learner.parameters.values()] == ([3, 3] if plan.form.gated else factors)
    ids, layout = texts(3)

    def kl(surrogates: Any) -> float:
        if set(surrogates) == set(plan.sites) and plan.form.of_runs:
            surrogates = together(surrogates, plan.surrogate_runs)
        return run_batch(forcing, ids, layout, plan, surrogates, policy).kl

    assert kl(learner.surrogates()) == pytest.approx(kl(pairs), rel=1e-3)
    assert kl(learner.pairs()) == pytest.approx(kl(pairs), rel=1e-3)
    distill(forcing, texts, plan, [policy], learner, DistillOptions(2, 1e-2), Workers())
    assert kl(learner.surrogates()) != pytest.approx(kl(pairs), rel=1e-3)
    assert kl(learner.pairs()) == pytest.approx(kl(learner.surrogates()), rel=1e-3)


def test_resuming_gives_what_one_run_gives(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    forcing, texts, plan, whole, policy = setting()
    ticks = itertools.count()
    options = DistillOptions(6, 1e-2, accumulate=2, checkpoint_seconds=2, clock=lambda: float(next(ticks)))
    losses = distill(forcing, texts, plan, [policy], whole, options, Workers())
    forcing, texts, plan, learner, policy = setting()

    def stop(done: int, total: int, loss: float, rate: float) -> None:
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        distill(forcing, texts, plan, [policy], learner, options, Workers(), tmp_path / "state.pt", stop)
    assert torch.load(tmp_path / "state.pt")["step"] == 2  # written every other second, not every one from then on
    forcing, texts, plan, again, policy = setting()
    assert distill(forcing, texts, plan, [policy], again, options, Workers(), tmp_path / "state.pt") == losses
    for a, b in zip(whole.all(), again.all(), strict=True):
        assert torch.equal(a, b)


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────


def run_fit(model: Path, words: Path, out: Path, **options):
    return fit(str(model), FitSettings(text=(words,), out=out, **(SMALL | options)))


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Ctrl-C ends a fit once a step of distillation was reported."""
    report = Report.__call__

    def interrupted(self: Report, done: int, *others: Any) -> None:
        report(self, done, *others)
        if done == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_from_text_to_a_bundle(model_dir: Path, words: Path, tmp_path: Path) -> None:
    """The adapters are PEFT's format, export and load, and decode as fitted: each stage is better on held-out text."""
    result = run_fit(model_dir, words, tmp_path / "a", drop_layers=(3, 5), steps=12, alpha=6.0, policies=("backfill",))
    assert set(result.stages) == {"base", "closed form", "distillation"}
    assert result.stages["distillation"]["kl"] < result.stages["base"]["kl"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "fit.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    source = family("llama")
    bundle = make_bundle(source, tmp_path / "b", adapters=tmp_path / "a")
    assert bundle.manifest.plan.sites == ("3", "5")
    assert bundle.manifest.plan.rank == 3
    assert bundle.manifest.plan.policy == "backfill"  # what they were fitted for
    plan = oracle_plan(bundle, tmp_path / "a")
    with Session.open(bundle.root, threads=1) as session:
        ours = [session.prefill([[1, 2, 3]], max_new_tokens=8)[0].copy()]
        ours += [session.step([token])[0].copy() for token in (4, 5, 6, 7)]
    theirs = oracle.decode_row(source.model, plan, [1, 2, 3], [4, 5, 6, 7], 3, "backfill")
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b.numpy()).max() < 3e-5 * b.abs().max()
    with pytest.raises(PlanError, match="drop list"):
        make_bundle(source, tmp_path / "c", adapters=tmp_path / "a", drop_layers=(3, 4))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama", "llama_mqa", "llama_mha")])
def test_every_family(name: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiny tokenizer, whatever class transformers has for the family; counts of heads reach no adapter.

    A Llama: test_from_text_to_a_bundle.
    """
    with_tokenizer(name, tmp_path / "m")
    monkeypatch.setattr(torch_model, "read_tokenizer", lambda path, _: PreTrainedTokenizerFast.from_pretrained(path))
    result = run_fit(tmp_path / "m", words, tmp_path / "a", drop_ratio=0.5, steps=2, closed_form_tokens=128)
    bundle = make_bundle(name, tmp_path / "b", adapters=tmp_path / "a")
    assert list(bundle.manifest.plan.sites) == list(result.plan["sites"])


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "falcon"])
def test_layers_that_are_called_h(name: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPT-2 has them: what is fitted is exported, and decodes as the oracle does."""
    with_tokenizer(name, tmp_path / "m")
    monkeypatch.setattr(torch_model, "read_tokenizer", lambda path, _: PreTrainedTokenizerFast.from_pretrained(path))
    options = {"drop_layers": (1,), "always_first": 0, "always_last": 0, "policies": ("backfill",)}
    run_fit(tmp_path / "m", words, tmp_path / "a", steps=2, closed_form_tokens=128, **options)
    source = more_family(name)
    bundle = make_bundle(source, tmp_path / "b", adapters=tmp_path / "a")
    plan = oracle_plan(bundle, tmp_path / "a")
    with Session.open(bundle.root, threads=1) as session:
        ours = [session.prefill([[1, 2, 3]], max_new_tokens=8)[0].copy()]
        ours += [session.step([token])[0].copy() for token in (4, 5, 6, 7)]
    theirs = oracle.decode_row(source.model, plan, [1, 2, 3], [4, 5, 6, 7], 3, "backfill")
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b.numpy()).max() < 3e-5 * b.abs().max()


@pytest.mark.parametrize(
    ("surrogate", "injection", "policy"),
    [
        *(("recurrent", "attn_mlp", policy) for policy in STREAMS),
        *(("anchor", "block", policy) for policy in STREAMS),
        ("residual-delta", "attn_mlp", "fill"),  # its halves under all of them: test_halves_from_text_to_a_bundle
    ],
)
def test_every_plan(surrogate: str, injection: str, policy: str, model_dir: Path, words: Path, tmp_path: Path) -> None:
    options = {"surrogate": surrogate, "injection": injection, "policies": (policy,), "drop_ratio": 0.75, "k": (1, 3)}
    run_fit(model_dir, words, tmp_path / "a", **options, steps=2, rank=64, closed_form_tokens=128)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["lora_drop"]["k"] == [1, 3]
    bundle = make_bundle("llama", tmp_path / "b", adapters=tmp_path / "a", surrogate=surrogate, injection=injection)
    assert bundle.manifest.plan.rank == 64


@pytest.mark.parametrize(
    ("surrogate", "injection", "policy"),
    [("recurrent", "attn_mlp", "skip"), ("anchor", "block", "backfill"), ("residual-delta", "attn_mlp", "fill")],
)
def test_distillation_alone(
    surrogate: str, injection: str, policy: str, model_dir: Path, words: Path, tmp_path: Path
) -> None:
    options = {"surrogate": surrogate, "injection": injection, "policies": (policy,), "drop_ratio": 0.75, "k": (1, 3)}
    result = run_fit(model_dir, words, tmp_path / "a", **options, steps=2, closed_form_tokens=0)
    assert set(result.stages) == {"base", "distillation"}
    assert json.loads((tmp_path / "a/fit.json").read_text())["losses"] == result.losses


@pytest.mark.parametrize("policy", STREAMS)
@pytest.mark.parametrize("surrogate", [name for name in SURROGATES if name.startswith("residual")])
def test_halves_from_text_to_a_bundle(
    surrogate: str, policy: str, model_dir: Path, words: Path, tmp_path: Path
) -> None:
    """A mixed list and a policy from a file: what is written has them, exports, and decodes as the oracle does."""
    (tmp_path / "list.json").write_text(json.dumps({"sites": ["3", "4.mlp", "5.attn"], "policy": policy}))
    options = {"drop_list": tmp_path / "list.json", "steps": 2, "surrogate": surrogate}
    run_fit(model_dir, words, tmp_path / "a", **options)
    said = json.loads((tmp_path / "a/adapter_config.json").read_text())["lora_drop"]
    assert (said["sites"], said["bare_sites"], said["policy"]) == (["3", "4.mlp", "5.attn"], [], policy)
    source = family("llama")
    bundle = make_bundle(source, tmp_path / "b", adapters=tmp_path / "a")
    assert bundle.manifest.plan.sites == ("3", "4.mlp", "5.attn")
    with Session.open(bundle.root, threads=1) as session:
        ours = [session.prefill([[1, 2, 3]], max_new_tokens=8)[0].copy()]
        ours += [session.step([token])[0].copy() for token in (4, 5, 6, 7, 8)]
    theirs = oracle.decode_row(source.model, oracle_plan(bundle, tmp_path / "a"), [1, 2, 3], [4, 5, 6, 7, 8], 3, policy)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b.numpy()).max() < 3e-5 * b.abs().max()


def test_a_static_flexidepth_plan(model_dir: Path, words: Path, tmp_path: Path) -> None:
    """Attentions have only their base, MLPs an adapter; so has the bundle."""
    from lora_drop_runtime.bundle.safetensors_file import read_tensors

    options = {"drop_layers": (3, 5), "injection": "attn_mlp", "policies": ("fill",), "adapters_for": "mlp", "steps": 2}
    result = run_fit(model_dir, words, tmp_path / "a", **options)
    assert list(result.plan["bare_sites"]) == ["3.attn", "5.attn"]
    assert result.stages["closed form"]["kl"] < result.stages["base"]["kl"]
    bundle = make_bundle("llama", tmp_path / "b", adapters=tmp_path / "a")
    plan = bundle.manifest.plan
    assert (plan.sites, plan.policy) == (("3.attn", "3.mlp", "5.attn", "5.mlp"), "fill")
    assert (plan.adapted_sites, plan.bare_sites) == (("3.mlp", "5.mlp"), ("3.attn", "5.attn"))
    stored = read_tensors(bundle.root / "weights" / "adapters.safetensors")
    assert {name.removeprefix("surrogate.").rpartition(".")[0] for name in stored} == {"3.mlp", "5.mlp"}


def test_adapters_of_version_0_1_are_replaced_and_an_unfinished_fit_of_it_goes_on(
    model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wrote layers and an injection in the place of sites."""
    options = {"drop_layers": (3, 5), "injection": "attn_mlp", "steps": 2}
    whole = run_fit(model_dir, words, tmp_path / "a", **options)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    plan = config["lora_drop"]
    old = {"drop_layers": [3, 5], "injection": "attn_mlp"}
    config["lora_drop"] = {name: plan[name] for name in plan if name not in ("sites", "bare_sites")} | old
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    stages = importlib.import_module("lora_drop_tools.fit.fit")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    genuine = stages.distilled
    monkeypatch.setattr(stages, "distilled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(model_dir, words, tmp_path / "a", **options, force=True)
    monkeypatch.setattr(stages, "distilled", genuine)
    file = tmp_path / "a.partial/settings.json"
    partial = json.loads(file.read_text())
    known = {name: value for name, value in partial["settings"].items() if name not in ("sites", "bare_sites")}
    file.write_text(json.dumps({"settings": known | old, "force": True}))
    again = run_fit(model_dir, words, tmp_path / "a", **options, resume=True)
    assert again.losses == whole.losses
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["lora_drop"] == plan


def test_windowed_layers(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Their MLPs may always be dropped, they themselves where the policy leaves no holes."""
    with_tokenizer("gemma2", tmp_path / "m")
    monkeypatch.setattr(torch_model, "read_tokenizer", lambda path, _: PreTrainedTokenizerFast.from_pretrained(path))
    small = {"steps": 1, "closed_form_tokens": 64}
    for name, options, sites in (
        ("a", {"policies": ("skip",), "drop_layers": ("4.mlp",)}, ["4.mlp"]),
        ("b", {"policies": ("backfill",), "drop_layers": (4, "6.attn")}, ["4", "6.attn"]),
        ("c", {"policies": ("fill",), "drop_ratio": 1.0}, ["3", "4", "5", "6"]),
        ("d", {"policies": ("skip",), "drop_ratio": 1.0}, ["3", "5"]),
    ):
        assert list(run_fit(tmp_path / "m", words, tmp_path / name, **options, **small).plan["sites"]) == sites
    with pytest.raises(PlanError, match="sliding window"):
        run_fit(tmp_path / "m", words, tmp_path / "e", policies=("skip",), drop_layers=("4.attn",), **small)


def test_a_bundle_is_fitted_for_policies_that_it_can_run(
    model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle("llama", tmp_path / "b", drop_layers=("3.attn", "5"), policy="fill", rank=3)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    monkeypatch.setattr(torch_model, "read_tokenizer", lambda *_: tokenizer)
    result = run_fit(bundle.root, words, tmp_path / "a", steps=1, closed_form_tokens=64)
    assert (list(result.plan["sites"]), result.plan["policy"]) == (["3.attn", "5"], "fill")
    with pytest.raises(PlanError, match="cannot be decoded under policy skip"):
        run_fit(bundle.root, words, tmp_path / "c", policies=("skip",))


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_bundle_brings_its_plan(
    dtype: str | None, model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights too, dequantized where they are quantized; what was fitted is loaded into a running session."""
    source = "llama" if dtype is None else rewritten("llama")
    bundle = make_bundle(source, tmp_path / "b", drop_layers=(3, 5), policy="backfill", rank=3, dtype=dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    monkeypatch.setattr(torch_model, "read_tokenizer", lambda *_: tokenizer)
    result = run_fit(bundle.root, words, tmp_path / "a")
    assert list(result.plan["sites"]) == ["3", "5"]
    assert result.plan["policy"] == "backfill"
    with Session.open(bundle.root, threads=1) as session:
        before = [session.prefill([[1, 2]], max_new_tokens=4).copy(), session.step([3]).copy()]
        session.load_adapters(tmp_path / "a")
        after = [session.prefill([[1, 2]], max_new_tokens=4).copy(), session.step([3]).copy()]
    assert np.array_equal(before[0], after[0])
    assert not np.allclose(before[1], after[1])
    with pytest.raises(InputError, match="brings its own plan"):
        run_fit(bundle.root, words, tmp_path / "c", drop_ratio=0.5)


def test_bfloat16_models(model_dir: Path, words: Path, tmp_path: Path) -> None:
    result = run_fit(model_dir, words, tmp_path / "a", drop_layers=(4,), dtype="bf16", steps=2)
    assert np.isfinite(result.stages["distillation"]["kl"])


def test_two_processes_learn_what_one_does(model_dir: Path, words: Path, tmp_path: Path) -> None:
    """torchrun with two processes of one batch equals one process that accumulates two."""
    from safetensors.numpy import load_file
    from torch.distributed.run import parse_args, run

    single = run_fit(model_dir, words, tmp_path / "one", drop_layers=(3, 5), steps=3, accumulate=2, threads=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(model_dir), "--text", str(words), "--out", str(tmp_path / "two"), "--drop-layers", "3,5"]
    sizes = "--steps 3 --window 32 --batch 2 --rank 3 --closed-form-tokens 512 --threads 1"
    launcher = "--nproc-per-node 2 --master-addr 127.0.0.1 --local-addr 127.0.0.1 --master-port"
    command = [*launcher.split(), str(port), "-m", "lora_drop_tools.cli", "fit", *arguments, *sizes.split()]
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        run(parse_args(command))  # raises where a process fails
    finally:
        for number in [number for number in before if signal.getsignal(number) != before[number]]:
            signal.signal(number, before[number])
    assert json.loads((tmp_path / "two/fit.json").read_text())["losses"] == pytest.approx(single.losses, rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("signalled", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_fit_can_be_resumed(
    signalled: type[BaseException],
    model_dir: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run_fit(model_dir, words, tmp_path / "whole", drop_layers=(3, 5), steps=4)
    module = importlib.import_module("lora_drop_tools.fit.distill")  # `lora_drop_tools.fit` is the function

    genuine, calls = module.run_batch, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(args) > 6 and len(calls) > 2 + 2 + 3:
            raise signalled
        return genuine(*args, **kwargs)

    monkeypatch.setattr(module, "run_batch", interrupted)
    with pytest.raises(signalled):
        run_fit(model_dir, words, tmp_path / "a", drop_layers=(3, 5), steps=4)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "a.partial").is_dir()
    said = " ".join(capsys.readouterr().err.split())
    assert f"with --resume goes on from what {tmp_path / 'a.partial'} has" in said
    monkeypatch.setattr(module, "run_batch", genuine)
    with pytest.raises(InputError, match="unfinished"):
        run_fit(model_dir, words, tmp_path / "a", drop_layers=(3, 5), steps=4)
    capsys.readouterr()
    with pytest.raises(InputError, match=r"begun with other options(.|\n)*steps 4"):
        run_fit(model_dir, words, tmp_path / "a", drop_layers=(3, 5), steps=5, resume=True)
    assert "loading the model" not in capsys.readouterr().err  # which takes minutes with a large one
    result = run_fit(model_dir, words, tmp_path / "a", drop_layers=(3, 5), steps=4, resume=True)
    assert not (tmp_path / "a.partial").exists()
    assert result.stages["distillation"] == pytest.approx(whole.stages["distillation"], rel=1e-5)
    assert len(result.losses) == 4


@pytest.mark.parametrize("removed", range(4))
def test_a_fit_that_is_killed_as_it_forgets_its_states(
    removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is known as an unfinished fit, which --force replaces."""
    partial = Partial(tmp_path / "a", {}, resume=False, force=True, workers=Workers())
    partial.save({}, {}, {}, tmp_path / "staged")
    partial.state.write_bytes(b"")
    genuine, files = os.unlink, [file.name for file in partial.root.iterdir()]

    def unlink(path: Path, **options: Any) -> None:
        if len(list(partial.root.iterdir())) == len(files) - removed:
            raise KeyboardInterrupt
        genuine(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    with contextlib.nullcontext() if removed == len(files) else pytest.raises(KeyboardInterrupt):
        partial.remove()
    monkeypatch.undo()
    assert partial.root.exists() == (removed < len(files))
    check_place(tmp_path / "a", resume=False, force=True)


# ── text that is streamed, and much of it ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def lines(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the text as JSON lines in a directory, fifty words a document."""
    tokens = words.read_text(encoding="utf-8").split()[:2000]
    root = tmp_path_factory.mktemp("lines") / "texts"
    root.mkdir()
    documents = [" ".join(tokens[begin : begin + 50]) for begin in range(0, len(tokens), 50)]
    (root / "a.jsonl").write_text("".join(json.dumps({"content": one}) + "\n" for one in documents))
    return root


STREAMED = {"drop_layers": (3, 5), "text_column": "content", "threads": 1}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four windows, so that a few steps go through several and the text begins again."""
    monkeypatch.setattr(importlib.import_module("lora_drop_tools.fit.stream"), "BLOCK_TOKENS", 128)


@pytest.mark.usefixtures("small_blocks")
def test_a_streamed_fit_is_resumed_in_the_middle(model_dir: Path, lines: Path, tmp_path: Path) -> None:
    """The batches, their order and so the adapters are those of a fit that nothing interrupted."""
    from safetensors.numpy import load_file

    budget = 14 * 2 * 32  # behind the eight batches of the closed form; fifteen are in the text
    whole = run_fit(model_dir, lines, tmp_path / "whole", **STREAMED, steps=None, tokens=budget)
    assert len(whole.losses) == 14
    options = {**STREAMED, "steps": None, "tokens": budget, "checkpoint_minutes": 0.0}
    with interrupted_at(6):
        run_fit(model_dir, lines, tmp_path / "a", **options)
    result = run_fit(model_dir, lines, tmp_path / "a", **options, resume=True)
    assert result.losses == whole.losses
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "a"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("given", "change"),
    [("text", "another file"), ("text", "other words"), ("dataset", "shorter"), ("dataset", "other words")],
)
def test_another_text_is_not_resumed(given: str, change: str, model_dir: Path, lines: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts"
    shutil.copytree(lines, text)
    where = {"text": (text,)} if given == "text" else {"dataset": str(text)}
    settings = FitSettings(out=tmp_path / "a", **where, **(SMALL | STREAMED | {"closed_form_tokens": 64}))
    with interrupted_at(1):
        fit(str(model_dir), settings)
    file = text / "a.jsonl"
    if change == "another file":
        shutil.copy(file, text / "b.jsonl")
    elif change == "shorter":
        file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    else:
        file.write_text(file.read_text().replace("t5 ", "t6 "))
    before = {path: path.read_bytes() for path in (tmp_path / "a.partial").iterdir()}
    with pytest.raises(InputError, match="another text under these names"):
        fit(str(model_dir), dataclasses.replace(settings, resume=True))
    assert {path: path.read_bytes() for path in (tmp_path / "a.partial").iterdir()} == before


@pytest.mark.usefixtures("small_blocks")
def test_text_that_breaks_off_on_the_way_leaves_what_was_reached(
    model_dir: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the network is gone; the fit goes on when it is back. Distillation begins behind the closed form."""
    whole = run_fit(model_dir, lines, tmp_path / "whole", **STREAMED, steps=6)
    texts = importlib.import_module("lora_drop_tools.fit.texts")
    genuine, calls = texts.StreamedTexts.__call__, []

    def gone(self: Any, number: int) -> Any:
        calls.append(number)
        if len(calls) > 8 + 4:  # the closed form takes eight
            raise InputError("The text cannot be read.", note="It is gone.", hint="Wait.")
        return genuine(self, number)

    monkeypatch.setattr(texts.StreamedTexts, "__call__", gone)
    options = {**STREAMED, "steps": 6, "checkpoint_minutes": 0.0}
    with pytest.raises(InputError, match="gone"):
        run_fit(model_dir, lines, tmp_path / "a", **options)
    monkeypatch.setattr(texts.StreamedTexts, "__call__", genuine)
    assert run_fit(model_dir, lines, tmp_path / "a", **options, resume=True).losses == whole.losses
    assert calls == list(range(13))


def test_a_damaged_state_is_said_and_kept(model_dir: Path, words: Path, tmp_path: Path) -> None:
    options = {"drop_layers": (3,), "checkpoint_minutes": 0.0}
    with interrupted_at(3):
        run_fit(model_dir, words, tmp_path / "a", **options)
    other = io.BytesIO()
    torch.save([], other)
    for name in ("state.pt", "begin.pt"):
        file = tmp_path / "a.partial" / name
        whole = file.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes(byte ^ 0x55 for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
        for content in (whole[:-100], b"mine", b"", other.getvalue(), flipped):
            file.write_bytes(content)
            with pytest.raises(LoraDropError, match=rf"cannot be read\.\nNote: [^\n]*{name}: [^\n]+\nHint: "):
                run_fit(model_dir, words, tmp_path / "a", **options, resume=True)
            assert file.read_bytes() == content
        file.write_bytes(whole)


@pytest.mark.parametrize("other", [{"drop_layers": (4,)}, {"rank": 2}, {"seed": 7}], ids=["layers", "rank", "seed"])
def test_what_another_fit_began_with_is_refused(
    other: dict[str, Any], model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise InputError("The text cannot be read.", note="It is gone.", hint="Wait.")

    monkeypatch.setattr(importlib.import_module("lora_drop_tools.fit.fit"), "distilled", gone)
    for name, options in (("a", {}), ("b", other)):
        with pytest.raises(InputError, match="gone"):
            run_fit(model_dir, words, tmp_path / name, **{"drop_layers": (3,), **options})
    shutil.copy(tmp_path / "b.partial" / "begin.pt", tmp_path / "a.partial")
    with pytest.raises(InputError, match=r"begin.pt: it is of another fit: \w+ [^\n]+\.\nHint: Begin anew by --force"):
        run_fit(model_dir, words, tmp_path / "a", drop_layers=(3,), resume=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("text", ["", None, "absent"])
def test_empty_documents_are_passed_over(text: str | None, model_dir: Path, lines: Path, tmp_path: Path) -> None:
    rows = (lines / "a.jsonl").read_text().splitlines()
    empty = {} if text == "absent" else {"content": text}
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:3], json.dumps(empty), *rows[3:]]) + "\n")
    run_fit(model_dir, tmp_path / "a.jsonl", tmp_path / "a", **STREAMED)


@pytest.mark.parametrize("place", ["out", "out/log", "out.partial", "file", "file/log"])
def test_odd_places_for_curves(place: str, model_dir: Path, words: Path, tmp_path: Path) -> None:
    """Refused before anything is made."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"--log-dir|curves"):
        run_fit(model_dir, words, tmp_path / "out", drop_layers=(3,), log_dir=tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("small_blocks")
def test_a_dataset_is_fitted_on_like_its_files(model_dir: Path, lines: Path, tmp_path: Path) -> None:
    files = run_fit(model_dir, lines, tmp_path / "files", **STREAMED)
    settings = FitSettings(out=tmp_path / "set", dataset=str(lines), **(SMALL | STREAMED))
    assert fit(str(model_dir), settings).losses == files.losses


def test_running_layers_again_changes_nothing(model_dir: Path, words: Path, tmp_path: Path) -> None:
    options = {"drop_layers": ("3", "5.attn", "6.mlp"), "policies": ("backfill",), "threads": 1}
    kept = run_fit(model_dir, words, tmp_path / "kept", **options)
    again = run_fit(model_dir, words, tmp_path / "again", **options, recompute=True)
    assert again.losses == pytest.approx(kept.losses, rel=1e-6)


def test_running_layers_again_keeps_less() -> None:
    """Bytes that the gradients' graph holds, counted by what is packed for it."""
    held = {}
    for recompute in (False, True):
        forcing, texts, plan, learner, policy = setting()
        forcing._recompute = recompute
        found = {}

        def pack(tensor: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids, layout = texts(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forcing.decode(forcing.exact(ids), ids, layout, plan, learner.pairs(), policy)
        held[recompute] = sum(found.values())
    assert held[True] < 0.3 * held[False]


def test_policies_are_mixed(model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches take them in turns, and held-out text is judged under each."""
    module = importlib.import_module("lora_drop_tools.fit.distill")
    genuine, seen = module.run_batch, []

    def recorded(*args: Any) -> Divergence:
        seen.append((args[5].name, "learned" if len(args) > 6 else "judged"))
        return genuine(*args)

    monkeypatch.setattr(module, "run_batch", recorded)
    options = {"steps": 2, "accumulate": 2, "closed_form_tokens": 0, "drop_layers": (3,)}
    result = run_fit(model_dir, words, tmp_path / "a", policies=("backfill", "skip"), **options)
    judged = [("backfill", "judged"), ("skip", "judged")] * 2
    assert seen == [*judged, *((name, "learned") for name in ("backfill", "skip") * 2), *judged]
    assert result.plan["policy"] == "backfill"


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_weights_of_the_offsets(policy: str) -> None:
    """The gradient is that of a mean weighted by hand; the figures stay those without weights."""
    forcing, texts, plan, learner, policy_object = setting(policy)
    ids, layout = texts(1)
    assert layout.offset.tolist() == [0] * 5 + [1, 2, 3, 0] * 4 + [1, 2, 3]
    weights = torch.tensor([1.0, 4.0, 0.5, 0.0])
    sums = run_batch(forcing, ids, layout, plan, learner.surrogates(), policy_object, True, weights)
    ours = [parameter.grad.clone() for parameter in learner.all()]
    assert sums.kl == run_batch(forcing, ids, layout, plan, learner.surrogates(), policy_object).kl
    for parameter in learner.all():
        parameter.grad = None
    at = layout.lora if policy == "backfill" else torch.arange(5, 24)
    exact = forcing.exact(ids)
    decoded = forcing.decode(exact, ids, layout, plan, learner.surrogates(), policy_object)
    decoded = decoded if policy == "backfill" else decoded[:, at]
    p, q = (forcing.logits(hidden).log_softmax(-1) for hidden in (exact[-1].output[:, at], decoded))
    of_each = torch.tensor([[4.0, 0.5, 0.0, 1.0][(position - 5) % 4] for position in at.tolist()])
    kl = (p.exp() * (p - q)).sum(-1)  # [B, S]
    ((kl * of_each).sum() / (of_each.sum() * len(ids))).backward()
    for mine, parameter in zip(ours, learner.all(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_distillation_weighs_refreshes_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    forcing, texts, plan, learner, policy = setting("skip")
    given: list[list[float]] = []

    def noted(*arguments: Any) -> Any:
        given.append(arguments[-1].tolist())
        return run_batch(*arguments)

    monkeypatch.setattr(importlib.import_module("lora_drop_tools.fit.distill"), "run_batch", noted)
    options = DistillOptions(1, 2e-2, offset_weights=(4.0, 0.5, 0.0))
    distill(forcing, texts, plan, [policy], learner, options, Workers())
    assert given == [[1.0, 4.0, 0.5, 0.0]]


def test_a_short_cycle_may_have_only_offsets_of_weight_0() -> None:
    """As of --k 1,3 --offset-weights 0,0,1: nothing is learned from a batch of k = 1."""
    forcing, texts, plan, learner, policy = setting()
    ids, layout = texts(0)[0], Layout.of(24, 4, PeriodicSchedule(1))
    run_batch(forcing, ids, layout, plan, learner.surrogates(), policy, True, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert not any(parameter.grad.any() for parameter in learner.all())


def test_a_budget_of_tokens() -> None:
    settings = FitSettings(text=(Path("x"),), out=Path("out"), tokens=15 * 10**9, window=256, batch=4)
    assert settings.steps_of(1) == 14648438
    assert settings.steps_of(8) == 1831055
    assert DistillOptions(14648438, 0.1).stretch == 14649


def test_losses_of_many_steps_are_means(model_dir: Path, words: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"drop_layers": (3,), "steps": 7, "closed_form_tokens": 0, "threads": 1}
    single = run_fit(model_dir, words, tmp_path / "a", **options).losses
    monkeypatch.setattr(importlib.import_module("lora_drop_tools.fit.distill"), "_LOSSES", 3)
    means = run_fit(model_dir, words, tmp_path / "b", **options).losses
    assert means == pytest.approx([np.mean(single[:3]), np.mean(single[3:6]), single[6]])


def test_curves_for_tensorboard(model_dir: Path, words: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = run_fit(model_dir, words, tmp_path / "a", drop_layers=(3,), log_dir=tmp_path / "log").losses
    found = EventAccumulator(str(tmp_path / "log")).Reload()
    assert set(found.Tags()["scalars"]) == {"kl", "learning_rate", "tokens_per_second"}
    assert [event.value for event in found.Scalars("kl")] == pytest.approx(losses)
    assert [event.step for event in found.Scalars("kl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("minutes", [0.0, 10.0], ids=["from the state", "from the beginning"])
def test_curves_of_a_resumed_fit_have_each_step_once(
    minutes: float, model_dir: Path, words: Path, tmp_path: Path
) -> None:
    """Those of steps behind the last state are drawn anew."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"drop_layers": (3,), "log_dir": tmp_path / "log", "checkpoint_minutes": minutes}
    with interrupted_at(3):
        run_fit(model_dir, words, tmp_path / "a", **options)
    losses = run_fit(model_dir, words, tmp_path / "a", **options, resume=True).losses
    found = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.step for event in found.Scalars("kl")] == [1, 2, 3, 4]
    assert [event.value for event in found.Scalars("kl")] == pytest.approx(losses)


@pytest.mark.parametrize(
    ("options", "words_of_error"),
    [
        (["--k", "0"], ("--k is too small",)),
        (["--rank", "65"], ("rank", "65", "64")),
        (["--rank", "0"], ("--rank",)),
        (["--window", "12"], ("window", "12")),
        (["--window", "512"], ("context", "512", "256")),
        (["--window", "250"], ("too short", "4000")),
        (["--steps", "0", "--closed-form-tokens", "0"], ("Nothing",)),
        (["--drop-ratio", "0"], ("No layer is dropped",)),
        (["--drop-ratio", "1.5"], ("--drop-ratio is too large", "1.5")),
        (["--drop-layers", "0"], ("always kept",)),
        (["--drop-layers", "4,4.attn"], ("a layer and a half of it", "4.attn")),
        (["--drop-layers", "4.attention"], ("no half", "4.attention")),
        (["--drop-layers", "4.attn", "--injection", "block"], ("--injection block", "4.attn")),
        (["--adapters-for", "mlp"], ("--adapters-for mlp", "dropped whole", "--injection attn_mlp")),
        (["--drop-layers", "4.attn", "--adapters-for", "mlp"], ("nothing to fit", "4.attn")),
        (
            ["--drop-layers", "3", "--apart", "--surrogate", "residual-delta"],
            ("not fitted apart", "--surrogate residual "),
        ),
        (["--drop-layers", "3", "--drop-list", "x.json"], ("twice",)),
        (["--learning-rate", "0"], ("--learning-rate is too small", "above 0")),
        (["--device", "cuda"], ("device", "cuda")),
        (["--resume"], ("no such fit",)),
        (["--text", "nowhere.txt"], ("nowhere.txt",)),
        (["--text", "nowhere.jsonl"], ("nowhere.jsonl", "does not exist")),
        (["--tokens", "64"], ("said twice", "--closed-form-tokens")),
        (["--offset-weights", "1,2"], ("do not fit the cycle", "has 2", "has 3")),
        (["--offset-weights", "0,0,0"], ("largest weight is 0",)),
        (["--offset-weights", "1,x,2"], ("1,x,2", "1,1,0.5")),
        (["--offset-weights", "1,nan,2"], ("--offset-weights is not a number",)),
        (["--policy", "skip,none"], ("refresh policy", "none")),
        (["--policy", "skip,fill"], ("cannot be mixed", "skip, fill")),
        (["--dataset", ":x"], ("no name", ":x")),
        (["--text-column", "content"], ("--text-column would change nothing", "content", "--text is plain")),
        (["--tokens", "1.5"], ("1.5", "15e9")),
        (["--tokens", "nan"], ("nan", "15e9")),
        (["--tokens", "1e15"], ("--tokens is too large",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_refusals(options, words_of_error, model_dir: Path, words: Path, tmp_path: Path, capsys) -> None:
    arguments = ["fit", str(model_dir), "--text", str(words), "--out", str(tmp_path / "a"), "--window", "32"]
    assert main([*arguments, "--steps", "1", "--closed-form-tokens", "64", *options]) == 2
    error = capsys.readouterr().err
    for word in words_of_error:
        assert word in error
    assert "Hint:" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_drop_list_of_another_model(model_dir: Path, words: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [3], "fingerprint": "0" * 64}))
    with pytest.raises(PlanError, match="chosen for another model"):
        run_fit(model_dir, words, tmp_path / "a", drop_list=tmp_path / "list.json")
    assert [path.name for path in tmp_path.iterdir()] == ["list.json"]


def test_what_is_there_is_not_touched(model_dir: Path, words: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("precious")
    for options in ({}, {"force": True}):
        with pytest.raises(LoraDropError):
            run_fit(model_dir, words, tmp_path / "a", drop_layers=(3,), **options)
    assert (tmp_path / "a/file").read_text() == "precious"
