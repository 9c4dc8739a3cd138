"""`lora-drop bench` where the engine runs whole cycles: what is timed, and what is said of it.

On a fake CUDA and a fake TensorRT; on no GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_tools.bench import arms
from lora_drop_tools.bench.arms import TimedSession
from lora_drop_tools.bench.report import describe
from lora_drop_tools.bench.result import BenchResult, Request, Run, make_row

from tests.support.fake_trt import make_device_bundle, open_device_session
from tests.tools.bench.test_result import tiny_manifest

ONE = {"kinds": ["refresh"] * 5, "device_cycles": [1] * 5}
TWO = {"kinds": ["lora", "refresh", "lora", "refresh", "lora"], "device_cycles": [2, 2, 1]}
FULL = [Run(0.5, [3.0] * 5, **ONE), Run(0.5, [4.5] * 5, **ONE)]
CYCLES = [
    Run(0.5, [4.0, 0.0, 6.0, 0.0, 1.0], [3.0, 0, 5.0, 0, 1.0], **TWO),
    Run(0.5, [8.0, 0.0, 6.0, 0.0, 1.0], [8.0, 0, 6.0, 0, 1.0], **TWO),
]


def result_of(*rows) -> BenchResult:
    facts = {"cpu": "a processor", "physical_cores": 1, "system": "a system", "versions": {}, "memory_bytes": None}
    result = BenchResult("bench", "now", facts, 1, "tensorrt-rtx", "tiny", "float16", None, 2, 6, {})
    result.rows += rows
    return result


def test_figures_of_cycles_by_hand() -> None:
    """k = 1, 5 steps: two cycles and a LoRA step, of two repeats; bytes as in test_result.py."""
    request = Request(context=5, rows=1, new_tokens=6)
    row = make_row("b", tiny_manifest(), 1, request, CYCLES, FULL, bandwidth=None)
    assert row.timed == "cycles"
    assert row.speedups == [15 / 11, 22.5 / 15]
    # A token has its share of a cycle: 2, 2, 3, 3, 1 and 4, 4, 3, 3, 1
    assert row.latency_ms == {"p50": 2500, "p95": 3500, "p99": 3500}
    whole, part = row.steps["cycle of 2"], row.steps["lora"]
    assert (whole.steps, whole.median_ms, whole.mean_bytes) == (2, 6000, (174 + 302 + 182 + 314) / 2)
    assert (part.steps, part.median_ms, part.mean_bytes) == (1, 1000, 190)
    assert row.overhead_share == pytest.approx((2 / 11) / 2)
    # Kinds of step were not timed apart, so nothing is said that needs them
    assert (row.own_speedup, row.tails) == (None, [])
    full = make_row("b", tiny_manifest(), 0, request, FULL, FULL, bandwidth=None)
    assert list(full.steps) == ["refresh"]  # a cycle of one step
    assert (full.timed, full.steps["refresh"].median_ms) == ("cycles", 3750)


def test_the_table_and_the_json_say_what_was_timed() -> None:
    request = Request(context=5, rows=1, new_tokens=6)
    kv = {"kv_prompt": {"kept": 0, "dropped": 0}, "kv": {"kept": 8, "dropped": 8}}
    rows = []
    for k, runs in ((0, FULL), (1, CYCLES)):
        own = [dataclasses.replace(run, **kv) for run in runs]
        rows.append(make_row("b", tiny_manifest(), k, request, own, FULL, bandwidth=None))
    text = "\n".join(describe(result_of(*rows)))
    assert "timed: cycles run without the host" in text
    assert "not compared in one form" not in text
    assert [row["timed"] for row in json.loads(result_of(*rows).to_json())["rows"]] == ["cycles", "cycles"]
    single = [Run(0.5, [3.0] * 5, **kv), Run(0.5, [4.5] * 5, **kv)]
    mixed = [make_row("b", tiny_manifest(), 0, request, single, single, bandwidth=None), rows[1]]
    assert "not compared in one form" in "\n".join(describe(result_of(*mixed)))
    assert "timed: cycles" not in "\n".join(describe(result_of(mixed[0])))


def test_a_timed_request_in_cycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user gets is what is timed: a graph for a cycle, begun before the one before it is read."""
    made = make_device_bundle("llama", tmp_path / "bundle", k=3, rank=2)
    session, engine, cuda = open_device_session(made, cycles=True)
    session.close()
    _, engine, cuda = open_device_session(made, cycles=True)
    monkeypatch.setattr(arms, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    timed = TimedSession(made, engine)
    with timed:
        run = timed.run(np.array([[3, 4, 5], [6, 7, 8]]), 12, k=3)
        assert run.device_cycles == [4, 4, 3]
        assert run.kinds == ["lora", "lora", "lora", "refresh"] * 2 + ["lora"] * 3
        # Clock ticks: 1 between two tokens; 2 more for each call of the engine, of which the first cycle has three
        assert run.step_seconds == [7, 1, 1, 1, 5, 1, 1, 1, 3, 1, 1]
        assert run.engine_seconds == [3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0]
        full = timed.run(np.array([[3, 4, 5]]), 4, k=0)
        assert (full.device_cycles, full.kinds) == ([1, 1, 1], ["refresh"] * 3)
        single = timed.run(np.array([[3, 4, 5]]), 4, k=PeriodicSchedule(100))  # a cycle of too many steps
        assert single.device_cycles is None
        assert single.kinds == ["lora"] * 3
    assert not cuda.live
