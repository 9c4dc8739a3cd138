"""Prompts of any type and padding, and long ones in chunks."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
import pytest
from lora_drop_runtime.decoding.request import PREFILL_CHUNK
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.drop_plan import DropPlan

from tests.support.decoding import LORA, PLAN, RAGGED, RECURRENT, REFRESH, assert_refused, continued, padded, slots
from tests.support.fake_engine import HIDDEN, VOCAB, FakeEngine, open_session

# ── tokens, lengths and slots ──────────────────────────────────────────────────────────────────────────────────


def test_padding_beyond_the_longest_prompt_is_not_computed() -> None:
    """Caches are sized by the longest prompt, so a wider padding must not reach the engine."""
    session, engine = open_session(PLAN)
    for width in (5, 6, PREFILL_CHUNK, PREFILL_CHUNK + 1, 3 * PREFILL_CHUNK):
        engine.forget()
        session.prefill(*padded(RAGGED, width=width), max_new_tokens=1)
        assert [run.input_ids.shape for run in engine.runs] == [(3, 5)]


def test_padding_may_hold_anything_and_prompts_are_left_as_they_were() -> None:
    session, engine = open_session(PLAN)
    for fill in (-1, VOCAB, 10**9):
        ids, lengths = padded(RAGGED, fill)
        ids.flags.writeable = False
        before = ids.copy(), lengths.copy()
        logits = session.prefill(ids, lengths, max_new_tokens=3)
        assert logits.argmax(1).tolist() == [continued(prompt, 1)[0] for prompt in RAGGED]
        assert (engine.runs[-1].input_ids >= 0).all()
        assert (engine.runs[-1].input_ids < VOCAB).all()
        session.step([1, 2, 3])
        ids.flags.writeable = True  # and now without protection
        session.prefill(ids, lengths, max_new_tokens=3)
        assert (ids == before[0]).all()
        assert (lengths == before[1]).all()


def test_prompts_may_be_lists_or_arrays_of_any_integers() -> None:
    session, _ = open_session(PLAN)
    expected = [continued(prompt, 3) for prompt in RAGGED]
    for prompts in (RAGGED, [np.array(prompt, np.int32) for prompt in RAGGED], tuple(map(tuple, RAGGED))):
        assert [row.tolist() for row in session.generate(prompts, 3)] == expected
    one = continued([4, 8, 15], 3)
    for prompt in ([4, 8, 15], (4, 8, 15), np.array([4, 8, 15], np.uint8), np.array([[4, 8, 15]]), [[4, 8, 15]]):
        assert [row.tolist() for row in session.generate(prompt, 3)] == [one]
        assert list(session.stream(prompt, 3)) == one
    transposed = np.array([[4, 1], [8, 2], [15, 3]]).T
    assert session.prefill(transposed).argmax(1).tolist() == [one[0], continued([1, 2, 3], 1)[0]]


# ── long prompts ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_of_one_chunk_runs_at_once() -> None:
    session, engine = open_session(PLAN)
    session.generate([[1] * PREFILL_CHUNK, [2]], 2)
    assert [run.input_ids.shape for run in engine.runs] == [(2, PREFILL_CHUNK), (2, 1)]


@pytest.mark.parametrize("surrogate", ["residual", "recurrent", "anchor", "residual-delta"])
def test_long_prompts_go_row_by_row_in_chunks(surrogate: str) -> None:
    plan = dataclasses.replace(RECURRENT, surrogate=surrogate)
    session, engine = open_session(plan, k=1)
    lengths = [2 * PREFILL_CHUNK + 3, 5, PREFILL_CHUNK, PREFILL_CHUNK + 1, 1]
    prompts = [[(7 * i + row) % VOCAB for i in range(length)] for row, length in enumerate(lengths)]
    logits = session.prefill(*padded(prompts), max_new_tokens=6)
    assert logits.argmax(1).tolist() == [continued(prompt, 1)[0] for prompt in prompts]

    full = PREFILL_CHUNK
    expected = [(0, 0, 3), (0, 3, full), (3, 0, 1)]  # row, begin, count: chunks are counted from a row's end
    expected += [(0, full + 3, full), (1, 0, 5), (2, 0, full), (3, 1, full), (4, 0, 1)]
    assert engine.kinds == [REFRESH] * len(expected)
    last_run_of_row = {}
    for number, (run, (row, begin, count)) in enumerate(zip(engine.runs, expected, strict=True), 1):
        assert run.input_ids.tolist() == [prompts[row][begin : begin + count]]
        assert run.len_kept.tolist() == run.len_dropped.tolist() == [begin]
        assert run.logits_index.tolist() == [[count - 1]]
        last_run_of_row[row] = number
    # The steps after it take all rows, with their own lengths and the state of their own last chunk.
    session.step([1, 2, 3, 4, 5])
    session.step([6, 7, 8, 9, 10])
    lora, refresh = engine.runs[-2:]
    assert (lora.kind, refresh.kind) == (LORA, REFRESH)
    assert lora.len_kept.tolist() == lengths
    assert refresh.len_kept.tolist() == [length + 1 for length in lengths]
    assert refresh.len_dropped.tolist() == lengths
    assert refresh.logits_index.tolist() == [[0]] * 5
    assert len(lora.past_states) == {"residual": 0, "residual-delta": 1}.get(surrogate, 2)
    for state in lora.past_states.values():
        assert state.tolist() == [[last_run_of_row[row]] * HIDDEN for row in range(5)]
    for row, prompt in enumerate(prompts):
        for name, fed in (("past_key.0", [row + 1, row + 6]), ("past_value.4", [row + 6])):
            assert slots(refresh.binding.inputs[name], row, len(prompt) + len(fed)) == prompt + fed
    assert len({binding.address("past_key.0") for binding in engine.bindings[-2:]}) == 1


def test_a_long_prompt_alone() -> None:
    session, engine = open_session(RECURRENT, k=2)
    prompt = [i % VOCAB for i in range(PREFILL_CHUNK + 2)]
    assert list(session.stream(prompt, 7)) == continued(prompt, 7)
    assert engine.kinds == [REFRESH, REFRESH, LORA, LORA, REFRESH, LORA, LORA, REFRESH]


def test_long_prompts_of_an_engine_that_takes_rows_together(plan: DropPlan) -> None:
    """Chunks are counted from each row's end: the last run is every row's last, and leaves all logits and states."""
    engine = FakeEngine(plan)
    engine.batched_chunks, engine.prefill_chunk = True, 4
    session, _ = open_session(plan, k=1, engine=engine)
    lengths = [11, 1, 4, 5, 8]
    prompts = [[(7 * i + row) % VOCAB for i in range(length)] for row, length in enumerate(lengths)]
    logits = session.prefill(*padded(prompts), max_new_tokens=6)
    assert logits.argmax(1).tolist() == [continued(prompt, 1)[0] for prompt in prompts]
    assert [run.input_ids.shape for run in engine.runs] == [(5, 3), (5, 4), (5, 4)]
    for run, begins, counts in zip(
        engine.runs,
        ([0, 0, 0, 0, 0], [3, 0, 0, 0, 0], [7, 0, 0, 1, 4]),
        ([3, 0, 0, 0, 0], [4, 0, 0, 1, 4], [4, 1, 4, 4, 4]),
        strict=True,
    ):
        assert run.len_kept.tolist() == begins
        if plan.dropped_layers:
            assert run.len_dropped.tolist() == begins
        assert run.logits_index.tolist() == [[max(count - 1, 0)] for count in counts]
        for row, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            assert run.input_ids[row, :count].tolist() == prompts[row][begin : begin + count]
    session.step([1, 2, 3, 4, 5])
    session.step([6, 7, 8, 9, 10])
    lora, refresh = engine.runs[-2:]
    assert lora.len_kept.tolist() == lengths
    assert all((state == 3).all() for state in lora.past_states.values())
    for row, prompt in enumerate(prompts):
        assert slots(refresh.binding.inputs["past_key.0"], row, len(prompt) + 2) == [*prompt, row + 1, row + 6]


class ChoosingEngine(FakeEngine):
    """Its graphs have an output for the largest logit, which is NaN from run `broken_at` on."""

    target = "tensorrt-rtx"
    chooses_tokens = True
    broken_at = 10**9

    def read(self, buffer: np.ndarray) -> np.ndarray:
        raise AssertionError("greedy decoding read the logits")

    def _predict(self, run) -> None:
        super()._predict(run)
        tokens = run.binding.outputs["logits"].argmax(-1)
        run.binding.outputs["next_token"][...] = -1 if len(self.runs) >= self.broken_at else tokens


def test_an_engine_that_chooses_tokens() -> None:
    session, engine = open_session(RECURRENT, k=2, engine=ChoosingEngine(RECURRENT))
    rows = session.generate(RAGGED, 9)
    assert [row.tolist() for row in rows] == [continued(prompt, 9) for prompt in RAGGED]
    assert all("next_token" in binding.outputs for binding in engine.bindings)
    with pytest.raises(AssertionError, match="read the logits"):
        session.generate(RAGGED, 9, sampling=SamplingOptions(repetition_penalty=1.1))
    engine.forget()
    engine.broken_at = 4
    stream = session.stream([4, 2], 9)
    assert list(islice(stream, 3)) == continued([4, 2], 3)
    assert_refused(lambda: next(stream), "not numbers", "row 0", error=BundleError)
