"""The session's own work in a step, counted; `python -m tests.overhead` prints the time that it takes."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.plan.drop_plan import DropPlan

from tests.support.fake_engine import IdleEngine, open_session

DEEP = DropPlan(num_layers=30, sites=tuple(range(3, 29, 2)))
SHALLOW = DropPlan(num_layers=6, sites=(3,))
MOST_LINES, MOST_CALLS = 200, 100  # half as many again as a streamed step has


@dataclasses.dataclass(frozen=True)
class Work:
    """Lines of Python that ran, and calls of functions, those written in C included."""

    lines: int
    calls: int


def work(call: Callable[[], Any]) -> Work:
    """What one call costs, on whatever machine; coverage or a debugger is put back afterwards."""
    lines = calls = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.gettrace(), sys.getprofile()
    gc.disable()  # whatever it would finalize is not of this call
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
        gc.enable()
    return Work(lines, calls)


def work_of_steps(plan: DropPlan, streamed: bool) -> list[Work]:
    """Of two whole cycles, after the first steps of either kind and side have been prepared."""
    session, _ = open_session(plan, engine=IdleEngine(plan), k=3, vocab_size=1000)
    if streamed:
        stream = session.stream([1, 2, 3], 30)
        next(stream)
        one = lambda: next(stream)  # noqa: E731
    else:
        session.prefill(np.array([[1, 2, 3]]), max_new_tokens=30)
        token = np.array([5])
        one = lambda: session.step(token)  # noqa: E731
    for _ in range(8):
        one()
    return [work(one) for _ in range(8)]


@pytest.mark.parametrize("streamed", [False, True], ids=["step", "stream"])
@pytest.mark.parametrize("changes", [{}, {"surrogate": "recurrent", "rank": 16}], ids=["residual", "recurrent"])
def test_a_step_costs_the_same_little_python_whatever_the_depth(changes: dict[str, Any], streamed: bool) -> None:
    """Beside an engine whose runs do nothing: a loop over layers, or bindings made anew, would show at once."""
    deep, shallow = (work_of_steps(dataclasses.replace(plan, **changes), streamed) for plan in (DEEP, SHALLOW))
    assert deep == shallow
    assert deep[:4] == deep[4:]  # nor does it grow from one cycle to the next
    assert max(one.lines for one in deep) <= MOST_LINES
    assert max(one.calls for one in deep) <= MOST_CALLS
