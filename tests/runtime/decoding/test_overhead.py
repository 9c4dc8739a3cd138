"""The session's own work in a step, beside an engine that does nothing."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from lora_drop_runtime.plan.drop_plan import DropPlan

from tests.support.fake_engine import IdleEngine, open_session

DEEP = DropPlan(num_layers=30, drop_layers=tuple(range(3, 29, 2)))


@pytest.mark.parametrize(
    "plan", [DEEP, dataclasses.replace(DEEP, surrogate="recurrent", rank=16)], ids=["residual", "recurrent"]
)
def test_a_step_costs_at_most_100_us_of_python(plan: DropPlan, record_property) -> None:
    """Beside an engine whose runs do nothing; the median, since other processes run too."""
    session, _ = open_session(plan, engine=IdleEngine(plan), vocab_size=1000)

    def median_us(next_one) -> float:
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            next_one()
            times.append(time.perf_counter() - begin)
        return 1e6 * sorted(times)[150]

    stream = session.stream([1, 2, 3], 302)
    next(stream)
    streamed = median_us(lambda: next(stream))
    session.prefill(np.array([[1, 2, 3]]), max_new_tokens=302)
    token = np.array([5])
    stepped = median_us(lambda: session.step(token))
    record_property("stream_us", streamed)
    record_property("step_us", stepped)
    print(f"stream {streamed:.1f} µs, step {stepped:.1f} µs")
    assert streamed < 100
    assert stepped < 100
