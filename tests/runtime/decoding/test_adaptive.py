"""Sessions under schedules that look at logits: the oracle's steps, room in the caches, whose logits count."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Calibration
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.schedules import named_schedule
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import POLICIES, Backfill
from lora_drop_runtime.plan.schedule import (
    AdaptiveSchedule,
    EntropySchedule,
    LastLogits,
    MarginSchedule,
    PeriodicSchedule,
    StepKind,
)

from tests.support import oracle
from tests.support.bundles import family, make_bundle, oracle_plan, save_adapters
from tests.support.decoding import LORA, PLAN, RAGGED, REFRESH, padded
from tests.support.fake_engine import VOCAB, FakeEngine, Run, make_manifest, open_session

TOLERANCE = 3e-5  # of the row's largest |logit|: float32 sums in another order


# ── against the oracle ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    root = tmp_path_factory.mktemp("adaptive")
    bundle = make_bundle("llama", root / "b", drop_ratio=0.75, rank=4, surrogate="recurrent")
    plan, fingerprint = bundle.manifest.plan, bundle.manifest.model.fingerprint
    return bundle, save_adapters(root / "a", plan, 64, fingerprint)


def how_sure(name: str, logits: torch.Tensor) -> float:
    """The margin, or minus the entropy."""
    if name == "margin":
        best = sorted(logits.tolist())
        return best[-1] - best[-2]
    return float((logits.softmax(0) * logits.log_softmax(0)).sum())


def decoded_by_the_oracle(
    plan: oracle.OraclePlan, prompt: list[int], forced: list[int], k: int, policy: str, name: str, least: float
) -> tuple[str, list[torch.Tensor], list[float]]:
    """Kinds of the steps, all logits, and how sure those of the LoRA steps were."""
    row, logits = oracle.prefill(family("llama").model, plan, prompt)
    kinds, found, sure, since = "", [logits], [], 0
    for token in forced:
        full = since > 0 and (since == k or how_sure(name, found[-1]) < least)
        found.append(row.backfill(token) if full and policy == "backfill" else row.step(token, full=full))
        since = 0 if full else since + 1
        kinds += "R" if full else "L"
        sure += [how_sure(name, found[-1])] if since else []
    return kinds, found, sure


@pytest.mark.parametrize("name", ["margin", "entropy"])
@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_the_steps_and_logits_of_the_oracle(policy: str, name: str, fitted: tuple[Bundle, Path]) -> None:
    bundle, adapters = fitted
    theirs, prompt = oracle_plan(bundle, adapters), [7, 3, 11, 19, 2]
    forced = np.random.default_rng(4).integers(0, 131, 20).tolist()
    _, _, sure = decoded_by_the_oracle(theirs, prompt, forced, 4, policy, name, -math.inf)
    middle = sorted(sure)[len(sure) // 4 : -len(sure) // 4]
    gap = max(range(len(middle) - 1), key=lambda i: middle[i + 1] - middle[i])
    least = (middle[gap] + middle[gap + 1]) / 2  # nothing is near to it
    kinds, expected, _ = decoded_by_the_oracle(theirs, prompt, forced, 4, policy, name, least)
    assert len(set(kinds.split("R"))) > 1, kinds  # neither limit of the threshold

    schedule: AdaptiveSchedule = MarginSchedule(4, least) if name == "margin" else EntropySchedule(4, -least)
    with Session.open(bundle.root, k=schedule, policy=policy, threads=1) as session:
        session.load_adapters(adapters)
        found = [session.prefill(np.array([prompt]), max_new_tokens=21).copy()]
        ours = ""
        for token in forced:
            kind = session.next_step
            assert session.next_step is kind
            ours += kind.name[0]
            found.append(session.step(np.array([token])).copy())
        kv = session.kv_bytes()
    assert ours == kinds
    for one, wanted in zip(found, expected, strict=True):
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(one[0], wanted.numpy(), atol=TOLERANCE * scale, rtol=0)
    plan, token_bytes = bundle.manifest.plan, bundle.manifest.model.token_kv_bytes([0])
    exact = kinds.count("R") if policy == "skip" else kinds.rfind("R") + 1
    assert kv["kept"] == len(plan.kept_attentions) * 25 * token_bytes
    assert kv["dropped"] == (8 - len(plan.kept_attentions)) * (5 + exact) * token_bytes


# ── room, rows and one's own schedules, on an engine without a model ───────────────────────────────────────────


class TableEngine(FakeEngine):
    """Logits of a row at a position are `table[position, row]`, whatever was run."""

    def __init__(self, table: Any) -> None:
        super().__init__(PLAN)
        self.table = table
        self.reads = 0
        self.batched_chunks = True

    def read(self, buffer: Any) -> Any:
        self.reads += 1
        return super().read(buffer)

    def _predict(self, run: Run) -> None:
        index = np.zeros(len(run.len_kept), np.int64) if run.logits_index is None else run.logits_index[:, 0]
        rows = np.arange(len(index))
        run.binding.outputs["logits"][:, 0] = self.table[run.len_kept + index, rows]


def table(rows: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, 1, (60, rows, VOCAB)).astype(np.float32)


def opened(engine: FakeEngine, schedule: Any, policy: str = "skip", **manifest: Any) -> Session:
    bundle = Bundle(Path("/nowhere"), make_manifest(PLAN, **manifest))
    return Session(bundle, engine, schedule, policy)


@pytest.mark.parametrize("policy", ["skip", "backfill"])
@pytest.mark.parametrize("threshold", [-math.inf, 0.2, math.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_no_slot_is_written_that_was_not_allocated(k: int, threshold: float, policy: str) -> None:
    """The fake engine refuses a write past a cache's end; at +∞ the last slot is used, for any number of steps."""
    for count in (1, 2, 3, 8, 19):
        engine = TableEngine(table(3))
        session = opened(engine, MarginSchedule(k, threshold), policy)
        session.generate(RAGGED, count, stop_token_ids=())
        request = session._running()
        refreshes = request.caches["past_key.3"].shape[2] - 5
        assert refreshes == ((count - 1) // 2 if policy == "skip" else count - 1)
        if policy == "skip" and threshold == math.inf:
            assert request.len_dropped.tolist() == [len(prompt) + refreshes for prompt in RAGGED]
        if threshold == -math.inf:
            periodic = opened(TableEngine(table(3)), PeriodicSchedule(k), policy)
            periodic.generate(RAGGED, count, stop_token_ids=())
            assert periodic._running().len_dropped.tolist() == request.len_dropped.tolist()
            assert periodic.kv_bytes()["kept"] == session.kv_bytes()["kept"]


class Watching:
    """One's own: LoRA steps only; keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float, float]] = []

    def kind(self, step: int, last: LastLogits | None) -> StepKind:
        assert last is not None
        self.seen.append((step, last.lora_steps, last.margin, last.entropy))
        return REFRESH if step == 3 else LORA


def test_one_s_own_schedule_sees_what_numpy_computes() -> None:
    """Of the logits of the step before: step 1 sees those of the prefill; each step is asked for once."""
    logits, watching = table(3), Watching()
    engine = TableEngine(logits)
    session = opened(engine, watching)
    returned = [session.prefill(*padded(RAGGED)).copy()]
    for token in range(5):
        assert session.next_step is (REFRESH if token == 2 else LORA)
        returned.append(session.step([token, token, token]).copy())
    assert [(step, lora_steps) for step, lora_steps, *_ in watching.seen] == [(1, 0), (2, 1), (3, 2), (4, 0), (5, 1)]
    for (*_, margin, entropy), seen in zip(watching.seen, returned, strict=False):
        best = np.sort(seen.astype(np.float64), axis=1)
        assert margin == pytest.approx((best[:, -1] - best[:, -2]).min(), abs=1e-6)
        p = np.exp(seen.astype(np.float64)) / np.exp(seen.astype(np.float64)).sum(axis=1, keepdims=True)
        assert entropy == pytest.approx((-p * np.log(p)).sum(axis=1).max(), abs=1e-5)


def test_the_least_sure_row_decides_as_long_as_it_goes_on() -> None:
    """Row 1 is never sure and ends at its fourth token; from then on the others, which are, go on to k."""
    logits = np.zeros((60, 3, VOCAB), np.float32)
    logits[:, :, 7] = 5
    logits[:, 1, 8] = 4.5
    stop = 9
    logits[1 + 3 - 1, 1, stop] = 9  # of a prompt of one token
    engine = TableEngine(logits)
    session = opened(engine, MarginSchedule(4, 1.0))
    rows = session.generate(RAGGED, 14, stop_token_ids=[stop])
    assert [len(row) for row in rows] == [14, 3, 14]
    kinds = "".join(kind.name[0] for kind in engine.kinds[1:])
    assert kinds == "LRL" + "LLLRLLLLRL"


def test_engines_that_choose_are_read_only_when_a_schedule_asks() -> None:
    class Choosing(TableEngine):
        chooses_tokens = True

    for schedule, reads in ((PeriodicSchedule(3), 0), (MarginSchedule(1, 1.0), 0), (MarginSchedule(3, 0.0), 4)):
        engine = Choosing(table(1))
        session = opened(engine, schedule)
        request_ids = np.array([[1]])
        session._begin(request_ids, None, 9, None, False)
        for _ in range(8):
            session._step(np.array([2]), None)
        assert engine.reads == reads, schedule  # after the first and the second of three LoRA steps


def test_a_schedule_with_more_refreshes_than_it_said_is_stopped() -> None:
    class Wrong(Watching):
        def most_refreshes(self, steps: int) -> int:
            return 0

    session = opened(TableEngine(table(1)), Wrong())
    session.prefill(np.array([[1]]), max_new_tokens=9)
    session.step([1])
    session.step([1])
    for call in (lambda: session.next_step, lambda: session.step([1])):
        with pytest.raises(InputError, match="more refreshes than it said") as caught:
            call()
        assert "Its most_refreshes(8) is 0; step 3 would be one more." in str(caught.value)


def test_an_interrupted_step_keeps_its_kind() -> None:
    engine = TableEngine(table(1))
    engine.prefill_chunk = 2
    session = opened(engine, MarginSchedule(5, math.inf), "backfill")
    watching = Watching()
    session.schedule = watching
    session.prefill(np.array([[1, 2]]), max_new_tokens=9)
    for token in (3, 4):
        session.step([token])
    engine.interrupt_at = len(engine.runs) + 2  # in the second of two runs
    with pytest.raises(KeyboardInterrupt):
        session.step([5])
    assert session.next_step is REFRESH
    session.step([5])
    assert [step for step, *_ in watching.seen] == [1, 2, 3]


def test_wrong_schedules_are_refused_before_a_request_begins() -> None:
    class OneArgument:
        def kind(self, step: int) -> StepKind:
            return LORA

    session, engine = open_session(PLAN)
    for call in (lambda: session.generate([1], 4, k=OneArgument()), lambda: session.prefill([[1]], k=OneArgument())):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="cannot be called with a step and the last logits"):
            call()
    assert engine.runs == []


# ── by name ────────────────────────────────────────────────────────────────────────────────────────────────────

FOUND = Calibration(1.25, 3, "backfill", 0.9, 0.91, 0.4, 500, 0.89, 0.41, 480)


def test_names_of_schedules() -> None:
    manifest = dataclasses.replace(make_manifest(PLAN), calibration={"margin": FOUND})
    assert named_schedule(manifest, None, None, None) == (3, "skip")
    assert named_schedule(manifest, "periodic", 5, "backfill") == (5, "backfill")
    for k, policy in ((None, None), (3, None), (None, "backfill"), (3, "backfill")):
        assert named_schedule(manifest, "margin", k, policy) == (MarginSchedule(3, 1.25), "backfill")
    own = MarginSchedule(2, 0.5)
    assert named_schedule(manifest, None, own, "skip") == (own, "skip")
    for arguments, words in (
        (("entropy", None, None), ("not calibrated for the entropy schedule", "stored for: margin", "--calibrate")),
        (("margin", 2, None), ("calibrated for another k", "for 3; 2 was asked for", "--k 2")),
        (("margin", None, "skip"), ("calibrated for another policy", "for backfill; skip", "--policy skip")),
        (("margin", own, None), ("given twice", "MarginSchedule")),
        (("periodic", own, None), ("given twice", "MarginSchedule")),
        (("margn", None, None), ("Unknown schedule", "'margn'")),
    ):
        with pytest.raises(InputError) as caught:
            named_schedule(manifest, *arguments)
        assert all(word in str(caught.value) for word in words), caught.value


def test_a_policy_that_decides_by_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Verifying(Backfill):
        verifies = True

    monkeypatch.setitem(POLICIES, "verifying", Verifying("verifying"))
    manifest = dataclasses.replace(make_manifest(PLAN), calibration={"margin": FOUND})
    assert named_schedule(manifest, None, None, "verifying") == (3, "verifying")
    with pytest.raises(InputError, match="The policy verifying follows no margin schedule"):
        named_schedule(manifest, "margin", None, "verifying")


def test_a_row_does_not_run_the_bundles_threshold_under_another_policy() -> None:
    """It is refused as at the opening; a window, or a threshold of one's own, goes with every policy."""
    engine = FakeEngine(PLAN)
    manifest = dataclasses.replace(make_manifest(PLAN), calibration={"margin": FOUND})
    bundle = dataclasses.replace(open_session(PLAN, engine=engine)[0].bundle, manifest=manifest)
    batch = Batch(bundle, engine, MarginSchedule(3, 1.25), "backfill", slots=8)
    for policy, words in (
        ("skip", ("calibrated for another policy", "margin schedule was found for backfill; skip was asked for")),
        ("lossless", ("policy lossless follows no margin schedule", "verifies drafts")),
    ):
        with pytest.raises(InputError) as caught:
            batch.add([5, 6, 7], 4, policy=policy)
        assert all(word in str(caught.value) for word in words), caught.value
    assert batch.rows == 0
    batch.add([5, 6, 7], 4, policy="backfill")
    batch.add([5, 6, 7], 4, policy="skip", k=2)
    batch.add([5, 6, 7], 4, policy="skip", k=MarginSchedule(3, 0.5))
    batch.add([5, 6, 7], 4, policy="lossless", schedule="periodic")
    own = Batch(bundle, engine, MarginSchedule(3, 0.5), "backfill", slots=1)
    own.add([5, 6, 7], 4, policy="skip")
