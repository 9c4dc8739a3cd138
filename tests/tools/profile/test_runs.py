"""`lora-drop profile --rankings run`: the neighbours that cost least with an adapter in their place."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_tools.cli import main
from lora_drop_tools.profile import runs
from lora_drop_tools.profile.result import Profile, RankedList
from lora_drop_tools.profile.settings import ProfileSettings
from lora_drop_tools.teacher_forcing.closed_form import RIDGES

from tests.support.bundles import make_bundle
from tests.support.models import FAMILIES
from tests.support.profiles import ELIGIBLE, PROMPT, TOLERANCE, WINDOW, K, add_tokenizer, make_scoring, saved
from tests.tools.profile.test_greedy import MODELS, kl_by_oracle, reference

Pair = tuple[torch.Tensor, torch.Tensor, float]


@pytest.fixture(scope="module")
def uneven_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(MODELS["uneven"](), tmp_path_factory.mktemp("runs") / "uneven")


def drawn(text: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The windows as the command draws them: to compare on, to rank on, and to fit."""
    ids = torch.tensor([int(word[1:]) for word in text.read_text(encoding="utf-8").split()])[: 20 * WINDOW].view(
        -1, WINDOW
    )
    ids = ids[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    return ids[:1], ids[1:2], ids[2:9]


def least_squares(windows: torch.Tensor, run: tuple[str, ...]) -> dict[str, Pair]:
    """The run's map by numpy, from transformers' own hidden states: the ridge is the sixth window's choice."""
    with torch.no_grad():
        states = reference("uneven")(windows, output_hidden_states=True).hidden_states
    before, behind = (states[i].double().numpy() for i in (int(run[0]), int(run[-1]) + 1))
    lora = [t for t in range(PROMPT, WINDOW) if (t - PROMPT + 1) % (K + 1)]
    anchor = [t - (t - PROMPT + 1) % (K + 1) for t in lora]
    x = np.concatenate([before[:, lora], (behind - before)[:, anchor]], axis=-1)
    y = (behind - before)[:, lora]
    fit = [n for n in range(len(x)) if n != 5]

    def rows(values: npt.NDArray[Any], which: list[int]) -> npt.NDArray[Any]:
        return values[which].reshape(-1, values.shape[-1])

    scale = np.sqrt((rows(x, fit) ** 2).mean(0))
    u, found = rows(x, fit) / scale, []
    for ridge in RIDGES:
        w = np.linalg.solve(u.T @ u + ridge * len(u) * np.eye(len(scale)), u.T @ rows(y, fit)) / scale[:, None]
        found.append((float(((rows(y, [5]) - rows(x, [5]) @ w) ** 2).sum()), w))
    error, w = min(found, key=lambda one: one[0])
    b = np.eye(w.shape[1]) * (error < float((rows(y, [5]) ** 2).sum()))  # else the base stays alone
    pair = (torch.tensor(w.T, dtype=torch.float32), torch.tensor(b, dtype=torch.float32), 1.0)
    nothing = (torch.zeros_like(pair[0]), torch.zeros_like(pair[1]), 1.0)
    return dict.fromkeys(run[:-1], nothing) | {run[-1]: pair}


@pytest.mark.parametrize("policy", ["backfill", "skip"])
def test_the_run_of_least_kl_by_the_oracle(
    policy: str, short: Callable[..., Profile], uneven_dir: Path, text: Path, tmp_path: Path
) -> None:
    comparing, ranking, fitting = drawn(text)

    def kl(run: tuple[str, ...], windows: torch.Tensor) -> float:
        pairs = least_squares(fitting, run)
        return kl_by_oracle("uneven", windows, run, policy, surrogate="residual-delta", adapters=pairs)

    sizes = {"tokens": 8 * WINDOW, "sensitivity_tokens": WINDOW}
    result = short(uneven_dir, tmp_path / "out", policy=policy, rankings=("run",), **sizes)
    assert [one.rho for one in result.drop_lists] == [0.25, 0.5, 0.75]
    for length, one in enumerate(result.drop_lists, 1):
        costs = {run: kl(run, ranking) for run in (ELIGIBLE[i : i + length] for i in range(5 - length))}
        assert one.sites == min(costs, key=costs.__getitem__)
        assert one.kl == pytest.approx(kl_by_oracle("uneven", comparing, one.sites, policy), rel=TOLERANCE)
        if policy == "backfill":  # under skip refreshes see holes, which the adapters of lists are fitted among
            assert one.kl_fitted == pytest.approx(kl(one.sites, comparing), rel=10 * TOLERANCE)
    assert result.rankings["run"][0] == result.drop_lists[0].sites[0]
    assert set(result.rankings["run"]) == set(itertools.chain(*(one.sites for one in result.drop_lists)))


def test_a_run_among_lists_is_fitted_as_alone() -> None:
    """One pass over all layers finds what walking through one list does."""
    windows = torch.randint(0, 131, (7, WINDOW), generator=torch.Generator().manual_seed(5))
    scoring = runs.with_adapters(make_scoring(FAMILIES["gemma2"](), "backfill"), 3)
    ticks: list[None] = []
    found = dict(runs._of_runs(scoring, windows, [("3",), ("4", "5", "6")], lambda: ticks.append(None)))
    assert len(ticks) == 8
    for run, surrogates in found.items():
        alone = runs._of_list(scoring, windows, run)
        assert set(alone) == set(surrogates) == {run[-1]}
        (a, b), (own_a, own_b) = surrogates[run[-1]], alone[run[-1]]
        assert a.shape == (3 * len(run), 128)
        assert (b @ a - own_b @ own_a).norm() <= 1e-4 * (own_b @ own_a).norm()


def test_all_lists_are_compared_with_adapters(
    short: Callable[..., Profile], uneven_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = short(uneven_dir, tmp_path / "out", policy="skip", rankings=("influence", "run"), tokens=8 * WINDOW)
    assert all(one.kl_fitted is not None for one in result.drop_lists)
    said = capsys.readouterr().out
    assert "the same with adapters" in said
    for rho in (0.25, 0.5, 0.75):
        lists = [one for one in result.drop_lists if one.rho == rho]
        assert [one.ranking for one in lists] == ["influence", "run"]
        best = result.best(rho)
        assert best.kl_fitted == min(one.kl_fitted for one in lists if one.kl_fitted is not None)
        assert f"{best.file}: {', '.join(best.sites)}" in said


def test_the_best_list_is_that_with_the_least_kl_with_adapters() -> None:
    for fitted, best in (((0.05, 0.02), "run"), ((None, None), "influence")):
        lists = [
            RankedList(name, 0.5, (), kl, 0.5, 0.5, with_adapters)
            for name, kl, with_adapters in zip(("influence", "run"), (0.1, 0.4), fitted, strict=True)
        ]
        assert Profile("m", "f", {}, {}, (), {}, (), tuple(lists)).best(0.5).ranking == best


def test_the_printed_command_fits_what_was_measured(
    short: Callable[..., Profile], uneven_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapters = tmp_path / "out", tmp_path / "adapters"
    result = short(uneven_dir, out, policy="backfill", k=2, rank=5, rankings=("run",))
    *_, last = capsys.readouterr().out.splitlines()
    best = result.best(0.5)
    assert json.loads((out / best.file).read_text())["run_rank"] == 5
    given = {"MODEL": uneven_dir, "…": text, "FILE": out / best.file, "DIR": adapters}
    words = [str(given.get(word, word)) for word in last.removeprefix("use one: lora-drop ").split()]
    sizes = ["--steps", "0", "--window", str(WINDOW), "--closed-form-tokens", "256"]
    assert main([*words, *sizes]) == 0
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert (config["r"], config["lora_drop"]["k"], config["lora_drop"]["policy"]) == (5, [2], "backfill")
    assert (config["lora_drop"]["surrogate"], tuple(config["lora_drop"]["sites"])) == ("residual-delta", best.sites)


def test_the_rank_matters_where_no_weights_are_counted(
    short: Callable[..., Profile], uneven_dir: Path, tmp_path: Path
) -> None:
    asked = {"objective": "kv", "rankings": ("run",)}
    one, many = (short(uneven_dir, tmp_path / f"{rank}", rank=rank, **asked).drop_lists[-1] for rank in (1, 16))
    assert one.kl_fitted != many.kl_fitted
    with pytest.raises(InputError, match="--bundle-dtype would change nothing"):
        ProfileSettings(text=(Path("t"),), out=Path("o"), bundle_dtype="bf16", **asked)


def test_gaps_between_what_may_be_dropped() -> None:
    assert runs._runs_of(("3", "4", "6", "10", "11", "12"), 2) == [("3", "4"), ("10", "11"), ("11", "12")]
    assert runs._runs_of(("3", "5"), 2) == []
    assert runs._runs_of(("3", "4"), 0) == []


def test_a_model_without_neighbours(
    short: Callable[..., Profile],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every other layer of Gemma 2 has a window, and is kept under skip."""
    model = saved(FAMILIES["gemma2"](), tmp_path / "gemma2")
    result = short(model, tmp_path / "out", policy="skip", rankings=("influence", "run"))
    assert {one.rho for one in result.drop_lists if one.ranking == "influence"} == {0.25, 0.5, 0.75}
    reached = {one.rho: one.sites for one in result.drop_lists if one.ranking == "run"}
    assert all(len(sites) == 1 for sites in reached.values())
    assert set(reached) == {one.rho for one in result.drop_lists if one.ranking == "influence" and len(one.sites) == 1}
    assert "–" in capsys.readouterr().out
    monkeypatch.setattr(importlib.import_module("lora_drop_tools.profile.choice"), "RATIOS", (0.75,))
    with pytest.raises(InputError, match="No neighbours are as many") as raised:
        short(model, tmp_path / "none", policy="skip", rankings=("run",))
    assert "Leave run out" in str(raised.value)


def test_an_overflow_is_refused() -> None:
    """As where lists are scored; no map can be found of it."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.mul_(1e6)
    windows = torch.randint(0, 131, (2, WINDOW), generator=torch.Generator().manual_seed(5))
    scoring = runs.with_adapters(make_scoring(model.half(), "skip"), 3)
    with pytest.raises(ModelError, match="not finite") as raised:
        dict(runs._of_runs(scoring, windows, [("3", "4")], lambda: None))
    assert "float16" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"sites": "halves"}, "of whole layers"),
        ({"adapters": Path("a")}, "of whole layers"),
        ({"policy": "fill"}, "one adapter stands for"),
        ({"tokens": 256, "sensitivity_tokens": 256, "window": 64}, "too little text"),
    ],
)
def test_refused(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        ProfileSettings(text=(Path("t"),), out=Path("o"), rankings=("influence", "run"), **options)


def test_policy_of_a_bundle(short: Callable[..., Profile], tmp_path: Path) -> None:
    """`fill` is refused where the bundle brings it, too."""
    bundle = make_bundle("llama", tmp_path / "bundle", policy="fill")
    add_tokenizer(bundle.root / "tokenizer")
    with pytest.raises(InputError, match="one adapter stands for"):
        short(bundle.root, tmp_path / "out", rankings=("run",))


def test_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    assert "and run: neighbours" in " ".join(capsys.readouterr().out.split())
