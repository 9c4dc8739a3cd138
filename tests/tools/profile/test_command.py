"""`lora-drop profile`: its files, what it prints, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_drop_tools.cli import main
from lora_drop_tools.profile.greedy import Greedy
from lora_drop_tools.profile.measures import site_figures
from lora_drop_tools.profile.profile import profile
from lora_drop_tools.profile.result import Profile
from lora_drop_tools.profile.scoring import Scoring
from lora_drop_tools.profile.settings import RANKINGS, ProfileSettings

from lora_drop_export.checkpoint.drop_list import DropList, read_drop_list
from tests.support.bundles import family, make_bundle
from tests.support.models import FAMILIES
from tests.support.profiles import ELIGIBLE, TOLERANCE, WINDOW, K, add_tokenizer, make_scoring, saved

OLD = json.dumps({"fingerprint": "", "layers": [{}], "rankings": {}, "drop_lists": []})  # of an earlier profile
profile_module = importlib.import_module("lora_drop_tools.profile.profile")  # the name in the package is the function


# ── the command and its files ──────────────────────────────────────────────────────────────────────────────────


def test_rankings_and_lists(made: tuple[Profile, Path]) -> None:
    result, out = made
    figures = {one.site: one for one in result.sites}
    assert [site for site, one in figures.items() if one.eligible] == list(ELIGIBLE)
    for ranking, key in (
        ("temporal", lambda i: -sum(figures[i].similarity.values())),
        ("influence", lambda i: -figures[i].influence_cosine),
    ):
        assert list(result.rankings[ranking]) == sorted(ELIGIBLE, key=key)
    assert len(result.rankings["sensitivity"]) == len(result.greedy_kl) == 3
    assert {site for site, one in figures.items() if one.kl_alone is not None} == set(ELIGIBLE)
    assert [(one.ranking, one.rho) for one in result.drop_lists] == list(itertools.product(RANKINGS, (0.25, 0.5, 0.75)))
    for one in result.drop_lists:
        count = {0.25: 1, 0.5: 2, 0.75: 3}[one.rho]
        assert one.sites == tuple(sorted(result.rankings[one.ranking][:count]))
        facts = json.loads((out / one.file).read_text())
        assert facts["sites"] == list(one.sites)
        assert (facts["ranking"], facts["rho"], facts["kl"]) == (one.ranking, one.rho, one.kl)
        assert (facts["model"], facts["fingerprint"]) == ("tiny-llama", result.fingerprint)
        errors = {
            base: {int(site): figures[site].base_errors[base] for site in one.sites} for base in ("recurrent", "anchor")
        }
        assert read_drop_list(out / one.file) == DropList(one.sites, result.fingerprint, errors, 3, 1, "skip")
    for rho in (0.25, 0.5, 0.75):
        assert result.best(rho).kl == min(one.kl for one in result.drop_lists if one.rho == rho)


def test_lists_are_compared_on_text_that_no_ranking_saw(
    llama_dir: Path, text: Path, made: tuple[Profile, Path]
) -> None:
    """The windows are drawn once: first those for the comparison, then those for the rankings."""
    ids = torch.tensor([int(word[1:]) for word in text.read_text(encoding="utf-8").split()])[: 20 * WINDOW].view(
        -1, WINDOW
    )
    drawn = ids[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    scoring = make_scoring(FAMILIES["llama"](), "skip")  # the default
    result = made[0]
    found = scoring.of_lists(drawn[:2], [one.sites for one in result.drop_lists], lambda: None)
    assert [one.kl for one in result.drop_lists] == pytest.approx(found, rel=TOLERANCE)
    alone = Greedy(scoring, drawn[2:4]).costs(ELIGIBLE)
    measured = {one.site: one for one in result.sites}
    assert {site: measured[site].kl_alone for site in ELIGIBLE} == pytest.approx(alone, rel=TOLERANCE)
    figures = site_figures(scoring.forcing, drawn[2:10], K, lambda: None)
    wanted = {site: own.influence_cosine for site, own in figures.items()}
    assert {site: one.influence_cosine for site, one in measured.items()} == pytest.approx(wanted)


def test_profile_json(made: tuple[Profile, Path]) -> None:
    result, out = made
    written = json.loads((out / "profile.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(result)))
    assert written["settings"]["tokens"] == 8 * WINDOW
    assert set(written["versions"]) == {"lora-drop-export", "torch", "transformers", "numpy"}
    names = {"profile.json", *(one.file for one in result.drop_lists)}
    if importlib.util.find_spec("matplotlib"):
        names |= {f"{n}.png" for n in ("similarity", "similarity_map", "influence", "base_errors", "sensitivity")}
    assert {file.name for file in out.iterdir()} == names
    assert [file.name for file in out.parent.iterdir()] == ["profile"]


def test_windowed_layers_are_not_eligible(short: Callable[..., Profile], tmp_path: Path) -> None:
    result = short(saved(FAMILIES["gemma2"](), tmp_path / "model"), tmp_path / "out", policy="skip")
    assert [one.site for one in result.sites if one.eligible] == ["3", "5"]
    assert [len(one.sites) for one in result.drop_lists] == [1, 1, 2] * 3


def arguments(model: Path, text: Path, out: Path, *more: object) -> list[str]:
    sizes = ("--tokens", 4 * WINDOW, "--window", WINDOW, "--sensitivity-tokens", WINDOW)
    return ["profile", *(str(a) for a in (model, "--text", text, "--out", out, *sizes, *more))]


@pytest.mark.usefixtures("no_figures")
def test_what_it_prints(llama_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(llama_dir, text, tmp_path / "out", "--rankings", "influence,temporal")) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert f"tiny-llama: {4 * WINDOW} tokens in windows of {WINDOW}" in lines
    (heading,) = [line for line in lines if line.startswith("layer ")]
    assert heading.split()[-2:] == ["influence", "temporal"]
    rows = [line.split() for line in lines[lines.index(heading) + 1 :][:8]]
    assert [row[0] for row in rows] == [str(i) for i in range(8)]
    assert [row[-1] for row in rows if row[-1] != "kept"] != []
    assert rows[0][-3:] == ["–", "kept", "kept"]
    facts = json.loads((tmp_path / "out" / "profile.json").read_text())
    best = min((one for one in facts["drop_lists"] if one["rho"] == 0.5), key=lambda one: one["kl"])
    layers = ", ".join(best["sites"])
    assert f"  {tmp_path}/out/drop-{best['ranking']}-0.5.json: {layers}" in lines
    assert "figures of the layers" in printed.err
    assert "sensitivity" not in printed.err
    assert not list((tmp_path / "out").glob("drop-sensitivity*"))


def test_a_full_disk_leaves_the_table(
    llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what is left of minutes or hours."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(profile_module, "_write", full)
    assert main(arguments(llama_dir, text, tmp_path / "out", "--rankings", "influence")) == 2
    printed = capsys.readouterr()
    assert "error: The disk is full." in printed.err
    assert "recommended, the least KL:" in printed.out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("most", [0.003, 0.08, 0.5, 4.0])
def test_the_axes_of_kl_can_be_read(made: tuple[Profile, Path], most: float) -> None:
    """At least three ticks, whatever the layers cost."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    from lora_drop_tools.profile.plots import _draw_sensitivity
    from matplotlib.figure import Figure

    sites = tuple(dataclasses.replace(one, kl_alone=most * (i + 1) / 8) for i, one in enumerate(made[0].sites))
    lists = tuple(dataclasses.replace(one, kl=most * one.rho) for one in made[0].drop_lists)
    result = dataclasses.replace(made[0], sites=sites, drop_lists=lists, greedy_kl=(most / 3, most / 2, most))
    figure = Figure()
    panels = figure.subplots(2, 1)
    _draw_sensitivity(panels, result)
    for panel in panels:
        bottom, top = panel.get_ylim()
        assert sum(bottom <= tick <= top for tick in panel.get_yticks()) >= 3


def test_without_matplotlib(
    llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else real(name))
    assert main(arguments(llama_dir, text, tmp_path / "out", "--rankings", "influence")) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_bundle_is_its_model(made: tuple[Profile, Path], short: Callable[..., Profile], tmp_path: Path) -> None:
    bundle = make_bundle("llama", tmp_path / "bundle").root
    add_tokenizer(bundle / "tokenizer")
    result = short(bundle, tmp_path / "out")
    assert (result.fingerprint, result.drop_lists) == (made[0].fingerprint, made[0].drop_lists)


# ── refusals ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--k 0", ("--k is too small", "It is 0")),
        ("--k -1", ("k", "-1")),
        ("--policy painless", ("--policy", "painless")),
        ("--rankings influence,size", ("--rankings", "'size'", "temporal")),
        ("--rankings ,", ("--rankings",)),
        ("--window 12", ("window is too short", "12", "16")),
        ("--window 24 --k 30", ("window is too short", "36")),
        ("--tokens 15", ("--tokens", "15", "16")),
        ("--sensitivity-tokens 7", ("--sensitivity-tokens", "7", "16")),
        ("--dtype int4", ("--dtype", "int4")),
        ("--text none.txt", ("text cannot be read", "none.txt")),
        ("--text /", ("text cannot be read", "/")),
        ("--text LATIN1", ("text cannot be read", "latin1.txt", "utf-8")),
        ("--text", ("--text",)),
    ],
)
def test_refused_without_the_model(
    more: str, words: tuple[str, ...], text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded before the refusal")

    monkeypatch.setattr("lora_drop_export.decoder.loaded.load_model", fail)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    changed = more.replace("LATIN1", str(tmp_path / "latin1.txt")).split()
    assert main([*arguments(tmp_path, text, tmp_path / "out"), *changed]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert [file.name for file in tmp_path.iterdir()] == ["latin1.txt"]


def test_refused_by_the_function(text: Path, tmp_path: Path) -> None:
    """What argparse would refuse before."""
    for options, word in (
        ({"policy": "painless"}, "refresh policy"),
        ({"dtype": "int4"}, "dtype"),
        ({"rankings": ()}, "ranking"),
    ):
        with pytest.raises(Exception, match=f"Unknown {word}"):
            profile("model", ProfileSettings(text=(text,), out=tmp_path / "out", **options))
    with pytest.raises(Exception, match="There is no text"):
        profile("model", ProfileSettings(text=(), out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--tokens", 20 * WINDOW), ("text is too short", "20 windows", "21")),
        (("--sensitivity-tokens", 11 * WINDOW), ("text is too short", "22")),
        (("--window", 257, "--tokens", 257, "--sensitivity-tokens", 257), ("model's context", "257", "256")),
        (("--always-first", 7), ("No layer", "first 7", "last 1")),
        (("--rank", 65), ("--rank is too large", "65", "64, the model's hidden size")),
        (("--always-first", -1), ("--always-first is too small", "-1")),
        (("--device", "nowhere"), ("device", "nowhere")),
    ],
)
def test_refused_with_the_model(
    more: tuple[Any, ...], words: tuple[str, ...], llama_dir: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(arguments(llama_dir, text, tmp_path / "out", *more)) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_not_a_model(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(text, text, tmp_path / "out")) == 2
    assert "not a GGUF file" in capsys.readouterr().err
    without = shutil.copytree(family("llama").directory, tmp_path / "model")
    assert main(arguments(without, text, tmp_path / "out")) == 2
    assert "Put the tokenizer's files beside the weights." in capsys.readouterr().err
    bundle = make_bundle("llama", tmp_path / "bundle").root  # which takes no more files
    assert main(arguments(bundle, text, tmp_path / "out")) == 2
    assert "Give the checkpoint that the bundle was made from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_logits_that_overflow(llama_dir: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    assert main(arguments(saved(model, tmp_path / "model"), text, tmp_path / "out")) == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_figures")
def test_an_existing_directory(llama_dir: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(arguments(llama_dir, text, out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(arguments(llama_dir, text, out, "--force")) == 2
    assert "is not a profile" in capsys.readouterr().err
    (out / "profile.json").write_text(OLD)
    assert main(arguments(llama_dir, text, out, "--force", "--rankings", "influence")) == 0
    assert (out / "profile.json").read_text() != OLD
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["load_model", "site_figures", "of_lists", "write_plots"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind(
    where: str, error: type[BaseException], llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    old = tmp_path / "old"
    old.mkdir()
    (old / "profile.json").write_text(OLD)

    def fail(*_: object, **__: object) -> None:
        raise error("in the middle")

    owners = {"load_model": importlib.import_module("lora_drop_export.decoder.loaded"), "of_lists": Scoring}
    monkeypatch.setattr(owners.get(where, profile_module), where, fail)
    for out in (tmp_path / "new" / "out", old):
        command = arguments(llama_dir, text, out, "--force", "--rankings", "influence")
        if error is KeyboardInterrupt:
            assert main(command) == 130
        else:
            with pytest.raises(RuntimeError, match="in the middle"):
                main(command)
    assert [file.name for file in tmp_path.rglob("*")] == ["old", "profile.json"]
    assert (old / "profile.json").read_text() == OLD
