"""A batch that rows join and leave: each row's tokens are its own, whatever else is there and wherever it lies."""

from __future__ import annotations

import contextlib
import linecache
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Batch, Event, SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.decoding.batch import CHUNK
from lora_drop_runtime.decoding.row import logprobs_of
from lora_drop_runtime.errors import BundleError, InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import MarginSchedule, PeriodicSchedule

from tests.support.bundles import first_layers, make_adapted_bundle, make_bundle
from tests.support.decoding import LORA, PLAN, PLANS, REFRESH, assert_refused, kept_session, slots
from tests.support.fake_engine import KINDS, TOKEN_BYTES, VOCAB, FakeEngine, make_manifest, next_token, open_session

NEAR = 1e-4  # logprobs that are nearer than this may change places
COUNTED: dict[str, Any] = {"min_p": 0.02, "presence_penalty": 0.3, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}}
WIDE = 0.05  # a margin that some steps of the tiny models have and some have not


@dataclass(frozen=True)
class Request:
    """What a row is asked, and after how many ticks; `cancel` ticks later it is given up."""

    prompt: tuple[int, ...]
    new_tokens: int
    k: int
    policy: str
    adaptive: bool
    temperature: float
    seed: int
    arrives: int
    cancel: int | None = None
    draft: str | None = None
    stops: tuple[int, ...] = ()
    counted: bool = False
    lenience: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        adaptive = self.adaptive and self.policy != "lossless"
        return {
            "k": MarginSchedule(self.k, WIDE) if adaptive else self.k,
            "draft": self.draft if self.policy == "lossless" and self.k else None,
            "lenience": self.lenience if self.policy == "lossless" else None,
            "sampling": SamplingOptions(self.temperature, seed=self.seed, **(COUNTED if self.counted else {})),
            "stop_token_ids": self.stops,
        }


@st.composite
def requests(draw, vocab: int, longest: int, policies: tuple[str, ...], lenient: bool = False) -> Request:
    return Request(
        prompt=tuple(draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=longest))),
        new_tokens=draw(st.integers(1, 18)),
        k=draw(st.integers(0, 4)),
        policy=draw(st.sampled_from(policies)),
        adaptive=draw(st.integers(0, 3)) == 0,
        temperature=draw(st.sampled_from((0.0, 0.0, 1.0))),
        seed=draw(st.integers(0, 99)),
        arrives=draw(st.integers(0, 25)),
        cancel=draw(st.none() | st.none() | st.integers(0, 12)),
        draft=draw(st.sampled_from((None, "ngram", "both"))),
        stops=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=2))),
        counted=draw(st.booleans()),
        lenience=draw(st.sampled_from((None, None, 0.5)) if lenient else st.none()),
    )


def decoded(
    batch: Batch, script: list[Request], logprobs: int | None = None, patient: bool = True
) -> list[list[Event]]:
    """Each request's events; with `patient`, every row waits for its step no longer than a cycle of its own."""
    events: dict[int, list[Event]] = defaultdict(list)
    numbers: dict[int, int] = {}
    coming = sorted(range(len(script)), key=lambda one: script[one].arrives)
    tick = 0
    while coming or batch.rows:
        while coming and script[coming[0]].arrives <= tick:
            request = script[coming[0]]
            number = batch.add(
                request.prompt, request.new_tokens, policy=request.policy, logprobs=logprobs, **request.options
            )
            numbers[coming.pop(0)] = number
        for one, number in numbers.items():
            cancel = script[one].cancel
            if cancel is not None and script[one].arrives + cancel == tick:
                batch.cancel(number)
        for event in batch.tick():
            events[event.row].append(event)
        for row in batch._rows:
            assert row.waited <= row.patience or not patient
        tick += 1
        assert tick < 5000
    return [events[numbers[one]] for one in range(len(script))]


def check_ends(request: Request, events: list[Event]) -> list[int]:
    """One event a token, and the last one says why the row is over; returns the tokens."""
    tokens = [event.token for event in events if event.token is not None]
    assert all(event.finished is None for event in events[:-1])
    assert all(event.token is not None for event in events[:-1])
    last = events[-1]
    assert (last.token is None) == (last.finished in ("stop", "cancelled"))
    assert (last.finished == "length") == (len(tokens) == request.new_tokens and last.token is not None)
    assert not set(tokens) & set(request.stops)
    if request.cancel is None:
        assert last.finished in ("stop", "length")
    return tokens


# ── on an engine that records what it is asked ─────────────────────────────────────────────────────────────────


def fake_batch(
    policy: str = "backfill", k: int = 2, kind: str = "idle rows", plan: DropPlan = PLAN, **options: Any
) -> tuple[Batch, FakeEngine]:
    engine = FakeEngine(plan)
    engine.behave(kind)
    bundle = open_session(plan, engine=engine)[0].bundle
    return Batch(bundle, engine, PeriodicSchedule(k), policy, **options), engine


def fake_tokens(request: Request) -> list[int]:
    """What the fake model makes of a request, greedily."""
    text = list(request.prompt)
    for _ in range(request.new_tokens):
        token = int(next_token(text[-1], len(text) - 1))
        if token in request.stops:
            break
        text.append(token)
    return text[len(request.prompt) :]


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(requests(VOCAB, 5, ("skip", "backfill", "lossless")), min_size=1, max_size=9),
    st.integers(1, 4),
    st.sampled_from(tuple(KINDS)),
)
def test_rows_do_not_disturb_each_other(script: list[Request], count: int, kind: str) -> None:
    """Tokens, and every valid cache entry after every tick."""
    script = [Request(**{**vars(one), "temperature": 0.0, "counted": False}) for one in script]
    longest = max(len(one.prompt) for one in script)
    most = max(len(one.prompt) + one.new_tokens for one in script)
    batch, _ = fake_batch(slots=count, kind=kind, max_seq_len=max(most, longest + 1), max_prompt_len=longest)
    plain = batch.tick

    def ticked() -> list[Event]:
        events = plain()
        for slot, row in enumerate(batch._rows):
            told = [event.token for event in history[row.number] if event.token is not None]
            told += [event.token for event in events if event.row == row.number and event.token is not None]
            text = row._prompt + told
            for name, cache in batch._slots.buffers.caches.items():
                if int(name.partition(".")[2]) not in PLAN.dropped_attentions:
                    assert slots(cache, slot, row.kept) == text[: row.kept]
                elif row.options.policy.name == "backfill":
                    assert slots(cache, slot, row.dropped) == text[: row.dropped]
        for event in events:
            history[event.row].append(event)
        return events

    history: dict[int, list[Event]] = defaultdict(list)
    batch.tick = ticked  # type: ignore[method-assign]
    for request, events in zip(script, decoded(batch, script), strict=True):
        tokens = check_ends(request, events)
        wanted = fake_tokens(request)
        assert tokens == wanted[: len(tokens)]
        if request.cancel is None:
            assert tokens == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [(7,), (7, 8, 9)])
def test_a_row_whose_dropped_slots_are_full_stands_beside_a_refresh(kind: str, prompt: tuple[int, ...]) -> None:
    """It has no slot for what a refresh writes behind a row that is not due."""
    batch, engine = fake_batch("skip", k=3, slots=3, kind=kind, max_prompt_len=4, max_seq_len=8)
    batch.add([1, 2, 3, 4], 4)
    batch.tick()
    batch.tick()
    batch.add(prompt, 4)
    batch.add(prompt, 4)
    batch.tick()
    assert engine.kinds[:3] == [REFRESH, LORA, REFRESH]
    for name, cache in batch._slots.buffers.caches.items():
        assert slots(cache, 0, 4) == [1, 2, 3, 4], name
        assert slots(cache, 1, len(prompt)) == slots(cache, 2, len(prompt)) == list(prompt), name
    while batch.rows:
        batch.tick()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [3, 6])
def test_a_row_near_its_end_stands_while_the_rest_of_a_prompt_runs(kind: str, new: int) -> None:
    """A long prompt goes on by parts; the one token of a row beside it runs in the first."""
    batch, _ = fake_batch(k=0, slots=2, kind=kind, max_prompt_len=6, max_seq_len=9)
    first = Request((1, 2), 7, 0, "backfill", False, 0.0, 0, 0)
    text = [*first.prompt, *fake_tokens(first)]
    batch.add(first.prompt, first.new_tokens)
    for _ in range(5):
        batch.tick()
    batch.add(range(10, 10 + new), 1)
    while batch.rows:
        batch.tick()
        caches = batch._slots.buffers.caches.values()
        assert all(slots(cache, 0, row.kept) == text[: row.kept] for row in batch._rows[:1] for cache in caches)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_window_share_a_cycle_and_never_wait(kind: str) -> None:
    batch, engine = fake_batch("skip", k=3, slots=4, kind=kind)
    for prompt in ([1, 2], [3], [4, 5, 6]):
        batch.add(prompt, 14)
    while batch.rows:
        batch.tick()
        assert all(row.waited == 0 for row in batch._rows)
    assert engine.kinds == [REFRESH, *[LORA, LORA, LORA, REFRESH] * 3, LORA]


def test_a_row_that_comes_between_joins_at_the_next_refresh() -> None:
    batch, engine = fake_batch(k=3, slots=4)
    batch.add([1, 2], 12)
    for _ in range(3):  # the prompt and two LoRA steps
        batch.tick()
    number = batch.add([7, 8, 9], 4)
    assert [event.row for _ in range(2) for event in batch.tick()] == [0, 0, number]
    assert engine.kinds == [REFRESH, LORA, LORA, LORA, REFRESH]
    widths = [run.input_ids.shape for run in engine.runs]
    assert widths[-1] == (2, 4)  # four tokens are run again beside a prompt of three
    batch.close()


def test_a_row_may_join_early_and_then_refreshes_with_the_others() -> None:
    """Its prompt runs at once, and its first cycle is what is left of theirs: as if it were alone with that cycle."""
    batch, engine = fake_batch("skip", k=3, slots=4, join_early=True)
    batch.add([1, 2], 12, stop_token_ids=[])
    for _ in range(3):  # the prompt and two LoRA steps
        batch.tick()
    request = Request((7, 8, 9), 6, 3, "skip", False, 0.0, 0, 0)
    number = batch.add(request.prompt, request.new_tokens, stop_token_ids=[])
    events = batch.tick()
    assert [event.row for event in events] == [number]
    while batch.rows:
        events += batch.tick()
    assert engine.kinds[3:9] == [REFRESH, LORA, REFRESH, LORA, LORA, LORA]
    assert [event.token for event in events if event.row == number] == fake_tokens(request)
    kinds = [event.kind for event in events if event.row == number]
    assert kinds == [REFRESH, LORA, REFRESH, LORA, LORA, LORA]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(requests(VOCAB, 5, ("skip", "backfill", "lossless")), min_size=1, max_size=9), st.integers(1, 4))
def test_rows_that_join_early_write_what_they_should(script: list[Request], count: int) -> None:
    script = [Request(**{**vars(one), "temperature": 0.0, "cancel": None, "counted": False}) for one in script]
    batch, _ = fake_batch(slots=count, join_early=True)
    for request, events in zip(script, decoded(batch, script, patient=False), strict=True):
        assert check_ends(request, events) == fake_tokens(request)


def test_rows_that_run_wait_no_longer_than_a_cycle_for_one_that_joins_early() -> None:
    """A prompt of several chunks has the ticks for itself, but for one in four, which a window of k = 3 has."""
    batch, _ = fake_batch("backfill", k=3, slots=2, join_early=True)
    first = batch.add([1, 2], 40, stop_token_ids=[])
    batch.tick()
    batch.add([token % VOCAB for token in range(9 * CHUNK + 3)], 4, stop_token_ids=[])
    still = [0]
    while batch.rows:
        told = {event.row for event in batch.tick()}
        still.append(0 if first in told else still[-1] + 1)
    assert max(still) == 4


def test_a_row_of_the_batchs_own_limits_may_join_early() -> None:
    """Its first refresh may come sooner, and writes an entry more."""
    for join_early in (False, True):
        batch, _ = fake_batch("skip", k=3, slots=1, max_prompt_len=8, max_seq_len=16, join_early=join_early)
        batch.add([1, 2, 3, 4, 5, 6, 7, 8], 8, stop_token_ids=[])
        assert sum(len(batch.tick()) for _ in range(8)) == 8
        assert batch.rows == 0


def test_a_long_prompt_comes_in_chunks_beside_running_rows() -> None:
    batch, engine = fake_batch(k=1, slots=2)
    batch.add([1], 20)
    batch.add([token % VOCAB for token in range(2 * CHUNK + 3)], 3)
    last = []
    while batch.rows:
        batch.tick()
        if engine.kinds[-1] is REFRESH:
            last.append(engine.runs[-1].logits_index[:, -1].tolist())
    assert last[0] == [0, CHUNK - 1]
    assert [index[1] for index in last[:3]] == [CHUNK - 1, CHUNK - 1, 2]


def test_slots_are_allocated_once_and_lora_ticks_touch_no_dropped_cache() -> None:
    batch, engine = fake_batch("skip", k=3, slots=3)
    allocated = batch.kv_bytes()["allocated"]
    layers, longest = 6, batch.max_seq_len - 1 + CHUNK
    prompts = batch.max_prompt_len
    few = prompts + (batch.max_seq_len - prompts - 1) // 4 + CHUNK
    dropped = len(PLAN.dropped_attentions)
    assert allocated == 3 * ((layers - dropped) * longest + dropped * few) * TOKEN_BYTES
    for prompt in ([1, 2], [3], [4, 5, 6], [7]):
        batch.add(prompt, 9)
    while batch.rows:
        batch.tick()
    assert batch.kv_bytes() == {"kept": 0, "dropped": 0, "allocated": allocated}
    for run in engine.runs:
        names = [name for name in run.binding.inputs if name.startswith("past_key.")]
        assert len(names) == (layers - dropped if run.kind is LORA else layers)


def test_a_tick_that_was_interrupted_can_be_taken_again() -> None:
    batch, engine = fake_batch(k=2, slots=2)
    request = Request((1, 2), 8, 2, "backfill", False, 0.0, 0, 0)
    batch.add(request.prompt, 8)
    tokens = []
    while batch.rows:
        interrupted = engine.interrupt_at is None
        engine.interrupt_at = len(engine.runs) + 1 if interrupted else None
        try:
            tokens += [event.token for event in batch.tick()]
        except KeyboardInterrupt:
            continue
    assert tokens == fake_tokens(request)


class Interrupt:
    """Raises KeyboardInterrupt in the `count`-th line that is run in the modules of a batch.

    Not in the last line of a tick, where its events are on their way to the caller.
    """

    FILES = tuple(
        f"/{name}.py"
        for name in ("batch", "row", "slots", "paged_slots", "kept_prefixes", "cycle", "flight", "sampling")
    )

    def __init__(self, count: int, files: str | tuple[str, ...] = FILES) -> None:
        self.left, self._files = count, files

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.replace("\\", "/").endswith(self._files):
            return None
        lines = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and "return events" not in lines:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
        return self


@contextlib.contextmanager
def interrupted(count: int, files: str | tuple[str, ...] = Interrupt.FILES) -> Iterator[None]:
    """Ctrl-C in the `count`-th line of these files, which ends the block."""
    tracing = sys.gettrace()
    sys.settrace(Interrupt(count, files))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        sys.settrace(tracing)


@pytest.mark.parametrize("count", range(1, 400, 7))
def test_an_interrupt_ends_at_most_the_row_that_it_comes_upon(count: int) -> None:
    """Wherever in a tick: no token is lost or told twice, and every row has a last event."""
    batch, _ = fake_batch(k=1, slots=3)
    asked = [Request(prompt, 5, 1, "backfill", False, 0.0, 0, 0) for prompt in ((1, 2), (3,), (4, 5, 6))]
    for request in asked:
        batch.add(request.prompt, 5, stop_token_ids=[])
    events = batch.tick()
    with interrupted(count):
        events += batch.tick()
        events += batch.tick()
    while batch.rows:
        events += batch.tick()
    for number, request in enumerate(asked):
        own = [event for event in events if event.row == number]
        tokens = [event.token for event in own if event.token is not None]
        failed = own[-1].finished == "failed"
        assert failed or own[-1].finished == "length"
        assert tokens == fake_tokens(request)[: len(tokens)]
        assert failed or len(tokens) == 5
    assert sum(event.finished == "failed" for event in events) <= 1


@pytest.mark.parametrize("count", range(1, 40))
def test_an_interrupt_as_rows_are_admitted_loses_none(count: int) -> None:
    batch, _ = fake_batch(k=1, slots=2)
    asked = [Request(prompt, 3, 1, "backfill", False, 0.0, 0, 0) for prompt in ((1, 2), (3,), (4, 5, 6))]
    for request in asked:
        batch.add(request.prompt, 3, stop_token_ids=[])
    events: list[Event] = []
    with interrupted(count):
        events += batch.tick()
    while batch.rows:
        events += batch.tick()
    for number, request in enumerate(asked):
        tokens = [event.token for event in events if event.row == number and event.finished != "failed"]
        assert tokens == fake_tokens(request)[: len(tokens)]
        assert sum(event.finished is not None for event in events if event.row == number) == 1


@pytest.mark.parametrize("count", range(1, 200, 5))
def test_rows_are_cancelled_after_an_interrupt(count: int) -> None:
    """Each has one last event, whether the interrupt ended it or not."""
    batch, _ = fake_batch(k=1, slots=3)
    for prompt in ([1, 2], [3], [4, 5, 6]):
        batch.add(prompt, 5, stop_token_ids=[])
    events = batch.tick()
    with interrupted(count):
        events += batch.tick()
    for number in range(3):
        batch.cancel(number)
    events += batch.tick()
    assert batch.rows == 0
    assert sorted(event.row for event in events if event.finished) == [0, 1, 2]


def test_an_interrupt_as_a_last_event_is_told_adds_none() -> None:
    class Untold(list[Event]):
        def append(self, event: Event) -> None:
            super().append(event)
            if event.finished:
                raise KeyboardInterrupt

    batch, _ = fake_batch(k=1, slots=2)
    for prompt, new_tokens in (([1, 2], 1), ([3], 3)):
        batch.add(prompt, new_tokens, stop_token_ids=[])
    batch._untold = Untold()
    with pytest.raises(KeyboardInterrupt):
        batch.tick()
    events: list[Event] = []
    while batch.rows:
        events += batch.tick()
    assert [(event.row, event.finished) for event in events if event.finished] == [(0, "length"), (1, "length")]


def test_a_row_that_fails_fails_alone() -> None:
    batch, engine = fake_batch(slots=2)
    plain = engine._predict

    def broken(run) -> None:
        plain(run)
        run.binding.outputs["logits"][1 if len(run.input_ids) > 1 else 0, :, 3] = np.nan if spoiled else 0

    spoiled = False
    engine._predict = broken
    batch.add([1, 2], 6, stop_token_ids=[])
    second = batch.add([3, 4], 6, stop_token_ids=[])
    events = batch.tick()
    spoiled = True
    events += batch.tick()
    spoiled = False
    while batch.rows:
        events += batch.tick()
    (failed,) = (event for event in events if event.finished == "failed")
    assert failed.row == second
    assert isinstance(failed.error, BundleError)
    assert [event.token for event in events if event.row == 0] == fake_tokens(
        Request((1, 2), 6, 2, "backfill", False, 0.0, 0, 0)
    )


def test_a_schedule_that_fails_ends_its_own_row() -> None:
    class Wrong:
        def kind(self, step, last):
            raise ValueError("not today")

    batch, _ = fake_batch(slots=2)
    first, second = batch.add([1, 2], 4, stop_token_ids=[]), batch.add([3], 4, k=Wrong(), stop_token_ids=[])
    events = [event for _ in iter(lambda: batch.rows, 0) for event in batch.tick()]
    assert [event.token for event in events if event.row == first] == fake_tokens(
        Request((1, 2), 4, 2, "backfill", False, 0.0, 0, 0)
    )
    *_, last = (event for event in events if event.row == second)
    assert (last.finished, str(last.error)) == ("failed", "not today")


@pytest.mark.parametrize(
    ("policy", "usual", "row", "kinds"),
    [
        ("backfill", 1, {}, [REFRESH, *[LORA, REFRESH] * 3]),
        ("backfill", MarginSchedule(2, np.inf), {}, [REFRESH, *[LORA, LORA, REFRESH] * 2]),
        ("backfill", 1, {"k": 2}, [REFRESH, *[LORA, LORA, REFRESH] * 2]),
        ("lossless", 2, {}, [REFRESH] * 7),
        ("lossless", 2, {"policy": "skip"}, [REFRESH, *[LORA, LORA, REFRESH] * 2]),
    ],
)
def test_a_row_that_names_the_periodic_schedule_keeps_the_batchs_window_and_policy(policy, usual, row, kinds) -> None:
    """Not those of the bundle, whose k is 3 and whose policy is `skip`."""
    engine = FakeEngine(PLAN)
    bundle = open_session(PLAN, engine=engine)[0].bundle
    assert (bundle.manifest.plan.k, bundle.manifest.plan.policy) == (3, "skip")
    batch = Batch(bundle, engine, PeriodicSchedule(usual) if isinstance(usual, int) else usual, policy, slots=1)
    batch.add([5, 6, 7], 7, schedule="periodic", stop_token_ids=[], **row)
    events = [event for _ in iter(lambda: batch.rows, 0) for event in batch.tick()]
    assert [event.kind for event in events] == kinds
    assert (events[-1].statistics is not None) == (policy == "lossless" and not row)
    wide = [run for run in engine.runs[1:] if run.kind is REFRESH and run.input_ids.shape[1] > 1]
    assert bool(wide) == (policy == "backfill")


@pytest.mark.parametrize(("chunk", "most"), [(None, CHUNK), (4, 4)])
def test_a_verified_row_waits_no_longer_than_what_a_refresh_verifies(chunk: int | None, most: int) -> None:
    """Beside rows that run LoRA steps to their end, and whatever its k is."""
    engine = FakeEngine(PLAN)
    engine.prefill_chunk = chunk  # type: ignore[assignment]
    limits = Limits(1000, 10, 8)
    bundle = Bundle(Path("/nowhere"), make_manifest(PLAN, limits=limits))
    batch = Batch(bundle, engine, PeriodicSchedule(900), "backfill", slots=3)
    for _ in range(2):
        batch.add([5, 6, 7], 600, stop_token_ids=[])
    last = batch.add([5, 6, 7], 300, policy="lossless", k=900, stop_token_ids=[])
    gaps, since = [], 0
    while batch.rows:
        told = [event for event in batch.tick() if event.row == last]
        since += 1
        if told:
            gaps.append(since)
            since = 0
        if any(event.finished for event in told):
            break
    assert max(gaps) <= 2 * most  # its drafts, and then as long a wait


def test_no_drafts_are_counted_where_there_are_none() -> None:
    """`lossless` with k = 0 is the full schedule."""
    batch, _ = fake_batch("lossless", k=0, slots=1)
    batch.add([5, 6, 7], 4, stop_token_ids=[])
    events = [event for _ in range(4) for event in batch.tick()]
    assert [(event.finished, event.statistics) for event in events] == [*[(None, None)] * 3, ("length", None)]


def test_the_last_event_of_a_row_that_verifies_has_what_it_counted() -> None:
    batch, _ = fake_batch("lossless", k=3, slots=3)
    whole, given_up = (batch.add([5, 6, 7], 9, stop_token_ids=[]) for _ in range(2))
    batch.add([3], 4, policy="backfill", stop_token_ids=[])
    events = batch.tick()
    batch.cancel(given_up)
    while batch.rows:
        events += batch.tick()
    told = {event.row: event.statistics for event in events if event.statistics is not None}
    assert told.keys() == {whole, given_up}
    assert all(event.finished for event in events if event.statistics is not None)
    assert (told[whole].tokens, told[given_up].tokens) == (8, 0)  # the prompt's token is not counted


def test_a_row_that_was_cancelled_counts_until_that_is_told() -> None:
    batch, _ = fake_batch(slots=1)
    numbers = [batch.add([1], 4), batch.add([2], 4)]
    for number in (*numbers, numbers[0]):
        batch.cancel(number)
    assert batch.rows == 2
    assert [(event.row, event.finished) for event in batch.tick()] == [(number, "cancelled") for number in numbers]
    assert batch.rows == 0


def test_rows_are_cancelled_while_another_thread_adds_some() -> None:
    batch, _ = fake_batch(slots=1)
    numbers = [batch.add([1, 2], 4) for _ in range(300)]
    done, before = threading.Event(), sys.getswitchinterval()

    def add() -> None:
        while not done.is_set() and batch.rows < 9000:
            batch.add([1, 2], 2)

    worker = threading.Thread(target=add)
    sys.setswitchinterval(1e-6)
    try:
        worker.start()
        for number in reversed(numbers):
            batch.cancel(number)
    finally:
        done.set()
        worker.join()
        sys.setswitchinterval(before)
    told = {event.row for event in batch.tick() if event.finished == "cancelled"}
    assert told == set(numbers)


@pytest.mark.parametrize(
    ("call", "behind"),
    [
        (lambda batch: batch.add([1], 1), "runtime.decoding.checks.check_prompts"),
        (Batch.tick, "runtime.decoding.stream.Usage.enter"),
        (lambda batch: batch.cancel(0), "runtime.decoding.stream.Usage.enter"),
    ],
    ids=["add", "tick", "cancel"],
)
def test_a_call_that_another_thread_closes_the_batch_before(call, behind, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = fake_batch()
    batch.add([1, 2], 4)

    def close(*_: object) -> None:
        monkeypatch.undo()
        batch.close()

    monkeypatch.setattr(f"lora_drop_{behind}", close)
    assert_refused(lambda: call(batch), "The batch is closed.")
    assert not batch.rows


def test_what_cannot_be_is_refused_and_leaves_the_batch_as_it_was() -> None:
    batch, _ = fake_batch("skip", k=3, slots=2, max_seq_len=12, max_prompt_len=4)
    assert_refused(lambda: batch.add([], 3), "The prompt is empty.")
    assert_refused(lambda: batch.add([[1], [2]], 3), "A row of a batch is one prompt.", "2 were given.")
    assert_refused(lambda: batch.add([1, 2, 3, 4, 5], 3), "A prompt is longer", "5 tokens", "allows 4")
    assert_refused(lambda: batch.add([1, 2], 11), "longer than the batch allows", "2 + 11", "12")
    assert_refused(lambda: batch.add([VOCAB], 3), "outside the vocabulary")
    assert_refused(lambda: batch.add([1, 2, 3, 4], 8, k=0), "does not fit into the caches of the dropped", "11", "5")
    assert_refused(lambda: batch.add([1], 3, policy="both"), "refresh policy")
    assert_refused(lambda: batch.add([1], 3, policy="skip", draft="ngram"), "The policy has no drafts.")
    biased = SamplingOptions(logit_bias={VOCAB: 1})
    assert_refused(lambda: batch.add([1], 3, sampling=biased), "logit_bias names a token that", f"It is {VOCAB}")
    assert_refused(lambda: batch.add([1], 3, logprobs=-1), "The number of logprobs is out of range.", "-1")
    assert_refused(lambda: batch.add([1], 3, prompt_logprobs=True), "A prompt's logprobs need logprobs.")
    assert_refused(lambda: batch.add([1], 3, logprobs=0, context_tokens=1), "A context needs a prompt that is scored.")
    for count in (0, 3):
        assert_refused(
            lambda count=count: batch.add([1, 2], 3, logprobs=0, prompt_logprobs=True, context_tokens=count),
            "The number of context tokens is out of range.",
            f"It is {count}, and the prompt has 2",
        )
    with pytest.raises(PlanError):
        batch.add([1], 3, k=-1)
    assert batch.rows == 0
    assert batch.tick() == []
    assert_refused(lambda: batch.cancel(17), "The batch has no such row.", "17", "0 were added")
    for wrong in (True, 0.0, None, np.array([1, 2])):
        with pytest.raises(InputError):
            batch.cancel(wrong)
    assert_refused(lambda: batch.add([1], 3, stop_token_ids=np.array(2)), "The list of stop tokens")
    batch.close()
    batch.close()
    sizes = batch.kv_bytes, batch.describe, lambda: batch.row_bytes
    for call in (batch.tick, lambda: batch.add([1], 1), *sizes, batch.__enter__):
        assert_refused(call, "The batch is closed.")


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"slots": 0}, "so many slots"),
        ({"slots": 10**6}, "so many slots"),
        ({"max_seq_len": 10**6}, "impossible length"),
        ({"max_seq_len": 1}, "impossible length"),
        ({"max_prompt_len": 0}, "impossible length"),
        ({"max_seq_len": 8, "max_prompt_len": 8}, "impossible length"),
    ],
    ids=str,
)
def test_slots_that_cannot_be_are_refused(options: dict[str, int], fact: str) -> None:
    assert_refused(lambda: fake_batch(**options), fact)


@pytest.mark.parametrize("most", [3, 8, 64])
def test_without_a_number_there_are_as_many_slots_as_the_bundle_allows_up_to_8(most: int) -> None:
    bundle = Bundle(Path("/nowhere"), make_manifest(PLAN, limits=Limits(100, 50, most)))
    assert Batch(bundle, FakeEngine(PLAN), PeriodicSchedule(3)).slots == min(most, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_each_row(kind: str) -> None:
    """A LoRA step reads what its own row's step before it wrote, whatever ran in between."""
    batch, engine = fake_batch("skip", kind=kind, plan=PLANS["recurrent"], slots=3)
    for k, count in ((1, 9), (3, 12), (2, 7)):
        batch.add([k, k + 1], count, k=k, stop_token_ids=[])
    wrote: dict[int, int] = {}  # by row: the number of the run that it took part in last
    while batch.rows:
        rows, begin = list(batch._rows) or list(batch._waiting), len(engine.runs)
        wanted = {slot: row.run.kind for slot, row in enumerate(rows)}
        batch.tick()
        runs = engine.runs[begin:]
        due = [slot for slot, one in wanted.items() if one is runs[0].kind]
        for place, slot in enumerate(due):
            run = runs[place] if len(runs) > 1 else runs[0]
            if run.kind is LORA:
                for state in run.past_states.values():
                    assert state[slot, 0] == wrote[rows[slot].number]
            wrote[rows[slot].number] = begin + 1 + (place if len(runs) > 1 else 0)


# ── on ONNX Runtime ────────────────────────────────────────────────────────────────────────────────────────────

# Of the first six layers of a family
PAIR = {"drop_layers": (2, 4), "always_first": 1}
CHANGE = {"surrogate": "residual-delta", "drop_layers": (1, 2, 4), "always_first": 1, "rank": 4}
ANCHOR = {"surrogate": "anchor", "injection": "attn_mlp"}
BUNDLES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "residual": ("llama", PAIR, ("skip", "backfill", "lossless")),
    "recurrent": ("qwen2", PAIR | {"surrogate": "recurrent"}, ("skip", "backfill", "lossless")),
    "change": ("llama", CHANGE, ("skip", "backfill", "lossless")),
    "anchor, halves": ("llama_mqa", PAIR | ANCHOR, ("skip", "backfill", "lossless")),
    "fill": ("qwen2", PAIR | {"policy": "fill"}, ("fill",)),
    "int8 caches": ("llama", PAIR | {"kv_dtype": "int8"}, ("skip", "backfill")),
}


@pytest.fixture(scope="module", params=BUNDLES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, tuple[str, ...]]:
    name, options, policies = BUNDLES[request.param]
    source = first_layers(name, 6)
    return make_adapted_bundle(source, tmp_path_factory.mktemp("batch"), max_batch=8, **options), policies


def alone(bundle: Bundle, request: Request) -> list[int]:
    session = kept_session(bundle.root, request.policy)
    (tokens,) = session.generate([request.prompt], request.new_tokens, **request.options)
    return tokens.tolist()


def test_tokens_are_those_of_each_row_alone(served: tuple[Bundle, tuple[str, ...]], capsys) -> None:
    """Strict: whenever rows come and go, whatever k, policy and schedule the others have, greedily and by draws."""
    bundle, policies = served
    near_ties = compared = 0

    @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(requests(90, 24, policies, lenient=True), min_size=2, max_size=8), st.integers(2, 4))
    def check(script: list[Request], count: int) -> None:
        nonlocal near_ties, compared
        policy = "fill" if policies == ("fill",) else "backfill"
        with Batch.open(bundle.root, slots=count, policy=policy, threads=1) as batch:
            found = decoded(batch, script, logprobs=2)
        for request, events in zip(script, found, strict=True):
            tokens, wanted = check_ends(request, events), alone(bundle, request)
            compared += len(wanted)
            place = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), None)
            if place is None:
                assert tokens == wanted[: len(tokens)]
                assert request.cancel is not None or tokens == wanted
                continue
            (_, first), (_, second) = events[place].top_logprobs
            assert not request.temperature, f"another draw: {request}"
            assert first - second < NEAR, f"{request}: {tokens} and alone {wanted}"
            near_ties += 1

    check()
    assert compared > 100
    assert near_ties <= 1, f"{near_ties} near-ties in {compared} tokens"


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = CHANGE | {"surrogate": "recurrent", "targets": ("ort", "openvino")}
    return make_adapted_bundle(first_layers("qwen2", 6), tmp_path_factory.mktemp("recurrent"), **options)


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_lora_step_that_was_interrupted_runs_again_from_the_state_before_it(
    target: str, recurrent: Bundle, capsys
) -> None:
    """Wherever Ctrl-C comes in its tick, the logprobs of what follows are those of a session."""
    prompt, wanted = [3, 1, 4], []
    with Session.open(recurrent.root, target=target, policy="backfill", k=3, threads=1) as session:
        logits = session.prefill([prompt], max_new_tokens=5)[0]
        for _ in range(5):
            token = int(logits.argmax())
            wanted.append((token, float(logits[token] - np.logaddexp.reduce(logits))))
            logits = session.step([token])[0] if len(wanted) < 5 else logits
    failed = 0
    with Batch.open(recurrent.root, target=target, policy="backfill", k=3, threads=1, slots=1) as batch:
        for count in range(90 + 2 * (target == "ort"), 300, 4):
            batch.add(prompt, 5, logprobs=0, stop_token_ids=[])
            events = [*batch.tick(), *batch.tick()]
            with interrupted(count):
                events += batch.tick()
            while batch.rows:
                events += batch.tick()
            told = [(event.token, event.logprob) for event in events if event.token is not None]
            failed += len(told) < 5
            assert [token for token, _ in told] == [token for token, _ in wanted[: len(told)]], count
            np.testing.assert_allclose([one for _, one in told], [one for _, one in wanted[: len(told)]], atol=NEAR)
    assert 0 < failed < 50  # of a row whose token was being chosen


def test_a_prompt_that_is_scored_changes_nothing_else(tmp_path) -> None:
    """Its tokens come first, then the same events as without; beside it another row keeps its own."""
    bundle = make_bundle("llama", tmp_path / "b", drop_ratio=0.5, max_batch=2)
    prompt = [(5 * place + 2) % 131 for place in range(27)]
    found = []
    for scores in (False, True):
        events = defaultdict(list)
        with Batch.open(bundle.root, slots=2, k=3, policy="backfill", threads=1) as batch:
            beside = batch.add(prompt[::-1], 12, logprobs=0)
            row = batch.add(prompt, 12, logprobs=2, prompt_logprobs=scores)
            while batch.rows:
                for event in batch.tick():
                    events[event.row].append(event)
        told = [event for event in events[row] if event.is_prompt]
        assert [event.token for event in told] == (prompt if scores else [])
        assert told == events[row][: len(told)]
        found.append([event for event in (*events[row], *events[beside]) if not event.is_prompt])
    for plain, scored in zip(*found, strict=True):
        assert (plain.row, plain.token, plain.kind) == (scored.row, scored.token, scored.kind)
        assert plain.logprob == pytest.approx(scored.logprob, abs=1e-4)


@pytest.mark.parametrize("policy", ["skip", "backfill", "lossless"])
def test_what_follows_a_context_has_the_logprobs_of_its_steps(policy: str, tmp_path) -> None:
    """As a session gives them that is fed the same tokens; rows of other contexts and one that writes run beside."""
    bundle = make_bundle("llama", tmp_path / "b", drop_ratio=0.5, max_batch=4)
    ids = [(5 * place + 2) % 131 for place in range(23)]
    found = defaultdict(list)
    with Batch.open(bundle.root, slots=3, k=3, policy=policy, threads=1) as batch:
        rows = {
            batch.add(ids, 2, logprobs=1, stop_token_ids=[], prompt_logprobs=True, context_tokens=context): context
            for context in (1, 9, 22, 23)
        }
        batch.add(ids[::-1], 12)
        while batch.rows:
            for event in batch.tick():
                found[event.row].append(event)
    for row, context in rows.items():
        events = found[row]
        assert [event.token for event in events if event.is_prompt] == ids
        assert len(events) == len(ids) + 2
        fed = [*ids, *(event.token for event in events[len(ids) :])]
        k = 0 if policy == "lossless" else 3
        with Session.open(bundle.root, k=k, policy=policy, threads=1) as session:
            logits = [session.prefill(np.array([fed[:context]]), max_new_tokens=len(fed) - context)[0].astype(float)]
            logits += [session.step(np.array([token]))[0].astype(float) for token in fed[context:-1]]
        for event, token, each in zip(events[context:], fed[context:], logits, strict=True):
            wanted = each - np.log(np.exp(each).sum())
            assert event.logprob == pytest.approx(wanted[token], abs=1e-4)
            assert event.top_logprobs[0][1] == pytest.approx(wanted.max(), abs=1e-4)


def test_the_likeliest_tokens_of_ties_are_the_lower_ids() -> None:
    """As if all were sorted: the same as a stable sort, whatever their number."""
    logits = np.repeat(np.random.default_rng(3).permutation(12), 2).astype(np.float32)
    for number in (0, 1, 2, 3, 7, 24, 99):
        logprob, found = logprobs_of(5, logits, number)
        wanted = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
        assert logprob == pytest.approx(wanted[5])
        assert [token for token, _ in found] == np.argsort(-logits, kind="stable")[:number].tolist()
        assert [value for _, value in found] == pytest.approx(sorted(wanted, reverse=True)[:number])


def test_logprobs_are_those_of_the_full_softmax(tmp_path) -> None:
    bundle = make_bundle("llama", tmp_path / "b", max_batch=4)
    prompt = [3, 14, 15, 92]
    with Batch.open(bundle.root, slots=2, k=0, threads=1) as batch:
        batch.add(prompt, 3, logprobs=4, stop_token_ids=[])
        events = [event for _ in range(3) for event in batch.tick()]
    text = list(prompt)
    with Session.open(bundle.root, k=0, threads=1) as session:
        for event in events:
            logits = session.prefill(np.array([text]))[0].astype(np.float64)
            wanted = logits - np.log(np.exp(logits).sum())
            assert event.token == int(logits.argmax())
            assert event.logprob == pytest.approx(wanted.max(), abs=1e-4)
            best = np.argsort(-wanted)[:4]
            assert [token for token, _ in event.top_logprobs] == best.tolist()
            assert [logprob for _, logprob in event.top_logprobs] == pytest.approx(wanted[best].tolist(), abs=1e-4)
            text.append(event.token)
    assert [event.finished for event in events] == [None, None, "length"]


def test_logits_of_several_tokens_share_their_memory(tmp_path) -> None:
    """Where now more and now fewer drafts are verified, as much is held as the most need."""
    bundle = make_bundle("llama", tmp_path / "b", max_batch=4)
    with Batch.open(bundle.root, slots=2, policy="lossless", draft="ngram", k=9, threads=1) as batch:
        for number in range(8):
            batch.add([1, 2, 3] * (2 + number), 20, stop_token_ids=[], k=1 + number)
        while batch.rows:
            batch.tick()
        outputs = {wanted: logits for wanted, (logits, _) in batch._slots._outputs.items() if wanted > 1}
        assert len(outputs) > 1
        widest = outputs[max(outputs)]
        assert all(logits.shape[:2] == (2, wanted) for wanted, logits in outputs.items())
        assert all(np.shares_memory(logits, widest) for logits in outputs.values())


def test_rows_reach_the_last_slot_beside_a_prompt(tmp_path) -> None:
    """A row that fills its slot to the end while another's prompt comes in: nothing is written past it."""
    bundle = make_bundle("llama", tmp_path / "b", max_batch=4, max_seq_len=40)
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 90, count).tolist() for count in (4, 30))
    script = [
        Request(tuple(first), 36, 2, "backfill", False, 0.0, 0, 0),
        Request(tuple(second), 10, 2, "backfill", False, 0.0, 0, 33),
    ]
    with Batch.open(bundle.root, slots=2, policy="backfill", threads=1) as batch:
        found = decoded(batch, script)
    for request, events in zip(script, found, strict=True):
        assert check_ends(request, events) == alone(bundle, request)
