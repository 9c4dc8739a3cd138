"""When a step is captured as a CUDA graph, when it is launched again, and what happens where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.trt import engine as engine_trt
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.engines.trt.step import EngineStep
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.support import fake_trt
from tests.support.device_steps import FORCED, RAGGED, assert_close, ort_steps, padded, steps
from tests.support.fake_cuda import FakeCuda, cudaError_t
from tests.support.fake_trt import TARGET, FakeTrt, open_device_session


@pytest.mark.parametrize(("name", "graphs"), [("residual", 2), ("recurrent", 3), ("recurrent, rank 0", 2)])
def test_one_graph_per_step_kind_batch_and_side_of_the_state(bundles, name: str, graphs: int) -> None:
    session, engine, cuda = open_device_session(bundles(name))
    with session:
        trt = engine._plans._trt
        session.generate(RAGGED, 12, k=2)
        assert engine.captures == len(cuda.executables) == graphs
        made = trt.contexts_made, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]
        plain = cuda.calls["cudaMemcpyAsync"]
        session.generate(RAGGED, 12, k=2)  # the second request of the same batch: nothing new
        assert engine.captures == graphs
        assert (trt.contexts_made, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]) == made
        # Only the prefill's chunks copied outside of a graph: ids, two lengths, index; and the token back
        assert cuda.calls["cudaMemcpyAsync"] == plain + 3 * 5
        session.generate(RAGGED[:2], 12, k=2)  # a smaller batch in the same memory
        assert engine.captures == 2 * graphs
        assert cuda.calls["cudaMalloc"] == made[1]
        session.generate(RAGGED, 12, k=2)
        session.generate(RAGGED[:2], 12, k=2)
        assert engine.captures == len(cuda.executables) == 2 * graphs
        assert not cuda.graphs


def test_a_larger_batch_replaces_buffers_and_drops_the_graphs_that_hold_them(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate(RAGGED[:1], 12, k=2)
        assert len(cuda.executables) == 3
        blocks = len(cuda.blocks)
        session.generate(RAGGED, 12, k=2)
        assert engine.captures == 6
        assert len(cuda.executables) == 3
        assert len(cuda.blocks) == blocks
        session.generate(RAGGED[:1], 12, k=2)
        assert engine.captures == 9
        assert len(cuda.executables) == 6


def test_steps_that_are_captured_again_amid_a_request_are_found_by_the_next(bundles) -> None:
    """More rows that verify drafts want more logits: that drops the graphs of steps which the request still runs."""
    session, engine, cuda = open_device_session(bundles("recurrent"), policy="lossless")
    with session:
        for rows in (1, 2, 3):
            session.generate([[7, 3, 11], [5], [23, 29, 31]][:rows], 20, k=3, stop_token_ids=())
            held = sum(step._graph is not None for step in engine._steps.values())
            assert held == len(cuda.executables) > 0
    assert not cuda.live


def test_prompts_of_any_length_leave_the_graphs_alone(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate([[1]], 12, k=2)
        captures, mallocs = engine.captures, cuda.calls["cudaMalloc"]
        for length in (2, 4, 5, 17, 40):
            session.generate([[1] * length], 12, k=2)
        assert (engine.captures, cuda.calls["cudaMalloc"]) == (captures, mallocs)


@pytest.mark.parametrize(("name", "k"), [("residual", 3), ("recurrent", 2), ("recurrent", 1), ("residual", 0)])
def test_after_a_warm_up_nothing_is_captured_or_allocated(bundles, name: str, k: int) -> None:
    session, engine, cuda = open_device_session(bundles(name))
    with session:
        session.schedule = PeriodicSchedule(k)
        session.warm_up()
        made = engine.captures, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]
        assert engine.captures
        assert session.kv_bytes()["allocated"] == 0
        session.generate(RAGGED[:1], 12)
        assert (engine.captures, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]) == made


def test_open_warms_up(bundle: Bundle, monkeypatch) -> None:
    """Through `Session.open`; a warm-up that fails leaves nothing open."""
    opened = []

    def open_engine(opened_bundle: Bundle, target: str) -> Any:
        _, engine, cuda = open_device_session(opened_bundle)
        opened.append((engine, cuda))
        return engine

    monkeypatch.setattr(engine_trt, "TrtEngine", open_engine)
    with Session.open(bundle.root, target=TARGET, k=2) as session:
        assert session.schedule == PeriodicSchedule(2)
        assert opened[0][0].captures == 3
    monkeypatch.setattr(Session, "step", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        Session.open(bundle.root, target=TARGET)
    assert not opened[1][1].blocks


def test_what_a_context_has_run_or_says_decides_on_capture(bundle: Bundle) -> None:
    """Without CUDA graphs the same tokens, and the reason is on record."""
    session, engine, _ = open_device_session(bundle)
    with session:
        expected = steps(session)
        assert engine.capture_note == ""
    cuda = FakeCuda()
    session, engine, _ = open_device_session(bundle, cuda=cuda, trt=FakeTrt(cuda, capturable=False))
    with session:
        assert_close(steps(session), expected)
        assert "cannot be captured" in engine.capture_note
        assert engine.captures == 0
        assert cuda.calls["cudaStreamBeginCapture"] == 0
    cuda = FakeCuda()
    cuda.fail["cudaGraphInstantiate"] = cudaError_t.cudaErrorInvalidValue
    session, engine, _ = open_device_session(bundle, cuda=cuda)
    with session:
        assert_close(steps(session), expected)
        assert "cudaGraphInstantiate: cudaErrorInvalidValue" in engine.capture_note
        assert cuda.calls["cudaStreamBeginCapture"] == 2  # each step tries once
        assert not cuda.graphs
    assert not cuda.live


def test_a_capture_that_fails_in_tensorrt_ends_the_capture(bundle: Bundle, monkeypatch) -> None:
    session, engine, cuda = open_device_session(bundle)
    execute = fake_trt.FakeExecutionContext.execute_async_v3

    def refusing(self: Any, stream: int) -> bool:
        if self.cuda.captured is not None:
            return self._refuse("this layer cannot be captured")
        return execute(self, stream)

    with session:
        expected = steps(session)
        engine._drop_steps()
        monkeypatch.setattr(fake_trt.FakeExecutionContext, "execute_async_v3", refusing)
        assert_close(steps(session), expected)
        assert "this layer cannot be captured" in engine.capture_note
        assert cuda.captured is None
    assert not cuda.live


def test_enterprise_tensorrt_has_no_runtime_configuration(bundle: Bundle) -> None:
    cuda = FakeCuda()
    session, _, _ = open_device_session(bundle, cuda=cuda, trt=FakeTrt(cuda, rtx=False))
    with session:
        assert_close(steps(session, 1), ort_steps(bundle, 1))


@pytest.mark.parametrize("at", ["enqueue", "launch"])
def test_an_interrupted_step_can_be_repeated(bundle: Bundle, monkeypatch, at: str) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        expected = steps(session)
        session.prefill(*padded(RAGGED), max_new_tokens=len(FORCED) + 1)
        if at == "enqueue":
            engine._drop_steps()
            monkeypatch.setattr(EngineStep, "_enqueue", interrupting(EngineStep._enqueue))
        else:
            monkeypatch.setattr(CudaDevice, "launch", interrupting(CudaDevice.launch))
        for tokens, logits in zip(FORCED, expected[1:], strict=True):
            try:
                ours = session.step(tokens)
            except KeyboardInterrupt:
                assert not cuda.queue  # nothing is under way any more that reads what the host writes next
                ours = session.step(tokens)
            np.testing.assert_array_equal(ours, logits)


def interrupting(function: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C at the end of every second call."""
    calls = 0

    def call(*arguments: Any) -> None:
        nonlocal calls
        function(*arguments)
        calls += 1
        if calls % 2:
            raise KeyboardInterrupt

    return call
