"""`lora-drop profile`: its figures from hidden states by hand, its KLs from the oracle, its files and its refusals."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_tools.cli import main
from lora_drop_tools.profile.greedy import Greedy, ticks
from lora_drop_tools.profile.measures import DELTAS, LEADING, LayerFigures, layer_figures
from lora_drop_tools.profile.profile import profile
from lora_drop_tools.profile.result import Profile
from lora_drop_tools.profile.scoring import Scoring
from lora_drop_tools.profile.settings import RANKINGS, ProfileSettings
from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
from lora_drop_tools.teacher_forcing.layout import Layout
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lora_drop_export.cli
from lora_drop_export.checkpoint.drop_list import DropList, read_drop_list
from tests import oracle
from tests.bundles import family, make_bundle
from tests.models import FAMILIES, SIZES

profile_module = importlib.import_module("lora_drop_tools.profile.profile")  # the name in the package is the function
greedy_module = importlib.import_module("lora_drop_tools.profile.greedy")
scoring_module = importlib.import_module("lora_drop_tools.profile.scoring")

WINDOW, PROMPT, K = 24, 6, 3
ELIGIBLE = (3, 4, 5, 6)
TOLERANCE = 2e-4  # relative, of sums of float32 in another order


def random_windows(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 131, (count, WINDOW), generator=torch.Generator().manual_seed(seed))


def add_tokenizer(directory: Path) -> None:
    """Word `w<i>` is token i."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(131)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(FAMILIES["llama"](), tmp_path_factory.mktemp("profile") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 windows and a half."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    ids = np.random.default_rng(1).integers(0, 131, 20 * WINDOW + WINDOW // 2)
    file.write_text(" ".join(f"w{i}" for i in ids))
    return file


@pytest.fixture(scope="module")
def short(text: Path) -> Callable[..., Profile]:
    """`profile` of little text."""
    options = {"tokens": 8 * WINDOW, "sensitivity_tokens": 2 * WINDOW, "window": WINDOW}
    return lambda model, out, **more: profile(str(model), ProfileSettings(text=(text,), out=out, **(options | more)))


@pytest.fixture(scope="module")
def made(
    llama_dir: Path, short: Callable[..., Profile], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Profile, Path]:
    out = tmp_path_factory.mktemp("made") / "deeper" / "profile"
    return short(llama_dir, out), out


# ── figures of the layers ──────────────────────────────────────────────────────────────────────────────────────


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def streams(model: PreTrainedModel, ids: torch.Tensor) -> list[np.ndarray]:
    """The residual stream before the first layer and after each, [T, d]; transformers norms its last one."""
    last: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *args: last.append(args[2]))
    with torch.no_grad():
        hidden = list(model(ids[None], output_hidden_states=True).hidden_states)
    hook.remove()
    hidden[-1] = last[0][0] if isinstance(last[0], tuple) else last[0]
    return [h[0].double().numpy()[LEADING:] for h in hidden]


def by_hand(model: PreTrainedModel, windows: torch.Tensor, layer: int, k: int) -> LayerFigures:
    similar: dict[int, list[float]] = {delta: [] for delta in DELTAS}
    centred: dict[int, list[float]] = {delta: [] for delta in DELTAS}
    kept: list[float] = []
    spread: list[float] = []
    norms: list[float] = []
    distances: dict[str, list[float]] = {"residual": [], "recurrent": [], "anchor": []}
    by_offset: dict[int, list[float]] = {offset: [] for offset in range(1, k + 1)}
    for ids in windows:
        x, y = streams(model, ids)[layer : layer + 2]
        mean = y.mean(0)
        for t in range(len(y)):
            for delta in DELTAS:
                if t + delta < len(y):
                    similar[delta].append(cosine(y[t], y[t + delta]))
                    centred[delta].append(cosine(y[t] - mean, y[t + delta] - mean))
            for offset, of_offset in by_offset.items():
                if t >= offset:
                    of_offset.append(float(np.linalg.norm(y[t] - y[t - offset])))
            kept.append(cosine(x[t], y[t]))
            distances["residual"].append(float(np.linalg.norm(y[t] - x[t])))
            spread.append(float(np.linalg.norm(y[t] - mean)))
            norms.append(float(np.linalg.norm(y[t])))
    means = {
        "residual": np.mean(distances["residual"]),
        "recurrent": np.mean(by_offset[1]),
        "anchor": np.mean([np.mean(of_offset) for of_offset in by_offset.values()]),
    }
    return LayerFigures(
        similarity={delta: float(np.mean(values)) for delta, values in similar.items()},
        centred_similarity={delta: float(np.mean(values)) for delta, values in centred.items()},
        influence_cosine=float(np.mean(kept)),
        base_errors={base: float(mean / np.mean(spread)) for base, mean in means.items()},
        base_errors_of_norm={base: float(mean / np.mean(norms)) for base, mean in means.items()},
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2"])
def test_figures_by_hand(name: str) -> None:
    windows, counted = random_windows(3), []
    forcing = TeacherForcing(FAMILIES[name]())
    figures = layer_figures(forcing, windows, K, lambda: counted.append(1))
    assert (len(figures), len(counted)) == (8, 3)
    for layer, found in enumerate(figures):
        expected = dataclasses.asdict(by_hand(FAMILIES[name](), windows, layer, K))
        for field, value in dataclasses.asdict(found).items():
            assert value == pytest.approx(expected[field], rel=TOLERANCE, abs=1e-5), (layer, field)


# ── KL and the greedy order ────────────────────────────────────────────────────────────────────────────────────


def uneven() -> PreTrainedModel:
    """What layers write is scaled, so that the greedy order goes back and forth."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        for layer, scale in ((3, 0.2), (4, 0.7), (5, 0.3), (6, 0.5)):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(scale)
            model.model.layers[layer].mlp.down_proj.weight.mul_(scale)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {**FAMILIES, "uneven": uneven}


def make_scoring(model: PreTrainedModel, policy: str, k: int = K) -> Scoring:
    layout = Layout.of(WINDOW, PROMPT, PeriodicSchedule(k))
    return Scoring(TeacherForcing(model), DropPlan(8, (), k), layout, policy)


def kl_by_oracle(name: str, windows: torch.Tensor, dropped: tuple[int, ...], policy: str, k: int = K) -> float:
    """Mean KL(full ‖ LoRA step), one token at a time."""
    model, found = MODELS[name](), []
    for ids in windows.tolist():
        with torch.no_grad():
            full = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        steps = oracle.decode_row(model, oracle.OraclePlan(dropped), ids[:PROMPT], ids[PROMPT:], k, policy)
        for j, logits in enumerate(steps):
            if j and not oracle.is_refresh(j, k):
                wanted = full[PROMPT - 1 + j]
                found.append(float((wanted.exp() * (wanted - logits.double().log_softmax(-1))).sum()))
    return float(np.mean(found))


@pytest.mark.parametrize("policy", ["skip", "backfill"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kl_is_the_oracles(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_module, "HEAD_ROWS", 5)  # of 14 LoRA steps a window
    windows = random_windows(2)
    scoring = make_scoring(FAMILIES[name](), policy)
    lists = [(5,), (3, 5), ()]
    expected = [kl_by_oracle(name, windows, one, policy) for one in lists[:2]]
    found = scoring.of_lists(windows, lists, lambda: None)
    assert found == pytest.approx([*expected, 0.0], rel=TOLERANCE, abs=1e-6)
    greedy = Greedy(scoring, windows)
    assert greedy.costs([3, 5])[5] == pytest.approx(expected[0], rel=TOLERANCE)
    greedy.drop(3)
    assert greedy.costs([5])[5] == pytest.approx(expected[1], rel=TOLERANCE)
    assert greedy.kept_bytes > 2 * 8 * WINDOW * SIZES["hidden_size"] * 4


@functools.cache
def greedy_by_oracle(name: str, policy: str) -> tuple[dict[int, float], list[tuple[int, float]]]:
    windows, order = random_windows(2), []
    alone: dict[int, float] = {}
    for _ in range(3):
        before = [layer for layer, _ in order]
        costs = {
            layer: kl_by_oracle(name, windows, tuple(sorted([*before, layer])), policy)
            for layer in ELIGIBLE
            if layer not in before
        }
        alone = alone or costs
        best = min(costs, key=lambda layer: costs[layer])
        order.append((best, costs[best]))
    return alone, order


ORDERED = [("uneven", "backfill"), ("uneven", "skip"), ("qwen2", "skip")]


@pytest.mark.parametrize(("name", "policy"), ORDERED)
def test_greedy_order_is_the_oracles(name: str, policy: str) -> None:
    expected_alone, expected = greedy_by_oracle(name, policy)
    ticked, reported = [], []
    greedy = Greedy(make_scoring(MODELS[name](), policy), random_windows(2), lambda: ticked.append(1))
    alone, order = greedy.order(ELIGIBLE, 3, lambda *found: reported.append(found))
    assert alone == pytest.approx(expected_alone, rel=TOLERANCE)
    assert [layer for layer, _ in order] == [layer for layer, _ in expected]
    assert [kl for _, kl in order] == pytest.approx([kl for _, kl in expected], rel=TOLERANCE)
    assert reported == order
    assert len(ticked) == ticks(4, 3, 2) == 2 * (4 + 3 + 2)  # never more than 4 candidates: none is given up


def test_the_greedy_order_is_measured_again() -> None:
    """What the cases above show: it is not the order of what the layers cost alone, nor always from the last."""
    found = [
        (sorted(alone, key=alone.get), [i for i, _ in order])
        for alone, order in map(greedy_by_oracle, *zip(*ORDERED, strict=True))
    ]
    assert any(order != alone[:3] for alone, order in found)
    assert any(order != sorted(order, reverse=True) for _, order in found)


def test_the_costlier_half_is_given_up_after_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, ticked = random_windows(3), []
    scoring = make_scoring(FAMILIES["llama"](), "backfill")
    greedy = Greedy(scoring, windows, lambda: ticked.append(1))
    whole = greedy.costs(ELIGIBLE)
    on_first = Greedy(scoring, windows[:1]).costs(ELIGIBLE)
    on_second = Greedy(scoring, windows[1:2]).costs(ELIGIBLE)
    half = sorted(ELIGIBLE, key=lambda i: on_first[i])[:2]
    last = min(half, key=lambda i: on_first[i] + on_second[i])
    ticked.clear()
    assert greedy.costs(ELIGIBLE, 1) == pytest.approx({last: whole[last]})
    assert len(ticked) == 4 + 2 + 1
    assert greedy.costs(ELIGIBLE, 3).keys() == set(sorted(ELIGIBLE, key=lambda i: on_first[i])[:3])
    monkeypatch.setattr(greedy_module, "SURVIVORS", 1)
    ticked.clear()
    greedy.order(ELIGIBLE, 3, lambda *_: None)
    assert len(ticked) == ticks(4, 3, 3) == 3 * 4 + (3 + 1 + 1) + (2 + 1 + 1)


def test_a_layer_that_does_nothing_comes_first(short: Callable[..., Profile], tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[5].self_attn.o_proj.weight.zero_()
        model.model.layers[5].mlp.down_proj.weight.zero_()
    result = short(saved(model, tmp_path / "model"), tmp_path / "out")
    assert result.layers[5].influence_cosine == pytest.approx(1, abs=1e-6)
    assert result.layers[5].base_errors["residual"] == 0
    assert result.layers[5].kl_alone == pytest.approx(0, abs=1e-6)
    assert result.rankings["influence"][0] == result.rankings["sensitivity"][0] == 5


# ── the command and its files ──────────────────────────────────────────────────────────────────────────────────


def test_rankings_and_lists(made: tuple[Profile, Path]) -> None:
    result, out = made
    figures = result.layers
    assert [layer.layer for layer in figures if layer.eligible] == list(ELIGIBLE)
    for ranking, key in (
        ("temporal", lambda i: -sum(figures[i].similarity.values())),
        ("influence", lambda i: -figures[i].influence_cosine),
    ):
        assert list(result.rankings[ranking]) == sorted(ELIGIBLE, key=key)
    assert len(result.rankings["sensitivity"]) == len(result.greedy_kl) == 3
    assert {i for i, layer in enumerate(figures) if layer.kl_alone is not None} == set(ELIGIBLE)
    assert [(one.ranking, one.rho) for one in result.drop_lists] == list(itertools.product(RANKINGS, (0.25, 0.5, 0.75)))
    for one in result.drop_lists:
        count = {0.25: 1, 0.5: 2, 0.75: 3}[one.rho]
        assert one.drop_layers == tuple(sorted(result.rankings[one.ranking][:count]))
        facts = json.loads((out / one.file).read_text())
        assert facts["drop_layers"] == list(one.drop_layers)
        assert (facts["ranking"], facts["rho"], facts["kl"]) == (one.ranking, one.rho, one.kl)
        assert (facts["model"], facts["fingerprint"]) == ("tiny-llama", result.fingerprint)
        errors = {base: {i: figures[i].base_errors[base] for i in one.drop_layers} for base in ("recurrent", "anchor")}
        assert read_drop_list(out / one.file) == DropList(one.drop_layers, result.fingerprint, errors)
    for rho in (0.25, 0.5, 0.75):
        assert result.best(rho).kl == min(one.kl for one in result.drop_lists if one.rho == rho)


def test_lists_are_compared_on_text_that_no_ranking_saw(
    llama_dir: Path, text: Path, made: tuple[Profile, Path]
) -> None:
    """The windows are drawn once: first those for the comparison, then those for the rankings."""
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])[: 20 * WINDOW].view(-1, WINDOW)
    drawn = ids[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    scoring = make_scoring(FAMILIES["llama"](), "skip")  # the default
    result = made[0]
    found = scoring.of_lists(drawn[:2], [one.drop_layers for one in result.drop_lists], lambda: None)
    assert [one.kl for one in result.drop_lists] == pytest.approx(found, rel=TOLERANCE)
    alone = Greedy(scoring, drawn[2:4]).costs(ELIGIBLE)
    assert {i: result.layers[i].kl_alone for i in ELIGIBLE} == pytest.approx(alone, rel=TOLERANCE)
    figures = layer_figures(scoring.forcing, drawn[2:10], K, lambda: None)
    assert [layer.influence_cosine for layer in result.layers] == pytest.approx([f.influence_cosine for f in figures])


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
    assert [layer.layer for layer in result.layers if layer.eligible] == [3, 5]
    assert [len(one.drop_layers) for one in result.drop_lists] == [1, 1, 2] * 3


def arguments(model: Path, text: Path, out: Path, *more: object) -> list[str]:
    sizes = ("--tokens", 4 * WINDOW, "--window", WINDOW, "--sensitivity-tokens", WINDOW)
    return ["profile", *(str(a) for a in (model, "--text", text, "--out", out, *sizes, *more))]


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
    layers = ", ".join(map(str, best["drop_layers"]))
    assert f"  {tmp_path}/out/drop-{best['ranking']}-0.5.json: {layers}" in lines
    assert "figures of the layers" in printed.err
    assert "sensitivity" not in printed.err
    assert not list((tmp_path / "out").glob("drop-sensitivity*"))


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


# ── exporting a drop list ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, llama_dir: Path, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: family("llama").traced)
    fixed = ("--model", llama_dir, "--out", tmp_path / "bundle", "--target", "none", "--max-seq-len", 64)
    return lambda *more: lora_drop_export.cli.main([str(argument) for argument in (*fixed, *more)])


def test_export_takes_a_list(
    made: tuple[Profile, Path], export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, out = made
    best = result.best(0.5)
    assert export("--drop-list", out / best.file) == 0
    assert json.loads((tmp_path / "bundle" / "lora_drop.json").read_text())["plan"]["drop_layers"] == list(
        best.drop_layers
    )
    assert "warning" not in capsys.readouterr().err


def test_export_warns_of_a_bad_base(
    export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {"recurrent": {"4": 1.25, "6": 1.5, "5": 0.9}, "anchor": {"4": 0.9, "5": 1.0, "6": 0.8}}
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [6, 5, 4], "base_errors": errors}))
    for surrogate, warned in (("recurrent", True), ("anchor", False), ("residual", False)):
        assert export("--drop-list", tmp_path / "list.json", "--surrogate", surrogate, "--force") == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
        assert bool(lines) is warned
        if warned:
            assert "--surrogate recurrent" in lines[0]
            assert "layers 4, 6 (relative errors 1.25 to 1.50)" in lines[0]


def test_export_refuses_a_list_of_another_model(
    export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [4], "fingerprint": "0123456789abcdef"}))
    assert export("--drop-list", tmp_path / "list.json") == 2
    message = capsys.readouterr().err
    assert "error: The drop list was chosen for another model." in message
    assert "0123456789ab, tiny-llama is" in message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("facts", [{"fingerprint": 7}, {"base_errors": [1]}, {"base_errors": {"anchor": {"x": 1}}}])
def test_export_refuses_a_damaged_list(
    facts: dict[str, Any], export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [4]} | facts))
    assert export("--drop-list", tmp_path / "list.json") == 2
    assert "holds no drop list" in capsys.readouterr().err


# ── refusals ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--k 0", ("no LoRA steps", "k is 0")),
        ("--k -1", ("k", "-1")),
        ("--policy lossless", ("--policy", "lossless")),
        ("--rankings influence,size", ("--rankings", "'size'", "temporal")),
        ("--rankings ,", ("--rankings",)),
        ("--window 12", ("window is too short", "12", "16")),
        ("--window 24 --k 30", ("window is too short", "36")),
        ("--tokens 23", ("--tokens", "23", "24")),
        ("--sensitivity-tokens 7", ("--sensitivity-tokens", "7", "24")),
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
        ({"policy": "lossless"}, "--policy"),
        ({"dtype": "int4"}, "--dtype"),
        ({"rankings": ()}, "--r"),
    ):
        with pytest.raises(Exception, match=f"Unknown value for {word}"):
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
        (("--always-first", -1), ("negative", "-1")),
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
    assert "no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_logits_that_overflow(llama_dir: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    assert main(arguments(saved(model, tmp_path / "model"), text, tmp_path / "out")) == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_directory(llama_dir: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(arguments(llama_dir, text, out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(arguments(llama_dir, text, out, "--force")) == 2
    assert "is not a profile" in capsys.readouterr().err
    (out / "profile.json").write_text("{}")
    (out / "old.txt").write_text("old")
    assert main(arguments(llama_dir, text, out, "--force", "--rankings", "influence")) == 0
    assert not (out / "old.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["load_model", "layer_figures", "of_lists", "write_plots"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind(
    where: str, error: type[BaseException], llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    old = tmp_path / "old"
    old.mkdir()
    (old / "profile.json").write_text("old")

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
    assert (old / "profile.json").read_text() == "old"
