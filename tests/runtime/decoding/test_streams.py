"""Where a request ends: stop tokens, closed streams, Ctrl-C, and a request after it."""

from __future__ import annotations

import itertools
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.decoding.request import PREFILL_CHUNK
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError

from tests.support.decoding import (
    PLAN,
    RAGGED,
    RECURRENT,
    REFRESH,
    assert_refused,
    continued,
    kinds_after_prefill,
    padded,
    slots,
)
from tests.support.fake_engine import FakeEngine, open_session

# ── stopping ───────────────────────────────────────────────────────────────────────────────────────────────────


def scripted(tokens: list[int], **manifest: object) -> tuple[Session, FakeEngine]:
    return open_session(PLAN, engine=FakeEngine(PLAN, [[token] for token in tokens]), **manifest)


def test_stop_tokens_of_the_model() -> None:
    for eos, expected in (((), [5, 6, 7, 8]), ((7,), [5, 6]), ((8, 6), [5]), ((5,), [])):
        session, engine = scripted([5, 6, 7, 8], eos=eos)
        assert list(session.stream([1], 4)) == expected
        assert len(engine.runs) == min(len(expected) + 1, 4)  # the run that made the stop token is the last
        session, _ = scripted([5, 6, 7, 8], eos=eos)
        assert [row.tolist() for row in session.generate([1], 4)] == [expected]


def test_given_stop_tokens_replace_the_models() -> None:
    for given, expected in (((), [5, 6, 7, 8]), ([7], [5, 6]), ((8, 30), [5, 6, 7]), (None, [5])):
        session, _ = scripted([5, 6, 7, 8], eos=(6,))
        assert list(session.stream([1], 4, stop_token_ids=given)) == expected


def test_token_0_of_finished_rows_is_no_output() -> None:
    """Finished rows are fed token 0; it must not come out, nor count as a stop."""
    script = [[9, 0], [0, 0], [0, 0], [0, 9]]
    session, _ = open_session(PLAN, engine=FakeEngine(PLAN, script))
    assert [row.tolist() for row in session.generate([[1], [2]], 9, stop_token_ids=[9])] == [[], [0, 0, 0]]


def test_a_stop_token_in_a_prompt_is_an_ordinary_token() -> None:
    session, engine = scripted([5, 6], eos=(7,))
    assert list(session.stream([7, 1, 7], 2)) == [5, 6]
    assert engine.runs[0].input_ids.tolist() == [[7, 1, 7]]


def test_sampling_options_reach_the_sampler() -> None:
    """Token 5 comes first and would come again; a penalty above 1 makes another token likeliest."""
    engine = FakeEngine(PLAN, [[5]] * 3)
    session, _ = open_session(PLAN, engine=engine)
    assert list(session.stream([1], 3)) == [5, 5, 5]
    engine.forget()
    options = SamplingOptions(temperature=5.0, seed=3)
    drawn = [row.tolist() for row in session.generate([1], 3, sampling=options)]
    engine.forget()
    assert drawn == [list(session.stream([1], 3, sampling=options))]
    assert drawn != [[5, 5, 5]]


# ── cancelling ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("taken", range(6))
def test_closing_a_stream_cancels(taken: int) -> None:
    session, engine = open_session(RECURRENT, k=2)
    stream = session.stream([4, 2], 40)
    assert list(islice(stream, taken)) == continued([4, 2], taken)
    stream.close()
    assert len(engine.runs) == taken  # nothing runs ahead
    assert list(stream) == []
    engine.forget()
    assert [row.tolist() for row in session.generate(RAGGED, 8)] == [continued(prompt, 8) for prompt in RAGGED]
    assert engine.kinds == [REFRESH, *kinds_after_prefill(2, 7)]


@pytest.mark.parametrize("number", range(1, 8))
def test_the_session_is_usable_after_ctrl_c(number: int) -> None:
    """Ctrl-C in the prefill, in LoRA steps of either side, in refreshes."""
    engine = FakeEngine(RECURRENT, interrupt_at=number)
    session, _ = open_session(RECURRENT, k=2, engine=engine)
    stream = session.stream([4, 2], 40)
    taken = []
    with pytest.raises(KeyboardInterrupt):
        taken.extend(stream)
    assert list(stream) == []
    engine.forget()
    engine.interrupt_at = None
    assert list(session.stream([4, 2], 9)) == continued([4, 2], 9)
    assert engine.kinds == [REFRESH, *kinds_after_prefill(2, 8)]
    assert engine.runs[0].len_kept.tolist() == [0]


@pytest.mark.parametrize("chunks", [1, 3])
def test_ctrl_c_in_the_prefill_leaves_no_half_request(chunks: int) -> None:
    engine = FakeEngine(PLAN, interrupt_at=chunks)
    session, _ = open_session(PLAN, engine=engine)
    prompt = [1] * (5 if chunks == 1 else 3 * PREFILL_CHUNK)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(np.array([prompt]))
    with pytest.raises(InputError, match="no running request"):
        session.step([1])


class InALine:
    """Raises KeyboardInterrupt in the `left`-th line that is run in the modules of a session."""

    FILES = tuple(f"/decoding/{name}.py" for name in ("session", "request", "slots", "cycle"))

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.replace("\\", "/").endswith(self.FILES):
            return None
        self.left -= event == "line"
        if event == "line" and not self.left:
            raise KeyboardInterrupt
        return self


def _step_interrupted(session: Session, step: int, line: int) -> bool:
    """Run it up to a line; returns whether it has fewer."""
    tracing, interrupt = sys.gettrace(), InALine(line)
    sys.settrace(interrupt)
    try:
        session.step([step] * 3)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracing)
    return interrupt.left > 0


@pytest.mark.parametrize("at", [1, 3])  # a LoRA step and a refresh
def test_a_step_that_is_interrupted_anywhere_is_repeated_or_refused(at: int) -> None:
    """No request goes on from caches and lengths that disagree, or from the state behind a step that is repeated."""
    refused = 0
    for line in itertools.count(1):
        session, engine = open_session(RECURRENT, k=2)
        session.prefill(*padded(RAGGED), max_new_tokens=9)
        for step in range(1, at):
            session.step([step] * 3)
        if _step_interrupted(session, at, line):
            break
        assert session._request is not None
        if session._request.is_torn:
            refused += 1
            with pytest.raises(InputError, match="interrupted as a step was counted"):
                session.step([at] * 3)
            assert session.generate([4, 2], 3, reuse_prefix=True)[0].tolist() == continued([4, 2], 3)
            continue
        for step in range(at + (session._request.steps_done == at), 9):
            session.step([step] * 3)
        assert slots(engine.runs[0].binding.inputs["past_key.0"], 1, 9) == [5, *range(1, 9)]
        assert slots(engine.runs[0].binding.inputs["past_key.3"], 1, 3) == [5, 3, 6]
        if len(engine.runs) > 9:
            first, again = engine.runs[at : at + 2]
            assert all((again.past_states[name] == state).all() for name, state in first.past_states.items())
    assert line > 100
    assert refused > 10


@pytest.mark.parametrize("number", range(2, 8))
def test_an_interrupted_step_can_be_repeated(number: int) -> None:
    """Nothing is counted before the engine has run, so the same step runs again on the same state."""
    engine = FakeEngine(RECURRENT, interrupt_at=number)
    session, _ = open_session(RECURRENT, k=2, engine=engine)
    session.prefill(*padded(RAGGED), max_new_tokens=9)
    for step in range(1, 9):
        kind = session.next_step
        try:
            session.step([step] * 3)
        except KeyboardInterrupt:
            assert session.next_step is kind
            session.step([step] * 3)
            again, first = engine.runs[-1], engine.runs[-2]
            assert again.kind is first.kind is kind
            assert again.len_kept.tolist() == first.len_kept.tolist()
            assert all((again.past_states[name] == state).all() for name, state in first.past_states.items())
    assert len(engine.runs) == 10
    assert slots(engine.runs[0].binding.inputs["past_key.0"], 1, 9) == [5, *range(1, 9)]
    assert slots(engine.runs[0].binding.inputs["past_key.3"], 1, 3) == [5, 3, 6]


def test_a_new_request_ends_an_open_stream() -> None:
    """Its next step would run on the other request's caches."""
    session, engine = open_session(PLAN)
    first = session.stream([4, 2], 9)
    assert next(first) == continued([4, 2], 1)[0]
    second = session.stream([1, 2, 3], 9)
    tokens = [next(second)]
    runs = len(engine.runs)
    assert_refused(lambda: next(first), "over")
    assert len(engine.runs) == runs
    tokens += second
    assert tokens == continued([1, 2, 3], 9)
