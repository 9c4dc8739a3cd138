"""Drafts and their verification on the fake engine: what is run, on which lengths, and what a request is left as."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.decoding.drafts import Text
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule, Schedule

from tests.support.decoding import LORA, PLAN, PLANS, RAGGED, REFRESH, assert_refused, continued, padded, slots
from tests.support.fake_engine import FakeEngine, Run, make_manifest, open_session

from .test_batch import interrupted

NOTHING_DROPPED = PLANS["nothing dropped"]


class Drafter(FakeEngine):
    """The fake model, sure of itself; its LoRA steps err at some positions and are unsure at others."""

    def __init__(
        self,
        plan: DropPlan = PLAN,
        errs: Callable[[int], bool] = lambda position: False,
        unsure: Callable[[int], bool] = lambda position: False,
        **options: Any,
    ) -> None:
        super().__init__(plan, **options)
        self.errs, self.unsure = errs, unsure

    def _predict(self, run: Run) -> None:
        super()._predict(run)
        logits = run.binding.outputs["logits"]
        logits *= 20
        if run.kind is LORA:
            for row, position in enumerate(run.len_kept.tolist()):
                if self.errs(position):
                    logits[row] = np.roll(logits[row], 1)
                if self.unsure(position):
                    logits[row] = 0


def lossless(engine: FakeEngine, k: int | str = 3, draft: str | None = None, eos: tuple[int, ...] = ()) -> Session:
    bundle = open_session(engine.plan, engine=engine, eos=eos)[0].bundle
    return Session(bundle, engine, PeriodicSchedule(3) if k == "auto" else PeriodicSchedule(int(k)), "lossless", draft)


def fed(run: Run) -> list[list[int]]:
    return run.input_ids.tolist()


ERRS = {
    "never": lambda position: False,
    "always": lambda position: True,
    "sometimes": lambda position: position % 3 == 1,
    "in runs": lambda position: position // 4 % 2 == 1,
}


@pytest.mark.parametrize("draft", ["lora", "ngram", "both"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("errs", ERRS.values(), ids=ERRS.keys())
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_the_tokens_and_caches_are_those_of_the_full_schedule(k: int, errs, together: bool, draft: str) -> None:
    """Of one row and of several, whatever the drafts are; a plain run of refreshes leaves the same lengths."""
    for prompts in (RAGGED, RAGGED[1:2]):
        for count in (1, 2, 3, 13):
            engine = Drafter(errs=errs, unsure=lambda position: position % 5 == 2)
            engine.behave("together" if together else "one by one")
            session = lossless(engine, k, draft)
            rows = session.generate(prompts, count, stop_token_ids=())
            assert [row.tolist() for row in rows] == [continued(prompt, count) for prompt in prompts]
            request = session._running()
            assert request.len_kept.tolist() == [len(p) + count - 1 for p in prompts]
            for row, prompt in enumerate(prompts):
                whole = prompt + continued(prompt, count - 1)
                # A row that is over may have lost its last slots, which then do not count
                sure = request.dropped[row]
                assert len(prompts) > 1 or sure == len(whole)
                for cache in request.caches.values():
                    assert slots(cache, row, sure) == whole[:sure]
            assert request.steps_done == request.max_steps
            full = functools.partial(session.step, [1] * len(prompts))
            assert_refused(full, "caches are full")


OPTIONS = {
    "presence": SamplingOptions(presence_penalty=2, logit_bias={7: 39, 11: 38.7}),
    "frequency": SamplingOptions(frequency_penalty=0.7, presence_penalty=-0.3, logit_bias={7: 40.7, 11: 40.2}),
    "bias": SamplingOptions(logit_bias=dict.fromkeys(range(0, 50, 3), -100) | {7: 1}),
    "all": SamplingOptions(
        repetition_penalty=1.02, presence_penalty=1, frequency_penalty=0.5, logit_bias={7: 39, 11: 39.5}
    ),
    "drawn": SamplingOptions(4, seed=5, min_p=0.02, frequency_penalty=0.5, logit_bias={7: 40, 11: 40}),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("errs", ERRS.values(), ids=ERRS.keys())
def test_penalties_and_biases_choose_what_they_choose_in_the_full_schedule(options: SamplingOptions, errs) -> None:
    """They change from draft to draft. The model's favourite is 40 before the rest; several tokens come again and
    again."""
    wanted = lossless(Drafter(errs=errs), 0).generate(RAGGED, 30, sampling=options, stop_token_ids=())
    assert any(row.tolist() != continued(prompt, 30) for row, prompt in zip(wanted, RAGGED, strict=True))
    accepted = 0
    for row, draft in enumerate(("ngram",) if options.temperature else ("lora", "ngram", "both")):
        for column, k in enumerate((1, 3, 5)):
            engine = Drafter(errs=errs)
            engine.behave(("together", "one by one")[(row + column) % 2])
            session = lossless(engine, k, draft)
            rows = session.generate(RAGGED, 30, sampling=options, stop_token_ids=())
            assert [row.tolist() for row in rows] == [row.tolist() for row in wanted]
            accepted += sum(sum(cycle.accepted) for cycle in session.statistics().cycles)
    assert accepted


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [5, 9])
@pytest.mark.parametrize("then", ["truncation", "fork", "next request"])
def test_a_row_that_was_over_first_goes_on_from_what_it_wrote(then: str, count: int, together: bool) -> None:
    """What others wrote over its last entries runs again."""
    engine = Drafter(errs=lambda position: position % 4 == 1)
    engine.batched_chunks = together
    session = lossless(engine)
    prompts = [list(range(20, 30)), [5], [7, 3]]
    stops = [continued(prompts[0], count)[-1]]  # the longest row is over first
    rows = session.generate(prompts, 9, stop_token_ids=stops)
    if then == "next request":
        texts = [[*prompt, *row.tolist(), 4] for prompt, row in zip(prompts, rows, strict=True)]
        session.prefill(*padded(texts), reuse_prefix=True)
    else:
        texts = [[*tokens[:-1], 4] for tokens in session._running().tokens]
        session.truncate([len(text) - 1 for text in texts])
        session = session.fork() if then == "fork" else session
        session.step([4, 4, 4])
    request = session._running()
    assert request.kept == request.dropped == [len(text) for text in texts]
    for row, text in enumerate(texts):
        for cache in request.caches.values():
            assert slots(cache, row, len(text)) == text


def test_a_cycle_feeds_what_was_chosen_to_lora_steps_and_verifies_it_in_one_run() -> None:
    engine = Drafter(errs=lambda position: position == 8)
    session = lossless(engine, 3)
    tokens = session.generate([[5, 6, 7]], 9, stop_token_ids=())[0].tolist()
    assert tokens == continued([5, 6, 7], 9)
    runs = engine.runs[1:]
    assert [run.kind for run in runs] == [*[LORA] * 3, REFRESH, *[LORA] * 3, REFRESH, LORA, REFRESH]
    first, second, last = (run for run in runs if run.kind is REFRESH)
    assert fed(first) == [tokens[:4]]  # all accepted, and a token of the verifier's
    assert first.logits_index.tolist() == [[0, 1, 2, 3]]
    assert fed(second)[0][:2] == tokens[4:6]
    assert second.len_kept.tolist() == second.len_dropped.tolist() == [7]
    assert [fed(run)[0][0] for run in runs[:3]] == tokens[:3]
    assert [run.len_kept.tolist() for run in runs[:3]] == [[3], [4], [5]]
    assert fed(second)[0][2] != tokens[6]
    assert fed(last) == [tokens[6:8]]
    assert last.len_kept.tolist() == last.len_dropped.tolist() == [9]
    counted = session.statistics()
    assert counted.tokens == 8
    assert counted.accepted_lengths == (0, 2, 0, 1)
    assert (counted.refreshes, counted.lora_steps, counted.drafted, counted.accepted) == (3, 7, 7, 5)
    assert counted.tokens_per_refresh == pytest.approx(8 / 3)
    assert "2.67 tokens per refresh" in counted.describe()


def test_drafting_stops_where_the_draft_is_unsure_and_one_token_before_the_last() -> None:
    engine = Drafter(unsure=lambda position: position == 4)
    session = lossless(engine, 5)
    session.generate([[5, 6, 7]], 5, stop_token_ids=())
    kinds = [run.kind for run in engine.runs[1:]]
    assert kinds == [LORA, LORA, REFRESH, LORA, REFRESH]  # 5 wanted; unsure after 1; then 2 tokens are left: 1 draft
    assert [run.input_ids.shape[1] for run in engine.runs if run.kind is REFRESH] == [3, 2, 2]
    assert [cycle.drafted for cycle in session.statistics().cycles] == [(1,), (1,)]


@pytest.mark.parametrize("place", range(7))
def test_a_stop_token_inside_an_accepted_draft_ends_the_row_there(place: int) -> None:
    """Its lengths are those of a plain run that ended there: the stop token was never fed."""
    prompt = [5, 6, 7]
    tokens = continued(prompt, 12)
    session = lossless(Drafter(), 5)
    out = session.generate([prompt], 12, stop_token_ids=[tokens[place]])[0].tolist()
    end = tokens.index(tokens[place])
    assert out == tokens[:end]
    assert session._running().len_kept.tolist() == session._running().len_dropped.tolist() == [3 + end]
    plain = lossless(Drafter(), 0)
    assert plain.generate([prompt], 12, stop_token_ids=[tokens[place]])[0].tolist() == out
    assert plain._running().len_kept.tolist() == [3 + end]
    kv, plain_kv = session.kv_bytes(), plain.kv_bytes()
    assert kv == plain_kv
    assert kv["kept"] * 2 == kv["dropped"] * 4


def test_rows_end_at_their_own_stop_tokens() -> None:
    for together in (False, True):
        for stop in range(50):
            engine = Drafter(errs=ERRS["sometimes"])
            engine.behave("together" if together else "one by one")
            rows = lossless(engine, 4).generate(RAGGED, 10, stop_token_ids=[stop])
            for prompt, row in zip(RAGGED, rows, strict=True):
                tokens = continued(prompt, 10)
                assert row.tolist() == tokens[: tokens.index(stop) if stop in tokens else 10]


def test_a_stream_yields_the_tokens_one_after_another_and_can_be_closed_between_them() -> None:
    session = lossless(Drafter(), 4)
    stream = session.stream([5, 6, 7], 12, stop_token_ids=())
    assert [next(stream) for _ in range(3)] == continued([5, 6, 7], 3)
    stream.close()
    assert list(session.stream([5, 6, 7], 12, stop_token_ids=())) == continued([5, 6, 7], 12)


@pytest.mark.parametrize("at", range(2, 12))
@pytest.mark.parametrize("plan", [PLAN, PLANS["recurrent"]])
def test_an_interrupt_anywhere_leaves_lengths_that_the_request_can_go_on_from(plan: DropPlan, at: int) -> None:
    """Every token that was handed out is fed but the last: single steps go on there."""
    engine = Drafter(plan, errs=ERRS["sometimes"], interrupt_at=at)
    session = lossless(engine, 3)
    stream, tokens = session.stream([5, 6, 7], 20, stop_token_ids=()), []
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(iter(functools.partial(next, stream), None))
    assert tokens == continued([5, 6, 7], len(tokens))
    request = session._running()
    assert request.len_kept.tolist() == request.len_dropped.tolist() == [3 + len(tokens) - 1]
    engine.interrupt_at = None
    while len(tokens) < 20:
        assert session.next_step is REFRESH
        tokens.append(int(session.step([tokens[-1]])[0].argmax()))
    assert tokens == continued([5, 6, 7], 20)
    assert slots(request.caches["past_key.3"], 0, 22) == [5, 6, 7, *tokens[:-1]]


@pytest.mark.parametrize("count", range(1, 500, 9))
def test_another_request_begins_behind_an_interrupt(count: int) -> None:
    """Also where a refresh was to give more logits than any before it."""
    session = lossless(Drafter(), 3)
    with interrupted(count, "slots.py"):
        session.generate([[5, 6, 7]], 20, stop_token_ids=())
    assert session.generate([[8, 9]], 9, stop_token_ids=())[0].tolist() == continued([8, 9], 9)


def test_single_steps_are_the_full_schedule() -> None:
    session = lossless(engine := Drafter(), 3)
    session.prefill(*padded(RAGGED), max_new_tokens=6)
    for _ in range(5):
        session.step([1, 2, 3])
    assert engine.kinds == [REFRESH] * 6
    assert session.statistics() is None


@pytest.mark.parametrize("plan", [PLAN, PLANS["recurrent"]])
def test_warming_up_runs_every_width_and_both_sides_of_a_state(plan: DropPlan) -> None:
    engine = Drafter(plan)
    engine.batched_chunks = True
    session = lossless(engine, 3)
    session.warm_up(2)
    assert {run.input_ids.shape for run in engine.runs if run.kind is REFRESH} == {(2, width) for width in range(1, 5)}
    drafts = [binding for binding in engine.bindings if binding.kind is LORA]
    assert len(drafts) == (2 if plan.updated_states else 1)
    warm = len(engine.runs)
    assert session.generate([[5], [6]], 9, stop_token_ids=())[0].tolist() == continued([5], 9)
    assert len(engine.runs) > warm


def test_no_verification_is_wider_than_the_engine_takes() -> None:
    for name in ("prefill_chunk", "verified_tokens"):
        engine = Drafter()
        setattr(engine, name, 3)
        assert lossless(engine, 5).generate([[5]], 12, stop_token_ids=())[0].tolist() == continued([5], 12)
        assert max(run.input_ids.shape[1] for run in engine.runs) == 3


def test_states_are_those_of_the_last_verified_token(plan: DropPlan) -> None:
    """A LoRA step reads what the refresh before it wrote, then what the step before it wrote where steps do."""
    if not plan.sites:
        return
    engine = Drafter(plan)
    lossless(engine, 2).generate([[5, 6]], 8, stop_token_ids=())
    for number, run in enumerate(engine.runs):
        before = engine.runs[number - 1]
        for name, values in run.past_states.items():
            if before.kind is REFRESH or name.removeprefix("past_state.") in plan.updated_states:
                assert (values == number).all(), name
            else:
                assert (values == number - 1).all(), name


# ── looked-up drafts ───────────────────────────────────────────────────────────────────────────────────────────


def looked_up(tokens: list[int], count: int) -> list[int]:
    """The reference: a scan of the whole text."""
    for size in (3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                found = list(tokens)
                for place in range(end, end + count):
                    found.append(found[place])
                return found[len(tokens) :]
    return []


def test_look_up_finds_the_latest_occurrence_of_the_longest_ngram() -> None:
    generator = np.random.default_rng(3)
    for vocab in (1, 2, 3, 8):
        tokens, text = [], Text()
        for token in generator.integers(0, vocab, 120).tolist():
            assert text.continuation(4) == looked_up(tokens, 4)
            tokens.append(token)
            text.append(token)
    assert Text([1, 2, 3, 9, 1, 2, 3]).continuation(6) == [9, 1, 2, 3, 9, 1]
    assert Text([1, 2, 3]).continuation(6) == []


def test_looked_up_drafts_take_no_lora_step() -> None:
    prompt = continued([5, 6, 7], 30)
    for plan, draft in ((NOTHING_DROPPED, None), (PLAN, "ngram")):
        engine = Drafter(plan)
        session = lossless(engine, 4, draft)
        out = session.generate([prompt], 20, stop_token_ids=())[0].tolist()
        assert out == continued(prompt, 20)
        assert LORA not in engine.kinds
        repeats = [9, 8, 7] * 5
        scripted = FakeEngine(plan, script=[[9], [8], [7], [9], [8], [7], [9], [8], [7], [9], [8]])
        scripted._predict = lambda run: _repeating(run)
        session = lossless(scripted, 4, draft)
        assert session.generate([repeats], 11, stop_token_ids=())[0].tolist() == ([9, 8, 7] * 4)[:11]
        assert session.statistics().accepted_lengths == (0, 0, 0, 0, 2)


def _repeating(run: Run) -> None:
    """9, 8, 7, and so on by position."""
    logits = run.binding.outputs["logits"]
    logits[...] = 0
    position = run.len_kept[:, None] + run.logits_index
    np.put_along_axis(logits, (9 - (position + 1) % 3)[:, :, None], 20, 2)


def test_both_looks_up_first_and_drafts_where_nothing_is_found() -> None:
    engine = Drafter()
    engine.batched_chunks = True
    session = lossless(engine, 3, "both")
    rows = session.generate([[1, 2, 3, 40, 1, 2, 3], [5]], 6, stop_token_ids=())
    assert [row.tolist() for row in rows] == [continued([1, 2, 3, 40, 1, 2, 3], 6), continued([5], 6)]
    assert LORA in engine.kinds


# ── options ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_options_are_refused_where_they_change_nothing() -> None:
    bundle = open_session(PLAN)[0].bundle
    whole = open_session(NOTHING_DROPPED)[0].bundle

    def opened(schedule: int | str | Schedule = 3, policy: str = "lossless", bundle=bundle, **options: Any) -> Session:
        kind = PeriodicSchedule(3) if isinstance(schedule, int | str) else schedule
        session = Session(bundle, Drafter(bundle.manifest.plan), kind, policy, **options)
        if isinstance(schedule, int | str):
            session.prefill([[1]], max_new_tokens=2, k=schedule)
        return session

    class Own:
        def kind(self, step: int):
            return REFRESH

    for policy in ("skip", "backfill"):
        assert_refused(lambda policy=policy: opened(policy=policy, draft="ngram"), "no drafts", "'ngram'", policy)
        assert_refused(lambda policy=policy: opened("auto", policy), "k cannot be chosen", "'auto'", policy)
        call = lambda policy=policy: opened(policy=policy).generate([[1]], 2, draft="lora")  # noqa: E731
        assert_refused(call, "no drafts", "'lora'", policy)
        assert_refused(lambda policy=policy: opened(policy=policy, lenience=1), "no drafts", "lenience is 1.0", policy)
        call = lambda policy=policy: opened(policy=policy).generate([[1]], 2, lenience=0.5)  # noqa: E731
        assert_refused(call, "no drafts", "lenience is 0.5", policy)
    for wrong in (0, -0.5, 1.01, float("nan"), "much", True):
        assert_refused(lambda wrong=wrong: opened(lenience=wrong), "lenience", str(wrong))
    assert_refused(lambda: opened(draft="nigram"), "Unknown draft", "'nigram'", "lora, ngram and both")
    assert_refused(lambda: opened(draft=3), "draft has the wrong type", "3")
    assert_refused(lambda: opened(Own()), "no schedule object", "Own", "lossless")
    assert_refused(lambda: opened(-1), "k is too small", "-1", error=PlanError)
    assert_refused(lambda: opened("much"), "whole number", "'much'", error=InputError)
    for draft in ("lora", "both"):
        call = lambda draft=draft: opened(bundle=whole, draft=draft)  # noqa: E731
        assert_refused(call, "no drafts of that kind", f"'{draft}'", "drops no layer")
    assert opened(bundle=whole, draft="ngram").statistics() is None
    assert opened("auto").next_step is REFRESH


def test_nothing_of_the_kv_is_saved() -> None:
    limits = make_manifest(PLAN)
    assert limits.plan.policy == "skip"
    session = lossless(Drafter(), 3)
    session.generate([[5, 6, 7]], 9, stop_token_ids=())
    kv = session.kv_bytes()
    assert kv["kept"] / 4 == kv["dropped"] / 2
    assert kv["allocated"] == kv["kept"] + kv["dropped"]
