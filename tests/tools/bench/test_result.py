"""`lora-drop bench`: its arithmetic by hand, its order, and one request of a session."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.statistics import Cycle
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_tools.bench import arms
from lora_drop_tools.bench.arms import Arm as BenchArm
from lora_drop_tools.bench.arms import TimedSession, measure
from lora_drop_tools.bench.judge import judge
from lora_drop_tools.bench.peers.peer import PeerError
from lora_drop_tools.bench.requests import TEXT, prompts_of
from lora_drop_tools.bench.result import BenchResult, Request, Run, make_row, median_ratio, quantile, rotated, tails_of
from lora_drop_tools.shared import costs
from lora_drop_tools.shared.table import table

from tests.support.costs import llama3_8b, request_ceiling
from tests.support.fake_engine import IdleEngine, open_session

LOSSLESS = POLICIES["lossless"]

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
    assert request_ceiling(manifest, 10, 5, 1) == sum(full) / sum(expected)
    assert request_ceiling(manifest, 10, 5, 0) == 1


def test_ceiling_of_a_request_by_hand() -> None:
    """2 layers of 100 bytes, one dropped, head 40, embedding row 10, K/V 4 bytes a token and layer; k = 1, 2 steps."""
    manifest = tiny_manifest()
    # LoRA step: 40 + 10 + 100 + (5 + 1)·4 = 174; refresh after it: 50 + 200 + (6 + 1)·4 + (5 + 1)·4 = 302
    assert costs.request_bytes(manifest, 5, 2, 1) == [174, 302]
    # Full: 250 + 2·6·4 = 298, then 250 + 2·7·4 = 306
    assert request_ceiling(manifest, 5, 2, 1) == pytest.approx((298 + 306) / (174 + 302))
    # Three rows: weights once, embedding rows and K/V three times
    assert costs.request_bytes(manifest, 5, 1, 1, rows=3) == [40 + 30 + 100 + 3 * 24]


def test_a_long_request_tends_to_the_ceiling_at_its_end() -> None:
    manifest = llama3_8b()
    assert request_ceiling(manifest, 4000, 8, 3) == pytest.approx(costs.speedup_ceiling(manifest, 4000, 8, 3), rel=1e-3)


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
    plan = DropPlan(num_layers=2, sites=(1,), always_first=1, always_last=0)
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


def test_figures_of_a_batch_are_of_all_its_rows() -> None:
    """2 rows of 4 steps and prompts of 5: 8 tokens a request, and twice the K/V of one row."""
    kv_prompt, kv = {"kept": 40, "dropped": 40}, {"kept": 72, "dropped": 56}
    run = Run(0.5, [1.0, 3.0, 1.0, 3.0], kv_prompt=kv_prompt, kv=kv)
    row = make_row("b", tiny_manifest(), 1, Request(5, 2, 5), [run] * 2, [run] * 2, None)
    assert (row.tokens_per_second, row.prefill_tokens_per_second) == (8 / 8, 10 / 0.5)
    assert row.kv_saved == 1 - 48 / 64


def test_a_batch_that_operations_forbid_is_told() -> None:
    run = Run(0.5, [1.0] * 4, [1.0] * 4)
    row = make_row("b", tiny_manifest(), 1, Request(5, 2, 5), [run] * 2, [run] * 2, None)
    told = {}
    for ceiling in (0.98, 1.02, None):
        one = dataclasses.replace(row, operations_ceiling=ceiling)
        result = SimpleNamespace(
            foreign_cores=None, memory=[], peer_rows=[], machine={"memory_bytes": None}, rows=[one]
        )
        result.warnings, result.problems = [], []
        judge(cast("BenchResult", result))
        told[ceiling] = [text.partition("operations allow ")[2] for text in result.warnings]
    assert told == {0.98: ["0.98×: this policy cannot pay at that batch on this machine."], 1.02: [], None: []}


def test_the_ceiling_under_lossless_is_that_of_the_cycles_that_were_counted() -> None:
    """4 steps in two cycles: 2 LoRA steps and a refresh that made 3 tokens, then a refresh that made 1."""
    request = Request(context=5, rows=1, new_tokens=5)
    cycles = (Cycle(2, (2,), (2,), (3,)), Cycle(0, (0,), (0,), (1,)))
    run = Run(0.5, [2.0, 0.0, 0.0, 1.0], [1.9, 0.0, 0.0, 0.9], cycles=cycles)
    for k in (3, "auto"):
        row = make_row("b", tiny_manifest(), k, request, [run, run], [Run(0.5, [1.5] * 4)] * 2, 1000.0, LOSSLESS)
        refresh, lora, last = 298, 174 + 178, 322  # at contexts 5 (LoRA: 5 and 6), and 8
        assert row.ceiling == pytest.approx((298 + 306 + 314 + 322) / (refresh + lora + last))
        assert row.speedup == 2
        assert row.tokens_per_refresh == 2
        assert row.kv_saving == 0
        assert row.own_speedup is None
        assert row.tails == []
        assert list(row.steps) == ["refresh after 0", "refresh after 2"]
        first, second = row.steps["refresh after 2"], row.steps["refresh after 0"]
        assert (first.steps, first.median_ms, first.mean_bytes) == (1, 2000, refresh + lora)
        assert (second.steps, second.median_ms, second.mean_bytes) == (1, 1000, last)
    whole = make_row("b", tiny_manifest(), 0, request, [Run(0.5, [1.5] * 4, cycles=())] * 2, [run] * 2, None, LOSSLESS)
    assert whole.tokens_per_refresh is None
    assert list(whole.steps) == ["refresh"]


def test_repeats_under_lossless_that_differ() -> None:
    """3 tokens and 1, then 1 token a cycle: the figures are the last one's, the ceiling is the highest."""
    request, single = Request(context=5, rows=1, new_tokens=5), Cycle(0, (0,), (0,), (1,))
    runs = [
        Run(0.5, [2.0, 0.0, 0.0, 1.0], cycles=(Cycle(2, (2,), (2,), (3,)), single)),
        Run(0.5, [0.5, 0.5, 1.0, 1.0], cycles=(single,) * 4),
    ]
    row = make_row("b", tiny_manifest(), 3, request, runs, [Run(0.5, [1.5] * 4)] * 2, None, LOSSLESS)
    full = [298, 306, 314, 322]
    assert row.ceiling == pytest.approx(sum(full) / (298 + 174 + 178 + 322))
    assert row.tokens_per_refresh == 1.5
    assert list(row.steps) == ["refresh after 0"]
    figures = row.steps["refresh after 0"]
    assert (figures.steps, figures.median_ms, figures.mean_bytes) == (4, 750, sum(full) / 4)


def test_repeats_of_an_adaptive_schedule_that_differ() -> None:
    """Each step's time counts for the kind that it was in its own run."""
    runs = [
        Run(0.5, [1.0, 3.0, 1.0, 1.0], kinds=["lora", "refresh", "lora", "lora"]),
        Run(0.5, [1.0, 1.0, 5.0, 1.0], kinds=["lora", "lora", "refresh", "lora"]),
    ]
    row = make_row("b", tiny_manifest(), 3, Request(5, 1, 5), runs, runs, None, schedule="margin")
    assert {kind: step.median_ms for kind, step in row.steps.items()} == {"lora": 1000, "refresh": 4000}


def test_a_ratio_within_the_noise_is_not_above_the_ceiling() -> None:
    request = Request(context=5, rows=1, new_tokens=5)
    full = [Run(0.5, [seconds] * 4) for seconds in (1.3, 1.4, 1.2)]
    row = make_row("b", tiny_manifest(), 1, request, [Run(0.5, [1.0] * 4)] * 3, full, None)
    assert row.speedup == 1.3 > row.ceiling
    assert row.noise == pytest.approx(0.2)
    assert not row.above_ceiling
    assert row.steps["lora"].bandwidth_share is None
    backfill = POLICIES["backfill"]
    backfill = make_row("b", tiny_manifest(), 1, request, [Run(0.5, [1.0] * 4)] * 3, full, None, policy=backfill)
    assert backfill.own_speedup is None  # its refreshes are longer than the full schedule's


@pytest.mark.parametrize(
    ("policy", "rows", "schedule", "counts"),
    [
        ("backfill", 2, "periodic", True),
        ("backfill", 1, "periodic", False),
        ("skip", 2, "periodic", False),
        ("backfill", 2, "margin", False),
    ],
)
def test_operations_count_where_a_batch_runs_several_tokens_at_once(policy, rows, schedule, counts) -> None:
    """By chunks of B and of B · (k + 1) tokens behind the context, and for no cycle that is not known beforehand."""
    asked = []

    def chunk_seconds(context: int, tokens: int) -> float:
        asked.append((context, tokens))
        return tokens / 10

    manifest, request = tiny_manifest(), Request(10, rows, 5)
    runs = [Run(0.5, [1.0] * 4, kinds=["lora", "refresh"] * 2)] * 2
    row = make_row("b", manifest, 1, request, runs, runs, None, POLICIES[policy], schedule, chunk_seconds)
    assert asked == ([(10, 2), (10, 4)] if counts else [])
    wanted = costs.operations_ceiling(manifest, 10, 1, 2, 0.2, 0.4) if counts else None
    assert row.operations_ceiling == wanted


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
    request = Request(4, 2, 3)
    runs, failed = measure([arm(name) for name in "abc"], request, np.zeros((2, 4), np.int64), 3, said.append, settle=0)
    assert "".join(order) == "abc" + "bca" + "ab"  # c failed in the second repeat
    assert {index: len(own) for index, own in runs.items()} == {0: 3, 1: 3}
    assert failed == {2: "it broke"}
    assert said[0] == "context 4, batch 2, repeat 1 of 3, tokens/s: a 4.0, b 4.0, c 4.0"


# ── one request of a session ───────────────────────────────────────────────────────────────────────────────────


def test_a_timed_request_under_lossless_brings_its_cycles() -> None:
    plan = DropPlan(num_layers=8, sites=("4", "6"))
    session, engine = open_session(plan, engine=IdleEngine(plan), eos=(0,))
    timed_session = TimedSession(session.bundle, engine, "lossless", "ngram")
    run = timed_session.run(np.array([[3, 4, 5]]), 12, k=3)
    assert run.cycles is not None
    assert sum(cycle.made[0] for cycle in run.cycles) == len(run.step_seconds) == 11
    assert max(cycle.made[0] for cycle in run.cycles) == 4  # token 0 comes each time, which the look-up soon knows
    assert TimedSession(session.bundle, IdleEngine(plan)).run(np.array([[3]]), 4, k=3).cycles is None


def test_a_timed_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks when it is read: once between the engine's begin and end, three times in a step."""
    monkeypatch.setattr(arms, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    plan = DropPlan(num_layers=8, sites=(4, 6))
    session, engine = open_session(plan, engine=IdleEngine(plan), eos=(0,))
    timed_session = TimedSession(session.bundle, engine)
    run = timed_session.run(np.array([[3, 4, 5], [6, 7, 8]]), 6, k=1)
    # Every logit is the same, so token 0, an end token, comes each time
    assert (run.step_seconds, run.engine_seconds) == ([3] * 5, [1] * 5)
    manifest = session.bundle.manifest
    for kv, steps in ((run.kv_prompt, 0), (run.kv, 5)):
        assert kv is not None
        assert [kv["kept"], kv["dropped"]] == [2 * part for part in costs.kv_bytes(manifest, 3, steps, 1)]
    again = timed_session.run(np.array([[3, 4, 5]]), 3, k=0)
    assert (again.step_seconds, again.engine_seconds) == ([3] * 2, [1] * 2)
    timed_session.session.close()
    assert engine.times_closed == 1


def test_a_chunk_takes_the_median_of_its_runs_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill takes 200 s, the first run, which prepares, 100. It is timed once."""
    now, seconds = [0.0], iter([200, 100, 3, 1, 2, 4, 90, 5, 80])
    monkeypatch.setattr(arms, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Engine(IdleEngine):
        def prepare(self, *_: Any) -> Callable[[], None]:
            return lambda: now.__setitem__(0, now[0] + next(seconds))

    plan = DropPlan(num_layers=8, sites=("4", "6"))
    session, engine = open_session(plan, engine=Engine(plan))
    timed_session = TimedSession(session.bundle, engine)
    assert [timed_session.chunk_seconds(5, 2) for _ in range(2)] == [4, 4]
    assert not list(seconds)


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
