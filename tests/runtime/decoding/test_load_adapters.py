"""What becomes of the running request when adapters are replaced, or cannot be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import BundleError, InputError, PlanError, Session
from lora_drop_runtime.plan.drop_plan import DropPlan
from safetensors.numpy import save_file

from tests.support.fake_engine import HIDDEN, FakeEngine, next_token, open_session

PLAN = DropPlan(num_layers=6, sites=(3, 4), rank=2)


class FullEngine(FakeEngine):
    def replace_adapters(self, weights: Mapping[str, Any]) -> None:
        raise BundleError("The engine is full.", note="It holds 1 of 1.", hint="Empty it.")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    a, b = np.ones((2, HIDDEN), np.float32), np.ones((HIDDEN, 2), np.float32)
    save_file(
        {f"model.layers.{i}.lora_{part}.weight": x for i in (3, 4) for part, x in (("A", a), ("B", b))},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    return tmp_path


def over(stream: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        next(stream)
    assert caught.value.fact == "The request of this stream is over."
    assert caught.value.hint
    return caught.value


def test_an_open_stream_hears_that_the_adapters_were_replaced(adapters: Path) -> None:
    session, engine = open_session(PLAN)
    stream = session.stream([4, 2], 9)
    next(stream)
    session.load_adapters(adapters)
    runs = len(engine.runs)
    error = over(stream)
    assert "adapters were replaced while it ran" in error.note
    assert "prefill" not in str(error)
    assert len(engine.runs) == runs
    with pytest.raises(StopIteration):
        next(stream)


def test_an_open_stream_hears_of_a_failure(adapters: Path) -> None:
    """The request is over before the engine is asked, since both would hold memory; the session works on."""
    session, _ = open_session(PLAN, engine=FullEngine(PLAN))
    stream = session.stream([4, 2], 9)
    next(stream)
    with pytest.raises(BundleError, match="full"):
        session.load_adapters(adapters)
    assert "which failed" in over(stream).note
    assert list(session.stream([4, 2], 1)) == [next_token(2, 1)]


def test_a_stream_hears_of_what_came_last(adapters: Path) -> None:
    session, _ = open_session(PLAN)
    first = session.stream([4, 2], 9)
    next(first)
    session.load_adapters(adapters)
    second = session.stream([4, 2], 9)
    next(second)
    assert "another one has begun" in over(first).note
    assert len(list(second)) == 8


def test_adapters_that_do_not_fit_leave_the_request_alone(adapters: Path) -> None:
    (adapters / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 8}))
    session, _ = open_session(PLAN)
    stream = session.stream([4, 2], 9)
    next(stream)
    with pytest.raises(PlanError):
        session.load_adapters(adapters)
    assert len(list(stream)) == 8


def test_a_closed_session_says_so_to_a_stream() -> None:
    session: Session = open_session(PLAN)[0]
    stream = session.stream([4, 2], 9)
    next(stream)
    session.close()
    with pytest.raises(InputError, match="closed"):
        next(stream)
