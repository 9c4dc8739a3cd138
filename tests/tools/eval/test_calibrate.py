"""`lora-drop eval --calibrate` and what is then evaluated: agreement recomputed with PyTorch and the oracle."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main
from lora_drop_tools.eval.calibrate import MOST_TRIED, QUANTILES, Reached, _search, calibrate, store_calibration
from lora_drop_tools.eval.eval import eval
from lora_drop_tools.eval.requests import text_request, text_windows
from lora_drop_tools.eval.scoring import Window
from lora_drop_tools.eval.settings import EvalSettings

from tests.support import oracle
from tests.support.bundles import family, oracle_plan

TEXT = "".join(f"{a} boats and {b} gulls; the tide is {a * b}.\n" for a in range(12) for b in range(6))
K, POLICY = 3, "backfill"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be written to."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def settings(text: Path, wanted: float | None, **more: Any) -> EvalSettings:
    given = {"k": (K,), "policies": (POLICY,), "schedules": ("margin",), "threads": 1} | more
    return EvalSettings(text=text, window=40, prompt=8, windows=4, calibrate=wanted, **given)


def margin(logits: torch.Tensor) -> float:
    best = sorted(logits.tolist())
    return best[-1] - best[-2]


def recomputed(bundle: Path, windows: list[Window], sure: Callable[[torch.Tensor], bool]) -> tuple[float, float]:
    """Agreement with one forward pass of PyTorch, and the share of refreshes, of scored steps by the oracle."""
    plan, model = oracle_plan(Bundle.open(bundle)), family("llama").model
    agree, refreshes, steps = 0, 0, 0
    for window in windows:
        ids = window.ids.tolist()
        with torch.no_grad():
            full = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        begin = window.context - min(int(window.phase * (K + 1)), window.context - 1)
        row, logits = oracle.prefill(model, plan, ids[:begin])
        since = 0
        for position in range(begin, len(ids) - 1):
            refresh = since > 0 and (since == K or not sure(logits))
            logits = row.backfill(ids[position]) if refresh else row.step(ids[position], full=False)
            since = 0 if refresh else since + 1
            if position >= window.context:
                agree += int(logits.argmax()) == full[position]
                refreshes += refresh
                steps += 1
    return agree / steps, refreshes / steps


@pytest.fixture(scope="module")
def most(bundle: Path, text: Path) -> tuple[float, float]:
    """Of the searched half, with a refresh wherever there may be one."""
    return recomputed(bundle, halves(bundle, settings(text, 0.5))[0], lambda _: False)


def halves(bundle: Path, given: EvalSettings) -> tuple[list[Window], list[Window]]:
    request = text_request(given)
    assert request is not None
    windows = list(text_windows(request, TextCodec.open(bundle / "tokenizer"), 0).values())
    return windows[:2], windows[2:]


def test_the_threshold_reaches_what_was_wanted(own: Path, text: Path, most: tuple[float, float]) -> None:
    """Stored, found again by an independent run, and no better one among those of the same search."""
    searched, held_out = halves(own, settings(text, 0.5))
    periodic, _ = recomputed(own, searched, lambda _: True)
    assert periodic < most[0]
    wanted = (periodic + most[0]) / 2
    out = io.StringIO()
    (found,) = calibrate(own, settings(text, wanted), out=out)
    stored = Bundle.open(own).manifest.calibration["margin"]
    assert stored == found.stored
    assert (stored.k, stored.policy, stored.wanted) == (K, POLICY, wanted)
    assert stored.agreement >= wanted
    for windows, expected, tokens in (
        (searched, (stored.agreement, stored.refresh_share), stored.tokens),
        (held_out, (stored.held_out_agreement, stored.held_out_refresh_share), stored.held_out_tokens),
    ):
        assert recomputed(own, windows, lambda logits: margin(logits) >= stored.threshold) == pytest.approx(expected)
        assert tokens == 2 * 31
    assert found.periodic[0].agreement == pytest.approx(periodic)
    assert found.most is not None
    assert (found.most.agreement, found.most.refresh_share) == pytest.approx(most)
    assert found.periodic[0].refresh_share < stored.refresh_share <= most[1]
    assert f"margin: the threshold {stored.threshold:.4g} is stored in the bundle" in out.getvalue()
    assert found.alike is not None
    steps = 1 / stored.held_out_refresh_share  # a cycle has, on average
    assert found.alike[0] == min(range(1, 9), key=lambda k: abs(k + 1 - steps))
    assert f"beside it: periodic, k = {found.alike[0]} " in out.getvalue()


def test_what_is_stored_is_run_and_evaluated(
    own: Path, text: Path, most: tuple[float, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched, held_out = halves(own, settings(text, 0.5))
    periodic, _ = recomputed(own, searched, lambda _: True)
    wanted = (periodic + most[0]) / 2  # so rows refresh at different steps: beside each other they would do so together
    (found,) = calibrate(own, settings(text, wanted), out=io.StringIO())
    stored = found.stored
    assert stored is not None
    with Session.open(own, schedule="margin", threads=1) as session:
        assert session.policy == POLICY
        assert (session.schedule.k, session.schedule.threshold) == (K, stored.threshold)  # type: ignore[attr-defined]
    given = settings(text, None, k=(1,), schedules=("periodic", "margin"), policies=())
    written = tmp_path / "eval.json"
    kept = dataclasses.replace(given, out_dir=tmp_path / "kept", json_file=written)
    agree, share = recomputed(own, searched + held_out, lambda logits: margin(logits) >= stored.threshold)
    for _ in range(2):  # the second time from what was kept
        result = eval(own, kept, out=io.StringIO())
        named = [(row.policy, row.k, row.schedule) for row in result.rows]
        periodic_backfill = (POLICY, 1, "periodic")
        assert named == [
            ("full", 0, "periodic"),
            ("skip", 1, "periodic"),
            periodic_backfill,
            (POLICY, K, "margin"),
        ]
        row = result.rows[-1]
        assert row.text is not None
        assert row.text.agreement.value == pytest.approx(agree)
        assert row.text.refresh_share.value == pytest.approx(share)
        assert row.text.refresh_share.value == pytest.approx((stored.refresh_share + stored.held_out_refresh_share) / 2)
        assert row.threshold == stored.threshold
        assert row.kv_bytes == result.rows[0].kv_bytes  # backfill saves none
    assert json.loads(written.read_text())["rows"][-1]["schedule"] == "margin"
    line = [
        "generate",
        str(own),
        "--prompt",
        "a tide",
        "--max-new-tokens",
        "9",
        "--schedule",
        "margin",
        "--threads",
        "1",
    ]
    assert main(line) == 0
    assert main([*line, "--k", "2"]) == 2
    assert "calibrated for another k" in capsys.readouterr().err
    assert main(["inspect", str(own)]) == 0
    assert f"margin: threshold {stored.threshold:.4g} for k = 3, backfill" in capsys.readouterr().out


def test_kv_of_an_adaptive_schedule_under_skip(own: Path, text: Path) -> None:
    """A dropped layer has an entry for each refresh that there was."""
    skipping = settings(text, 0.05, policies=("skip",))
    data = json.loads((own / MANIFEST_NAME).read_text())
    data["calibration"] = {
        "margin": dataclasses.asdict(calibration(threshold=0.2, k=K, policy="skip")),
    }
    (own / MANIFEST_NAME).write_text(json.dumps(data))
    given = dataclasses.replace(skipping, calibrate=None, k=(0,), policies=())
    result = eval(own, given, out=io.StringIO())
    full, row = result.rows
    assert row.text is not None
    manifest = Bundle.open(own).manifest
    prompt, steps = result.kv_request
    assert prompt + steps == manifest.limits.max_seq_len
    refreshes = round(steps * row.text.refresh_share.value)
    dropped = len(manifest.plan.sites)
    entries = (manifest.model.num_layers - dropped) * (prompt + steps) + dropped * (prompt + refreshes)
    assert row.kv_bytes == entries * manifest.model.token_kv_bytes([0]) < full.kv_bytes


def calibration(**changes: Any) -> Any:
    from lora_drop_runtime.bundle.manifest import Calibration

    return dataclasses.replace(Calibration(1.0, K, POLICY, 0.9, 0.91, 0.4, 93, 0.89, 0.41, 93), **changes)


class Measured:
    """Says what schedules reach by their thresholds, and counts how often it was asked."""

    def __init__(self, reached: Callable[[float], tuple[float, float]]) -> None:
        self.say, self.asked = reached, 0

    def reached(self, schedule: Any) -> Reached:
        self.asked += 1
        return Reached(*self.say(schedule.threshold), 100)


@pytest.mark.parametrize("name", ["margin", "entropy"])
@given(
    values=st.lists(st.integers(1, 400), min_size=1, max_size=200),
    steps=st.lists(st.integers(0, 420), max_size=6),
    wanted=st.integers(0, 6),
)
@settings_of_hypothesis(deadline=None, max_examples=60)
def test_the_search_finds_the_fewest_refreshes(name: str, values: list[int], steps: list[int], wanted: int) -> None:
    """Where agreement grows with refreshes, as it mostly does, a few tries find what all of them would find. It grows
    in steps, and what is wanted is reached exactly by one of them."""
    unsure = (lambda value, limit: value < limit) if name == "margin" else (lambda value, limit: value > limit)

    def say(limit: float) -> tuple[float, float]:
        refreshes = sum(unsure(value, limit) for value in values) / len(values)
        return sum(unsure(step, limit) for step in steps) / 6, refreshes

    text = Measured(say)
    most, found = _search(text, name, 3, wanted / 6, [float(value) for value in values])  # type: ignore[arg-type]
    assert text.asked <= MOST_TRIED
    extreme = -1.0 if name == "entropy" else 2 * max(values) + 1.0
    assert (most.agreement, most.refresh_share) == say(extreme)
    limits = [*np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES + 1))).tolist(), extreme]
    good = [say(limit) for limit in limits if say(limit)[0] >= wanted / 6]
    if not good:
        assert found is None
        return
    assert found is not None
    threshold, reached = found
    assert threshold in limits
    assert (reached.agreement, reached.refresh_share) == say(threshold)
    assert reached.agreement >= wanted / 6
    assert reached.refresh_share == min(share for _, share in good)


def test_of_as_many_refreshes_those_that_agree_more() -> None:
    by_limit = {1.0: (0.8, 0.3), 2.0: (0.9, 0.3), 3.0: (0.9, 0.4), 9.0: (1.0, 0.5)}

    def say(limit: float) -> tuple[float, float]:
        return by_limit[max(at for at in by_limit if at <= limit)]

    _, found = _search(Measured(say), "margin", 3, 0.75, [1.0, 2.0, 3.0, 4.0])  # type: ignore[arg-type]
    assert found is not None
    assert (found[1].agreement, found[1].refresh_share) == (0.9, 0.3)


def test_not_needed_and_out_of_reach(own: Path, text: Path) -> None:
    before = (own / MANIFEST_NAME).read_bytes()
    for wanted, words in ((1e-6, "not needed, the periodic schedule of k = 3 agrees on"), (1.0, "out of reach")):
        out = io.StringIO()
        (found,) = calibrate(own, settings(text, wanted), out=out)
        assert found.stored is None
        assert words in out.getvalue()
        assert "nothing is stored" in out.getvalue()
        assert ("at most" in out.getvalue()) == (words == "out of reach")  # of what was not searched nothing is known
    assert (own / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ("--calibrate 0.9", "There is nothing to calibrate on."),
        ("--calibrate 0", "--calibrate is too small."),
        ("--calibrate 1.1 --text TEXT", "--calibrate is too large."),
        ("--calibrate 0.9 --text TEXT --schedule periodic,margin", "The periodic schedule has no threshold."),
        ("--calibrate 0.9 --text TEXT --k 1,3", "--k names several"),
        ("--calibrate 0.9 --text TEXT --k 0", "There is no LoRA step to calibrate."),
        ("--calibrate 0.9 --text TEXT --policy skip,backfill", "--policy names several"),
        ("--calibrate 0.9 --text TEXT --json out.json", "--json would change nothing."),
        ("--calibrate 0.9 --text TEXT --windows 1", "The text is too short."),
        ("--calibrate 0.9 --text nowhere.txt", "The text cannot be read."),
        ("--schedule margin --text TEXT", "The bundle is not calibrated for the margin schedule."),
        ("--schedule often --text TEXT", "Unknown schedule."),
        ("--schedule margin --tasks piqa", "Tasks are evaluated under the periodic schedule alone."),
    ],
)
def test_refused_before_any_work(
    options: str, fact: str, bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Session, "open", lambda *_, **__: pytest.fail("work has begun"))
    windows = ["--window", "40", "--prompt", "8"] if "--text" in options else []
    assert main(["eval", str(bundle), *windows, *options.replace("TEXT", str(text)).split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {fact}")


def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(
    own: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "open", lambda *_, **__: pytest.fail("work has begun"))
    monkeypatch.setattr(os, "access", lambda path, _: path != own.resolve())
    with pytest.raises(InputError, match="cannot be replaced") as refused:
        calibrate(own, settings(text, 0.5))
    assert f"{own.resolve() / MANIFEST_NAME}: Permission denied." in refused.value.note
    assert os.listdir(own.parent) == ["own"]


def test_a_full_disk_leaves_the_table(
    own: Path, text: Path, most: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what is left of the search; nothing says that the threshold is stored."""
    out = io.StringIO()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="disk is full"):
        calibrate(own, settings(text, most[0] - 1e-9), out=out)
    assert "margin, k = 3" in out.getvalue()
    assert "stored in the bundle" not in out.getvalue()
    assert not Bundle.open(own).manifest.calibration


def test_windows_have_room_for_the_cycle_of_the_bundle(own: Path, text: Path) -> None:
    """As where the same k is named."""
    manifest = json.loads((own / MANIFEST_NAME).read_text())
    manifest["plan"]["k"] = 20
    (own / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(InputError) as named:
        settings(text, 0.9, k=(20,))
    with pytest.raises(InputError) as left_out:
        calibrate(own, settings(text, 0.9, k=None))
    assert str(left_out.value) == str(named.value)


def test_two_bundles_are_refused(bundle: Path, text: Path, capsys: Any) -> None:
    assert main(["eval", str(bundle), str(bundle), "--calibrate", "0.9", "--text", str(text)]) == 2
    assert "A threshold is found for one bundle." in capsys.readouterr().err
    with pytest.raises(InputError, match="eval finds no thresholds"):
        eval(bundle, settings(text, 0.9))


def test_the_manifest_keeps_what_came_meanwhile_and_is_not_another_bundle_s(own: Path) -> None:
    opened = Bundle.open(own)
    store_calibration(opened, {"margin": calibration()})
    store_calibration(opened, {"entropy": calibration(threshold=2.0)})  # opened before the first was stored
    assert Bundle.open(own).manifest.calibration == {"margin": calibration(), "entropy": calibration(threshold=2.0)}
    assert sorted(os.listdir(own.parent)) == ["own"]
    Bundle.open(own).check_unchanged()
    data = json.loads((own / MANIFEST_NAME).read_text())
    data["plan"]["k"] = 7
    (own / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(InputError, match="exported again meanwhile"):
        store_calibration(opened, {"margin": calibration(threshold=9.0)})
    assert json.loads((own / MANIFEST_NAME).read_text()) == data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"margn": {}}, "calibration"),
        ({"margin": {}}, "calibration.'margin' has no 'threshold'"),
        ({"margin": {"threshold": "1"}}, "threshold is '1'"),
        ({"margin": {"k": 2**40}}, "from 1 to"),
        ({"margin": {"k": 0}}, "from 1 to"),
        ({"margin": {"held_out_agreement": 7}}, "a share"),
        ({"margin": {"policy": "none"}}, "policy is 'none'"),
        ({"periodic": {}}, "a key of calibration is 'periodic'"),
    ],
)
def test_a_manifest_with_a_wrong_calibration_is_refused(change: dict[str, Any], reason: str, own: Path) -> None:
    data = json.loads((own / MANIFEST_NAME).read_text())
    whole = dataclasses.asdict(calibration())
    filled = {name: (whole | one if one or name == "periodic" else one) for name, one in change.items()}
    (own / MANIFEST_NAME).write_text(json.dumps(data | {"calibration": filled}))
    with pytest.raises(BundleError, match="manifest is damaged") as caught:
        Bundle.open(own)
    assert reason in str(caught.value)


def test_settings_from_python() -> None:
    with pytest.raises(InputError, match="no agreement to calibrate to"):
        calibrate("nowhere", EvalSettings(text=Path("t")))
    assert math.isclose(EvalSettings(text=Path("t"), calibrate=0.9).calibrate or 0, 0.9)
