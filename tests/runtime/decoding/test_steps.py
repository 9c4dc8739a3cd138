"""The session on a fake engine: which step runs when, on which tokens, lengths and slots.

Expected values are worked out from docs/algorithm.md here, not with the product's functions.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind

from tests.support.decoding import LORA, PLAN, RAGGED, REFRESH, WINDOWS, continued, kinds_after_prefill, padded, slots
from tests.support.fake_engine import FakeEngine, open_session

# ── the schedule ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize("length", [1, 4, 5])
def test_order_of_steps(k: int, length: int) -> None:
    """The count begins at the prefill, whatever the prompt's length and wherever the last request stopped."""
    session, engine = open_session(PLAN, k=k)
    for new_tokens in (2 * (k + 1) + 2, k + 2, 2 * (k + 1) + 2):
        engine.forget()
        session.generate([1] * length, new_tokens)
        assert engine.kinds == [REFRESH, *kinds_after_prefill(k, new_tokens - 1)]


@pytest.mark.parametrize("k", WINDOWS)
def test_next_step_tells_what_runs(k: int, plan: DropPlan) -> None:
    session, engine = open_session(plan, k=k)
    session.prefill(*padded(RAGGED), max_new_tokens=2 * (k + 1) + 2)
    told = []
    for _ in range(2 * (k + 1) + 1):
        told.append(session.next_step)
        assert session.next_step is told[-1]  # asking changes nothing
        session.step([1, 2, 3])
    assert told == engine.kinds[1:] == kinds_after_prefill(k, 2 * (k + 1) + 1)


@pytest.mark.parametrize("new_tokens", [1, 2, 7])
def test_n_new_tokens_take_n_minus_1_decode_steps(new_tokens: int) -> None:
    session, engine = open_session(PLAN)
    (row,) = session.generate([4, 2], new_tokens)
    assert row.dtype == np.int64
    assert row.tolist() == continued([4, 2], new_tokens)
    assert len(engine.runs) == 1 + (new_tokens - 1)
    engine.forget()
    assert list(session.stream([4, 2], new_tokens)) == row.tolist()
    assert len(engine.runs) == 1 + (new_tokens - 1)


def test_k_per_request() -> None:
    session, engine = open_session(PLAN, k=3)
    for k in (1, 0, None, 5):
        engine.forget()
        list(session.stream([1], 9, k=k))
        assert engine.kinds[1:] == kinds_after_prefill(3 if k is None else k, 8)
    engine.forget()
    session.generate(RAGGED, 9, k=2)
    assert engine.kinds[1:] == kinds_after_prefill(2, 8)
    session.prefill(np.array([[1]]), k=0)
    assert session.next_step is REFRESH


def test_a_custom_schedule_chooses_kinds_and_sizes_the_caches() -> None:
    class Squares:
        def kind(self, step: int, last: object) -> StepKind:
            return REFRESH if step in (1, 4, 9) else LORA

        def most_refreshes(self, steps: int) -> int:
            return sum(step <= steps for step in (1, 4, 9))

    session, engine = open_session(PLAN, schedule=Squares())
    session.generate([5, 6], 9)  # 8 decode steps, 2 refreshes
    assert engine.kinds[1:] == [REFRESH, LORA, LORA, REFRESH, LORA, LORA, LORA, LORA]
    assert engine.bindings[0].inputs["past_key.0"].shape[2] == 2 + 8
    assert engine.bindings[0].inputs["past_key.3"].shape[2] == 2 + 2
    engine.forget()
    session.generate([5, 6], 9, k=0)
    assert engine.kinds == [REFRESH] * 9
    session, engine = open_session(PLAN, k=1)
    session.generate([5, 6], 9, k=Squares())  # of one request
    assert engine.kinds[1:] == [REFRESH, LORA, LORA, REFRESH, LORA, LORA, LORA, LORA]


# ── tokens, lengths and slots ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", WINDOWS)
def test_what_the_engine_sees_at_every_step(k: int, plan: DropPlan) -> None:
    """Ids, len_kept = all tokens, len_dropped = prompt + refreshes, per row of a ragged batch."""
    count = 2 * (k + 1) + 2
    session, engine = open_session(plan, k=k)
    rows = session.generate(RAGGED, count)
    expected = [continued(prompt, count) for prompt in RAGGED]
    assert [row.tolist() for row in rows] == expected
    lengths = np.array([5, 1, 3])
    refreshes = 0
    for j, run in enumerate(engine.runs):
        if j == 0:
            for row, prompt in enumerate(RAGGED):
                assert run.input_ids[row, : len(prompt)].tolist() == prompt
            assert run.len_kept.tolist() == [0, 0, 0]
        else:
            assert run.input_ids.tolist() == [[tokens[j - 1]] for tokens in expected]
            assert run.len_kept.tolist() == (lengths + j - 1).tolist()
        if run.kind is REFRESH:
            assert run.logits_index.tolist() == ([[4], [0], [2]] if j == 0 else [[0], [0], [0]])
            if plan.dropped_layers:
                assert run.len_dropped.tolist() == ([0, 0, 0] if j == 0 else (lengths + refreshes).tolist())
            refreshes += j > 0
        else:
            assert run.len_dropped is None
            assert run.logits_index is None


@pytest.mark.parametrize("k", WINDOWS)
def test_caches_hold_what_each_layer_has_seen(k: int) -> None:
    """A kept layer every token, a dropped one the prompt and the refreshes' tokens, without gaps."""
    count = 2 * (k + 1) + 2
    session, engine = open_session(PLAN, k=k)
    session.generate(RAGGED, count)
    caches = engine.bindings[-1].inputs | engine.bindings[0].inputs
    for row, prompt in enumerate(RAGGED):
        tokens = continued(prompt, count)[:-1]  # the last one is never fed
        seen = prompt + tokens
        seen_by_dropped = prompt + [t for j, t in enumerate(tokens, 1) if j % (k + 1) == 0]
        for layer in range(6):
            expected = seen_by_dropped if layer in (3, 4) else seen
            for part in ("key", "value"):
                assert slots(caches[f"past_{part}.{layer}"], row, len(expected)) == expected


@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize(
    "ends",
    [(12, 12, 12), (0, 12, 12), (12, 0, 5), (1, 2, 3), (4, 12, 0), (3, 3, 3), (0, 0, 0), (0, 0, 12), (7, 4, 8)],
    ids=str,
)
def test_finished_rows_do_not_advance(k: int, ends: tuple[int, ...]) -> None:
    """Row i stops at its token number `ends[i]` (12: never). The engine itself refuses to write past a capacity."""
    stop, count = 9, 12
    script = [[stop if j == ends[row] else 20 + 10 * row + j % 10 for row in range(3)] for j in range(count)]
    engine = FakeEngine(PLAN, script)
    session, _ = open_session(PLAN, k=k, engine=engine)
    rows = session.generate(RAGGED, count, stop_token_ids=[stop])
    assert [row.tolist() for row in rows] == [[script[j][row] for j in range(ends[row])] for row in range(3)]
    # A run per token until all rows have stopped, and no step whose token nobody wants.
    assert len(engine.runs) == min(max(ends) + 1, count)
    for j, run in enumerate(engine.runs[1:], 1):
        for row, prompt in enumerate(RAGGED):
            fed = min(j - 1, ends[row])  # tokens of this row in the cache before step j
            assert run.len_kept[row] == len(prompt) + fed
            if run.kind is REFRESH:
                assert run.len_dropped[row] == len(prompt) + fed // (k + 1)
            if j <= ends[row]:
                assert run.input_ids[row, 0] == script[j - 1][row]


def test_capacities(plan: DropPlan) -> None:
    """Kept T_max + N − 1 slots, dropped T_max + ⌊(N − 1)/(k+1)⌋."""
    for k, new_tokens in itertools.product(WINDOWS, (1, 2, 4, 5, 21, 22)):
        session, engine = open_session(plan, k=k)
        session.generate(RAGGED, new_tokens)
        for binding in engine.bindings:
            for name, array in (binding.inputs | binding.outputs).items():
                if "_key." in name or "_value." in name:
                    dropped = int(name.split(".")[1]) in plan.dropped_layers
                    tokens = 5 + ((new_tokens - 1) // (k + 1) if dropped else new_tokens - 1)
                    assert array.shape == (3, 2, tokens, 4), (k, new_tokens, name)


def test_without_max_new_tokens_the_caches_have_room_for_what_the_bundle_allows() -> None:
    session, engine = open_session(PLAN, k=3, limits=Limits(max_seq_len=24, max_prompt_len=20, max_batch=2))
    session.prefill(np.array([[1, 2, 3]]))
    assert engine.bindings[0].inputs["past_key.0"].shape[2] == 23  # 21 new tokens take 20 steps
    assert engine.bindings[0].inputs["past_key.3"].shape[2] == 3 + 5
    for _ in range(20):
        session.step([1])
    with pytest.raises(InputError, match="full"):
        session.step([1])


@pytest.mark.parametrize("policy", ["skip", "backfill", "lossless"])
def test_a_step_inside_a_stream_is_refused(policy: str) -> None:
    """It would put a token between the stream's own; the stream goes on as if nothing had been asked."""
    session, _ = open_session(dataclasses.replace(PLAN, policy=policy), k=2)
    whole = list(session.stream([7, 3], 9))
    stream = session.stream([7, 3], 9)
    begun = [next(stream), next(stream)]
    with pytest.raises(InputError, match="A stream is reading"):
        session.step([5])
    assert begun + list(stream) == whole
    stream = session.stream([7, 3], 9)
    next(stream)
    session.prefill([[7, 3]], max_new_tokens=3)  # a request of one's own ends it
    session.step([5])
    with pytest.raises(InputError):
        list(stream)
    stream = session.stream([7, 3], 9)
    next(stream)
    stream.close()
    session.step([5])


@pytest.mark.parametrize("k", [0, 3])
def test_a_request_without_a_step_left_says_so(k: int) -> None:
    session, _ = open_session(PLAN, k=k)
    session.generate([[7, 3]], 4)
    for ask in (lambda: session.next_step, lambda: session.step([5])):
        with pytest.raises(InputError, match="caches are full"):
            ask()
