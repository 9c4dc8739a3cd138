"""`lora-drop bench` under adaptive schedules: bytes and ceilings of the steps that really ran."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, Calibration
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_tools.bench.bench import bench
from lora_drop_tools.bench.requests import prompts_of
from lora_drop_tools.bench.result import Request, Run, make_row
from lora_drop_tools.bench.settings import BenchSettings
from lora_drop_tools.cli import main
from lora_drop_tools.shared import costs

from tests.support.bundles import make_bundle
from tests.tools.bench.conftest import held
from tests.tools.bench.test_result import tiny_manifest

bench_module = importlib.import_module("lora_drop_tools.bench.bench")  # the name in the package is the function
KINDS = {"R": StepKind.REFRESH, "L": StepKind.LORA}


def test_bytes_of_counted_steps_by_hand() -> None:
    """Weights 100 a layer and 50 outside, K/V 4 a token and layer; a LoRA step leaves the second layer out."""
    kinds = [KINDS[letter] for letter in "LRLLLR"]
    for policy, before in ((POLICIES["skip"], [0, 0, 1, 1, 1, 1]), (POLICIES["backfill"], [0, 0, 2, 2, 2, 2])):
        expected = [
            50 + 100 + 4 * (10 + done + 1) + (100 + 4 * (10 + before[done] + 1) if kind is KINDS["R"] else 0)
            for done, kind in enumerate(kinds)
        ]
        assert costs.bytes_of_steps(tiny_manifest(), 10, kinds, policy=policy) == expected
    assert costs.entries_made(kinds, POLICIES["skip"]) == [0, 1, 1, 1, 1, 2]
    assert costs.entries_made(kinds, POLICIES["backfill"]) == [0, 2, 2, 2, 2, 6]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_the_periodic_schedule_is_the_equations_(k: int, policy: str) -> None:
    kinds = costs.periodic_kinds(23, k)
    assert [kind is StepKind.REFRESH for kind in kinds] == [j % (k + 1) == 0 for j in range(1, 24)]
    for done, made in enumerate([0, *costs.entries_made(kinds, POLICIES[policy])]):
        assert 7 + made == costs.kv_entries(7, done, k, POLICIES[policy])[1]
    steps_at = [4.0] * (k + 1)  # whole cycles
    valid = sum(costs.kv_bytes(tiny_manifest(), 7, 6 * (k + 1), k, POLICIES[policy]))
    assert costs.kv_bytes_of_cycles(tiny_manifest(), 7, 6 * (k + 1), steps_at, POLICIES[policy]) == valid


def test_a_row_of_an_adaptive_schedule() -> None:
    """Its ceiling, its saving and the time of each kind are of the steps that ran, not of k."""
    names = ["lora", "refresh", "lora", "lora", "lora", "refresh"]
    kv_prompt, kv = {"kept": 20, "dropped": 20, "allocated": 99}, {"kept": 44, "dropped": 28, "allocated": 99}
    run = Run(0.5, [1.0, 3.0, 1.0, 1.0, 1.0, 3.0], None, kv_prompt, kv, names)
    full = [Run(0.5, [3.0] * 6, kinds=["refresh"] * 6)] * 2
    request = Request(context=10, rows=1, new_tokens=7)
    row = make_row("b", tiny_manifest(), 3, request, [run, run], full, None, schedule="margin")
    ours = costs.bytes_of_steps(tiny_manifest(), 10, [KINDS[letter] for letter in "LRLLLR"])
    whole = [50 + 200 + 2 * 4 * (10 + done + 1) for done in range(6)]
    assert row.ceiling == pytest.approx(sum(whole) / sum(ours))
    assert (row.schedule, row.refresh_share) == ("margin", pytest.approx(1 / 3))
    assert {kind: (one.steps, one.median_ms) for kind, one in row.steps.items()} == {
        "lora": (4, 1000),
        "refresh": (2, 3000),
    }
    assert row.speedup == 18 / 10
    assert row.kv_saving == pytest.approx(0.5 * (1 - 2 / 6))
    assert row.kv_saved == pytest.approx(1 - 32 / 48)
    assert row.asymptotic == pytest.approx(1 / (0.5 + 0.5 / 3))
    assert row.tails == []
    assert (
        make_row(
            "b",
            tiny_manifest(),
            3,
            Request(context=10, rows=1, new_tokens=6),
            [dataclasses.replace(run, step_seconds=run.step_seconds[:5], kinds=names[:5])],  # ends within a cycle
            [dataclasses.replace(full[0], step_seconds=[3.0] * 5)],
            None,
            POLICIES["backfill"],
            "margin",
        ).kv_saving
        == 0
    )


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An adaptive arm beside the periodic ones: the kinds that the engine ran, K/V by them."""
    monkeypatch.setattr(bench_module, "measure_memory", held(None))
    root, written = tmp_path / "b", tmp_path / "figures.json"
    bundle = make_bundle("llama", root, drop_ratio=0.5)
    found = Calibration(0.1, 3, "skip", 0.9, 0.91, 0.4, 93, 0.89, 0.41, 93)
    (root / MANIFEST_NAME).write_text(dataclasses.replace(bundle.manifest, calibration={"margin": found}).to_json())
    options = "--contexts 8 --new-tokens 20 --repeats 2 --threads 1 --k 2 --schedule periodic,margin --json"
    code = main(["bench", str(root), *options.split(), str(written)])
    data = json.loads(written.read_text())
    assert code == (1 if data["problems"] else 0)  # real times of a model of nothing: either may be
    rows = [(row["k"], row["schedule"]) for row in data["rows"]]
    assert rows == [(0, "periodic"), (2, "periodic"), (3, "margin")]
    row = data["rows"][-1]
    (raw,) = [one for one in data["raw"] if one["schedule"] == "margin"]
    kinds = raw["runs"][0]["kinds"]
    assert raw["runs"][1]["kinds"] == kinds
    with Session.open(root, schedule="margin", threads=1) as session:
        ids = prompts_of(bundle, 8, 1)
        logits, expected = session.prefill(ids, max_new_tokens=20), []
        for _ in range(19):
            expected.append(session.next_step.value)
            logits = session.step(logits.argmax(axis=1))
    assert kinds == expected
    assert row["refresh_share"] == kinds.count("refresh") / 19
    sites, token_bytes = len(bundle.manifest.plan.sites), bundle.manifest.model.token_kv_bytes([0])
    assert row["kv_bytes"]["dropped"] == sites * (8 + kinds.count("refresh")) * token_bytes
    assert f"k=3 margin ({row['refresh_share']:.0%} refreshes)" in capsys.readouterr().out


def test_refusals(tmp_path: Path) -> None:
    root = tmp_path / "b"
    make_bundle("llama", root, drop_ratio=0.5)
    with pytest.raises(InputError, match="not calibrated for the margin schedule"):
        bench(root, BenchSettings(schedules=("margin",), contexts=(8,), threads=1))
    bundle = Bundle.open(root)
    found = Calibration(0.1, 9, "skip", 0.9, 0.91, 0.4, 93, 0.89, 0.41, 93)
    text = dataclasses.replace(bundle.manifest, calibration={"margin": found}).to_json()
    (root / MANIFEST_NAME).write_text(text)
    with pytest.raises(InputError, match="too few new tokens"):
        bench(root, BenchSettings(k=(0,), schedules=("margin",), contexts=(8,), new_tokens=20, threads=1))
    with pytest.raises(InputError, match="calibrated for another policy"):
        bench(root, BenchSettings(schedules=("margin",), policy="backfill", contexts=(8,), threads=1))
    with pytest.raises(InputError, match="Unknown schedule"):
        BenchSettings(schedules=("often",))
