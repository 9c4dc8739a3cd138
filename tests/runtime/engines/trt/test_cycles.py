"""Whole cycles on the device: the tokens of the step-by-step path, and what the host still has to do for them.

On a fake CUDA and a fake TensorRT, with the kernel that chooses tokens on the host (test_choose.py); on no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import BundleError, InputError, SamplingOptions, Session
from lora_drop_runtime.bundle.adapters import weight_shapes
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.trt import engine as trt_engine
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.engines.trt.cycle import DeviceCycle
from lora_drop_runtime.engines.trt.engine import TrtEngine
from lora_drop_runtime.plan.schedule import MarginSchedule, PeriodicSchedule

from tests.support.device_steps import LORA, RAGGED
from tests.support.fake_cuda import FakeCuda, cudaError_t
from tests.support.fake_trt import FakeCudaEngine, FakeTrt, open_device_session
from tests.support.kernel_build import chooser_on_host

WORK = ("cudaMemcpyAsync", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaGraphLaunch", "cuLaunchKernel")


@pytest.fixture
def pair(bundles: Callable[..., Bundle]) -> Iterator[Callable[..., tuple[Session, Session, TrtEngine, FakeCuda]]]:
    """Sessions of one bundle: step by step, and in cycles; with the engine and the GPU of the second."""
    opened: list[tuple[Session, FakeCuda]] = []

    def open_both(name: str, policy: str | None = None) -> tuple[Session, Session, TrtEngine, FakeCuda]:
        stepwise, _, cuda = open_device_session(bundles(name), policy=policy)
        opened.append((stepwise, cuda))
        cycles, engine, cuda = open_device_session(bundles(name), policy=policy, cycles=True)
        opened.append((cycles, cuda))
        return stepwise, cycles, engine, cuda

    yield open_both
    for session, cuda in opened:
        session.close()
        assert not cuda.live


def same(stepwise: Session, cycles: Session, prompts: list[list[int]], new_tokens: int, **options: Any) -> list[Any]:
    """What both generate, and what both have counted, which is the same."""
    theirs = [row.tolist() for row in stepwise.generate(prompts, new_tokens, **options)]
    assert [row.tolist() for row in cycles.generate(prompts, new_tokens, **options)] == theirs
    for name in ("kept", "dropped", "tokens"):
        assert getattr(cycles._request, name) == getattr(stepwise._request, name), name
    return theirs


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("recurrent", "skip"),
        ("recurrent", "backfill"),
        ("change", "backfill"),
        ("fill", "fill"),
        ("anchor, attn_mlp", "backfill"),
    ],
)
def test_tokens_are_those_of_single_steps(pair, name: str, policy: str) -> None:
    """Rows of any lengths, k, and numbers of tokens that end within a cycle; stops in its midst; and a step after."""
    stepwise, cycles, engine, _ = pair(name, policy)
    for prompts, new_tokens, k in ((RAGGED, 9, 3), (RAGGED[:1], 8, 2), (RAGGED[1:], 2, 3), (RAGGED, 7, 1)):
        same(stepwise, cycles, prompts, new_tokens, k=k, stop_token_ids=())
        assert engine.captures  # of the first request, whose cycle came twice
    for k in (3, 2):
        free = same(stepwise, cycles, RAGGED, 11, k=k, stop_token_ids=())
        stops = [free[0][4], free[1][5], 10**9]  # in the midst of the second cycle, in two rows
        rows = same(stepwise, cycles, RAGGED, 11, k=k, stop_token_ids=stops)
        assert len({len(row) for row in rows}) > 1
        same(stepwise, cycles, RAGGED[:1], 11, k=k, stop_token_ids=stops)
    same(stepwise, cycles, RAGGED[:2], 6, k=0, stop_token_ids=())
    same(stepwise, cycles, RAGGED[:2], 1, k=2, stop_token_ids=())
    assert engine.notes()[1:] == []


def test_single_steps_go_on_behind_cycles(pair) -> None:
    """The side of the state and the LoRA steps since the refresh are those of single steps."""
    stepwise, cycles, _, _ = pair("recurrent", "skip")
    for new_tokens in (2, 5, 6):  # a LoRA step; a refresh; a LoRA step behind one
        logits = []
        for session in (stepwise, cycles):
            rows = session.generate(RAGGED[:2], new_tokens, k=3, stop_token_ids=())
            session._request.max_steps += 1  # there are slots
            assert session.next_step is LORA
            logits.append(session.step([row[-1] for row in rows]).copy())
        np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_a_stream_that_is_closed_goes_on_in_full(pair, policy: str) -> None:
    """The device was ahead of what was told: what stays is what was told, as after `truncate`."""
    stepwise, cycles, _, cuda = pair("recurrent", policy)
    found = []
    for session in (stepwise, cycles):
        stream = session.stream(RAGGED[0], 20, k=3, stop_token_ids=())
        told = [next(stream) for _ in range(7)]
        stream.close()
        session.truncate(len(RAGGED[0]) + 6)
        found.append((told, session._request.kept, session.step(told[-1:]).copy(), session.step([5]).copy()))
    assert found[0][:2] == found[1][:2]
    for ours, theirs in zip(found[1][2:], found[0][2:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    stream = cycles.stream(RAGGED[0], 20, k=3, stop_token_ids=())
    next(stream), next(stream)
    same(stepwise, cycles, RAGGED, 9, k=3, stop_token_ids=())  # while the old one is under way
    with pytest.raises(InputError):
        next(stream)
    assert not cuda.queue


def test_a_stream_that_is_over_leaves_the_device_to_the_next(pair) -> None:
    """Asked for more where its next cycle would begin, while another stream's is under way."""
    stepwise, cycles, _, cuda = pair("recurrent", "skip")
    expected = stepwise.generate(RAGGED[2:], 14, k=3, stop_token_ids=())[0].tolist()
    first = cycles.stream(RAGGED[0], 20, k=3, stop_token_ids=())
    for _ in range(5):
        next(first)
    second = cycles.stream(RAGGED[2], 14, k=3, stop_token_ids=())
    told = [next(second)]
    launches = cuda.calls["cuLaunchKernel"], cuda.calls["cudaGraphLaunch"]
    with pytest.raises(InputError):
        next(first)
    assert launches == (cuda.calls["cuLaunchKernel"], cuda.calls["cudaGraphLaunch"])
    assert [*told, *second] == expected


@pytest.mark.parametrize("k", [1, 3])
def test_a_request_may_fill_every_slot(pair, k: int) -> None:
    """The last slot of kept layers, and of dropped ones; short rows that stop stand still within theirs."""
    stepwise, cycles, _, _ = pair("recurrent", "skip")
    prompt = [int(token) for token in np.random.default_rng(1).integers(0, 131, 40)]
    free = same(stepwise, cycles, [prompt, prompt[:3]], 24, k=k, stop_token_ids=())
    assert max(cycles._request.kept) == 63
    same(stepwise, cycles, [prompt, prompt[:3]], 24, k=k, stop_token_ids=[free[0][-1]])
    same(stepwise, cycles, [prompt, prompt[:3]], 24, k=k, stop_token_ids=[free[1][2]])


SAMPLING = [
    SamplingOptions(temperature=2.0, seed=1),
    SamplingOptions(temperature=3.0, top_k=9, top_p=0.8, repetition_penalty=1.3, seed=4),
    SamplingOptions(repetition_penalty=1.5),
]


def test_a_seed_means_the_same_tokens(pair) -> None:
    """As the host draws them, whatever rows stand beside; options change without another graph."""
    stepwise, cycles, engine, _ = pair("recurrent", "backfill")
    for options in SAMPLING:
        rows = same(stepwise, cycles, RAGGED, 12, k=3, sampling=options, stop_token_ids=())
        assert engine.captures == 1
        if options.temperature:
            assert rows[0] != same(stepwise, cycles, RAGGED, 12, k=3, stop_token_ids=())[0]
    alone = cycles.generate(RAGGED[:1], 12, k=3, sampling=SAMPLING[0], stop_token_ids=())[0]
    beside = cycles.generate(RAGGED, 12, k=3, sampling=SAMPLING[0], stop_token_ids=())[0]
    assert alone.tolist() == beside.tolist()


@pytest.mark.parametrize(
    "options",
    [{"min_p": 0.05}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.7}, {"logit_bias": {5: 2.0}}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_the_device_does_not_know_take_single_steps(
    pair, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokens of an engine that runs nothing else; min-p changes nothing for greedy."""
    stepwise, cycles, _, _ = pair("recurrent", "backfill")
    runs, run = [], DeviceCycle.run
    monkeypatch.setattr(DeviceCycle, "run", lambda self, count: (runs.append(count), run(self, count))[1])
    for temperature, in_cycles in ((2.0, False), (0.0, "min_p" in options)):
        sampling = SamplingOptions(temperature, seed=3, **options)
        same(stepwise, cycles, RAGGED, 9, k=3, sampling=sampling, stop_token_ids=())
        assert bool(runs) == in_cycles


@pytest.mark.parametrize("sampling", [None, SAMPLING[1]], ids=["greedy", "drawn"])
def test_what_the_host_does_for_a_cycle(pair, sampling: SamplingOptions | None) -> None:
    """One copy, one wait and one launch for the four tokens of a cycle; single steps do that for each token."""
    stepwise, cycles, engine, cuda = pair("recurrent", "skip")
    more = {}
    for session, gpu in ((stepwise, stepwise._engine._device._cuda), (cycles, cuda)):
        session.generate(RAGGED, 13, k=3, sampling=sampling, stop_token_ids=())
        counts = []
        for new_tokens in (13, 21):  # two cycles more, with longer lengths, by the same graph
            before = dict(gpu.calls)
            session.generate(RAGGED, new_tokens, k=3, sampling=sampling, stop_token_ids=())
            counts.append([gpu.calls[name] - before.get(name, 0) for name in WORK])
        more[session] = dict(zip(WORK, np.subtract(counts[1], counts[0]).tolist(), strict=True))
    assert more[cycles] == dict(zip(WORK, (2, 0, 2, 2, 0), strict=True))
    assert engine.captures == len(cuda.executables) == 1
    # A graph a step, which holds the copies of ids and lengths; and the logits where the host draws
    drawn = 8 * (sampling is not None)
    assert more[stepwise] == dict(zip(WORK, (drawn, 8 + drawn, 0, 8, 0), strict=True))


def test_the_host_reads_a_cycle_late(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next cycle is on the stream before the tokens of one are waited for."""
    _, cycles, _, _ = pair("recurrent", "skip")
    order: list[str] = []
    for name in ("run", "read"):
        method = getattr(DeviceCycle, name)

        def noted(self: Any, *arguments: Any, method: Any = method, name: str = name) -> Any:
            order.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(DeviceCycle, name, noted)
    cycles.generate(RAGGED[:1], 16, k=3, stop_token_ids=())
    assert order == ["run", "run", "read", "run", "read", "run", "read", "read"]


def test_one_graph_per_batch_and_cycle(pair) -> None:
    _, cycles, engine, cuda = pair("recurrent", "skip")
    for count, (prompts, k) in enumerate([(RAGGED, 3), (RAGGED[:2], 3), (RAGGED[:2], 2)], 1):
        cycles.generate(prompts, 12, k=k, stop_token_ids=())
        assert engine.captures == len(cuda.executables) == count
    for prompts, k in ((RAGGED, 3), (RAGGED[:2], 3), (RAGGED[:2], 2)):
        cycles.generate(prompts, 9, k=k, stop_token_ids=())
    assert engine.captures == 3


def test_after_a_warm_up_nothing_is_compiled_captured_or_allocated(pair) -> None:
    _, cycles, engine, cuda = pair("recurrent", "backfill")
    cycles.schedule = PeriodicSchedule(3)
    cycles.warm_up()
    made = engine.captures, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"], cuda.calls["cuModuleLoadData"]
    assert made[3] == 1
    cycles.generate(RAGGED[:1], 12, sampling=SAMPLING[0], stop_token_ids=())
    calls = cuda.calls
    now = engine.captures, calls["cudaMalloc"], calls["cudaHostRegister"], calls["cuModuleLoadData"]
    assert now == made


# ── what does not go on the device, and what goes wrong there ──────────────────────────────────────────────────


def test_what_needs_the_host_goes_step_by_step(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adaptive schedule, a refresh of more tokens than the engine takes at once; and no NVRTC, which is told."""
    stepwise, cycles, engine, _ = pair("recurrent", "backfill")
    monkeypatch.setattr(DeviceCycle, "run", lambda *_: pytest.fail("on the device"))
    same(stepwise, cycles, RAGGED, 7, k=MarginSchedule(2, 0.1), stop_token_ids=())
    same(stepwise, cycles, RAGGED, 12, k=5, stop_token_ids=())
    assert engine.prefill_chunk == 4
    assert engine.runs_cycles
    assert stepwise.engine_notes()[1:] == []
    stepwise.generate(RAGGED, 2, k=1)
    (note,) = stepwise.engine_notes()[1:]
    assert "every token goes through the host: NVRTC cannot be loaded" in note
    assert "pip install nvidia-cuda-nvrtc" in note


def test_logits_that_are_no_numbers(pair) -> None:
    _, cycles, engine, _ = pair("residual", "skip")
    plan = cycles.bundle.manifest.plan
    nan = {name: np.full(shape, np.nan) for name, shape in weight_shapes(plan, 64).items()}
    engine.replace_adapters(nan)
    for sampling in (None, SAMPLING[0]):
        with pytest.raises(BundleError, match="not numbers"):
            cycles.generate(RAGGED, 9, k=3, sampling=sampling)


def test_logits_that_are_no_numbers_leave_none_behind(pair) -> None:
    """Attention multiplies what lies behind a row's length by 0: caches with NaN would end all later requests."""
    stepwise, cycles, *_ = pair("recurrent", "skip")
    plan = cycles.bundle.manifest.plan
    for session in (stepwise, cycles):
        engine: Any = session._opened()
        good, nan = (
            {name: np.full(shape, x) for name, shape in weight_shapes(plan, 64).items()} for x in (0.01, np.nan)
        )
        engine.replace_adapters(good)
        expected = [row.tolist() for row in session.generate(RAGGED, 9, k=3, stop_token_ids=())]
        engine.replace_adapters(nan)
        with pytest.raises(BundleError, match="not numbers"):
            session.generate(RAGGED, 9, k=3, stop_token_ids=())
        engine.replace_adapters(good)
        session.generate(RAGGED[:1], 9, k=3, stop_token_ids=())
        assert [row.tolist() for row in session.generate(RAGGED, 9, k=3, stop_token_ids=())] == expected
        engine.replace_adapters(nan)
        session.prefill([list(range(20))] * len(RAGGED), max_new_tokens=9, k=3)
        assert np.isnan(session.step([7] * len(RAGGED))).any()  # whoever steps by hand sees it
        engine.replace_adapters(good)
        assert [row.tolist() for row in session.generate(RAGGED, 9, k=3, stop_token_ids=())] == expected


def test_cycles_that_cannot_be_captured_run_all_the_same(bundles) -> None:
    made = bundles("recurrent")
    stepwise, _, _ = open_device_session(made)
    kernel = chooser_on_host()
    refusing, failing = FakeCuda(kernel=kernel), FakeCuda(kernel=kernel)
    failing.fail["cudaGraphInstantiate"] = cudaError_t.cudaErrorInvalidValue
    with stepwise:
        for cuda, capturable, word in (
            (refusing, False, "cannot be captured"),
            (failing, True, "cudaGraphInstantiate"),
        ):
            trt = FakeTrt(cuda, capturable=capturable)
            session, engine, _ = open_device_session(made, cuda=cuda, trt=trt)
            with session:
                same(stepwise, session, RAGGED, 13, k=3, stop_token_ids=())
                assert word in engine.capture_note
            assert not cuda.live


def test_graphs_of_cycles_that_are_past_are_given_back(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests choose k, and each k has a cycle with contexts of its own; those that come again capture again."""
    monkeypatch.setattr(trt_engine, "MOST_CYCLES", 3)
    stepwise, cycles, engine, _ = pair("recurrent", "skip")
    for k in (6, 5, 4, 3, 2, 1, 0, 6):
        same(stepwise, cycles, [[7, 3, 11]], 3 * (k + 1) + 1, k=k, stop_token_ids=())
    assert len(engine._cycles) == 3
    of_cycles = sum(cycle._graph is not None for cycle in engine._cycles.values())
    of_steps = sum(step._graph is not None for step in engine._steps.values())
    assert of_cycles == 3
    assert len(engine._device._graphs) == of_cycles + of_steps


def test_a_longer_cycle_takes_the_place_of_a_shorter_one(pair) -> None:
    """Its tokens want more page-locked memory, and the other one's is no longer page-locked."""
    stepwise, cycles, _, _ = pair("recurrent", "skip")
    for k in (1, 6, 1):
        same(stepwise, cycles, [[7, 3, 11]], 3 * (k + 1) + 1, k=k, stop_token_ids=())


def test_a_capture_that_failed_once_is_no_reason_for_others(bundles) -> None:
    """Such as for a card that was full: another k has its graph, and so have engines beside."""
    kernel = chooser_on_host()
    cuda = FakeCuda(kernel=kernel)
    cuda.fail["cudaGraphInstantiate"] = cudaError_t.cudaErrorMemoryAllocation
    session, engine, _ = open_device_session(bundles("recurrent"), cuda=cuda, policy="skip")
    with session:
        for _ in range(2):
            session.generate([[7, 3, 11]], 13, k=3, stop_token_ids=())
        assert engine.captures == 0
        assert "cudaGraphInstantiate" in engine.capture_note
        del cuda.fail["cudaGraphInstantiate"]
        for _ in range(2):
            session.generate([[7, 3, 11]], 13, k=2, stop_token_ids=())
        assert engine.captures > 0


def test_a_cycle_that_could_not_be_bound_is_whole_the_next_time(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its contexts in turn is not to be had once, as where the card is full; then there is room again."""
    stepwise, cycles, engine, _ = pair("recurrent", "skip")
    create, left = FakeCudaEngine.create_execution_context, 0

    def refuses_one(self: FakeCudaEngine, config: Any) -> Any:
        nonlocal left
        left -= 1
        return None if left == 0 else create(self, config)

    cycles.generate([[5]], 4, k=2, stop_token_ids=())
    monkeypatch.setattr(FakeCudaEngine, "create_execution_context", refuses_one)
    for number, prompt in enumerate(([7, 3, 11], [23, 29, 31], [9, 8, 7]), 1):  # LoRA steps on two sides, the refresh
        engine._drop_steps()
        left = number
        with pytest.raises(BundleError, match="cannot create an execution context"):
            cycles.generate([prompt], 4, k=2, stop_token_ids=())
        same(stepwise, cycles, [prompt], 4, k=2, stop_token_ids=())


def test_everything_is_freed_whichever_call_fails(bundles) -> None:
    """From the kernel's loading on, at some of CUDA's calls."""
    made = bundles("recurrent")
    session, _, cuda = open_device_session(made, cycles=True)
    opened = cuda.called
    session.generate(RAGGED[:1], 10, k=3)
    used = cuda.called
    session.close()
    for number in range(opened + 1, used + 1, 6):
        cuda = FakeCuda(kernel=chooser_on_host())
        cuda.fail_at_call = number
        session, engine, _ = open_device_session(made, cuda=cuda)
        with session:
            try:
                session.generate(RAGGED[:1], 10, k=3)
            except BundleError as error:
                reason = error.note
            else:  # a kernel that cannot be loaded, a capture that failed
                reason = engine._host_note or engine.capture_note
        assert "cudaErrorIllegalAddress" in reason, number
        assert not cuda.live, f"call {number} of {opened} and {used}"


def test_an_interrupted_request_leaves_no_trace(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    stepwise, cycles, _, _ = pair("recurrent", "skip")
    wait, calls = CudaDevice.wait, 0

    def interrupted(self: CudaDevice, event: Any) -> None:
        nonlocal calls
        wait(self, event)
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(CudaDevice, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cycles.generate(RAGGED, 16, k=3, stop_token_ids=())
    same(stepwise, cycles, RAGGED, 9, k=3, stop_token_ids=())
