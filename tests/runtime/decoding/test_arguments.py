"""The Python interface takes whole numbers of any kind where it needs some, and refuses what is none before it runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import Batch, PeriodicSchedule, PlanError, SamplingOptions, Session, StepKind
from lora_drop_runtime.errors import InputError

from tests.support.decoding import PLAN, assert_refused
from tests.support.fake_engine import open_session

from .test_batch import fake_batch

NO_NUMBERS: tuple[Any, ...] = (3.0, "3", b"3", True, None, [3], {3}, 3 + 0j, Fraction(3), object(), np.float32(3))
NO_NUMBERS += (np.bool_(True), np.array([3, 4]), np.array(3.0), math.nan)
NO_NUMBERS += (type("bool_", (), {"__index__": lambda _: 1})(),)  # that of older numpy
NUMBERS: tuple[Any, ...] = (3, np.int8(3), np.uint64(3), np.int64(3), np.array(3))


def kind(value: object) -> str:
    """Names a case; an address in it would be another in each worker."""
    return type(value).__name__


@pytest.fixture
def session() -> Session:
    return open_session(PLAN)[0]


def requests(session: Session) -> dict[str, Callable[[Any], object]]:
    """What takes token ids."""
    return {
        "generate": lambda ids: session.generate(ids, 2),
        "stream": lambda ids: list(session.stream(ids, 2)),
        "prefill": lambda ids: session.prefill(ids, max_new_tokens=2),
    }


@pytest.mark.parametrize("method", ["generate", "stream", "prefill"])
@pytest.mark.parametrize(
    "ids",
    [
        "hi", b"hi", 5, None, 5.0, {5}, {5: 6}, object(), iter([5]), [5.0], [[5.0]], ["5"], [["5"]], [None], [True, 1],
        [[True]], [[[5]]], [[5], 6], [[5], [6.0]], [2**70], np.array([5.0]), np.array(["5"]), np.array([True]),
        np.array(5), np.zeros((1, 1, 1), np.int64), [np.array([[5]])], [[5], None], np.array([object()]),
    ],
    ids=kind,
)  # fmt: skip
def test_prompts_that_are_no_token_ids(session, method, ids) -> None:
    run = requests(session)[method]
    with pytest.raises(InputError) as caught:
        run(ids)
    assert caught.value.note
    assert caught.value.hint
    assert session.generate([5], 2)[0].size == 2  # nothing was harmed


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_prompts_of_any_whole_numbers(session, dtype) -> None:
    wanted = session.generate([5, 6, 7], 4)[0].tolist()
    for ids in (np.array([5, 6, 7], dtype), list(np.array([5, 6, 7], dtype)), (5, 6, 7), [np.array([5, 6, 7], dtype)]):
        assert session.generate(ids, 4)[0].tolist() == wanted
        assert list(session.stream(ids, 4)) == wanted
    session.prefill(np.array([[5, 6, 7]], dtype), np.array([3], dtype), max_new_tokens=4)
    assert session.step(np.array([wanted[0]], dtype)).argmax() == wanted[1]
    assert_refused(lambda: session.generate(np.array([2**63 + 5], np.uint64), 2), "outside the vocabulary")


@pytest.mark.parametrize("wrong", [*NO_NUMBERS[:4], *NO_NUMBERS[5:]], ids=kind)
def test_numbers_that_are_none(session, wrong) -> None:
    for call in (
        lambda: session.generate([5], wrong),
        lambda: list(session.stream([5], wrong)),
        lambda: session.prefill([[5]], max_new_tokens=wrong),
        lambda: session.warm_up(wrong),
        lambda: session.generate([5], 2, stop_token_ids=[wrong]),
    ):
        assert_refused(call, "has the wrong type", type(wrong).__name__)
    for name in ("top_k", "seed"):
        call = functools.partial(SamplingOptions, **{name: wrong})
        assert_refused(call, f"{name} must be a whole number", type(wrong).__name__)
    for plan_call in (
        functools.partial(PeriodicSchedule, wrong),
        lambda: session.generate([5], 2, k=wrong),
        lambda: session.prefill([[5]], k=wrong),
    ):
        assert_refused(plan_call, "k must be a whole number", error=PlanError)
    for step in () if isinstance(wrong, list | np.ndarray) else (wrong, [wrong], [[wrong]]):
        session.prefill([[5]], max_new_tokens=3)
        with pytest.raises(InputError, match=r"\nNote: .+\nHint: "):
            session.step(step)


@pytest.mark.parametrize("wrong", [10**5000, -(10**5000)], ids=["positive", "negative"])
def test_numbers_that_python_does_not_write(session, wrong) -> None:
    batch, _ = fake_batch()
    session.prefill([[5]], max_new_tokens=3)
    for call in (
        lambda: session.generate([5], wrong),
        lambda: session.generate([wrong], 2),
        lambda: session.generate([5], 2, stop_token_ids=[wrong]),
        lambda: session.prefill([[5]], max_new_tokens=wrong),
        lambda: session.prefill([[5]], [wrong]),
        lambda: session.step([wrong]),
        lambda: session.truncate(wrong),
        lambda: session.warm_up(wrong),
        lambda: batch.add([5], wrong),
        lambda: batch.add([5], 2, logprobs=wrong),
        lambda: batch.add([5], 2, policy=[wrong]),
        lambda: batch.cancel(wrong),
        lambda: fake_batch(slots=wrong),
        lambda: fake_batch(max_seq_len=wrong),
        lambda: fake_batch(join_early=wrong),
    ):
        with pytest.raises(InputError, match=r"\nNote: .+\nHint: "):
            call()


@pytest.mark.parametrize("three", NUMBERS, ids=kind)
def test_numbers_of_any_kind(session, three) -> None:
    wanted = session.generate([5], 3)[0].tolist()
    assert session.generate([5], three)[0].tolist() == wanted
    assert list(session.stream([5], three)) == wanted
    assert session.generate([5], three, k=three, sampling=SamplingOptions(top_k=three, seed=three))[0].size == 3
    assert PeriodicSchedule(three) == PeriodicSchedule(3)
    assert PeriodicSchedule(three).kind(np.int64(4)) is StepKind.REFRESH
    session.prefill([[5]], max_new_tokens=three)
    assert session.generate([5], 3, stop_token_ids=[three, wanted[2]])[0].tolist() == wanted[:2]
    assert session.generate([5], 3, stop_token_ids=np.array([wanted[1]]))[0].tolist() == wanted[:1]


@pytest.mark.parametrize("wrong", ["x", True, None, [1.0], 1j, np.array([1.0]), np.bool_(True)], ids=kind)
@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "repetition_penalty", "min_p", "presence_penalty", "frequency_penalty"]
)
def test_sampling_options_that_are_no_numbers(name, wrong) -> None:
    assert_refused(lambda: SamplingOptions(**{name: wrong}), f"option {name} must be a number", repr(wrong))


def test_sampling_options_of_numpy() -> None:
    options = SamplingOptions(np.float32(0.5), np.int32(3), np.float64(0.5), np.float16(1.5), np.uint8(3))
    assert open_session(PLAN)[0].generate([5], 3, sampling=options)[0].size == 3
    for name in ("temperature", "top_p", "repetition_penalty"):
        assert_refused(lambda name=name: SamplingOptions(**{name: math.nan}), "is not a number", "nan")


@pytest.mark.parametrize("wrong", [2, "2", b"2", 2.0, object(), iter([2])], ids=kind)
def test_stop_tokens_that_are_no_list(session, wrong) -> None:
    assert_refused(lambda: session.generate([5], 2, stop_token_ids=wrong), "list of stop tokens has the wrong type")


@pytest.mark.parametrize("wrong", [5, 5.0, True, ["cpu"], {"a": 1}, b"cpu", object()], ids=kind)
def test_what_is_chosen_by_name(wrong) -> None:
    for name in ("policy", "target", "provider"):
        assert_refused(lambda name=name: Session.open("/nowhere", **{name: wrong}), f"The {name} has the wrong type")
    assert_refused(lambda: Session.open(wrong) if not isinstance(wrong, bytes) else Session.open(5), "wrong type")
    session = open_session(PLAN)[0]
    assert_refused(lambda: Session(session.bundle, session._engine, session.schedule, wrong), "policy has the wrong")
    assert_refused(lambda: session.generate([5], 2, sampling=wrong), "sampling has the wrong type")
    assert_refused(lambda: session.load_adapters(wrong), "directory of adapters has the wrong type")


@pytest.mark.parametrize("wrong", [5, ["margin"], b"margin", np.array([5, 6]), np.array([])], ids=kind)
def test_a_rows_schedule_that_is_no_name(wrong) -> None:
    batch, _ = fake_batch()
    assert_refused(lambda: batch.add([5], 2, schedule=wrong), "schedule has the wrong type")


@pytest.mark.parametrize("wrong", ["false", 1, None, [], np.array([]), np.array([5, 6])], ids=kind)
def test_a_check_that_is_no_truth_value(wrong) -> None:
    for cls in (Session, Batch):
        assert_refused(lambda cls=cls: cls.open("/nowhere", check=wrong), "option check has the wrong type")


@pytest.mark.parametrize("rows", [9, 2**40, 2**70, np.uint64(2**63)])
def test_more_rows_to_warm_up_than_the_bundle_allows(session, rows) -> None:
    assert_refused(lambda: session.warm_up(rows), "batch is larger than the bundle allows", f"has {rows} rows")


def test_steps_of_a_wrong_shape(session) -> None:
    session.prefill([[5], [6]], max_new_tokens=4)
    for wrong in ([], [5], [5, 6, 7], [[5, 6]], [[5], [6]], np.int64(5), 5):
        with pytest.raises(InputError, match="another batch"):
            session.step(wrong)
    assert session.step([5, 6]).shape[0] == 2


def test_lengths_of_a_wrong_kind(session) -> None:
    for wrong in ([1.0, 1.0], ["1", "1"], [True, True], [[1], [1, 2]], object(), "11"):
        with pytest.raises(InputError, match=r"\nNote: .+\nHint: "):
            session.prefill([[5, 5], [6, 6]], wrong)
    for wrong in ([], [1], [[1, 1]], 1, [0, 1], [3, 1], [-1, 1]):
        with pytest.raises(InputError, match=r"\nNote: .+\nHint: "):
            session.prefill([[5, 5], [6, 6]], wrong)


def test_a_closed_session(session) -> None:
    stream = session.stream([5], 9)
    next(stream)
    session.close()
    for call in (
        lambda: session.generate([5], 2),
        lambda: list(session.stream([5], 2)),
        lambda: next(stream),
        lambda: session.prefill([[5]]),
        lambda: session.step([5]),
        lambda: session.next_step,
        lambda: session.engine_notes(),
        lambda: session.load_adapters("adapters"),
        lambda: session.warm_up(),
    ):
        assert_refused(call, "session is closed")
