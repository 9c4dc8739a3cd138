"""Requests that go on from another's caches: reused prefixes, truncation, forks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.schedule import MarginSchedule, PeriodicSchedule

from tests.support import oracle
from tests.support.bundles import first_layers, make_bundle, oracle_plan, save_adapters
from tests.support.decoding import LORA, PLAN, RAGGED, RECURRENT, REFRESH, assert_refused, continued, padded, slots
from tests.support.fake_engine import KINDS, FakeEngine, open_session


def opened(policy: str, k: int = 2, kind: str = "one by one", **manifest: Any) -> tuple[Session, FakeEngine]:
    engine = FakeEngine(PLAN)
    engine.behave(kind)
    bundle = open_session(PLAN, engine=engine, **manifest)[0].bundle
    return Session(bundle, engine, PeriodicSchedule(k), policy), engine


class Holes:
    """What one row's caches should hold: the tokens, and those of them that dropped layers have seen."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens, self.seen, self.behind = list(prompt), list(range(len(prompt))), 0

    def step(self, token: int, refresh: bool, policy: str) -> None:
        self.tokens.append(token)
        self.behind = 0 if refresh else self.behind + 1
        if refresh and policy == "backfill":
            self.seen = list(range(len(self.tokens)))
        elif refresh:
            self.seen.append(len(self.tokens) - 1)

    def cut(self, count: int) -> None:
        """Keep the first tokens."""
        self.tokens = self.tokens[:count]
        self.seen = [place for place in self.seen if place < count]

    def run(self, tokens: list[int]) -> None:
        self.seen += range(len(self.tokens), len(self.tokens) + len(tokens))
        self.tokens += tokens


def check_caches(session: Session, rows: list[Holes]) -> None:
    request = session._running()
    for row, holes in enumerate(rows):
        assert request.kept[row] == len(holes.tokens)
        for name, cache in request.caches.items():
            dropped = int(name.partition(".")[2]) in PLAN.dropped_attentions
            wanted = [holes.tokens[place] for place in holes.seen] if dropped else holes.tokens
            assert slots(cache, row, len(wanted)) == wanted
        assert request.dropped[row] == len(holes.seen)


def test_nothing_is_reused_of_a_request_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches are emptied before the next one begins, since some of what it wrote may be no numbers."""
    session, _ = opened("skip")
    session.prefill([[1, 2, 3, 1]])

    def lost(*_: Any) -> None:
        raise BundleError("The device is lost.")

    monkeypatch.setattr(session, "_step", lost)
    with pytest.raises(BundleError, match="lost"):
        session.generate([[1, 2, 3, 1]], 4, stop_token_ids=())
    session.prefill([[1, 2, 3, 1, 2]], reuse_prefix=True)
    check_caches(session, [Holes([1, 2, 3, 1, 2])])


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=7)  # of few tokens, so that prefixes are shared
ACTS = st.tuples(st.lists(TEXTS, min_size=1, max_size=3), st.integers(0, 9), st.one_of(st.none(), st.integers(1, 12)))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(ACTS, min_size=1, max_size=4), st.integers(0, 3), st.sampled_from(("skip", "backfill")), st.data())
def test_caches_are_those_of_what_ran(acts: list[Any], k: int, policy: str, data: Any) -> None:
    """Requests of any rows, each begun with what it has in common with any row before, steps, truncations, forks."""
    session, engine = opened(policy, k, data.draw(st.sampled_from(tuple(KINDS))))
    engine.prefill_chunk = data.draw(st.sampled_from((None, 2)))
    rows: list[Holes] = []
    for prompts, count, cut in acts:
        begun = []
        for prompt in prompts:
            common = [
                next((n for n, (a, b) in enumerate(zip(row.tokens, prompt[:-1], strict=False)) if a != b), None)
                for row in rows
            ]
            ends = [min(len(r.tokens), len(prompt) - 1) if n is None else n for r, n in zip(rows, common, strict=True)]
            usable = [min(n, len(r.seen)) if policy == "backfill" else n for r, n in zip(rows, ends, strict=True)]
            new = Holes([])
            if usable and max(usable):
                before = rows[usable.index(max(usable))]
                new.tokens = prompt[: max(usable)]
                new.seen = [place for place in before.seen if place < max(usable)]
            new.run(prompt[len(new.tokens) :])
            begun.append(new)
        session.prefill(*padded(prompts), max_new_tokens=40, reuse_prefix=True)
        rows = begun
        check_caches(session, rows)
        since = 0
        for step in range(count):
            if cut is not None and step == count // 2:
                if data.draw(st.booleans()):
                    session = session.fork()
                for row in rows:
                    row.cut(min(cut, len(row.tokens)))
                for _ in range(data.draw(st.integers(1, 2))):
                    session.truncate(cut)
                check_caches(session, rows)
                assert session.next_step is REFRESH
                session.step([7] * len(rows))
                for row in rows:
                    row.step(7, True, policy)
                check_caches(session, rows)
                since = 0
                continue
            kind = session.next_step
            assert kind is (REFRESH if since == k else LORA)
            since = 0 if kind is REFRESH else since + 1
            column = [(step + row) % 4 for row in range(len(rows))]
            session.step(column)
            for row, token in zip(rows, column, strict=True):
                row.step(token, kind is REFRESH, policy)
            check_caches(session, rows)


def test_only_new_tokens_run() -> None:
    session, engine = opened("backfill")
    text = [5, 6, 7]
    for _ in range(4):
        reply = list(session.stream(text, 6, stop_token_ids=(), reuse_prefix=True))
        assert reply == continued(text, 6)
        text += [*reply, 9, 8]
    prompts = [run.input_ids.shape[1] for run in engine.runs if run.input_ids.shape[1] > 3]
    assert prompts == [5, 5, 5]  # the last two of a reply were not run in full; its last token and two new ones
    plain = len(engine.runs)
    session.prefill([text])
    assert engine.runs[plain].input_ids.shape == (1, len(text))


@pytest.mark.parametrize("policy", ["skip", "lossless"])
@pytest.mark.parametrize("count", range(1, 12))
def test_a_stream_that_was_closed_leaves_what_it_told(policy: str, count: int) -> None:
    """But its last token, which is not fed yet; drafts that were verified and not told are forgotten."""
    session, engine = opened(policy, k=3)
    stream = session.stream([5, 6, 7], 20, stop_token_ids=())
    tokens = [next(stream) for _ in range(count)]
    stream.close()
    assert session._running().tokens == [[5, 6, 7, *tokens[:-1]]]
    assert session._running().kept == [3 + count - 1]
    begin = len(engine.runs)
    if policy == "lossless":
        with session.fork() as fork:
            for one in (session, fork):
                for token in continued([5, 6, 7], 19)[count - 1 :]:
                    logits = one.step([token])
                assert int(logits[0].argmax()) == continued([5, 6, 7], 20)[-1]
    else:
        session.prefill([[5, 6, 7, *tokens, 1]], reuse_prefix=True)
        assert engine.runs[begin].input_ids.shape == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_steps_after_rows_have_ended_at_different_places(policy: str, kind: str) -> None:
    """A refresh runs each row's own tokens again, also those of a row that stood still for some steps."""
    session, _ = opened(policy, k=3, kind=kind)
    prompts = [[5], [6, 7]]
    texts = [continued(prompt, 12) for prompt in prompts]
    stops = [texts[0][2], texts[1][6]]
    ends = [min(text.index(stop) for stop in stops if stop in text) for text in texts]
    rows = session.generate(prompts, 12, stop_token_ids=stops)
    assert [len(row) for row in rows] == ends
    assert ends[0] != ends[1]
    request, holes = session._running(), [Holes(prompt) for prompt in prompts]
    for row, (one, text) in enumerate(zip(holes, texts, strict=True)):
        for step, token in enumerate(text[: ends[row]], 1):
            one.step(token, step % 4 == 0, policy)
    check_caches(session, holes)
    for step in range(request.steps_done + 1, request.max_steps + 1):
        kind_of_step = session.next_step
        assert (kind_of_step is REFRESH) == (step % 4 == 0)
        session.step([1, 2])
        for one, token in zip(holes, (1, 2), strict=True):
            one.step(token, kind_of_step is REFRESH, policy)
        check_caches(session, holes)


@pytest.mark.parametrize("kind", ["together", "one by one"])
def test_a_row_that_was_over_keeps_the_entries_of_its_lora_steps(kind: str) -> None:
    """The others' refresh has no room behind it."""
    session, _ = opened("backfill", k=2, kind=kind)
    prompts = [[5], list(range(20, 30))]
    texts = [continued(prompt, 4) for prompt in prompts]
    session.generate(prompts, 5, stop_token_ids=[texts[0][3], texts[1][2]])
    holes = [Holes(prompt) for prompt in prompts]
    for one, text, count in zip(holes, texts, (3, 2), strict=True):
        for step, token in enumerate(text[:count], 1):
            one.step(token, step == 3, "backfill")
    check_caches(session, holes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_a_step_of_rows_that_stood_still_reads_no_state(policy: str, kind: str) -> None:
    """None is kept for them: it runs in full, and the schedule begins anew behind it."""
    engine = FakeEngine(RECURRENT)
    engine.behave(kind)
    session = Session(open_session(RECURRENT, engine=engine)[0].bundle, engine, PeriodicSchedule(3), policy)
    prompts = [[5], [6, 7]]
    texts = [continued(prompt, 12) for prompt in prompts]
    session.generate(prompts, 16, stop_token_ids=[texts[0][3], texts[1][5]])
    assert [session._running().kept[row] - len(prompts[row]) for row in range(2)] == [3, 5]
    assert session.next_step is REFRESH
    session.step([1, 2])
    assert session._running().kept == [5, 8]
    for _ in range(3):
        assert session.next_step is LORA
        session.step([1, 2])
    assert session.next_step is REFRESH


def test_rows_of_another_request_take_the_longest_prefix() -> None:
    session, engine = opened("backfill")
    session.prefill(*padded(RAGGED))
    begin = len(engine.runs)
    prompts = [[5, 1], [23, 29, 2], [7, 3, 11, 19, 2], [40]]
    session.prefill(*padded(prompts), reuse_prefix=True)
    assert sum(run.input_ids.size for run in engine.runs[begin:]) == 4
    for row, prompt in enumerate(prompts):
        assert slots(session._running().caches["past_key.3"], row, len(prompt)) == prompt


def test_a_truncated_request_has_room_for_what_it_had() -> None:
    """All slots of kept layers; of dropped ones the refresh behind a truncation takes one more."""
    for policy in ("skip", "backfill"):
        session, _ = opened(policy, k=3, limits=Limits(max_seq_len=24, max_prompt_len=10, max_batch=2))
        session.prefill([[1, 2, 3, 4]], max_new_tokens=17)
        for cut in (12, 8, 4):
            for _ in range(session._running().max_steps - session._running().steps_done):
                session.step([5])
            held = session._running().kept[0]
            assert held == 20 or policy == "skip"
            assert_refused(functools.partial(session.step, [5]), "caches are full", f"has {held} tokens")
            session.truncate(cut)
            steps = session._running().max_steps
            assert steps == 20 - cut or (policy == "skip" and 20 - cut - 4 <= steps < 20 - cut)


def test_what_cannot_be_is_refused() -> None:
    session, _ = opened("skip")
    assert_refused(lambda: session.truncate(3), "no running request")
    assert_refused(session.fork, "no running request")
    session.prefill(*padded(RAGGED))
    assert_refused(lambda: session.truncate(0), "No token of a row would stay.", "0")
    assert_refused(lambda: session.truncate([1, 2]), "does not fit the request", "2 numbers", "3 rows")
    for wrong in ("2", b"2", bytearray(b"2"), memoryview(b"2"), 2.0, True, None, np.array(2.0), [2.0, 1, 1]):
        assert_refused(functools.partial(session.truncate, wrong), "The number of tokens that stay")
    assert_refused(lambda: session.prefill([[1]], reuse_prefix=1), "reuse_prefix")
    assert session._running().kept == [5, 1, 3]
    stream = session.stream([1, 2], 9)
    next(stream)
    assert_refused(lambda: session.truncate(1), "stream")
    assert_refused(session.fork, "stream")
    stream.close()


class ChoosingEngine(FakeEngine):
    """Its graphs choose tokens, and give -1 where logits are no numbers."""

    target, chooses_tokens = "tensorrt", True

    def _predict(self, run: Any) -> None:
        super()._predict(run)
        logits = run.binding.outputs["logits"]
        logits[run.input_ids.max(axis=1) == 49] = np.nan
        run.binding.outputs["next_token"][...] = np.where(np.isnan(logits[..., 0]), -1, logits.argmax(axis=2))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_the_engine_chose_stay_while_the_rest_of_a_prompt_runs(kind: str) -> None:
    """A row near its end has one new token, the other so many that they run in parts."""
    engine = ChoosingEngine(PLAN)
    engine.behave(kind)
    session = Session(open_session(PLAN, engine=engine)[0].bundle, engine, PeriodicSchedule(0), "backfill")
    text = [1, 2, 3, 4, 5, 6]
    for last in ([7], [49]):
        session.prefill([text])
        prompts = [[*text, *last], [9, 8, 7, 6, 5]]
        generate = functools.partial(session.generate, prompts, 2, stop_token_ids=(), reuse_prefix=True)
        if last == [49]:
            with pytest.raises(BundleError):
                generate()
        else:
            assert [row.tolist() for row in generate()] == [continued(prompt, 2) for prompt in prompts]


def test_nothing_is_built_on_a_request_whose_logits_were_no_numbers() -> None:
    """In an attention 0 · NaN is NaN: a slot behind the prefix would spoil the next request, too."""
    engine = ChoosingEngine(PLAN)
    session = Session(open_session(PLAN, engine=engine)[0].bundle, engine, PeriodicSchedule(0), "backfill")
    with pytest.raises(BundleError):
        session.generate([[1, 2, 3, 49]], 2)
    engine.runs.clear()
    assert session.generate([[1, 2, 3, 4]], 2, stop_token_ids=(), reuse_prefix=True)[0].tolist() == continued(
        [1, 2, 3, 4], 2
    )
    assert engine.runs[0].input_ids.tolist() == [[1, 2, 3, 4]]


class OneRequestEngine(FakeEngine):
    """Has one buffer of each name, which the next request of as many rows gets as it is."""

    many_requests = False

    def __init__(self) -> None:
        super().__init__(PLAN)
        self.buffers: dict[str, Any] = {}

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        return dict.fromkeys(needed, 20)

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        if name not in self.buffers or self.buffers[name].shape != shape:
            self.buffers[name] = super().allocate_resident(name, shape, dtype)
        return self.buffers[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_an_engine_of_one_request_takes_what_the_same_row_left(policy: str, kind: str) -> None:
    engine = OneRequestEngine()
    engine.behave(kind)
    session = Session(open_session(PLAN, engine=engine)[0].bundle, engine, PeriodicSchedule(2), policy)

    def fed(*prompts: list[int]) -> set[int]:
        """The tokens that a request is given."""
        engine.runs.clear()
        session.prefill(*padded(list(prompts)), max_new_tokens=3, reuse_prefix=True)
        check_caches(session, [Holes(prompt) for prompt in prompts])
        return {token for run in engine.runs for row in run.input_ids.tolist() for token in row}

    text, other = [1, 2, 3, 4], [5, 6]
    fed(text, other)
    session.step([7, 8])
    assert not fed([*text, 9, 9], [*other, 9]) & {1, 2, 3, 5, 6}
    assert fed([*other, 3, 3], text) >= {5, 6, 1, 2, 3, 4}  # what the other row has lies elsewhere
    assert fed([*other, 3, 3]) >= {5, 6}  # as do the caches of fewer rows
    assert fed([*other, 3, 3, 8]) == {8}


def test_forks_share_the_engine_until_the_last_is_closed() -> None:
    session, engine = open_session(RECURRENT)
    session.prefill([[5, 6, 7]])
    fork = session.fork()
    assert fork.policy == "skip"
    assert fork.kv_bytes() == session.kv_bytes()
    assert_refused(lambda: session.load_adapters("nowhere"), "adapters are in use", "1 fork")
    session.step([1])
    fork.step([2])
    for one, token in ((session, 1), (fork, 2)):
        assert slots(one._running().caches["past_key.0"], 0, 4) == [5, 6, 7, token]
    session.close()
    assert not engine.times_closed
    fork.step([3])
    fork.close()
    fork.close()
    assert engine.times_closed == 1


def test_a_fork_sees_the_latest_logits_and_its_place_in_the_schedule() -> None:
    engine = FakeEngine(RECURRENT)
    session, _ = open_session(RECURRENT, schedule=MarginSchedule(3, 1.0), engine=engine)
    session.prefill([[5, 6]])
    session.step([1])
    fork = session.fork()
    assert fork.next_step is session.next_step is LORA  # a margin of 1 between logits of 1 and 0
    state = fork._running().slots.buffers.states[1]["3"]
    assert (state == 2).all()  # what the second run wrote
    fork.step([2])
    assert (session._running().slots.buffers.states[0]["3"] == 1).all()


# ── on ONNX Runtime ────────────────────────────────────────────────────────────────────────────────────────────

TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("policy", "surrogate"),
    [
        ("skip", "residual"),
        ("skip", "recurrent"),
        ("backfill", "recurrent"),
        ("backfill", "anchor"),
        ("skip", "residual-delta"),
        ("backfill", "residual-delta"),
    ],
)
def test_turns_of_a_chat_are_those_of_the_oracle(policy: str, surrogate: str, tmp_path) -> None:
    """Logits at every token of three turns; under `skip` the holes of the turns before stay holes."""
    source, options = first_layers("llama", 6), {"drop_ratio": 0.75, "always_first": 1, "policy": policy}
    bundle = make_bundle(source, tmp_path / "b", surrogate=surrogate, rank=4, **options)
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, 64, bundle.manifest.model.fingerprint)
    model, plan = source.model, oracle_plan(bundle, adapters)
    rng, k, text = np.random.default_rng(0), 2, []
    row = oracle.Row(model, plan)
    with Session.open(bundle.root, k=k, threads=1) as session, row.installed():
        session.load_adapters(adapters)
        for _ in range(3):
            text += rng.integers(0, 131, 6).tolist()
            ours = session.prefill(np.array([text]), reuse_prefix=True)[0].copy()
            new = text[row.position :]
            if policy == "backfill":
                theirs = row.backfill(new[0])
                new = new[1:]
            for token in new:
                theirs = row.step(token, full=True)
            assert np.abs(ours - theirs.numpy()).max() < TOLERANCE * np.abs(ours).max()
            for step in range(1, 6):
                token = int(rng.integers(0, 131))
                ours = session.step([token])[0]
                refresh = step % (k + 1) == 0
                theirs = row.backfill(token) if refresh and policy == "backfill" else row.step(token, full=refresh)
                assert np.abs(ours - theirs.numpy()).max() < TOLERANCE * np.abs(ours).max()
                text.append(token)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_exact_policies_reuse_without_a_trace(kv_dtype: str | None, tmp_path) -> None:
    """`lossless`, and the full schedule: tokens of every turn are those of a session that knows no turns."""
    bundle = make_bundle("qwen2", tmp_path / "b", drop_ratio=0.5, kv_dtype=kv_dtype, policy="lossless")
    with Session.open(bundle.root, threads=1) as session, Session.open(bundle.root, threads=1) as other:
        for k in (3, 0):
            text = [3, 14, 15, 92]
            for turn in range(3):
                ours = list(session.stream(text, 9, k=k, stop_token_ids=(), reuse_prefix=turn > 0))
                assert ours == list(other.stream(text, 9, k=k, stop_token_ids=()))
                text += [*ours, turn, 17]


def test_forks_go_their_own_ways(tmp_path) -> None:
    bundle = make_bundle("llama", tmp_path / "b", drop_ratio=0.5, surrogate="recurrent")
    tokens = [[5, 9, 40, 41], [77, 3, 8, 100]]
    with Session.open(bundle.root, k=2, threads=1) as session:
        session.prefill([[3, 14, 15]])
        session.step([9])
        with session.fork() as fork:
            ours = [
                [one.step([token])[0].copy() for token in column]
                for one, column in zip((session, fork), tokens, strict=True)
            ]
    with Session.open(bundle.root, k=2, threads=1) as session:
        for column, found in zip(tokens, ours, strict=True):
            session.prefill([[3, 14, 15]])
            session.step([9])
            for token, logits in zip(column, found, strict=True):
                np.testing.assert_array_equal(session.step([token])[0], logits)
