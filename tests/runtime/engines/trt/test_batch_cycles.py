"""Whole cycles of a batch on the device: each row's tokens are its own, and what the host still does.

On a fake CUDA and a fake TensorRT, with the kernel that chooses tokens on the host (test_choose.py); on no GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import Batch, BundleError, Event, SamplingOptions, Session
from lora_drop_runtime.bundle.adapters import weight_shapes
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.flight import MOST_STEPS
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.engines.trt.cycle import DeviceCycle
from lora_drop_runtime.engines.trt.engine import TrtEngine
from lora_drop_runtime.plan.schedule import MarginSchedule, PeriodicSchedule

from tests.runtime.decoding.test_batch import Interrupt
from tests.runtime.engines.trt.test_cycles import WORK
from tests.support.decoding import ticked_through
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_trt import open_device_session

DRAWN = SamplingOptions(temperature=3.0, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=4)
PROMPTS = [[7, 3, 11, 19, 2, 40], [5], [23, 29, 31], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2], [77, 2]]


@dataclass
class Asked:
    """A row, the tick before which it comes, and the one before which it is given up."""

    prompt: list[int]
    new_tokens: int
    arrives: int = 0
    cancel: int | None = None
    k: int | Any = None
    sampling: SamplingOptions | None = None
    stops: tuple[int, ...] = ()
    more: dict[str, Any] | None = None


@pytest.fixture
def opened(bundles: Callable[..., Bundle]) -> Iterator[Callable[..., tuple[Batch, Session, TrtEngine, FakeCuda]]]:
    """A batch in cycles, and a session of the same bundle that goes step by step."""
    with contextlib.ExitStack() as stack:

        def open_both(
            name: str, policy: str = "skip", k: int = 3, **options: Any
        ) -> tuple[Batch, Session, TrtEngine, FakeCuda]:
            made = bundles(name)
            alone, _, _ = open_device_session(made, k=k, policy=policy)
            stack.enter_context(alone)
            _, engine, cuda = open_device_session(made, cycles=True)
            limits = {"slots": 3, "max_seq_len": 50, "max_prompt_len": 24} | options
            batch = Batch(made, engine, PeriodicSchedule(k), policy, **limits)
            stack.enter_context(batch)
            return batch, alone, engine, cuda

        yield open_both


def decoded(batch: Batch, script: list[Asked]) -> tuple[list[list[Event]], list[str]]:
    """Each row's events; and of each tick why it was no whole cycle."""
    events: dict[int, list[Event]] = defaultdict(list)
    numbers: dict[int, int] = {}
    reasons = []
    coming = sorted(range(len(script)), key=lambda one: script[one].arrives)
    for tick in range(1000):
        while coming and script[coming[0]].arrives <= tick:
            one = script[coming[0]]
            options = {"k": one.k, "sampling": one.sampling, "stop_token_ids": one.stops} | (one.more or {})
            numbers[coming.pop(0)] = batch.add(one.prompt, one.new_tokens, **options)
        for place, number in numbers.items():
            if script[place].cancel == tick:
                batch.cancel(number)
        for event in batch.tick():
            events[event.row].append(event)
        reasons.append(batch.why_single_steps)
        if not coming and not batch.rows:
            return [events[numbers[place]] for place in range(len(script))], reasons
    raise AssertionError("rows do not end")


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def check(batch: Batch, alone: Session, script: list[Asked]) -> list[str]:
    """Every row has the tokens that it has alone, step by step, and one last event; returns the reasons."""
    found, reasons = decoded(batch, script)
    for one, events in zip(script, found, strict=True):
        options = {"k": one.k, "sampling": one.sampling, "stop_token_ids": one.stops}
        (wanted,) = alone.generate([one.prompt], one.new_tokens, **options)
        ours = tokens_of(events)
        assert [bool(event.finished) for event in events] == [False] * (len(events) - 1) + [True]
        if events[-1].finished == "cancelled":
            assert one.cancel is not None
            assert ours == wanted.tolist()[: len(ours)]
        else:
            assert ours == wanted.tolist()
            assert events[-1].finished == ("length" if len(ours) == one.new_tokens else "stop")
    return reasons


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is asked of cycles, in order: (run, steps), (read, steps)."""
    seen: list[tuple[str, int]] = []
    run, read = DeviceCycle.run, DeviceCycle.read

    def noted_run(self: DeviceCycle, count: int) -> None:
        seen.append(("run", count))
        run(self, count)

    def noted_read(self: DeviceCycle, number: int) -> Any:
        found = read(self, number)
        seen.append(("read", len(found)))
        return found

    monkeypatch.setattr(DeviceCycle, "run", noted_run)
    monkeypatch.setattr(DeviceCycle, "read", noted_read)
    return seen


@pytest.mark.parametrize(
    ("name", "policy"),
    [("residual", "skip"), ("recurrent", "skip"), ("recurrent", "backfill"), ("fill", "fill")],
)
def test_rows_that_come_and_go_have_their_own_tokens(opened, runs, name: str, policy: str) -> None:
    """Greedy and drawn, each with options, stops and a length of its own; prompts of one and of several chunks."""
    batch, alone, _, _ = opened(name, policy)
    free = alone.generate([PROMPTS[2]], 20, k=3, stop_token_ids=())[0].tolist()
    script = [
        Asked(PROMPTS[0], 22),
        Asked(PROMPTS[1], 17, sampling=DRAWN),
        Asked(PROMPTS[2], 20, stops=(free[6], 10**9)),
        Asked(PROMPTS[3], 9, arrives=1, sampling=SamplingOptions(repetition_penalty=1.5)),
        Asked(PROMPTS[4], 1, arrives=3),
        Asked(PROMPTS[0], 14, arrives=4, sampling=SamplingOptions(temperature=2.0, seed=9)),
        Asked(PROMPTS[3], 12, arrives=5, cancel=8),
        Asked(PROMPTS[1], 24, arrives=6, sampling=DRAWN),
    ]
    reasons = check(batch, alone, script)
    assert not any(reasons)
    assert sum(count for kind, count in runs if kind == "run") >= 40
    assert {count for kind, count in runs if kind == "run"} > {4}  # whole cycles, and a part at a row's end


@pytest.mark.parametrize("seed", range(8))
def test_any_rows(opened, seed: int) -> None:
    """Windows, schedules, policies and arrivals at random: cycles where rows allow them, steps in between."""
    draw = np.random.default_rng(seed)
    policy = ("skip", "backfill")[seed % 2]
    batch, alone, _, _ = opened("recurrent", policy, join_early=False)
    script, usual = [], int(draw.integers(1, 4))
    for _ in range(7):
        prompt = draw.integers(0, 131, draw.integers(1, 14)).tolist()
        temperature = float(draw.choice([0.0, 0.0, 2.0]))
        asked = Asked(prompt, int(draw.integers(1, 20)), int(draw.integers(0, 14)))
        asked.k = usual if draw.random() < 0.85 else int(draw.choice([0, 1, 2, 3]))
        asked.sampling = SamplingOptions(temperature=temperature, seed=int(draw.integers(99)))
        asked.stops = tuple(draw.integers(0, 131, 2).tolist())
        if draw.random() < 0.1:
            asked.k = MarginSchedule(2, 0.05)
        if draw.random() < 0.15:
            asked.more = {"logprobs": 0}
        if draw.random() < 0.2:
            asked.cancel = asked.arrives + int(draw.integers(0, 9))
        script.append(asked)
    check(batch, alone, script)


def test_the_host_reads_a_cycle_late(opened, runs) -> None:
    """The next cycle is on the stream before the tokens of one are waited for; a tick tells those of one."""
    batch, _, _, _ = opened("recurrent")
    for prompt in PROMPTS[1:3]:
        batch.add(prompt, 16, stop_token_ids=())
    told = [len(batch.tick()) for _ in range(5)]
    order = [("run", 4), ("run", 4), ("read", 4), ("run", 4), ("read", 4), ("run", 3), ("read", 4), ("read", 3)]
    assert runs == order
    assert told == [2, 8, 8, 8, 6]


def test_prompts_run_between_cycles(opened, runs) -> None:
    """A row that comes is admitted at a boundary; each of its chunks follows a cycle, and it joins the next ones."""
    batch, alone, _, _ = opened("recurrent", slots=4)
    reasons = check(batch, alone, [Asked(PROMPTS[0], 40), Asked(PROMPTS[3], 30, arrives=4)])
    assert not any(reasons)
    chunks = -(-len(PROMPTS[3]) // 4)
    # Read at once while a prompt waits: nothing runs ahead of its next chunk
    assert "".join(kind[1] for kind, _ in runs).count("ueue" * (chunks - 1)) == 1


def test_a_row_that_needs_the_host_makes_its_neighbours_go_step_by_step(opened, runs) -> None:
    """By name, while it is there; then whole cycles come back."""
    batch, alone, _, _ = opened("recurrent")
    script = [Asked(PROMPTS[1], 40), Asked(PROMPTS[2], 6, arrives=3, more={"logprobs": 2})]
    found, reasons = decoded(batch, script)
    for one, events in zip(script, found, strict=True):
        assert tokens_of(events) == alone.generate([one.prompt], one.new_tokens, k=3, stop_token_ids=())[0].tolist()
    assert all(len(event.top_logprobs) == 2 for event in found[1])
    named = [place for place, reason in enumerate(reasons) if "row 1: its logprobs are asked for" in reason]
    assert named
    assert not any(reasons[: named[0]])
    assert not any(reasons[named[-1] + 4 :])  # the cycle that they were amid is ended first
    assert sum(count for kind, count in runs if kind == "read") < 39


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"k": MarginSchedule(2, 0.1)}, "its schedule MarginSchedule is not periodic"),
        ({"policy": "lossless"}, "its policy lossless verifies drafts"),
        ({"sampling": SamplingOptions(presence_penalty=1)}, "its presence_penalty is of the host alone"),
        ({"sampling": SamplingOptions(frequency_penalty=1)}, "its frequency_penalty is of the host alone"),
        ({"sampling": SamplingOptions(logit_bias={5: 1})}, "its logit_bias is of the host alone"),
        ({"sampling": SamplingOptions(1, min_p=0.1)}, "its min_p is of the host alone"),
        ({"k": 5, "policy": "backfill"}, "its refresh runs 6 tokens, the engine takes 4 at once"),
        ({"k": MOST_STEPS}, f"its cycle has {MOST_STEPS + 1} steps, the most are {MOST_STEPS}"),
        ({"k": 1}, "have another k or policy each"),
        ({"policy": "backfill"}, "have another k or policy each"),
    ],
)
def test_why_ticks_are_single_steps(opened, options: dict[str, Any], reason: str) -> None:
    batch, _, _, _ = opened("recurrent")
    batch.add(PROMPTS[1], 4, stop_token_ids=())
    batch.add(PROMPTS[4], 4, stop_token_ids=(), **options)
    batch.tick()
    assert reason in batch.why_single_steps
    while batch.rows:
        batch.tick()
    assert batch.why_single_steps == ""


def test_without_nvrtc_every_tick_is_a_step(bundles) -> None:
    made = bundles("recurrent")
    _, engine, cuda = open_device_session(made)
    with Batch(made, engine, PeriodicSchedule(3), slots=2, max_seq_len=50) as batch:
        batch.add(PROMPTS[0], 9, stop_token_ids=())
        told = []
        while batch.rows:
            told.append(len(batch.tick()))
            assert not batch.rows or batch.why_single_steps == "row 0: the engine runs single steps"
    assert max(told) == 1
    assert not cuda.live


def test_what_the_host_does_for_a_cycle(opened) -> None:
    """One copy, one wait and one launch for the four tokens of every row."""
    batch, _, engine, cuda = opened("recurrent")
    for prompt in PROMPTS[:3]:
        batch.add(prompt, 40, sampling=DRAWN, stop_token_ids=())
    while len(batch.tick()) < 12:
        pass
    batch.tick()
    before = dict(cuda.calls)
    assert len(batch.tick()) == len(batch.tick()) == 12
    made = {name: cuda.calls[name] - before.get(name, 0) for name in WORK}
    assert made == dict(zip(WORK, (2, 0, 2, 2, 0), strict=True))
    assert engine.captures == len(cuda.executables)


def test_few_graphs_serve_all_numbers_of_rows(opened) -> None:
    """1, 2 and 4 rows of 4 slots; the slot beside three rows stands still."""
    batch, _, engine, _ = opened("residual", slots=4)
    for _ in range(2):
        for length in range(4):
            batch.add(PROMPTS[1], 8 + 12 * length, stop_token_ids=())
        while batch.rows:
            batch.tick()
    cycles = {cycle._rows.device["ids"].shape[0] for cycle in engine._cycles.values()}
    assert cycles == {1, 2, 4}


def test_cycles_begin_with_the_states_of_the_other_side(opened) -> None:
    """Where a refresh beside rows that were amid their cycles has left them there."""
    batch, alone, engine, cuda = opened("recurrent")
    batch.add(PROMPTS[1], 14, stop_token_ids=())
    events = batch.tick()
    assert not batch._rows[0].is_new
    slots = batch._slots
    for site, state in slots.buffers.states[0].items():
        engine.copy(state, slots.buffers.states[1][site], None)
        engine._device.synchronize()
        cuda.view(state.address, state.nbytes).view(np.float32)[...] = np.nan
    slots._side = 1
    while batch.rows:
        events += batch.tick()
    assert tokens_of(events) == alone.generate([PROMPTS[1]], 14, stop_token_ids=())[0].tolist()


def test_a_row_stands_still_only_where_it_has_room(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose valid entries end less than a refresh before the last slot."""
    batch, alone, _, _ = opened("recurrent", "backfill")
    kept, dropped = batch._slots._most_kept - 4, batch._slots._most_dropped - 4
    found = [batch._slots.have_room(kept + more, dropped + other, 4) for more, other in ((0, 0), (1, 0), (0, 1))]
    assert found == [True, False, False]
    monkeypatch.setattr(type(batch._slots), "have_room", lambda _self, kept, _dropped, width: kept + width <= 8)
    reasons = check(batch, alone, [Asked(PROMPTS[1], 30), Asked(PROMPTS[3], 12, arrives=1, sampling=DRAWN)])
    assert "row 1 has no room to stand still beside a cycle" in reasons
    assert reasons[-2] == ""


def test_logits_that_are_no_numbers_fail_their_row(opened) -> None:
    batch, _, engine, _ = opened("residual")
    plan = batch.bundle.manifest.plan
    nan = {name: np.full(shape, np.nan) for name, shape in weight_shapes(plan, 64).items()}
    engine.replace_adapters(nan)
    script = [Asked(PROMPTS[1], 9), Asked(PROMPTS[2], 9, sampling=DRAWN)]
    for events in decoded(batch, script)[0]:
        assert [event.finished for event in events] == [None, "failed"]
        assert isinstance(events[-1].error, BundleError)
        assert "not numbers" in str(events[-1].error)
    engine.replace_adapters({name: np.full(array.shape, 0.01) for name, array in nan.items()})
    for events in decoded(batch, script)[0]:  # in the same slots
        assert [event.finished for event in events][-1] == "length"


# ── interrupts ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def undisturbed(bundles) -> list[list[int]]:
    """What the first prompts become in a session."""
    with open_device_session(bundles("recurrent"), k=3)[0] as alone:
        return [alone.generate([prompt], 14, k=3, stop_token_ids=())[0].tolist() for prompt in PROMPTS[:3]]


@pytest.mark.parametrize("count", [*range(1, 300, 23), 2000])
def test_an_interrupt_anywhere_in_a_tick(bundles, undisturbed: list[list[int]], count: int) -> None:
    """No token is lost or told twice, and every row has a last event: those whose cycle was being begun have failed."""
    made = bundles("recurrent")
    _, engine, cuda = open_device_session(made, cycles=True)
    with Batch(made, engine, PeriodicSchedule(3), slots=3, max_seq_len=50) as batch:
        for prompt in PROMPTS[:3]:
            batch.add(prompt, 14, stop_token_ids=())
        events = []
        while len(told := batch.tick()) < 12:
            events += told
        events += told
        tracing = sys.gettrace()
        sys.settrace(Interrupt(count))
        try:
            with contextlib.suppress(KeyboardInterrupt):
                events += batch.tick()
        finally:
            sys.settrace(tracing)
        while batch.rows:
            events += batch.tick()
        for number, tokens in enumerate(undisturbed):
            own = [event for event in events if event.row == number]
            ours = tokens_of(own)
            assert own[-1].finished in ("failed", "length")
            assert sum(event.finished is not None for event in own) == 1
            assert ours == tokens[: len(ours)]
            assert len(ours) == 14 or own[-1].finished == "failed"
    assert not cuda.live


def test_a_cycle_that_was_interrupted_as_it_was_begun_fails_its_rows(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other: the row that waits has its tokens."""
    batch, alone, _, _ = opened("recurrent", slots=2)
    for prompt in PROMPTS[:3]:
        batch.add(prompt, 12, stop_token_ids=())
    mark, calls = CudaDevice.mark, 0

    def interrupted(self: CudaDevice, event: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        mark(self, event)

    monkeypatch.setattr(CudaDevice, "mark", interrupted)
    events, interrupts = ticked_through(batch)
    assert interrupts == 1
    ends = {event.row: event for event in events if event.finished}
    assert [ends[row].finished for row in range(3)] == ["failed", "failed", "length"]
    assert "was interrupted" in str(ends[0].error)
    own = [event for event in events if event.row == 2]
    assert tokens_of(own) == alone.generate([PROMPTS[2]], 12, k=3, stop_token_ids=())[0].tolist()


def test_where_no_memory_is_left_for_a_cycle_rows_go_on_once_there_is(opened) -> None:
    """Their caches stay: cycles of more rows want more memory, which somebody else has taken meanwhile."""
    batch, alone, _, cuda = opened("recurrent")
    free = cuda.memory_bytes
    rows: dict[int, list[int | None]] = defaultdict(list)

    def ticks(count: int) -> None:
        for event in (event for _ in range(count) for event in batch.tick()):
            rows[event.row].append(event.token)

    batch.add(PROMPTS[0], max_new_tokens=6)
    ticks(4)
    cuda.memory_bytes = sum(block.nbytes for block in cuda.blocks.values()) + 2048
    for prompt in PROMPTS[1:4]:
        batch.add(prompt, max_new_tokens=6)
    for _ in range(2):
        with pytest.raises(BundleError, match="rows of a cycle takes"):
            ticks(4)
    cuda.memory_bytes = free
    ticks(6)
    for row, prompt in enumerate(PROMPTS[:4]):
        assert rows[row] == alone.generate([prompt], 6)[0].tolist()


@pytest.mark.parametrize(("buffer", "k", "more"), [("aside", 3, {}), ("logits.2", 0, {"prompt_logprobs": True})])
def test_where_no_memory_is_left_for_what_comes_late_rows_go_on_once_there_is(
    opened, buffer: str, k: int, more: dict[str, Any]
) -> None:
    """A refresh beside a row amid its cycle puts that one's states aside; a scored prompt wants more logits."""
    batch, alone, _, cuda = opened("recurrent")
    free = cuda.memory_bytes
    rows = {batch.add(PROMPTS[0], 12, k=k, stop_token_ids=(), logprobs=0): k}
    events = [*batch.tick(), *batch.tick()]

    def ticks() -> None:
        while batch.rows:
            events.extend(batch.tick())

    rows[batch.add(PROMPTS[0], 12, k=0, stop_token_ids=(), logprobs=0, **more)] = 0
    cuda.memory_bytes = sum(block.nbytes for block in cuda.blocks.values()) + 100
    for _ in range(2):
        with pytest.raises(BundleError, match=f"The buffer {buffer}"):
            ticks()
    cuda.memory_bytes = free
    ticks()
    for row, k in rows.items():
        own = [event for event in events if event.row == row and not event.is_prompt]
        assert tokens_of(own) == alone.generate([PROMPTS[0]], 12, k=k, stop_token_ids=())[0].tolist()
