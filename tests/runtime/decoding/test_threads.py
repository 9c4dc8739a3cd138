"""One session from two threads: the second gets our error, and the work of the first is unharmed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from lora_drop_runtime import Session
from lora_drop_runtime.errors import InputError

from tests.support.decoding import PLAN, assert_refused
from tests.support.fake_engine import FakeEngine, open_session

WANTED = open_session(PLAN)[0].generate([5, 6], 12)[0].tolist()
MINUTES = 600


class SlowEngine(FakeEngine):
    """In one of its runs it waits for the other thread."""

    def __init__(self, waits_in_run: int) -> None:
        super().__init__(PLAN)
        self.waits_in_run = waits_in_run
        self.is_inside, self.may_go_on = threading.Event(), threading.Event()

    def _run(self, binding) -> None:
        if len(self.runs) + 1 == self.waits_in_run:
            self.is_inside.set()
            assert self.may_go_on.wait(MINUTES)
        super()._run(binding)


def others(session: Session, stream) -> list[Callable[[], object]]:
    """All that would touch the engine."""
    return [
        lambda: session.generate([7], 3),
        lambda: session.prefill([[7]]),
        lambda: session.step([7]),
        lambda: session.next_step,
        lambda: next(session.stream([7], 3)),
        lambda: next(stream),
        lambda: stream.close(),
        lambda: session.warm_up(),
        lambda: session.close(),
    ]


@pytest.mark.parametrize("inside", [1, 4])
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_while_a_step_runs(method, inside) -> None:
    engine = SlowEngine(inside)
    session, _ = open_session(PLAN, engine=engine)
    stream = session.stream([5, 6], 12)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: list(stream) if method == "stream" else session.generate([5, 6], 12)[0].tolist())
        assert engine.is_inside.wait(MINUTES)
        try:
            for call in others(session, stream):
                assert_refused(call, "in use by another thread")
        finally:
            engine.may_go_on.set()
        assert first.result(MINUTES) == WANTED
        assert not engine.times_closed
        assert session.generate([5, 6], 12)[0].tolist() == WANTED  # now it is ours


def test_between_the_tokens_of_a_stream() -> None:
    """Another thread's request would end it."""
    session, _ = open_session(PLAN)
    stream = session.stream([5, 6], 12)
    tokens = [next(stream)]

    def other_thread() -> None:
        for call in (
            lambda: session.generate([7], 3),
            lambda: session.prefill([[7]]),
            lambda: next(session.stream([7], 3)),
        ):
            assert_refused(call, "in use by another thread")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(other_thread).result(MINUTES)
        tokens += stream
        assert tokens == WANTED
        assert pool.submit(session.generate, [5, 6], 12).result(MINUTES)[0].tolist() == WANTED  # it is at its end
        cancelled = session.stream([5, 6], 12)
        next(cancelled)
        cancelled.close()
        assert pool.submit(session.generate, [5, 6], 12).result(MINUTES)[0].tolist() == WANTED
        forgotten = session.stream([5, 6], 12)
        next(forgotten)
        del forgotten
        assert pool.submit(session.generate, [5, 6], 12).result(MINUTES)[0].tolist() == WANTED


def test_threads_that_take_turns_at_a_stream() -> None:
    """As a pool of them does that serves a generator."""
    session, _ = open_session(PLAN)
    stream = session.stream([5, 6], 12)
    tokens = []
    for _ in WANTED:
        with ThreadPoolExecutor(1) as pool:
            tokens.append(pool.submit(next, stream).result(MINUTES))
    assert tokens == WANTED


def test_a_stream_in_the_same_thread_is_ended_by_the_next_request() -> None:
    session, _ = open_session(PLAN)
    stream = session.stream([5, 6], 12)
    assert next(stream) == WANTED[0]
    assert session.generate([5, 6], 12)[0].tolist() == WANTED
    with pytest.raises(InputError, match="stream is over"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_two_threads_that_race() -> None:
    """Whoever comes second is refused or waits its turn; every result is whole."""
    session, _ = open_session(PLAN)
    refusals, results = [], []

    def ask() -> None:
        for _ in range(60):
            try:
                results.append(session.generate([5, 6], 12)[0].tolist())
            except InputError as error:
                refusals.append(error.fact)

    with ThreadPoolExecutor(4) as pool:
        for asked in [pool.submit(ask) for _ in range(4)]:
            asked.result(MINUTES)
    assert len(results) + len(refusals) == 240
    assert all(result == WANTED for result in results)
    assert set(refusals) <= {"The session is in use by another thread."}
