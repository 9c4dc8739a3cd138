"""`lora-drop bench`: its arithmetic by hand, its order, its peers' protocol, and the command on a tiny bundle.

Times are scripted wherever a figure is checked; where they are real, only what does not depend on them is.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_tools.bench.arms import Arm as BenchArm
from lora_drop_tools.bench.arms import TimedSession, measure
from lora_drop_tools.bench.bench import bench
from lora_drop_tools.bench.judge import MeasurementError
from lora_drop_tools.bench.peers import options as peer_options_module
from lora_drop_tools.bench.peers import peer as bench_peers
from lora_drop_tools.bench.peers.options import peer_options, reason_against
from lora_drop_tools.bench.peers.peer import Peer, PeerError
from lora_drop_tools.bench.peers.worker import timed
from lora_drop_tools.bench.requests import TEXT, prompts_of
from lora_drop_tools.bench.result import Memory, Request, Run, make_row, median_ratio, quantile, rotated, tails_of
from lora_drop_tools.bench.settings import BenchSettings
from lora_drop_tools.cli import main
from lora_drop_tools.shared import costs, machine
from lora_drop_tools.shared.bundles import weight_dtype
from lora_drop_tools.shared.table import table

from tests.bundles import make_bundle
from tests.runtime.fake_engine import IdleEngine, open_session
from tests.tools.test_costs import llama3_8b

bench_module = importlib.import_module("lora_drop_tools.bench.bench")  # the name in the package is the function


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of 8 layers, 1 and 2 of the 4 eligible ones are dropped; 128 tokens, prompts of 127, batches of 8."""
    root = tmp_path_factory.mktemp("bench")
    return [make_bundle("llama", root / f"rho{ratio}", drop_ratio=ratio).root for ratio in (0.25, 0.5)]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**22)
    monkeypatch.setattr(machine, "BANDWIDTH_ROUNDS", 1)


def held(pss: dict[str, int] | None) -> Callable[..., list[Memory]]:
    """Stands for `measure_memory`."""
    return lambda name, bundle, windows, request, *_: [Memory(name, 3, request, pss)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Replaces what takes time: every step under k takes the given seconds, 90 % of them in the engine."""

    def script(step_seconds: dict[int, float]) -> None:
        def run(self: TimedSession, prompts: Any, new_tokens: int, k: int) -> Run:
            steps = [step_seconds[k]] * (new_tokens - 1)
            kv = {"kept": 0, "dropped": 0, "allocated": 0}
            return Run(0.5, steps, [0.9 * seconds for seconds in steps], kv, kv)

        monkeypatch.setattr(TimedSession, "run", run)
        monkeypatch.setattr(
            bench_module, "measure_memory", lambda name, bundle, windows, request, *_: [Memory(name, 3, request, None)]
        )

    return script


# ── arithmetic ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_quantiles_are_measured_values() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(values, q) for q in (0.0, 0.2, 0.21, 0.5, 0.6, 0.95, 1.0)] == [1, 1, 2, 3, 3, 5, 5]
    # Of 20, the 19th is the p95 and only one is slower: 0.95 · 20 is 19 whatever floats say
    assert quantile(list(range(1, 21)), 0.95) == 19
    assert quantile([7.0], 0.99) == 7


@pytest.mark.parametrize("k", [1, 2, 3, 5, 18, 19, 20])
@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_quantile_of_a_schedule_is_equation_11(k: int, q: float) -> None:
    """Whole cycles of fast steps and one slow one: the quantile is the slow one exactly where Eq. 11 says so."""
    steps = ([1.0] * k + [2.0]) * 400
    assert (quantile(steps, q) == 2.0) == costs.quantile_is_refresh(k, q)


def test_bytes_of_a_request() -> None:
    """Steps 1 to 5 under k = 1 after a prompt of 10: a dropped layer's context grows by refreshes alone."""
    manifest = llama3_8b()
    expected = [
        costs.step_bytes(manifest, 10, 10)[1],
        costs.step_bytes(manifest, 11, 10)[0],
        costs.step_bytes(manifest, 12, 11)[1],
        costs.step_bytes(manifest, 13, 11)[0],
        costs.step_bytes(manifest, 14, 12)[1],
    ]
    assert costs.request_bytes(manifest, 10, 5, 1) == expected
    full = [costs.step_bytes(manifest, 10 + step, 10 + step)[0] for step in range(5)]
    assert costs.request_bytes(manifest, 10, 5, 0) == full
    assert costs.request_ceiling(manifest, 10, 5, 1) == sum(full) / sum(expected)
    assert costs.request_ceiling(manifest, 10, 5, 0) == 1


def test_ceiling_of_a_request_by_hand() -> None:
    """2 layers of 100 bytes, one dropped, head 40, embedding row 10, K/V 4 bytes a token and layer; k = 1, 2 steps."""
    manifest = tiny_manifest()
    # LoRA step: 40 + 10 + 100 + (5 + 1)·4 = 174; refresh after it: 50 + 200 + (6 + 1)·4 + (5 + 1)·4 = 302
    assert costs.request_bytes(manifest, 5, 2, 1) == [174, 302]
    # Full: 250 + 2·6·4 = 298, then 250 + 2·7·4 = 306
    assert costs.request_ceiling(manifest, 5, 2, 1) == pytest.approx((298 + 306) / (174 + 302))
    # Three rows: weights once, embedding rows and K/V three times
    assert costs.request_bytes(manifest, 5, 1, 1, rows=3) == [40 + 30 + 100 + 3 * 24]


def test_a_long_request_tends_to_the_ceiling_at_its_end() -> None:
    manifest = llama3_8b()
    assert costs.request_ceiling(manifest, 4000, 8, 3) == pytest.approx(
        costs.speedup_ceiling(manifest, 4000, 8, 3), rel=1e-3
    )


def tiny_manifest() -> Any:
    manifest = llama3_8b()
    model = dataclasses.replace(
        manifest.model,
        num_layers=2,
        kv_heads=1,
        head_dim=1,
        dtype="float16",
        windows=(0, 0),
        layer_bytes=(100, 100),
        head_bytes=40,
        embedding_row_bytes=10,
    )
    plan = DropPlan(num_layers=2, drop_layers=(1,), always_first=1, always_last=0)
    return dataclasses.replace(manifest, model=model, plan=plan)


def test_tails() -> None:
    medians = {"lora": 10.0, "refresh": 20.0}
    p50, p95 = tails_of(3, medians, {0.5: 11.0, 0.95: 14.0})
    assert (p50.predicted, p50.nearer_to, p50.holds) == ("lora", "lora", True)
    assert (p95.predicted, p95.nearer_to, p95.holds) == ("refresh", "lora", False)
    (p95,) = tails_of(19, medians, {0.95: 19.0})
    assert (p95.predicted, p95.holds) == ("lora", False)


def test_figures_of_a_row() -> None:
    """k = 1, 4 steps, two repeats: LoRA steps of 1 and 2 s, refreshes of 3 and 4 s."""
    request = Request(context=5, rows=1, new_tokens=5)
    kv_prompt, kv = {"kept": 20, "dropped": 20, "allocated": 99}, {"kept": 36, "dropped": 28, "allocated": 99}
    runs = [
        Run(0.5, [1.0, 3.0, 1.0, 3.0], [0.9, 2.9, 0.9, 2.9], kv_prompt, kv),
        Run(1.5, [2.0, 4.0, 2.0, 4.0], [1.0, 3.0, 1.0, 3.0], kv_prompt, kv),
    ]
    full = [Run(0.5, [3.0] * 4), Run(0.5, [4.5] * 4)]
    row = make_row("b", tiny_manifest(), 1, request, runs, full, bandwidth=1000.0)
    assert row.speedups == [12 / 8, 18 / 12]
    assert (row.speedup, row.noise) == (1.5, 0)
    assert row.tokens_per_second == pytest.approx((4 / 8 + 4 / 12) / 2)
    assert row.prefill_tokens_per_second == pytest.approx((10 + 5 / 1.5) / 2)
    assert row.first_token_ms == 1000
    assert row.latency_ms == {"p50": 1500, "p95": 3500, "p99": 3500}
    assert row.overhead_share == pytest.approx((0.4 / 8 + 4 / 12) / 2)
    assert row.kv_saved == 1 - 24 / 32  # 4 tokens in 2 layers of 4 bytes, of which 16 + 8 were written
    assert row.kv_saving == 0.25  # Eq. 16: half the layers, every other step
    lora, refresh = row.steps["lora"], row.steps["refresh"]
    assert (lora.steps, lora.median_ms, lora.mean_bytes) == (2, 1500, (174 + 182) / 2)
    assert lora.gb_per_second == pytest.approx(178 / 1.5 / 1e9)
    assert lora.bandwidth_share == pytest.approx(178 / 1.5 / 1000)
    assert refresh.mean_bytes == (302 + 314) / 2
    assert row.ceiling == pytest.approx((298 + 306 + 314 + 322) / (174 + 302 + 182 + 314))
    assert row.share == row.speedup / row.ceiling
    assert row.own_speedup == pytest.approx(4 * 3.5 / (2 * 1.5 + 2 * 3.5))
    assert row.own_share == pytest.approx(1.4 / row.ceiling)
    assert row.gain_share == (row.speedup - 1) / (row.ceiling - 1)
    assert row.above_ceiling  # 1.5 over 1.276, and the repeats agree
    assert [tail.predicted for tail in row.tails] == ["lora", "refresh", "refresh"]


def test_a_ratio_within_the_noise_is_not_above_the_ceiling() -> None:
    request = Request(context=5, rows=1, new_tokens=5)
    full = [Run(0.5, [seconds] * 4) for seconds in (1.3, 1.4, 1.2)]
    row = make_row("b", tiny_manifest(), 1, request, [Run(0.5, [1.0] * 4)] * 3, full, None)
    assert row.speedup == 1.3 > row.ceiling
    assert row.noise == pytest.approx(0.2)
    assert not row.above_ceiling
    assert row.steps["lora"].bandwidth_share is None
    backfill = make_row("b", tiny_manifest(), 1, request, [Run(0.5, [1.0] * 4)] * 3, full, None, policy="backfill")
    assert backfill.own_speedup is None  # its refreshes are longer than the full schedule's


def test_median_of_ratios() -> None:
    assert median_ratio([1.0, 8.0, 3.0], [1.0, 2.0, 1.0]) == 3  # of 1, 4 and 3


def test_table() -> None:
    assert table(("what", "ms"), [("a", "10.5"), ("longer", "2")]) == ["what      ms", "a       10.5", "longer     2"]


# ── order ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_arm_runs_once_in_each_repeat_and_the_order_rotates() -> None:
    assert [rotated("abc", repeat) for repeat in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    order: list[str] = []

    def arm(name: str) -> BenchArm:
        def run(prompts: Any, new_tokens: int) -> Run:
            order.append(name)
            if name == "c" and order.count("c") == 2:
                raise PeerError("it broke")
            return Run(1.0, [0.5] * (new_tokens - 1))

        return BenchArm("", 0, name, run)

    said: list[str] = []
    request = Request(4, 1, 3)
    runs, failed = measure([arm(name) for name in "abc"], request, np.zeros((1, 4), np.int64), 3, said.append, settle=0)
    assert "".join(order) == "abc" + "bca" + "ab"  # c failed in the second repeat
    assert {index: len(own) for index, own in runs.items()} == {0: 3, 1: 3}
    assert failed == {2: "it broke"}
    assert said[0] == "context 4, batch 1, repeat 1 of 3, tokens/s: a 2.0, b 2.0, c 2.0"


# ── one request of a session ───────────────────────────────────────────────────────────────────────────────────


def test_a_timed_request() -> None:
    plan = DropPlan(num_layers=8, drop_layers=(4, 6))
    session, engine = open_session(plan, engine=IdleEngine(plan), eos=(0,))
    timed_session = TimedSession(session.bundle, engine)
    run = timed_session.run(np.array([[3, 4, 5], [6, 7, 8]]), 6, k=1)
    assert len(run.step_seconds) == 5  # every logit is the same, so token 0, an end token, comes each time
    assert run.engine_seconds is not None
    assert len(run.engine_seconds) == 5
    assert all(0 < e < s for e, s in zip(run.engine_seconds, run.step_seconds, strict=True))
    manifest = session.bundle.manifest
    for kv, steps in ((run.kv_prompt, 0), (run.kv, 5)):
        assert kv is not None
        assert [kv["kept"], kv["dropped"]] == [2 * part for part in costs.kv_bytes(manifest, 3, steps, 1)]
    again = timed_session.run(np.array([[3, 4, 5]]), 3, k=0)
    assert len(again.engine_seconds or ()) == len(again.step_seconds) == 2
    timed_session.session.close()
    assert engine.times_closed == 1


def test_prompts(bundles: list[Path], tmp_path: Path) -> None:
    bundle = Bundle.open(bundles[0])
    prompts = prompts_of(bundle, 300, 2)  # without a tokenizer
    assert prompts.shape == (2, 300)
    assert prompts.max() < bundle.manifest.model.vocab_size
    assert (prompts == prompts_of(bundle, 300, 2)).all()
    assert (prompts[0] != prompts[1]).any()
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(dict.fromkeys(TEXT.split()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="The"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    count = len(TEXT.split())
    prompts = prompts_of(Bundle(tmp_path, bundle.manifest), 2 * count, 1)
    assert prompts[0].tolist() == 2 * [words[word] for word in TEXT.split()]


# ── the machine ────────────────────────────────────────────────────────────────────────────────────────────────


def test_bandwidth() -> None:
    found = machine.read_bandwidth(2, 2**20)
    assert found.buffer_bytes == 2**20
    assert found.bytes_per_second == max(found.all_kernels.values()) == found.all_kernels[found.kernel] > 0
    assert "2 thread(s)" in found.describe()


def test_memory_and_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/smaps_rollup").write_text("00-ff ---p\nRss: 9 kB\nPss: 7 kB\nPss_Anon: 4 kB\nPss_File: 3 kB\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.pss_bytes() == {"total": 7168, "anonymous": 4096, "file": 3072}
    assert machine.pss_bytes(12) is None
    assert machine.available_bytes() is None
    assert machine.cpu_time() is None
    begin, end = machine.CpuTime(10, 100, 50), machine.CpuTime(20, 115, 60)
    assert machine.foreign_cores(begin, end) == 0.5
    assert machine.foreign_cores(begin, None) is None
    assert machine.foreign_cores(machine.CpuTime(10, 100, 50), machine.CpuTime(20, 101, 60)) == 0
    assert machine.physical_cores() >= 1
    (tmp_path / "cpuinfo").write_text("".join(f"physical id : 0\ncore id : {i // 2}\n\n" for i in range(4)))
    assert machine.physical_cores() <= 2
    assert machine.machine_facts()["versions"]["numpy"] == np.__version__


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────


def test_command_end_to_end(bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    options = ["--k", "1,3", "--contexts", "8,24", "--batches", "1,2", "--new-tokens", "12", "--repeats", "2"]
    code = main(["bench", *map(str, bundles), *options, "--threads", "1", "--json", str(written)])
    data = json.loads(written.read_text())
    assert code == (1 if data["problems"] else 0)  # real times of a model of nothing: either may be
    printed = capsys.readouterr()
    assert "context 24, batch 2, repeat 2 of 2" in printed.err
    for text in ("── context 8, batch 1 ──", "rho0.5 ρ=0.50 k=3", "Eq. 16", "Eq. 11", "PSS MB"):
        assert text in printed.out
    assert [(row["bundle"], row["k"], row["context"], row["rows"]) for row in data["rows"]] == [
        (bundle, k, context, rows)
        for rows in (1, 2)
        for context in (8, 24)
        for bundle in ("rho0.25", "rho0.5")
        for k in (0, 1, 3)
    ]
    for row in data["rows"]:
        manifest = Bundle.open(next(path for path in bundles if path.name == row["bundle"])).manifest
        kept, dropped = costs.kv_bytes(manifest, row["context"], 11, row["k"])
        assert (row["kv_bytes"]["kept"], row["kv_bytes"]["dropped"]) == (row["rows"] * kept, row["rows"] * dropped)
        assert row["ceiling"] == costs.request_ceiling(manifest, row["context"], 11, row["k"], row["rows"])
        assert 0 < row["overhead_share"] < 1
        assert sum(step["steps"] for step in row["steps"].values()) == 11
        if row["k"] == 0:
            assert row["speedups"] == [1, 1]
    assert len(data["raw"]) == len(data["rows"])
    assert all(len(run["step_seconds"]) == 11 for entry in data["raw"] for run in entry["runs"])
    assert data["machine"]["versions"]["onnxruntime"]
    assert data["bandwidth"]["threads"] == data["threads"] == 1
    assert [(one["bundle"], one["k"]) for one in data["memory"]] == [
        (name, k) for name in ("rho0.25", "rho0.5") for k in (3, 0)
    ]
    assert data["weight_dtype"] == "float32"


def test_above_the_ceiling(
    bundles: list[Path], tmp_path: Path, scripted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The results are written and printed, then the command ends with 1."""
    scripted({0: 0.010, 3: 0.004})
    written = tmp_path / "figures.json"
    options = ["--k", "3", "--contexts", "8", "--new-tokens", "12", "--repeats", "2", "--json", str(written)]
    assert main(["bench", str(bundles[1]), *options]) == 1
    printed = capsys.readouterr()
    assert "error: A speed-up is above what the bytes allow." in printed.err
    assert "Note: rho0.5 (ρ 0.50, k = 3, context 8, batch 1): 2.500× is above the ceiling of 1." in printed.err
    assert "Hint: " in printed.err
    assert "2.500×" in printed.out
    data = json.loads(written.read_text())
    assert len(data["problems"]) == 1
    assert data["rows"][1]["speedup"] == pytest.approx(2.5)
    assert any("10.0% of a step is not the engine's" in text for text in data["warnings"])
    assert "not measured" in printed.out  # PSS, as without /proc


def test_below_the_ceiling(bundles: list[Path], scripted: Callable[..., None]) -> None:
    scripted({0: 0.0100, 1: 0.0097, 3: 0.0096})
    out = io.StringIO()
    result = bench(bundles, BenchSettings(k=(1, 3), new_tokens=12, repeats=2), out=out)
    assert {row.context for row in result.rows} == {116}  # by default 128 and 2048; the bundles allow 128 with 12 new
    assert [round(row.speedup, 3) for row in result.rows[:3]] == [1, 1.031, 1.042]
    assert not result.problems
    assert out.getvalue().startswith("model ")


def test_foreign_load_is_told(bundles: list[Path], scripted: Callable[..., None], monkeypatch: Any) -> None:
    scripted({0: 0.01, 3: 0.01})
    monkeypatch.setattr(machine, "load_average", lambda: (1.5, 1.0, 1.0))
    monkeypatch.setattr(machine, "foreign_cores", lambda *_: 0.7)
    out = io.StringIO()
    bench(bundles[0], BenchSettings(k=(3,), contexts=(8,), new_tokens=12, repeats=2), out=out)
    assert "warning: The load average was 1.50 before the run" in out.getvalue()
    assert "warning: Other processes kept 0.70 cores busy" in out.getvalue()


def test_too_much_for_the_memory_is_told(bundles: list[Path], scripted: Callable[..., None], monkeypatch: Any) -> None:
    scripted({0: 0.01, 3: 0.01})
    monkeypatch.setattr(bench_module, "measure_memory", held({"total": 6 * 10**9}))
    facts = machine.machine_facts() | {"memory_bytes": 8 * 10**9}
    monkeypatch.setattr(machine, "machine_facts", lambda: facts)
    result = bench(bundles, BenchSettings(k=(3,), contexts=(8,), new_tokens=12, repeats=2), out=io.StringIO())
    assert any("held 12.0 GB together" in text for text in result.warnings)


def test_plots(bundles: list[Path], tmp_path: Path, scripted: Callable[..., None]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    scripted({0: 0.0100, 1: 0.0097, 3: 0.0096})
    settings = BenchSettings(k=(1, 3), contexts=(8,), new_tokens=12, repeats=2, plots=tmp_path / "p")
    bench(bundles, settings, out=io.StringIO())
    files = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert files == [f"{name}_context8_batch1.png" for name in ("kv_saving", "latency", "speedup")]
    assert all((tmp_path / "p" / name).read_bytes().startswith(b"\x89PNG") for name in files)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--contexts", "120"], "The bundle does not allow what is to be measured."),
        (["--contexts", "128"], "The bundle does not allow what is to be measured."),
        (["--contexts", "8", "--batches", "9"], "The bundle does not allow what is to be measured."),
        (["--contexts", "0"], "A prompt length or batch is out of range."),
        (["--contexts", "8", "--batches", "0"], "A prompt length or batch is out of range."),
        (["--contexts", "8", "--k", "40"], "There are too few new tokens to measure."),
        (["--contexts", "8", "--k", "-1"], "k must be a whole number"),
        (["--contexts", "8", "--repeats", "1"], "There are too few repeats."),
        (["--contexts", "8,x"], "The command line is not understood."),
        (["--contexts", "8", "--target", "tensorrt"], "The bundle cannot run on that target."),
        (["--contexts", "8", "--peers"], "The peers have no model to load."),
        (["--contexts", "8", "--peers", "nobody", "--model", "x"], "Unknown peer."),
        (["--contexts", "8", "--peers", "--model", "nowhere.gguf"], "The model for the peers cannot be read."),
        (["--contexts", "8", "--json", "nowhere/at/all.json"], "The results cannot be written."),
    ],
)
def test_refused_before_any_work(
    options: list[str],
    fact: str,
    bundles: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(machine, "read_bandwidth", work)
    monkeypatch.setattr(Session, "open", work)
    assert main(["bench", str(bundles[0]), "--new-tokens", "13", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {fact}")
    assert "\nNote: " in error
    assert "\nHint: " in error


def test_figures_without_matplotlib_are_refused(bundles: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="Figures need matplotlib"):
        bench(bundles, BenchSettings(contexts=(8,), new_tokens=14, plots=Path("plots")))


def test_bundles_of_one_model(bundles: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        bench([bundles[0], bundles[0]], BenchSettings(contexts=(8,)))
    other = Path(shutil.copytree(bundles[1], tmp_path / "other"))
    text = (other / MANIFEST_NAME).read_text()
    fingerprint = Bundle.open(other).manifest.model.fingerprint
    (other / MANIFEST_NAME).write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(InputError, match="not of one model"):
        bench([bundles[0], other], BenchSettings(contexts=(8,)))
    with pytest.raises(InputError, match="no bundle"):
        bench([], BenchSettings())


def test_weight_dtype(bundles: list[Path]) -> None:
    model = Bundle.open(bundles[0]).manifest.model
    assert weight_dtype(model) == "float32"
    half = dataclasses.replace(model, dtype="float16")
    assert weight_dtype(half) == "float16"
    quantized = type("Facts", (), {"dtype": "float32", "weight_dtype": "int4"})()
    assert weight_dtype(quantized) == "int4"


# ── peers ──────────────────────────────────────────────────────────────────────────────────────────────────────

FAKE_WORKER = """
import json, sys
command, name, argument = sys.argv[1:4]
arguments = json.loads(argument)
say = lambda value: print(json.dumps(value), flush=True)
if command == "prepare":
    print("preparing", file=sys.stderr)
    made = {"model": arguments["source"], "built": "as given"}
    say({"error": "RuntimeError: cannot"} if name == "llama.cpp" else made)
    raise SystemExit
say({"ready": arguments["model"]})
for line in sys.stdin:
    request = json.loads(line)
    if request["new_tokens"] == 13:
        print("out of luck", file=sys.stderr)
        raise SystemExit(3)
    steps = [0.002] * (request["new_tokens"] - 1)
    say({"tokens": [1] * request["new_tokens"], "prefill_seconds": 0.004, "step_seconds": steps})
"""


@pytest.fixture
def hf_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER)
    return path


def test_reasons_against_peers(hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(peer_options_module, "_is_installed", lambda module: False)
    both = peer_options((), [hf_directory, gguf], None, ())
    assert both.names == tuple(bench_peers.PEERS)
    reasons = {name: reason_against(name, both, "float32") for name in both.names}
    assert reasons["llama.cpp"] == "not installed: pip install llama-cpp-python"
    assert "transformers < 4.58" in str(reasons["optimum-onnx"])
    assert "weights are int4" in str(reason_against("transformers", both, "int4"))
    monkeypatch.setattr(peer_options_module, "_is_installed", lambda module: True)
    assert [reason_against(name, both, "float32") for name in both.names] == [None] * 4
    assert reason_against("onnxruntime-genai", both, "int4") is None
    alone = peer_options(("transformers",), [gguf], None, ())
    assert reason_against("transformers", alone, "float32") == (
        "it loads a Hugging Face directory, --model gives a .gguf file"
    )
    with pytest.raises(InputError, match="two models of one kind"):
        peer_options((), [gguf, gguf], None, ())
    with pytest.raises(InputError, match="Python of a peer"):
        peer_options((), [gguf], None, ["optimum-onnx"])
    assert peer_options((), [gguf], None, [f"optimum-onnx={sys.executable}"]).pythons == {
        "optimum-onnx": sys.executable
    }


def test_what_is_not_installed_is_found_missing() -> None:
    assert peer_options_module._is_installed("numpy")
    assert not peer_options_module._is_installed("no_such_package_anywhere")
    assert not peer_options_module._is_installed("no_such_package_anywhere.inside")


def test_protocol(worker: Path, hf_directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(worker)]
    arguments = (hf_directory, "float32", tmp_path / "cache", 1, 64)
    with Peer("transformers", command, *arguments) as peer:
        peer.warm_up([1, 2, 3], 2)
        assert peer.pss is None or peer.pss["total"] > 0
        answer = peer.generate([1, 2, 3], 4)
        assert (len(answer["tokens"]), answer["step_seconds"]) == (4, [0.002] * 3)
        assert (peer.built, peer.model_bytes) == ("as given", 2)
        with pytest.raises(PeerError, match="ended with code 3: out of luck"):
            peer.generate([1], 13)
        with pytest.raises(PeerError, match="ended with code 3"):
            peer.generate([1], 4)
    record = tmp_path / "cache/transformers.json"
    prepared = json.loads(record.read_text())
    record.write_text(json.dumps(prepared | {"built": "earlier"}))
    with Peer("transformers", command, *arguments) as peer:
        assert peer.built == "earlier"  # what is there already is not made again
    (hf_directory / "more").write_text("changed")
    with Peer("transformers", command, *arguments) as peer:
        assert peer.built == "as given"
    worker.write_text(FAKE_WORKER.replace('say({"ready"', 'print("hello", {"ready"'))
    with pytest.raises(PeerError, match="its answer is not understood: hello"):
        Peer("transformers", command, *arguments)
    with pytest.raises(PeerError, match="RuntimeError: cannot"):
        Peer("llama.cpp", command, *arguments)


def test_command_with_peers(
    bundles: list[Path],
    worker: Path,
    hf_directory: Path,
    tmp_path: Path,
    scripted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that answers, one that cannot be prepared, one that dies, one that is not there: only the first has a row."""
    scripted({0: 0.0040, 3: 0.0039})
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(bench_peers, "WORKER", worker)
    monkeypatch.setattr(peer_options_module, "_is_installed", lambda module: module != "optimum.onnxruntime")
    out = io.StringIO()
    options: dict[str, Any] = {"k": (3,), "contexts": (8,), "batches": (1, 2), "repeats": 2, "peers": ()}
    options |= {"model": (hf_directory, tmp_path / "model.gguf"), "peer_cache": tmp_path / "cache"}
    result = bench(bundles[1], BenchSettings(new_tokens=12, **options), out=out)
    assert {row.name for row in result.peer_rows} == {"onnxruntime-genai", "transformers"}
    assert set(result.peers_left_out) == {"llama.cpp", "optimum-onnx"}
    assert result.peers_left_out["llama.cpp"] == "RuntimeError: cannot"
    (peer,) = [row for row in result.peer_rows if row.name == "transformers"]
    assert (peer.tokens_per_second, peer.p50_ms, peer.prefill_tokens_per_second) == pytest.approx((500, 2, 2000))
    full, dropping, *batch_2 = result.rows
    assert full.over_peers["transformers"] == pytest.approx(0.5)
    assert dropping.over_peers["transformers"] == pytest.approx(20 / 39)
    assert all(row.over_peers == {} for row in batch_2)  # peers run one row
    assert "transformers" in out.getvalue()
    assert "llama.cpp: RuntimeError: cannot" in out.getvalue()

    result = bench(bundles[1], BenchSettings(new_tokens=13, **options), out=out)
    assert not result.peer_rows
    assert result.peers_left_out["transformers"] == "it ended with code 3: out of luck"


def test_a_worker_times_each_token() -> None:
    def generate(prompt: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        for token in range(new_tokens):
            emit(token)

    answer = timed(generate, [5], 4)
    assert answer["tokens"] == [0, 1, 2, 3]
    assert len(answer["step_seconds"]) == 3
    assert answer["prefill_seconds"] >= 0
    with pytest.raises(RuntimeError, match="2 tokens came, 3 were asked for"):
        timed(lambda prompt, n, emit: generate(prompt, n - 1, emit), [5], 3)


def test_the_real_worker_says_what_is_wrong(hf_directory: Path, tmp_path: Path) -> None:
    """An unknown name stands for every failure inside a worker."""
    command = [sys.executable, "-P", str(bench_peers.WORKER)]
    with pytest.raises(PeerError, match="KeyError: 'nobody'"):
        Peer("nobody", command, hf_directory, "float32", tmp_path / "cache", 1, 64)


def test_measurement_errors_end_with_1() -> None:
    assert MeasurementError("x").exit_code == 1
