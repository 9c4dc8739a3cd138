"""Refresh policies, and one more that is added here without touching another file.

The toy takes back half of the LoRA steps since the last refresh, the latest ones: neither `skip` nor `backfill`, and
every length, capacity and cache tells it from both. Its oracle is that of tests/support/oracle.py, told which tokens to
repeat.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, Limits
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.engine import STANDING_SLOTS
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES, Policy, policy_named
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind
from lora_drop_tools.shared import costs

from lora_drop_export.check.verify import compare
from lora_drop_export.targets.trt.target import static_slots
from tests.support import oracle
from tests.support.bundles import PROMPTS, first_layers, make_bundle, oracle_plan, save_adapters
from tests.support.fake_engine import FakeEngine, open_session

WINDOWS = (0, 1, 2, 3, 5, 19)
TOLERANCE = 3e-5  # of the row's largest |logit|: float32 sums in another order


class Half(Policy):
    """Half of the LoRA steps, the latest ones."""

    leaves_holes = True
    exact_refreshes = False

    def steps_taken_back(self, lora_steps: int) -> int:
        return lora_steps // 2


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> Policy:
    policy = Half("half")
    monkeypatch.setitem(POLICIES, policy.name, policy)
    return policy


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table() -> None:
    assert list(POLICIES) == ["skip", "backfill", "fill", "lossless"]
    assert [policy.name for policy in POLICIES.values()] == list(POLICIES)
    facts = [(policy.leaves_holes, policy.exact_refreshes, policy.fills) for policy in POLICIES.values()]
    assert facts == [(True, False, False), (False, True, False), (False, False, True), (False, True, False)]
    assert [policy.verifies for policy in POLICIES.values()] == [False, False, False, True]
    assert [POLICIES["skip"].refresh_tokens(k) for k in WINDOWS] == [1] * 6
    assert [POLICIES["backfill"].refresh_tokens(k) for k in WINDOWS] == [1, 2, 3, 4, 6, 20]


def test_a_name_is_read_once_or_refused() -> None:
    assert policy_named("backfill") is POLICIES["backfill"]
    with pytest.raises(InputError, match="Unknown refresh policy") as caught:
        policy_named("backfil")
    assert "'backfil' was given, known are skip, backfill" in str(caught.value)
    assert "Use skip." in str(caught.value)
    with pytest.raises(PlanError, match="Unknown value for --policy"):
        DropPlan(num_layers=6, sites=(3,), policy="backfil")


@pytest.mark.parametrize("k", WINDOWS)
def test_dropped_slots(k: int) -> None:
    """⌊steps / (k+1)⌋ refreshes among steps 1 … steps; step 0 is the prefill and not counted."""
    schedule = PeriodicSchedule(k)
    for steps in range(50):
        assert POLICIES["skip"].dropped_slots(7, steps, schedule) == 7 + steps // (k + 1)
        assert POLICIES["backfill"].dropped_slots(7, steps, schedule) == 7 + steps
        assert Half("half").dropped_slots(7, steps, schedule) == 7 + steps // (k + 1) * (1 + k // 2)


def test_dropped_slots_of_another_schedule() -> None:
    class TwoOfSeven:
        def kind(self, step: int, last: object) -> StepKind:
            return StepKind.REFRESH if step in (1, 7) else StepKind.LORA

    class Counted(TwoOfSeven):
        def most_refreshes(self, steps: int) -> int:
            return (steps >= 1) + (steps >= 7)

    policies = (
        (POLICIES["skip"], list(range(9)), [0, 1, 1, 1, 1, 1, 1, 2, 2]),
        (POLICIES["backfill"], list(range(9)), list(range(9))),
        (Half(""), list(range(9)), [0, 1, 1, 2, 2, 3, 3, 4, 5]),  # at most half of the other steps
    )
    for policy, uncounted, counted in policies:
        assert [policy.dropped_slots(0, steps, TwoOfSeven()) for steps in range(9)] == uncounted
        assert [policy.dropped_slots(0, steps, Counted()) for steps in range(9)] == counted


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("name", ["skip", "backfill", "half"])
def test_slots_of_an_engine_with_static_caches(name: str, k: int, half: Policy) -> None:
    plan = DropPlan(num_layers=6, sites=(3,), k=k, policy=name)
    found = static_slots(plan, Limits(max_seq_len=50, max_prompt_len=20, max_batch=1))
    cycles = 29 // (k + 1)
    dropped = 20 + {"skip": cycles, "backfill": 29, "half": cycles * (1 + k // 2)}[name]
    assert found == {"kept": 49 + STANDING_SLOTS, "dropped": dropped + STANDING_SLOTS}


# ── a policy of one's own ──────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_takes_it_and_stores_its_name(half: Policy) -> None:
    plan = DropPlan(num_layers=6, sites=(3, 4), policy="half")
    assert plan.refresh_policy is half
    assert dataclasses.asdict(plan)["policy"] == "half"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("k", WINDOWS)
def test_a_session_runs_what_it_takes_back(k: int, chunk: int | None, together: bool, half: Policy) -> None:
    """Ragged rows on the fake engine: each cache holds the tokens that its layer should have written, in order."""
    plan = DropPlan(num_layers=6, sites=(3, 4), k=k, policy="half")
    engine = FakeEngine(plan)
    engine.prefill_chunk, engine.batched_chunks = chunk, together
    session, _ = open_session(plan, k=k, engine=engine)
    prompts, lengths = np.array([[7, 3, 11, 19, 2], [5, 0, 0, 0, 0], [23, 29, 31, 0, 0]]), np.array([5, 1, 3])
    steps = 2 * (k + 1) + 1
    session.prefill(prompts, lengths, max_new_tokens=steps + 1)
    kept = [prompts[row, :length].tolist() for row, length in enumerate(lengths)]
    dropped = [list(tokens) for tokens in kept]
    again = k // 2
    for j in range(1, steps + 1):
        engine.runs.clear()
        column = [(17 * row + j) % 50 for row in (1, 2, 3)]
        session.step(column)
        refresh = j % (k + 1) == 0
        for row, token in enumerate(column):
            kept[row].append(token)
            if refresh:
                dropped[row] += kept[row][-(again + 1) :]
        parts = [min(chunk or again + 1, again + 1 - begin) for begin in range(0, again + 1, chunk or again + 1)]
        runs = sum(1 if together or part == 1 else 3 for part in parts)
        assert len(engine.runs) == (runs if refresh else 1)
        assert engine.runs[0].len_kept[0] == len(kept[0]) - 1 - (again if refresh else 0)
        for name, cache in session._running().caches.items():
            own = dropped if int(name.split(".")[1]) in plan.dropped_layers else kept
            for row in range(3):
                assert (cache[row, 0, : len(own[row]), 0] - 1).astype(int).tolist() == own[row], (j, name)
    caches = session._running().caches
    assert caches["past_key.0"].shape[2] == 5 + steps
    assert caches["past_key.3"].shape[2] == 5 + steps // (k + 1) * (again + 1)


def test_rows_that_are_over_stay_as_they_are(half: Policy) -> None:
    """A row that ended at once has fewer tokens than a refresh takes back."""
    plan = DropPlan(num_layers=6, sites=(3, 4), policy="half")
    stop, count = 9, 16
    ends = (0, 15, 4)
    script = [[stop if j == ends[row] else 20 + row for row in range(3)] for j in range(count)]
    engine = FakeEngine(plan, script)
    engine.batched_chunks = True
    session, _ = open_session(plan, k=7, engine=engine)
    rows = session.generate([[1], [2, 3], [4]], count, stop_token_ids=[stop])
    assert [row.tolist() for row in rows] == [[20 + row] * ends[row] for row in range(3)]
    request = session._running()
    assert request.len_kept.tolist() == [1, 2 + 15, 1 + 4]
    assert request.len_dropped.tolist() == [1, 2 + 4, 1]  # one refresh, which took three of seven steps back


def test_an_interrupted_refresh_can_be_taken_again(half: Policy) -> None:
    plan = DropPlan(num_layers=6, sites=(3, 4), policy="half")
    engine = FakeEngine(plan)
    engine.prefill_chunk = 2
    session, _ = open_session(plan, k=5, engine=engine)
    session.prefill([[1, 2]], max_new_tokens=9)
    for token in (3, 4, 5, 6, 7):
        session.step([token])
    engine.interrupt_at = len(engine.runs) + 2  # in the second of two runs
    with pytest.raises(KeyboardInterrupt):
        session.step([8])
    session.step([8])
    caches = session._running().caches
    assert (caches["past_key.0"][0, 0, :8, 0] - 1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (caches["past_key.3"][0, 0, :5, 0] - 1).tolist() == [1, 2, 6, 7, 8]


def decoded_by_the_oracle(plan: oracle.OraclePlan, prompt: list[int], forced: list[int], k: int) -> list[torch.Tensor]:
    """The logits after the prompt and after each forced token; a refresh repeats the last k // 2 tokens in full."""
    row, logits = oracle.prefill(first_layers("llama", 6).model, plan, prompt)
    found = [logits]
    with row.installed():
        for j, token in enumerate(forced, start=1):
            if j % (k + 1):
                found.append(row.step(token, full=False))
            else:
                row.since_refresh = row.since_refresh[k - k // 2 :]
                found.append(row.backfill(token))
    return found


@pytest.mark.parametrize("options", [{}, {"surrogate": "recurrent", "injection": "attn_mlp"}], ids=["plain", "halves"])
def test_a_bundle_decodes_as_the_oracle_does(options: dict[str, str], tmp_path: Path, half: Policy) -> None:
    """Exported as the default policy of a bundle, decoded by ONNX Runtime, verified against the reference."""
    given = options | {"drop_ratio": 0.75, "always_first": 1, "policy": "half"}
    bundle = make_bundle(first_layers("llama", 6), tmp_path / "b", rank=4, **given)
    assert json.loads((bundle.root / MANIFEST_NAME).read_text())["plan"]["policy"] == "half"
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, 64, bundle.manifest.model.fingerprint)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    padded = np.zeros((3, 5), np.int64)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt
    forced = np.random.default_rng(2).integers(0, 131, (12, 3))
    with Session.open(bundle.root, threads=1) as session:
        assert session.policy == "half"  # the bundle's own
        session.load_adapters(adapters)
        for k in (2, 5):
            ours = [session.prefill(padded, lengths, max_new_tokens=13, k=k).copy()]
            ours += [session.step(column).copy() for column in forced]
            kv = session.kv_bytes()
            costed = [costs.kv_bytes(bundle.manifest, int(length), 12, k, half) for length in lengths]
            assert (kv["kept"], kv["dropped"]) == tuple(map(sum, zip(*costed, strict=True)))
            for row, prompt in enumerate(PROMPTS):
                theirs = decoded_by_the_oracle(oracle_plan(bundle, adapters), prompt, forced[:, row].tolist(), k)
                for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                    assert np.abs(a[row] - b.numpy()).max() < TOLERANCE * b.abs().max(), (k, row, step)
    fitted = make_bundle(first_layers("llama", 6), tmp_path / "c", adapters=adapters, **given)
    results = {policy: compare(fitted, threads=1, policy=policy) for policy in (None, "half", "skip")}
    assert all(result.passed for result in results.values())
    assert results[None].policy == "half"
    assert results["half"].steps == results[None].steps != results["skip"].steps
