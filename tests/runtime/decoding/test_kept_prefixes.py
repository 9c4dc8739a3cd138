"""Batches whose rows take over what others have run, in slots: what lies where, tokens, and what really runs.

Target openvino, whose rows share blocks, has tests of its own (engines/openvino/test_kept_prefixes.py).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Batch, Event, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding import batch as module
from lora_drop_runtime.decoding.batch import CHUNK
from lora_drop_runtime.decoding.slots import Slots

from tests.support.bundles import first_layers, make_adapted_bundle, make_bundle, traced_family
from tests.support.decoding import PLAN, RECURRENT, assert_refused, prompts_run, slots, ticked_through
from tests.support.fake_engine import KINDS, VOCAB, FakeEngine
from tests.support.models import FAMILIES

from .test_batch import Request, check_ends, decoded, fake_batch, fake_tokens, interrupted, requests

CLOSE = 2e-4  # of logprobs, which other orders of sums change
NEAR = 1e-3  # of the largest |logit|: two best logits that are nearer may change places


def keeping(policy: str = "backfill", k: int = 2, kind: str = "idle rows", **options: Any) -> tuple[Batch, FakeEngine]:
    return fake_batch(policy, k, kind, **{"keep_prefixes": True, "max_seq_len": 400, "max_prompt_len": 300} | options)


def answered(batch: Batch, prompt: list[int], new_tokens: int = 6, **options: Any) -> tuple[list[int], int]:
    """A row's tokens, and how many of its prompt were not run."""
    row = batch.add(prompt, new_tokens, stop_token_ids=[], **options)
    events, _ = ticked_through(batch)
    (reused,) = {event.reused for event in events if event.row == row}
    return [event.token for event in events if event.row == row and event.token is not None], reused


def check_kept(batch: Batch) -> None:
    """What rows that are over have left lies apart, and behind the rows that run; every layer has all of it."""
    assert batch._prefixes is not None
    places = [one.place for one in batch._prefixes._kept]
    assert len(set(places)) == len(places)
    assert all(len(batch._rows) <= place < batch.slots for place in places)
    for one in batch._prefixes._kept:
        for cache in batch._slots.buffers.caches.values():
            assert slots(cache, one.place, len(one.tokens)) == one.tokens.tolist()


SHARED = st.lists(st.integers(0, 2), max_size=9)  # of few tokens, so that prompts begin alike


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(requests(VOCAB, 3, ("skip", "backfill", "lossless")), SHARED), min_size=2, max_size=9),
    st.integers(1, 5),
    st.sampled_from(tuple(KINDS)),
    st.sampled_from((1, 3, 128)),
    st.booleans(),
)
def test_caches_and_tokens(drawn: list[Any], count: int, kind: str, chunk: int, join_early: bool) -> None:
    """After every tick, of rows that run and of what is kept; then a second turn of each row."""
    greedy = {"temperature": 0.0, "counted": False}
    script = [Request(**{**vars(one), **greedy, "prompt": (*begin, *one.prompt)}) for one, begin in drawn]
    sizes = {"max_seq_len": 80, "max_prompt_len": 60}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "CHUNK", chunk)
        patched.setattr(module, "_WORTH_WAITING", 2)
        batch, _ = keeping(slots=count, kind=kind, join_early=join_early, **sizes)
        ran, told, plain = prompts_run(batch), defaultdict(list), batch.tick

        def ticked() -> list[Event]:
            waiting = batch.waiting
            events = plain()
            assert len(batch._waiting) == waiting
            for event in events:
                told[event.row] += [event.token] * (event.token is not None)
            for slot, row in enumerate(batch._rows):
                text = row._prompt + told[row.number]
                assert row.exact.tolist() == text[: len(row.exact)]
                for cache in batch._slots.buffers.caches.values():
                    assert slots(cache, slot, len(row.exact)) == text[: len(row.exact)]
            check_kept(batch)
            return events

        batch.tick = ticked  # type: ignore[method-assign]
        for _ in range(2):
            found = decoded(batch, script, patient=not join_early)
            for request, events in zip(script, found, strict=True):
                tokens, wanted = check_ends(request, events), fake_tokens(request)
                assert tokens == (wanted if request.cancel is None else wanted[: len(tokens)])
                (reused,) = {event.reused for event in events}
                if tokens:
                    assert ran[events[0].row] == len(request.prompt) - reused
            turns = [(*request.prompt, *told[events[0].row], 1) for request, events in zip(script, found, strict=True)]
            script = [Request(**{**vars(one), "prompt": turn}) for one, turn in zip(script, turns, strict=True)]


@pytest.mark.parametrize(
    ("policy", "k", "exact"),
    [("skip", 2, 0), ("skip", 0, 8), ("backfill", 2, 6), ("backfill", 0, 8), ("lossless", 2, 8), ("lossless", 0, 8)],
)
def test_what_a_second_turn_takes_over(policy: str, k: int, exact: int) -> None:
    """9 tokens were told, of which the last is not fed; LoRA steps leave nothing, until a refresh takes them back."""
    batch, _ = keeping(policy, k)
    ran = prompts_run(batch)
    first = list(range(40))
    reply, reused = answered(batch, first, 9)
    assert reused == 0
    turn = [*first, *reply, 1, 2, 3]
    assert answered(batch, turn)[1] == 40 + exact
    assert answered(batch, turn)[1] == len(turn) - 2  # the last one has to give logits, and does not run alone
    assert answered(batch, [*first[:35], 1, 1])[1] == 35
    assert answered(batch, turn, logprobs=0, prompt_logprobs=True)[1] == 0
    assert ran == {0: 40, 1: 12 - exact, 2: 2, 3: 2, 4: len(turn)}


def test_rows_of_one_prompt_run_it_once() -> None:
    prompt = np.random.default_rng(1).integers(0, VOCAB, 200).tolist()
    batch, _ = keeping()
    ran = prompts_run(batch)
    rows = [batch.add([*prompt, token], 3, stop_token_ids=[]) for token in range(3)]
    overtakes = batch.add([5, 6], 3, stop_token_ids=[])
    assert batch.waiting == 2
    batch.tick()
    assert batch.waiting == 2
    assert [row.number for row in batch._rows] == [rows[0], overtakes]
    ticked_through(batch)
    assert ran == {rows[0]: 201, rows[1]: 2, rows[2]: 2, overtakes: 2}


@pytest.mark.parametrize("count", range(1, 9))
def test_the_last_token_of_a_prompt_does_not_run_alone(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of it is there, and whatever chunks it comes in."""
    monkeypatch.setattr(module, "CHUNK", 4)
    batch, engine = keeping(k=0)
    prompt = list(range(20, 20 + count))
    for there in range(count + 1):
        begun = len(engine.runs)
        _, reused = answered(batch, [*prompt[:there], *(there + 1 for _ in prompt[there:])], 1)
        widths = [run.input_ids.shape[1] for run in engine.runs[begun:]]
        assert sum(widths) == count - reused
        assert max(widths) <= 4
        assert widths[-1] >= min(count, 2)


def test_prompts_that_begin_with_little_in_common_do_not_wait() -> None:
    batch, _ = keeping()
    for token in range(3):
        batch.add([*range(31), token], 3)
    batch.tick()
    assert len(batch._rows) == 3


def test_prompts_that_wait_are_compared_as_they_lie() -> None:
    """In every tick no array of them is made; and they are what they were when they were added."""
    batch, _ = keeping(slots=2)
    prompt = np.arange(50)
    rows = [batch.add(prompt, 3) for _ in range(2)]
    prompt[:] = 7
    for row in batch._waiting:
        assert np.shares_memory(row.reusable, row.will_run)
        assert row.reusable.tolist() == list(range(48))
        assert row.will_run.tolist() == list(range(50))
    events, _ = ticked_through(batch)
    assert {event.reused for event in events if event.row == rows[1]} == {48}


def test_a_scored_prompt_keeps_nobody_waiting() -> None:
    """It goes in by 8 tokens a tick."""
    batch, _ = keeping(slots=2)
    batch.add(list(range(40)), 3, logprobs=0, prompt_logprobs=True)
    batch.add(list(range(40)), 3)
    batch.tick()
    assert len(batch._rows) == 2


# ── which slot ─────────────────────────────────────────────────────────────────────────────────────────────────


def chat(number: int) -> list[int]:
    return np.random.default_rng(number).integers(0, VOCAB, 20).tolist()


def test_as_many_chats_as_slots_take_turns() -> None:
    """Each finds its own in its turn, wherever it has been put meanwhile."""
    batch, _ = keeping(slots=3, k=0)
    chats = [chat(number) for number in range(3)]
    for turn in range(4):
        for own in chats:
            reply, reused = answered(batch, own, 3)
            assert reused == (len(own) - 3 if turn else 0)
            own += [*reply, 7, 7]
            check_kept(batch)


def test_the_text_that_was_used_least_recently_goes() -> None:
    batch, _ = keeping(slots=3, k=0)
    for number in (0, 1, 2):
        answered(batch, chat(number))
    assert answered(batch, chat(0))[1] == 18
    answered(batch, chat(3))
    assert batch._prefixes is not None
    assert [one.tokens[:20].tolist() for one in batch._prefixes._kept] == [chat(2), chat(0), chat(3)]


def test_a_text_is_kept_where_its_slot_is_taken_over_in_part() -> None:
    batch, _ = keeping(slots=2, k=0)
    answered(batch, chat(0))
    assert answered(batch, [*chat(0)[:10], 1, 2])[1] == 10
    assert answered(batch, [*chat(0), 1, 2])[1] == 20


def test_a_single_slot_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied."""
    batch, _ = keeping(slots=1, k=0)
    monkeypatch.setattr(Slots, "copy", None)
    reply, _ = answered(batch, chat(0), 3)
    assert answered(batch, [*chat(0), *reply, 1, 2], 3)[1] == 22
    assert answered(batch, chat(0), 3)[1] == 18


def test_a_running_row_gives_its_prompt_on() -> None:
    batch, _ = keeping(slots=2, k=0)
    batch.add(chat(0), 50)
    batch.tick()
    assert answered(batch, [*chat(0), 1, 2])[1] == 20


@pytest.mark.parametrize("count", range(1, 1200, 13))
def test_an_interrupt_in_any_line_spoils_nothing(count: int) -> None:
    """While rows are admitted and end that begin with texts of others."""
    batch, _ = keeping(slots=3, k=1)
    asked = [(*range(9), *chat(number)[: 2 + number]) for number in range(6)]
    events: list[Event] = []
    for prompt in asked[:3]:
        batch.add(prompt, 3 + len(prompt) % 3, stop_token_ids=[])
        events += batch.tick()
    for prompt in asked[3:]:
        batch.add(prompt, 3 + len(prompt) % 3, stop_token_ids=[])
    with interrupted(count):
        while batch.rows:
            events += batch.tick()
    for prompt in asked:
        batch.add((*prompt, 1), 2, stop_token_ids=[])
    while batch.rows:
        events += batch.tick()
        check_kept(batch)
    for number, prompt in enumerate([*asked, *((*prompt, 1) for prompt in asked)]):
        own = [event for event in events if event.row == number]
        request = Request(prompt, 9, 1, "backfill", False, 0.0, 0, 0)
        tokens = [event.token for event in own if event.token is not None]
        assert own[-1].finished in ("length", "failed")
        assert tokens == fake_tokens(request)[: len(tokens)]
    assert sum(event.finished == "failed" for event in events) <= 1


@pytest.mark.parametrize("place", range(1, 9))
@pytest.mark.parametrize("method", ["copy", "exchange", "release", "admit"])
@pytest.mark.parametrize("before", [False, True])
def test_interrupts_spoil_nothing(method: str, place: int, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or behind the n-th call of what moves entries."""
    plain, calls = getattr(Slots, method), 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == place and before:
            raise KeyboardInterrupt
        plain(*arguments)
        if calls == place:
            raise KeyboardInterrupt

    monkeypatch.setattr(Slots, method, interrupted)
    batch, _ = keeping(slots=3, plan=RECURRENT)
    texts = [[*range(9), *chat(number)[: 2 + 2 * number]] for number in range(5)]
    script = [
        Request(tuple(one), 3 + 2 * number, 2, "backfill", False, 0.0, 0, number) for number, one in enumerate(texts)
    ]
    for request in [*script, *script]:
        row = batch.add(request.prompt, request.new_tokens, stop_token_ids=[])
        if request is not script[1]:
            events, _ = ticked_through(batch)
            check_kept(batch)
            tokens = [event.token for event in events if event.row == row and event.token is not None]
            assert tokens == fake_tokens(request)


def test_an_engine_on_a_gpu_keeps_none() -> None:
    engine = FakeEngine(PLAN)
    engine.many_requests = False
    batch, _ = keeping()
    bundle = batch.bundle
    ours = Batch(bundle, engine, batch.schedule, "backfill", keep_prefixes=True)
    assert ours._prefixes is None
    assert ours.describe().endswith("no prefixes are kept by this engine")
    assert Batch(bundle, engine, batch.schedule, "backfill", slots=1).describe().startswith("1 slot of ")
    for _ in range(2):
        assert answered(ours, [1, 2, 3])[1] == 0


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_what_is_no_flag(wrong: Any) -> None:
    assert_refused(lambda: keeping(keep_prefixes=wrong), "keep_prefixes", str(wrong))


# ── on target ort ──────────────────────────────────────────────────────────────────────────────────────────────

BUNDLES: dict[str, dict[str, Any]] = {
    "residual": {},
    "recurrent": {"surrogate": "recurrent", "rank": 4},
    "anchor, fill": {"surrogate": "anchor", "policy": "fill"},
}
TEXTS = [np.random.default_rng(seed).integers(0, 131, 60).tolist() for seed in (1, 2)]


@pytest.fixture(scope="module", params=BUNDLES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Bundle, dict[str, Session]]]:
    source, options = first_layers("qwen3", 6), {"always_first": 1, "max_batch": 8} | BUNDLES[request.param]
    bundle = make_adapted_bundle(source, tmp_path_factory.mktemp("served"), **options)
    policies = ("fill",) if "policy" in options else ("skip", "backfill", "lossless")
    with contextlib.ExitStack() as stack:
        root = bundle.root
        yield bundle, {policy: stack.enter_context(Session.open(root, policy=policy, threads=1)) for policy in policies}


def check_row(session: Session, request: Request, events: list[Event]) -> int:
    """Tokens and logprobs are those of a row alone, up to its first near-tie; returns how many were compared."""
    check_ends(request, events)
    k, compared = 0 if request.policy == "lossless" else request.k, 0
    logits = session.prefill(np.array([request.prompt]), max_new_tokens=request.new_tokens, k=k)[0]
    for event in events:
        second, first = np.sort(logits)[-2:]
        if event.finished == "cancelled" or first - second < NEAR * np.abs(logits).max():
            break
        token, shifted = int(logits.argmax()), logits.astype(np.float64) - logits.max()
        if event.token is None:
            assert token in request.stops
            break
        assert event.token == token, f"{request}: token {compared}"
        assert event.logprob == pytest.approx(-np.log(np.exp(shifted).sum()), abs=CLOSE)
        compared += 1
        if event.finished is None:
            logits = session.step([token])[0]
    return compared


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_prompt_has_the_same_bits_the_second_time(target: str, tmp_path: Path, capsys) -> None:
    """In int4, where a token that runs alone rounds otherwise; the prompt has a token more than a chunk."""
    count = CHUNK + 1
    sizes = {"max_batch": 8, "max_seq_len": 256, "max_prompt_len": 200, "always_first": 1}
    root = make_bundle(first_layers("qwen3", 4), tmp_path / "b", targets=(target,), dtype="int4", **sizes).root
    prompt = np.random.default_rng(count).integers(0, 131, count).tolist()
    found = []
    with Batch.open(root, slots=1, k=0, threads=1, keep_prefixes=True) as batch:
        for reused in (0, count - 2):
            batch.add(prompt, 1, stop_token_ids=[], logprobs=5)
            (event,) = ticked_through(batch)[0]
            assert event.reused == reused
            found.append((event.token, event.logprob, event.top_logprobs))
    assert found[0] == found[1]


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_row_of_no_numbers_leaves_nothing(target: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """Neither when it has failed, nor while the rest of its prompt runs. A token that is no number spoils the entries
    of those before it, which come in the same chunk."""
    monkeypatch.setattr(module, "CHUNK", 64)
    bad, begin, model = 77, list(range(10, 50)), FAMILIES["qwen3"]()
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    spoilt = traced_family("qwen3", model, "float32")
    root = make_bundle(spoilt, tmp_path / "b", targets=(target,), drop_ratio=0.5, max_batch=8).root
    prompt = [*begin, 1, 2]
    with Session.open(root, k=0, threads=1) as session:
        wanted = session.generate([prompt], 6, stop_token_ids=())[0].tolist()
    with Batch.open(root, slots=3, k=0, threads=1, keep_prefixes=True) as batch:
        for rest in (3, 50):
            first = batch.add([*begin, bad, *range(rest)], 6)
            events = batch.tick()
            row = batch.add(prompt, 6, stop_token_ids=[])
            events += ticked_through(batch)[0]
            assert [event.finished for event in events if event.row == first] == ["failed"]
            assert [event.token for event in events if event.row == row] == wanted


def test_rows_are_as_alone(served: tuple[Bundle, dict[str, Session]], capsys) -> None:
    """Whenever they come and go, whatever was run before; then a second turn of each, which begins with the first."""
    bundle, sessions = served
    policies = tuple(sessions)
    compared = reused = 0
    begun = st.tuples(st.sampled_from(TEXTS), st.integers(0, 60)).map(lambda one: one[0][: one[1]])

    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(requests(131, 8, policies), begun), min_size=2, max_size=7), st.integers(1, 4), st.booleans()
    )
    def check(drawn: list[Any], count: int, join_early: bool) -> None:
        nonlocal compared, reused
        changed = {"temperature": 0.0, "counted": False, "adaptive": False} | ({"k": 0} if join_early else {})
        script = [Request(**{**vars(one), **changed, "prompt": (*begin, *one.prompt)}) for one, begin in drawn]
        options = {"slots": count, "policy": policies[0], "k": 0, "join_early": join_early, "threads": 1}
        with Batch.open(bundle.root, keep_prefixes=True, **options) as batch:
            ran = prompts_run(batch)
            for _ in range(2):
                found = decoded(batch, script, logprobs=0, patient=not join_early)
                turns = []
                for request, events in zip(script, found, strict=True):
                    compared += check_row(sessions[request.policy], request, events)
                    if events[0].token is not None:
                        assert ran[events[0].row] == len(request.prompt) - events[0].reused
                        reused += events[0].reused
                    turns.append((*request.prompt, *(event.token for event in events if event.token is not None), 1, 2))
                script = [Request(**{**vars(one), "prompt": turn}) for one, turn in zip(script, turns, strict=True)]

    check()
    assert compared > 100
    assert reused > 150
