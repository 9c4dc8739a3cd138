"""`lora-drop profile --adapters`: lists and their order with fitted adapters in place, from the oracle."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_tools.cli import main
from lora_drop_tools.profile.result import Profile
from safetensors.torch import load_file

from lora_drop_export.checkpoint.drop_list import read_drop_list
from tests.support.bundles import family, make_bundle, save_adapters
from tests.support.profiles import TOLERANCE, WINDOW, add_tokenizer
from tests.tools.profile.test_greedy import kl_by_oracle

LAYERS = ("3", "4", "6")
HALVES = ("3.attn", "3.mlp", "5.attn", "5.mlp")
NAMES = {"self_attn": ".attn", "mlp": ".mlp"}


def adapters(directory: Path, sites: tuple[str, ...], surrogate: str = "residual", **told: Any) -> Path:
    bare = told.get("bare_sites", ())
    plan = DropPlan(8, sites, rank=4, surrogate=surrogate, policy=told.get("policy", "skip"), bare_sites=bare)
    save_adapters(directory, plan, 64, family("llama").checkpoint.fingerprint())
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_drop"] |= told
    file.write_text(json.dumps(config))
    return directory


def matrices(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Of each site as the oracle takes them; the scale is what save_adapters writes."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(directory / "adapter_model.safetensors").items():
        layer, *rest = name.partition(".layers.")[2].split(".")
        found.setdefault(layer + NAMES.get(rest[0], ""), {})[rest[-2]] = value
    return {site: (pair["lora_A"], pair["lora_B"], 2.0) for site, pair in found.items()}


def drawn(text: Path) -> torch.Tensor:
    """The windows as the command draws them: one to compare on, one to rank on."""
    ids = torch.tensor([int(word[1:]) for word in text.read_text(encoding="utf-8").split()])[: 20 * WINDOW].view(
        -1, WINDOW
    )
    return ids[torch.randperm(20, generator=torch.Generator().manual_seed(0))[:2]]


def command(*arguments: object) -> int:
    sizes = ("--tokens", 4 * WINDOW, "--window", WINDOW, "--sensitivity-tokens", WINDOW)
    return main(["profile", *(str(a) for a in (*arguments, *sizes))])


@pytest.mark.usefixtures("no_figures")
def test_neighbours_that_were_fitted_as_one(llama_dir: Path, text: Path, tmp_path: Path, capsys) -> None:
    """Their adapters are refused; layers that are apart are not, nor those fitted so."""
    fitted = ["--text", str(text), "--steps", "0", "--window", "16", "--closed-form-tokens", "64", "--rank", "4"]
    for name, layers, more, code in (
        ("one", "3,4,6", [], 2),
        ("apart", "3,4,6", ["--apart"], 0),
        ("others", "3,5", [], 0),
        ("halves", "3.attn,3.mlp", [], 2),
        ("state", "3,4", ["--surrogate", "recurrent"], 0),
        ("change", "3,5", ["--surrogate", "residual-delta"], 2),
        ("gates", "3,5", ["--surrogate", "residual-gated"], 2),
    ):
        out = tmp_path / name
        assert main(["fit", str(llama_dir), *fitted, "--drop-layers", layers, *more, "--out", str(out)]) == 0
        capsys.readouterr()
        assert command(llama_dir, "--text", text, "--adapters", out, "--out", tmp_path / f"p-{name}") == code, name
        said = capsys.readouterr().err
        assert ("fitted as one" in said or "with their neighbours alone" in said) == bool(code)
        assert ("lora-drop fit" in said) == ("--apart" in said) == bool(code)
        assert (tmp_path / f"p-{name}").exists() == (not code)


@pytest.mark.parametrize(
    ("policy", "surrogate", "sites"),
    [
        ("backfill", "residual", LAYERS),
        ("skip", "recurrent", LAYERS),
        ("fill", "anchor", LAYERS),
        ("backfill", "residual", HALVES),
        ("skip", "anchor", HALVES),
    ],
)
def test_scores_and_order_are_the_oracles(
    policy: str,
    surrogate: str,
    sites: tuple[str, ...],
    short: Callable[..., Profile],
    llama_dir: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    fitted = adapters(tmp_path / "adapters", sites, surrogate)
    pairs, (compared, ranked) = matrices(fitted), drawn(text).split(1)

    @functools.cache
    def kl(dropped: tuple[str, ...], *, comparing: bool = False) -> float:
        own = {site: pairs[site] for site in dropped}
        windows = compared if comparing else ranked
        return kl_by_oracle("llama", windows, dropped, policy, surrogate=surrogate, adapters=own)

    result = short(llama_dir, tmp_path / "out", adapters=fitted, policy=policy, sensitivity_tokens=WINDOW)
    assert set(result.rankings["temporal"]) == set(sites)
    for one in result.drop_lists:
        assert one.kl == pytest.approx(kl(one.sites, comparing=True), rel=TOLERANCE)
    alone = {site: kl((site,)) for site in sites}
    measured = {one.site: one for one in result.sites}
    assert {site: measured[site].kl_alone for site in sites} == pytest.approx(alone, rel=TOLERANCE)
    order, listed = result.rankings["sensitivity"], list[str]()
    for place, reached in enumerate(result.greedy_kl):
        listed.append(order[place])
        assert reached == pytest.approx(kl(tuple(sorted(listed))), rel=TOLERANCE)
        before = result.greedy_kl[place - 1] if place else 0.0
        price = {
            site: (kl(tuple(sorted([*listed[:-1], site]))) - before) / measured[site].saved_bytes
            for site in sites
            if site not in listed[:-1]
        }
        assert min(price, key=lambda site: price[site]) == listed[-1]


def test_lists_as_long_as_the_adapters_allow(short: Callable[..., Profile], llama_dir: Path, tmp_path: Path) -> None:
    """Of four eligible layers one, two and three make ρ = 0.25, 0.5 and 0.75."""
    for sites, ratios in ((LAYERS, [0.25, 0.5, 0.75]), (LAYERS[1:], [0.25, 0.5]), (HALVES, [0.25, 0.5])):
        name = "-".join(sites)
        fitted = adapters(tmp_path / name, sites)
        result = short(llama_dir, tmp_path / f"out-{name}", adapters=fitted, rankings=("influence",))
        assert [one.rho for one in result.drop_lists] == ratios


def test_what_the_adapters_bring(short: Callable[..., Profile], llama_dir: Path, tmp_path: Path) -> None:
    """Policy, rank and the layers that are kept; what is asked for comes first."""
    fitted = adapters(tmp_path / "adapters", LAYERS, policy="backfill", always_first=1, always_last=0)
    found = short(llama_dir, tmp_path / "out", adapters=fitted, rankings=("influence",))
    brought = {"policy": "backfill", "rank": 4, "always_first": 1, "always_last": 0, "adapters": "adapters"}
    assert {name: found.settings[name] for name in brought} == brought
    (ranked,) = found.drop_lists  # of seven eligible layers a quarter are two; half would be four
    facts = read_drop_list(tmp_path / "out" / ranked.file)
    assert (len(facts.sites), facts.always_first, facts.always_last) == (2, 1, 0)
    found = short(llama_dir, tmp_path / "two", adapters=fitted, rankings=("influence",), policy="skip", always_first=2)
    assert (found.settings["policy"], found.settings["always_first"]) == ("skip", 2)


def test_halves_without_adapters_take_no_bytes_of_one(
    short: Callable[..., Profile], llama_dir: Path, tmp_path: Path
) -> None:
    attentions = tuple(site for site in HALVES if site.endswith(".attn"))  # as `fit --adapters-for mlp` leaves them
    found = []
    for bare in ((), attentions):
        fitted = adapters(tmp_path / f"fitted-{len(bare)}", HALVES, bare_sites=bare)
        result = short(llama_dir, tmp_path / f"out-{len(bare)}", adapters=fitted, rankings=("influence",))
        found.append({one.site: one.saved_bytes for one in result.sites})
    adapter = 2 * 4 * 64 * 4  # A and B of rank 4 in float32
    more = {site: found[1][site] - found[0][site] for site in HALVES}
    assert more == {site: adapter if site in attentions else 0 for site in HALVES}


def test_a_bundles_policy(short: Callable[..., Profile], tmp_path: Path) -> None:
    bundle = make_bundle("llama", tmp_path / "bundle", policy="backfill").root
    add_tokenizer(bundle / "tokenizer")
    own = short(bundle, tmp_path / "own", rankings=("influence",))
    asked = short(bundle, tmp_path / "asked", rankings=("influence",), policy="backfill")
    other = short(bundle, tmp_path / "other", rankings=("influence",), policy="skip")
    assert own.settings["policy"] == "backfill"
    assert own.drop_lists == asked.drop_lists != other.drop_lists


@pytest.mark.usefixtures("no_figures")
def test_what_it_prints(llama_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = adapters(tmp_path / "fitted", LAYERS, policy="backfill", always_first=2)
    assert command(llama_dir, "--text", text, "--out", tmp_path / "out", "--adapters", fitted) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"on {WINDOW} other tokens, k = 3, policy backfill, residual with the adapters of fitted" in lines
    assert lines[-1] == (
        "use one: lora-drop fit MODEL --text … --surrogate residual --rank 4 --drop-list FILE --policy backfill --k 3 "
        "--out DIR"
    )
    (row,) = [line.split() for line in lines if line.startswith("5 ")]
    assert row[-3:] == ["–", "–", "–"]  # nothing stands in for it


@pytest.mark.parametrize(
    ("sites", "more", "words"),
    [
        (LAYERS, ("--sites", "halves"), ("--sites would change nothing", "halves", "--adapters brings it")),
        (LAYERS, ("--rank", 4), ("--rank would change nothing", "It is 4")),
        (LAYERS, ("--policy", "painless"), ("--policy", "painless")),
        (LAYERS, ("--always-first", 4), ("always kept", "3")),
        (LAYERS, ("--objective", "kv", "--policy", "backfill"), ("No K/V is saved", "backfill")),
        (("4", "5.attn", "5.mlp"), (), ("whole layers and for halves", "4, 5.attn, 5.mlp")),
        (("4.attn",), (), ("stand in for too little", "4.attn", "ρ = 0.25")),
    ],
)
def test_refused(
    sites: tuple[str, ...],
    more: tuple[Any, ...],
    words: tuple[str, ...],
    llama_dir: Path,
    text: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    fitted = adapters(tmp_path / "fitted", sites)
    assert command(llama_dir, "--text", text, "--out", tmp_path / "out", "--adapters", fitted, *more) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert [file.name for file in tmp_path.iterdir()] == ["fitted"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_drop": {}}, ("do not say what they stand in for",)),
        ({"peft_type": "IA3"}, ("not a directory of LoRA-Drop adapters",)),
        (
            {"lora_drop": {"sites": ["3"], "base_fingerprint": "0123456789abcdef"}},
            ("another base model", "0123456789ab"),
        ),
        ({"r": 9}, ("wrong shape", "(9, 64)")),
        ({"lora_drop": {"sites": ["3", "99"]}}, ("99",)),
        ({"lora_drop": {"sites": ["3", "4", "5", "6"]}}, ("do not cover", "layer 5")),
    ],
)
def test_damaged_adapters(
    config: dict[str, Any], words: tuple[str, ...], llama_dir: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    fitted = adapters(tmp_path / "fitted", LAYERS)
    file = fitted / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert command(llama_dir, "--text", text, "--out", tmp_path / "out", "--adapters", fitted) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert command(llama_dir, "--text", text, "--out", tmp_path / "out", "--adapters", tmp_path / "nowhere") == 2
    assert not (tmp_path / "out").exists()
