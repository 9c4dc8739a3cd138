"""A refresh under the policy `backfill` runs the tokens since the last one, whatever rows do and whoever interrupts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.support.decoding import LORA, PLAN, RAGGED, REFRESH, WINDOWS, continued, kinds_after_prefill, padded, slots
from tests.support.fake_engine import TOKEN_BYTES, VOCAB, FakeEngine, open_session


def backfilling(engine: FakeEngine, k: int, together: bool) -> Session:
    engine.batched_chunks = together
    return Session(open_session(PLAN, engine=engine)[0].bundle, engine, PeriodicSchedule(k), policy="backfill")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("k", WINDOWS)
def test_a_backfill_runs_the_tokens_since_the_last_refresh(k: int, chunk: int | None, together: bool) -> None:
    """At their positions, in every layer; afterwards all caches hold all tokens, as under the full schedule."""
    count = 2 * (k + 1) + 2
    engine = FakeEngine(PLAN)
    engine.prefill_chunk = chunk
    session = backfilling(engine, k, together)
    tokens = [continued(prompt, count) for prompt in RAGGED]
    lengths = [len(prompt) for prompt in RAGGED]
    session.prefill(*padded(RAGGED), max_new_tokens=count)
    capacity = 5 + count - 1
    for j in range(1, count):
        engine.runs.clear()
        session.step([row[j - 1] for row in tokens])
        if kinds_after_prefill(k, j)[-1] is LORA:
            assert [run.kind for run in engine.runs] == [LORA]
            continue
        exact = j - k - 1  # tokens after the prompt that were exact before
        fed = {row: [] for row in range(3)}
        alone = itertools.cycle(range(3))
        for run in engine.runs:
            rows = range(3) if len(run.input_ids) == 3 else [next(alone)]
            for at, row in enumerate(rows):
                assert run.kind is REFRESH
                assert run.len_kept[at] == run.len_dropped[at] == lengths[row] + exact + len(fed[row])
                assert run.logits_index[at, 0] == run.input_ids.shape[1] - 1
                fed[row] += run.input_ids[at].tolist()
        assert fed == {row: tokens[row][exact:j] for row in range(3)}
        parts = [min(chunk or k + 1, k + 1 - begin) for begin in range(0, k + 1, chunk or k + 1)]
        assert len(engine.runs) == sum(1 if together or part == 1 else 3 for part in parts)
        caches = session._running().caches
        for row, prompt in enumerate(RAGGED):
            for name in caches:
                assert caches[name].shape[2] == capacity
                assert slots(caches[name], row, lengths[row] + j) == prompt + tokens[row][:j]
        kv = session.kv_bytes()
        assert (kv["kept"], kv["dropped"]) == (4 * (9 + 3 * j) * TOKEN_BYTES, 2 * (9 + 3 * j) * TOKEN_BYTES)
        assert kv["allocated"] == 6 * 3 * capacity * TOKEN_BYTES


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize("ends", [(12, 12, 12), (0, 12, 12), (12, 0, 5), (1, 2, 3), (7, 4, 8)], ids=str)
def test_rows_that_are_over_do_not_disturb_a_backfill(k: int, ends: tuple[int, ...], together: bool) -> None:
    stop, count = 9, 12
    script = [[stop if j == ends[row] else 20 + 10 * row + j % 10 for row in range(3)] for j in range(count)]
    engine = FakeEngine(PLAN)
    session = backfilling(engine, k, together)

    def scripted(run) -> None:
        logits = run.binding.outputs["logits"]
        logits[...] = 0
        first = 0 if len(logits) == 3 else (run.binding.address("logits") - base) // (VOCAB * 4)
        step = session._running().steps_done + 1 if session._request else 0
        for at in range(len(logits)):
            logits[at, 0, script[step][first + at]] = 1

    base = 0

    def begun(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        nonlocal base
        buffer = np.full(shape, -7, dtype)
        base = buffer.ctypes.data if name == "logits" else base
        return buffer

    engine._predict = scripted
    engine.allocate_resident = begun
    rows = session.generate(RAGGED, count, stop_token_ids=[stop])
    assert [row.tolist() for row in rows] == [[script[j][row] for j in range(ends[row])] for row in range(3)]
    request = session._running()
    done = request.steps_done
    for row, prompt in enumerate(RAGGED):
        fed = min(done, ends[row])
        assert request.len_kept[row] == len(prompt) + fed
        exact = min(done // (k + 1) * (k + 1), fed // (k + 1) * (k + 1))
        assert request.len_dropped[row] == len(prompt) + exact
        caches = session._running().caches
        seen = prompt + [script[j][row] for j in range(fed)]
        if ends[row] >= done:  # a row that was over may lose its inexact tokens, which nobody reads again
            assert slots(caches["past_key.0"], row, len(seen)) == seen
        assert slots(caches["past_key.3"], row, len(prompt) + exact) == seen[: len(prompt) + exact]


def test_a_backfill_that_was_interrupted_can_be_taken_again() -> None:
    engine = FakeEngine(PLAN)
    engine.prefill_chunk = 2
    session = backfilling(engine, 3, True)
    session.prefill([[1, 2]], max_new_tokens=9)
    for token in (3, 4, 5):
        session.step([token])
    engine.interrupt_at = len(engine.runs) + 2  # in the second of two runs
    with pytest.raises(KeyboardInterrupt):
        session.step([6])
    session.step([6])
    assert slots(session._running().caches["past_key.3"], 0, 6) == [1, 2, 3, 4, 5, 6]
    assert session.next_step is LORA
    for token in (7, 8, 9, 10):
        session.step([token])
    assert slots(session._running().caches["past_value.4"], 0, 10) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
