"""`lora-drop profile --sites halves`: bytes by hand, the greedy order by brute force, lists that stand under ρ."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_tools.cli import main
from lora_drop_tools.profile.greedy import Greedy
from lora_drop_tools.profile.result import Profile
from lora_drop_tools.profile.settings import ProfileSettings
from lora_drop_tools.profile.sizes import LayerBytes, Savings, layer_bytes, savings
from lora_drop_tools.shared.costs import dropped_weight_bytes, shares, step_bytes
from lora_drop_tools.teacher_forcing.forcing import TeacherForcing

from lora_drop_export.checkpoint.drop_list import read_drop_list
from tests.support.bundles import make_bundle
from tests.support.models import FAMILIES, gptj, qwen2_moe
from tests.support.profiles import TOLERANCE, WINDOW, make_scoring, random_windows, saved
from tests.tools.profile.test_greedy import kl_by_oracle, uneven

# Of the tiny Llama: q, o 64 × 64, k, v 32 × 64, three products of 96 × 64, a norm of 64 before each half
ATTENTION, MAKES_KV, MLP = 2 * 64 * 64 + 2 * 32 * 64 + 64, 2 * 32 * 64 + 64, 3 * 96 * 64 + 64
TOKEN_KV = 2 * 2 * 16  # of two heads of 16, K and V


def plan(policy: str = "skip", **options: object) -> DropPlan:
    return DropPlan(8, (), policy=policy, **options)  # type: ignore[arg-type]


def of_llama(policy: str, objective: str = "speed", context: int = 100, adapter: float = 0.0) -> Savings:
    one = LayerBytes(4 * (ATTENTION + MLP), 4 * ATTENTION, 4 * MAKES_KV, 4 * TOKEN_KV)
    return Savings(plan(policy), [one] * 8, objective, context, adapter)


# ── bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_of_a_layers_parts() -> None:
    forcing = TeacherForcing(FAMILIES["llama"]())
    assert layer_bytes(forcing, "float32") == list(of_llama("skip").layers)
    quantized = layer_bytes(forcing, "int4")[3]
    matrices, vectors = 2 * 64 * 64 + 2 * 32 * 64, 64
    assert quantized.attention == matrices * 5 / 8 + vectors * 4  # a scale of 32 bits for 32 values is one more bit
    assert quantized.token_kv == 4 * TOKEN_KV
    quantized = layer_bytes(forcing, "float8_e4m3fn")[3]  # a scale of 16 bits for a row, beside bfloat16
    assert quantized.attention == matrices + (2 * 64 + 2 * 32) * 2 + vectors * 2
    assert quantized.token_kv == 2 * TOKEN_KV
    fused = layer_bytes(TeacherForcing(FAMILIES["phi3"]()), "float32")[3]  # q, k and v are one product
    assert (fused.attention, fused.makes_kv) == (4 * ATTENTION, 4 * (64 * 64 + 2 * 32 * 64 + 64))


def test_bytes_of_experts() -> None:
    """A token is sent to 2 of 6."""
    model = qwen2_moe()
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    experts = 6 * 3 * 64 * 32
    found = [one.weights for one in layer_bytes(TeacherForcing(model), "float32")]
    assert found == [4 * sizes[0], pytest.approx(4 * (sizes[1] - experts * 4 / 6))]


def test_bytes_are_those_of_a_bundle(tmp_path: Path) -> None:
    """As the exporter counts them from the graph, and costs.py makes a step's bytes of them."""
    sites = ("3", "4.mlp", "5.attn")
    for policy in ("backfill", "fill"):
        manifest = make_bundle("llama", tmp_path / policy, drop_layers=sites, policy=policy, rank=2).manifest
        forcing = TeacherForcing(FAMILIES["llama"]())
        told = ProfileSettings(text=(Path("x"),), out=Path("y"), context=40, rank=2, policy=policy)
        saved_bytes = savings(forcing, dataclasses.replace(manifest.plan, sites=(), rank=0), told)
        assert sum(map(saved_bytes.weights, sites)) == dropped_weight_bytes(manifest)
        full, lora = step_bytes(manifest, 40, 40)
        token = manifest.model.token_kv_bytes([0]) * 2 * (policy == "backfill")  # of the step itself
        assert sum(map(saved_bytes.of, sites)) == full - lora - token


def test_what_a_site_saves() -> None:
    skip, fill = of_llama("skip"), of_llama("fill", adapter=512)
    assert skip.of("3") == 4 * (ATTENTION + MLP + 100 * TOKEN_KV)
    assert skip.of("3.attn") == 4 * (ATTENTION + 100 * TOKEN_KV)
    assert skip.of("3.mlp") == 4 * MLP
    assert fill.of("3.attn") == 4 * (ATTENTION - MAKES_KV + 100 * TOKEN_KV) - 512
    assert fill.of("3.mlp") == 4 * MLP - 512
    assert of_llama("skip", "kv").of("3.attn") == of_llama("skip", "kv").of("3") == 4 * 100 * TOKEN_KV
    bare = dataclasses.replace(fill, bare=("3.attn",))  # it has no adapter that a LoRA step would read
    assert bare.of("3.attn") == fill.of("3.attn") + 512
    assert bare.of("3.mlp") == fill.of("3.mlp")


def test_candidates() -> None:
    assert of_llama("skip").candidates(False) == ("3", "4", "5", "6")
    halves = [f"{i}.{half}" for i in (3, 4, 5, 6) for half in ("attn", "mlp")]
    assert of_llama("skip").candidates(True) == tuple(halves)
    assert of_llama("skip", "kv").candidates(True) == tuple(halves[::2])
    assert of_llama("fill", context=200, adapter=4 * MLP).candidates(True) == tuple(halves[::2])  # these save K/V, too
    windowed = Savings(plan("skip", windowed_layers=(4, 6)), of_llama("skip").layers, "speed", 100)
    assert windowed.candidates(True) == ("3.attn", "3.mlp", "4.mlp", "5.attn", "5.mlp", "6.mlp")
    assert windowed.candidates(False) == ("3", "5")


def test_a_list_stands_under_rho_when_it_saves_as_much_as_whole_layers() -> None:
    one = of_llama("skip")
    for rho, count in ((0.25, 1), (0.5, 2), (0.75, 3)):
        for order in itertools.islice(itertools.permutations(one.candidates(True)), 0, 40000, 997):
            found = one.list_under(order, rho)
            weights, everything = sum(map(one.weights, found)), sum(map(one.of, found))
            assert weights >= count * one.weights("3")
            assert everything >= count * one.of("3")
            last = found[-1]
            assert weights - one.weights(last) < count * one.weights("3") or (
                everything - one.of(last) < count * one.of("3")
            )
    all_windowed = Savings(plan("skip", windowed_layers=tuple(range(8))), one.layers, "speed", 100)
    found = all_windowed.list_under(all_windowed.candidates(True), 0.25)
    assert found == ("3.mlp", "4.mlp", "5.mlp")  # two save 147 968 bytes, a layer with its K/V 148 992
    assert of_llama("skip", "kv").list_under(("6.attn", "3.attn", "5.attn", "4.attn"), 0.5) == ("6.attn", "3.attn")
    assert one.list_under(("5", "3", "4", "6"), 0.5) == ("5", "3")
    assert of_llama("fill").list_under(("5", "3", "4", "6"), 0.25) == ("5",)
    of_five = dataclasses.replace(one, plan=plan("skip", always_first=2))
    assert of_five.list_under(("5", "3", "4", "6", "2"), 0.5) == ("5", "3", "4")  # 2.5 is 3, as for --drop-ratio


# ── the greedy order ───────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
@functools.cache
def kl(sites: tuple[str, ...], policy: str) -> float:
    return kl_by_oracle("uneven", random_windows(1), sites, policy)


@pytest.mark.parametrize("policy", ["backfill", "fill"])
def test_the_order_is_brute_forces(policy: str) -> None:
    """Each time the site whose added KL for each byte is the least."""
    saved_bytes, order = of_llama(policy, context=1, adapter=20000), list[str]()
    for _ in range(2):
        before = kl(tuple(sorted(order)), policy) if order else 0.0
        added = {
            site: (kl(tuple(sorted([*order, site])), policy) - before) / saved_bytes.of(site)
            for site in saved_bytes.candidates(True)
            if site not in order
        }
        order.append(min(added, key=lambda site: added[site]))
    greedy = Greedy(make_scoring(uneven(), policy), random_windows(1), saved_bytes.of)
    alone, found = greedy.order(saved_bytes.candidates(True), lambda sites: len(sites) == 2, lambda *_: None)
    assert [site for site, _ in found] == order
    assert [cost for _, cost in found] == pytest.approx(
        [kl(tuple(sorted(order[: n + 1])), policy) for n in range(2)], rel=TOLERANCE
    )
    assert alone["4.mlp"] == pytest.approx(kl(("4.mlp",), policy), rel=TOLERANCE)
    assert list(alone) != sorted(alone, key=lambda site: alone[site])  # bytes count


def test_only_the_cheapest_are_measured_again() -> None:
    saved_bytes, measured = of_llama("backfill"), list[tuple[str, ...]]()
    greedy = Greedy(make_scoring(uneven(), "backfill"), random_windows(1), saved_bytes.of)
    costs = greedy.costs

    def counted(sites: list[str], survivors: int | None = None) -> dict[str, float]:
        measured.append(tuple(sites))
        return costs(sites, survivors)

    greedy.costs = counted  # type: ignore[method-assign,assignment]
    alone, order = greedy.order(saved_bytes.candidates(True), lambda sites: len(sites) == 3, lambda *_: None, 2)
    assert [len(sites) for sites in measured] == [8, 2, 2]
    assert next(iter(alone)) == order[0][0]
    assert set(measured[1]) == set(list(alone)[1:3])  # the cheapest for their bytes but the one that was dropped


def test_the_price_of_a_half_that_is_given_up_is_that_of_its_windows() -> None:
    """What it adds on the first of two windows to the list's KL there, for each byte: it is screened by that."""
    saved_bytes, windows = of_llama("backfill"), torch.cat([random_windows(1), random_windows(2)[1:]])
    greedy = Greedy(make_scoring(uneven(), "backfill"), windows, saved_bytes.of)
    greedy.drop("4.mlp")
    (given_up,) = {"5.mlp", "6.mlp"} - greedy.costs(("5.mlp", "6.mlp"), 1).keys()
    added = kl(("4.mlp", given_up), "backfill") - kl(("4.mlp",), "backfill")
    expected = added * greedy.scoring.layout.lora.numel() / saved_bytes.of(given_up)
    assert greedy.prices[given_up] == pytest.approx(expected, rel=TOLERANCE)


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def halves(
    llama_dir: Path, short: Callable[..., Profile], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Profile, Path]:
    out = tmp_path_factory.mktemp("halves") / "profile"
    return short(llama_dir, out, sites="halves", policy="backfill", context=50, rank=1), out


def test_lists_of_halves(halves: tuple[Profile, Path], tmp_path: Path) -> None:
    """They are read as they were written, and a bundle of each stands under its ρ by its own count."""
    result, out = halves
    assert [one.site for one in result.sites] == [f"{i}.{half}" for i in range(8) for half in ("attn", "mlp")]
    assert [one.site for one in result.sites if one.eligible] == list(of_llama("skip").candidates(True))
    assert result.sites[7].saved_bytes == 4 * (MLP - 2 * 64)
    for one in result.drop_lists:
        facts = json.loads((out / one.file).read_text())
        assert read_drop_list(out / one.file).sites == one.sites == tuple(facts["sites"])
        assert (facts["policy"], facts["context"], facts["rank"]) == ("backfill", 50, 1)
        assert one.attention_share == sum(site.endswith("attn") for site in one.sites) / 4
    best = result.best(0.5)
    manifest = make_bundle(
        "llama", tmp_path / "b", drop_layers=read_drop_list(out / best.file).sites, policy="backfill"
    ).manifest
    assert manifest.plan.sites == best.sites
    assert shares(manifest).rho >= 0.5
    assert shares(manifest).weight_bytes == pytest.approx(best.weight_share)


def test_half_by_half_is_the_layer(halves: tuple[Profile, Path], made: tuple[Profile, Path]) -> None:
    """Influence and errors of a half are from what lies between: both ends are the layer's."""
    by_site = {one.site: one for one in halves[0].sites}
    for one in made[0].sites:
        assert by_site[f"{one.site}.mlp"].similarity == one.similarity
        assert by_site[f"{one.site}.mlp"].base_errors["anchor"] == one.base_errors["anchor"]
        assert by_site[f"{one.site}.attn"].influence_cosine != one.influence_cosine


def test_attentions_for_kv(llama_dir: Path, short: Callable[..., Profile], tmp_path: Path, capsys: object) -> None:
    result = short(llama_dir, tmp_path / "out", sites="halves", objective="kv")
    assert {len(one.sites) for one in result.drop_lists if one.rho == 0.5} == {2}
    assert all(site.endswith(".attn") for one in result.drop_lists for site in one.sites)
    assert [one.attention_share for one in result.drop_lists[:3]] == [0.25, 0.5, 0.75]
    printed = capsys.readouterr().out  # type: ignore[attr-defined]
    assert "attentions = 0.5" in printed
    assert "KL per byte of K/V that is not stored" in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--objective kv --policy backfill", ("No K/V is saved", "backfill", "--policy skip")),
        ("--objective kv --policy fill", ("No K/V is saved", "fill")),
        ("--objective kv --rank 4", ("--rank would change nothing", "counts no weights")),
        ("--objective kv --context 5", ("--context would change nothing", "It is 5", "what each token stores")),
        ("--sites thirds", ("--sites", "thirds")),
        ("--sites layers --bundle-dtype int4 --rank 64 --context 1", ("No layer saves", "rank 64", "Lower --rank")),
    ],
)
def test_refusals(
    more: str, words: tuple[str, ...], llama_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--tokens", 2 * WINDOW, "--window", WINDOW, "--sensitivity-tokens", WINDOW)
    command = ["profile", *map(str, (llama_dir, "--text", text, "--out", tmp_path / "out", *sizes)), *more.split()]
    assert main(command) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_a_model_without_halves(text: Path, short: Callable[..., Profile], tmp_path: Path) -> None:
    directory = saved(gptj(), tmp_path / "model")
    options = {"always_first": 0, "always_last": 0, "rankings": ("influence",)}
    with pytest.raises(ModelError, match="no halves"):
        short(directory, tmp_path / "out", sites="halves", **options)
    assert len(short(directory, tmp_path / "out", **options).sites) == 2


def test_windowed_layers(short: Callable[..., Profile], tmp_path: Path) -> None:
    """Their MLPs are ranked under `skip`, they themselves where no holes are left."""
    directory, options = saved(FAMILIES["gemma2"](), tmp_path / "model"), {"rankings": ("influence",)}
    under_skip = short(directory, tmp_path / "a", sites="halves", **options)
    assert set(under_skip.rankings["influence"]) == {"3.attn", "3.mlp", "4.mlp", "5.attn", "5.mlp", "6.mlp"}
    under_fill = short(directory, tmp_path / "b", policy="fill", context=100, **options)
    assert set(under_fill.rankings["influence"]) == {"3", "4", "5", "6"}
    saved_bytes = {one.site: one.saved_bytes for one in under_fill.sites}
    assert saved_bytes["5"] == saved_bytes["4"]  # an engine reads a whole cache, as `step_bytes` counts it


def test_gradients_are_left_as_they_were() -> None:
    forcing = TeacherForcing(FAMILIES["llama"]().requires_grad_(False))
    layer_bytes(forcing, "float32")
    assert not any(parameter.requires_grad for parameter in forcing.model.parameters())
    assert all(parameter.grad is None for parameter in forcing.model.parameters())


def test_policies_differ() -> None:
    """Profiles are made under the policy that was asked for."""
    windows, site = random_windows(1), ("3.attn", "5.attn")
    found = {policy: make_scoring(uneven(), policy).of_lists(windows, [site], lambda: None)[0] for policy in POLICIES}
    assert found["lossless"] == found["backfill"]
    assert len({found[policy] for policy in ("skip", "backfill", "fill")}) == 3
