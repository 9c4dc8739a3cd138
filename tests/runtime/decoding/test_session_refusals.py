"""Requests that a session refuses, with both values, and without touching the one that runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.support.decoding import PLAN, assert_refused, continued
from tests.support.fake_engine import FakeEngine, next_token, open_session

LIMITS = Limits(max_seq_len=12, max_prompt_len=8, max_batch=2)
REFUSED_PROMPTS = {
    "no rows": ((np.zeros((0, 3), np.int64),), {}, "prompt is empty", "(0, 3)"),
    "no tokens": ((np.zeros((2, 0), np.int64),), {}, "prompt is empty", "(2, 0)"),
    "a row without batch": ((np.array([1, 2, 3]),), {}, "not one row of token ids each", "(3,)", "[batch, tokens]"),
    "three axes": ((np.ones((1, 1, 2), np.int64),), {}, "not one row of token ids each", "(1, 1, 2)"),
    "an empty row": ((np.ones((2, 3), np.int64), [3, 0]), {}, "A prompt is empty", "[3, 0]", "(2, 3)"),
    "a negative length": ((np.ones((2, 3), np.int64), [-1, 3]), {}, "A prompt is empty", "[-1, 3]", "(2, 3)"),
    "too large a length": ((np.ones((2, 3), np.int64), [3, 4]), {}, "lengths do not fit", "[3, 4]", "(2, 3)"),
    "too few lengths": ((np.ones((2, 3), np.int64), [3]), {}, "lengths do not fit", "[3]", "(2, 3)"),
    "lengths with two axes": ((np.ones((2, 3), np.int64), [[3], [3]]), {}, "lengths do not fit", "[[3], [3]]"),
    "a single length": ((np.ones((2, 3), np.int64), 3), {}, "lengths do not fit", "3", "(2, 3)"),
    "too many rows": ((np.ones((3, 3), np.int64),), {}, "batch is larger", "3 rows", "allows 2"),
    "too long a prompt": ((np.ones((1, 9), np.int64),), {}, "prompt is longer", "9 tokens", "allows 8"),
    "too long a sequence": ((np.ones((1, 8), np.int64),), {"max_new_tokens": 5}, "longer", "8 + 5", "allows 12"),
    "no new token": ((np.ones((1, 8), np.int64),), {"max_new_tokens": 0}, "nothing to generate", "is 0", "1"),
    "negative new tokens": ((np.ones((1, 8), np.int64),), {"max_new_tokens": -3}, "nothing to generate", "is -3", "1"),
    "a negative id": ((np.array([[1, -1]]),), {}, "outside the vocabulary", "-1", "0 to 49"),
    "an id past the vocabulary": ((np.array([[1, 2], [50, 3]]),), {}, "outside the vocabulary", "50", "0 to 49"),
    "a negative k": ((np.array([[1, 2]]),), {"k": -1}, "k is too small", "-1", "0"),
    "half a k": ((np.array([[1, 2]]),), {"k": 1.5}, "k must be", "1.5", "0"),
}


@pytest.mark.parametrize("case", REFUSED_PROMPTS.values(), ids=REFUSED_PROMPTS.keys())
def test_prefill_refuses(case: tuple) -> None:
    arguments, options, fact, *note = case
    session, engine = open_session(PLAN, limits=LIMITS)
    assert_refused(lambda: session.prefill(*arguments, **options), fact, *note)
    # A refusal changes nothing: a running request goes on.
    session.prefill(np.array([[4, 2]]), max_new_tokens=3)
    session.step([1])
    assert_refused(lambda: session.prefill(*arguments, **options), fact, *note)
    assert session.step([1]).argmax() == next_token(1, 3)
    assert len(engine.runs) == 3


def test_the_longest_request_is_served() -> None:
    session, _ = open_session(PLAN, limits=LIMITS)
    rows = session.generate([[1] * 8, [2]], 4)
    assert [row.tolist() for row in rows] == [continued([1] * 8, 4), continued([2], 4)]
    session, _ = open_session(PLAN, limits=Limits(max_seq_len=8, max_prompt_len=8, max_batch=1))
    assert_refused(lambda: session.prefill(np.ones((1, 8), np.int64)), "longer", "8 + 1", "allows 8")


def test_requests_refuse_what_prefill_refuses() -> None:
    session, engine = open_session(PLAN, limits=LIMITS)
    for prompts, count, fact in (
        ([], 3, "prompt is empty"),
        ([[]], 3, "prompt is empty"),
        ([[1], []], 3, "prompt is empty"),
        ([[1], [2], [3]], 3, "batch is larger"),
        ([1] * 9, 1, "prompt is longer"),
        ([1] * 8, 5, "longer than the bundle allows"),
        ([1, 50], 3, "outside the vocabulary"),
        ([1, 2], 0, "nothing to generate"),
        ([1, 2], -2, "nothing to generate"),
    ):
        assert_refused(lambda prompts=prompts, count=count: session.generate(prompts, count), fact)
        if len(prompts) != 3 and prompts != [[1], []]:
            assert_refused(lambda prompts=prompts, count=count: next(session.stream(prompts, count)), fact)
    biased = SamplingOptions(logit_bias={49: 1, 50: 1})
    for call in (session.generate, lambda *asked, **how: next(session.stream(*asked, **how))):
        words = "logit_bias names a token that the model does not have", "It is 50", "0 to 49"
        assert_refused(lambda call=call: call([1], 3, sampling=biased), *words)
    assert_refused(lambda: session.generate([1], 3, k=-1), "k is too small", error=PlanError)
    assert_refused(lambda: next(session.stream([[1], [2]], 3)), "one prompt", "2")
    assert not engine.runs


def test_step_refuses() -> None:
    session, engine = open_session(PLAN, limits=LIMITS)
    for call in (lambda: session.step([1, 2]), lambda: session.next_step):
        assert_refused(call, "no running request", "truncate and fork need one")
    session.prefill(np.array([[4, 2], [1, 1]]), max_new_tokens=3)
    for tokens, shape in (([1], "(1,)"), ([1, 2, 3], "(3,)"), ([[1], [2]], "(2, 1)"), (1, "()")):
        assert_refused(lambda tokens=tokens: session.step(tokens), "another batch", shape, "2 rows")
    for tokens, wrong in (([1, 50], "50"), ([-1, 2], "-1")):
        assert_refused(lambda tokens=tokens: session.step(tokens), "outside the vocabulary", wrong, "0 to 49")
    assert len(engine.runs) == 1
    session.step([1, 2])
    session.step(np.array([3, 4], np.int32))
    assert_refused(lambda: session.step([1, 2]), "caches are full", "longest row has 4 tokens")
    assert len(engine.runs) == 3
    session.prefill(np.array([[4, 2]]), max_new_tokens=1)
    assert_refused(lambda: session.step([1]), "caches are full", "longest row has 2 tokens")


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_what_decodes_is_not_pickled(copied: Callable[[object], object]) -> None:
    """Nor is a method of it, as a pool of processes would be given."""
    session, _ = open_session(PLAN)
    batch = Batch(session.bundle, FakeEngine(PLAN), PeriodicSchedule(3), slots=1)
    for one, word in ((session, "session"), (batch, "batch"), (session.generate, "session")):
        assert_refused(lambda one=one: copied(one), f"A {word} can be neither copied nor sent to another process")
    assert session.generate([1], 3)[0].tolist() == continued([1], 3)


def test_a_closed_session_refuses() -> None:
    session, _ = open_session(PLAN)
    stream = session.stream([1], 9)
    next(stream)
    session.close()
    for call in (
        lambda: session.prefill(np.array([[1]])),
        lambda: session.step([1]),
        lambda: session.next_step,
        lambda: session.generate([1], 3),
        lambda: next(session.stream([1], 3)),
    ):
        assert_refused(call, "session is closed")
    assert_refused(lambda: next(stream), "")
