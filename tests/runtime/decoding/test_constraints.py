"""Rows under a constraint: what they write, by every policy, against masked logits of PyTorch; and their neighbours."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import Batch, Event, SamplingOptions, Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.sampling import RowSampler, masked
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import LastLogits

from tests.support.bundles import PROMPTS, first_layers, make_bundle, oracle_plan
from tests.support.constraints import Rule, Ruled
from tests.support.covering import covering_array
from tests.support.decoding import assert_refused, kept_session
from tests.support.oracle import is_refresh, prefill

VOCAB, NEW, END = 131, 14, 130


def drifting(tokens: tuple[int, ...]) -> range:
    """A third of the vocabulary, another one after every token; without an end."""
    return range((tokens[-1] if tokens else 0) % 3, END, 3)


def ending(tokens: tuple[int, ...]) -> list[int]:
    """Twelve tokens at most; from the fifth on the text may end, and END ends it."""
    if tokens[-1:] == (END,) or len(tokens) == 12:
        return []
    return [*drifting(tokens), *([END] if len(tokens) > 4 else [])]


def one_way(tokens: tuple[int, ...]) -> list[int]:
    """Seven tokens, each the only one."""
    return [(17 * len(tokens) + 5) % END] if len(tokens) < 7 else []


RULES: dict[str, Rule] = {"drifting": drifting, "ending": ending, "one way": one_way}


OPTIONS: dict[str, Any] = {"drop_layers": (1, 2, 4), "always_first": 1, "k": 3, "max_batch": 8}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(first_layers("llama", 6), tmp_path_factory.mktemp("constraints") / "b", **OPTIONS)


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("constraints") / "fill"
    return make_bundle(first_layers("llama", 6), root, policy="fill", **OPTIONS)


@functools.cache
def by_pytorch(root: Path, rule: Rule, k: int, policy: str) -> list[list[int]]:
    """Greedy, token by token: the largest logit among those that the rule allows; of each prompt."""
    rows, plan = [], oracle_plan(Bundle.open(root))
    for prompt in PROMPTS:
        row, logits = prefill(first_layers("llama", 6).model, plan, prompt)
        tokens: list[int] = []
        rows.append(tokens)
        with row.installed():
            while len(tokens) < NEW and (allowed := sorted(rule(tuple(tokens)))):
                token = allowed[int(logits[allowed].argmax())]
                if token == END:
                    break
                tokens.append(token)
                refresh = is_refresh(len(tokens), k)
                logits = row.backfill(token) if policy == "backfill" and refresh else row.step(token, full=refresh)
    return rows


def generated(bundle: Bundle, rule: Rule | None, k: int, policy: str, **options: Any) -> list[list[int]]:
    constraint = None if rule is None else Ruled(rule, VOCAB)
    session = kept_session(bundle.root, policy)
    rows = session.generate(PROMPTS, NEW, k=k, stop_token_ids=[END], constraint=constraint, **options)
    assert constraint is None or constraint.tokens == ()
    return [row.tolist() for row in rows]


def check(rule: Rule, tokens: list[int]) -> None:
    """Every token was allowed, and the text ends where it may or has to, or where there is no room."""
    for place, token in enumerate(tokens):
        assert token in rule(tuple(tokens[:place]))
    after = rule(tuple(tokens))
    assert not after or END in after or len(tokens) == NEW


def covering(**factors: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Cases in which each rule meets each value of each factor, and those each other."""
    return covering_array({"rule": tuple(RULES), **factors}, seed=0)


def named(case: dict[str, Any]) -> str:
    return "-".join(f"{case[name]}" for name in sorted(case))


@pytest.mark.parametrize("case", covering(policy=("skip", "backfill", "fill"), k=(0, 1, 3)), ids=named)
def test_greedy_takes_the_largest_logit_that_is_allowed(bundle: Bundle, filling: Bundle, case: dict[str, Any]) -> None:
    rule, policy, k = RULES[case["rule"]], case["policy"], case["k"]
    served = filling if policy == "fill" else bundle
    ours = generated(served, rule, k, policy)
    assert ours == by_pytorch(served.root, rule, k, policy)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("draft", ["lora", "ngram", "both"])
def test_lossless_writes_what_the_full_schedule_writes_under_the_constraint(
    bundle: Bundle, rule: Rule, k: int, draft: str
) -> None:
    ours = generated(bundle, rule, k, "lossless", draft=draft)
    assert ours == by_pytorch(bundle.root, rule, 0, "skip")


@pytest.mark.parametrize("case", covering(policy=("skip", "backfill", "lossless", "fill"), k=(0, 1, 2, 3)), ids=named)
def test_whatever_is_drawn_is_allowed(bundle: Bundle, filling: Bundle, case: dict[str, Any]) -> None:
    rule, policy, k = RULES[case["rule"]], case["policy"], case["k"]
    for seed in range(4):
        options = SamplingOptions(0.5 + seed, top_k=(0, 7)[seed % 2], top_p=(1.0, 0.8)[seed // 2], seed=seed)
        penalty = SamplingOptions(1.0, repetition_penalty=1.5, seed=seed)
        for sampling in (options, penalty):
            for row in generated(filling if policy == "fill" else bundle, rule, k, policy, sampling=sampling):
                check(rule, row)


def test_drafts_leave_the_distribution_of_the_constraint(bundle: Bundle) -> None:
    """Of the second token, which a draft of a LoRA step may become: against the masked logits of PyTorch."""
    rule: Rule = lambda tokens: [] if len(tokens) == 2 else [3, 60, 90] if not tokens else [7, 11, 50]  # noqa: E731
    counts: dict[tuple[int, int], int] = defaultdict(int)
    with Session.open(bundle.root, k=1, policy="lossless", threads=1) as session:
        for seed in range(300):
            sampling = SamplingOptions(4.0, seed=seed)
            for row in session.generate([[7, 3]] * 8, NEW, sampling=sampling, constraint=Ruled(rule, VOCAB)):
                counts[tuple(row.tolist())] += 1
    plan, model = oracle_plan(bundle), first_layers("llama", 6).model
    statistic = 0.0
    _, logits = prefill(model, plan, [7, 3])
    first = (logits[[3, 60, 90]] / 4).softmax(0)
    for i, token in enumerate((3, 60, 90)):
        second = (prefill(model, plan, [7, 3, token])[1][[7, 11, 50]] / 4).softmax(0)
        for j, other in enumerate((7, 11, 50)):
            wanted = 2400 * float(first[i] * second[j])
            statistic += (counts[token, other] - wanted) ** 2 / wanted
    assert sum(counts.values()) == 2400
    assert statistic < 26.1  # χ² with 8 degrees of freedom, p = 0.001; the seeds are fixed


# ── in a batch ─────────────────────────────────────────────────────────────────────────────────────────────────


def run(batch: Batch) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = defaultdict(list)
    while batch.rows:
        for event in batch.tick():
            events[event.row].append(event)
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("policy", ["skip", "backfill", "lossless"])
@pytest.mark.parametrize("k", [0, 2])
def test_a_row_under_a_constraint_leaves_its_neighbours_alone(bundle: Bundle, policy: str, k: int) -> None:
    alone, bound = generated(bundle, None, k, policy), generated(bundle, ending, k, policy)
    with Batch.open(bundle.root, slots=4, k=k, policy=policy, threads=1) as batch:
        constraint = Ruled(ending, VOCAB)
        free = [batch.add(prompt, NEW, stop_token_ids=[END]) for prompt in PROMPTS]
        tied = [batch.add(prompt, NEW, stop_token_ids=[END], constraint=constraint) for prompt in PROMPTS]
        events = run(batch)
    assert [tokens_of(events[row]) for row in free] == alone
    assert [tokens_of(events[row]) for row in tied] == bound
    assert constraint.tokens == ()
    for row in tied:
        last = events[row][-1]
        assert last.finished == "stop"
        assert (last.token is None) == (len(tokens_of(events[row])) < 12)


def test_logprobs_are_those_of_the_model(bundle: Bundle) -> None:
    with Session.open(bundle.root, k=0, threads=1) as session:
        logits = session.prefill(np.array([PROMPTS[0]])).astype(np.float64)[0]
    with Batch.open(bundle.root, slots=1, k=0, threads=1) as batch:
        row = batch.add(PROMPTS[0], 9, logprobs=2, constraint=Ruled(one_way, VOCAB))
        first = run(batch)[row][0]
    logprobs = logits - np.log(np.exp(logits).sum())
    assert first.token == 5
    assert first.logprob == pytest.approx(logprobs[5], abs=1e-4)
    assert [token for token, _ in first.top_logprobs] == np.argsort(-logprobs)[:2].tolist()


def test_a_schedule_sees_the_logits_of_the_model(bundle: Bundle) -> None:
    margins: list[float] = []

    class Watching:
        def kind(self, step: int, last: LastLogits) -> StepKind:
            margins.append(last.margin)
            return StepKind.REFRESH

    with Session.open(bundle.root, threads=1) as session:
        session.generate([PROMPTS[0]], 5, k=Watching(), constraint=Ruled(one_way, VOCAB))
        largest = np.sort(session.prefill(np.array([PROMPTS[0]]))[0])[-2:]
    assert margins[0] == pytest.approx(float(largest[1] - largest[0]), abs=1e-5)
    assert np.isfinite(margins).all()


class Failing(Ruled):
    def allowed(self) -> np.ndarray:
        if len(self.tokens) == 2:
            raise InputError("The grammar is too complex.", note="It is.", hint="Use another.")
        return super().allowed()

    def fork(self) -> Failing:
        return Failing(self.rule, self.vocab_size, self.tokens)


@pytest.mark.parametrize("policy", ["skip", "lossless"])
def test_a_constraint_that_fails_ends_its_own_row(bundle: Bundle, policy: str) -> None:
    with Batch.open(bundle.root, slots=2, k=2, policy=policy, threads=1) as batch:
        bad = batch.add(PROMPTS[0], NEW, constraint=Failing(drifting, VOCAB))
        good = batch.add(PROMPTS[0], NEW, constraint=Ruled(drifting, VOCAB))
        events = run(batch)
    assert events[bad][-1].finished == "failed"
    assert "too complex" in str(events[bad][-1].error)
    assert len(tokens_of(events[good])) == NEW


def test_masks_that_cannot_be_used_are_refused() -> None:
    scores = np.zeros(5, np.float32)
    for mask in (np.zeros(5, np.bool_), np.ones(6, np.bool_), np.ones(5, np.int8), [True] * 5):
        assert_refused(lambda mask=mask: masked(scores, mask), "allows no token", "bool (5,)")
    assert masked(scores, np.array([0, 1, 0, 0, 0], np.bool_)).tolist() == [-np.inf, 0, -np.inf, -np.inf, -np.inf]
    assert scores.tolist() == [0] * 5


def test_constraints_that_cannot_be_used_are_refused(bundle: Bundle) -> None:
    used = Ruled(one_way, VOCAB, tuple(one_way((0,) * n)[0] for n in range(7)))
    with Session.open(bundle.root, threads=1) as session, Batch.open(bundle.root, slots=1, threads=1) as batch:
        for bad, fact in ((used, "allows no text"), ("a+", "The constraint has the wrong type")):
            assert_refused(lambda bad=bad: session.generate([[1]], 2, constraint=bad), fact)
            assert_refused(lambda bad=bad: next(session.stream([1], 2, constraint=bad)), fact)
            assert_refused(lambda bad=bad: batch.add([1], 2, constraint=bad), fact)
        used.tokens, used.fork = (), lambda: None  # a forgotten return would leave the row free
        assert_refused(lambda: session.generate([[1]], 2, constraint=used), "What a constraint's fork returns", "None")
        assert_refused(lambda: batch.add([1], 2, constraint=used), "What a constraint's fork returns", "None")
        assert batch.rows == 0


def test_drafting_leaves_the_constraint_where_it_was() -> None:
    """Also where it is interrupted: a draft is no part of the text yet."""
    from lora_drop_runtime.decoding.drafter import Drafter
    from lora_drop_runtime.plan.drafting import draft_source
    from lora_drop_runtime.plan.policy import POLICIES

    constraint = Ruled(one_way, VOCAB)
    sampler = RowSampler(SamplingOptions(), np.array([1]), np.random.SeedSequence(0), 0, constraint)
    drafter = Drafter(sampler, draft_source("lora", POLICIES["lossless"], 1), (), [1], None)
    drafter.begin([1], 20)
    drafter.begin_steps()
    steps = 0
    while drafter.may_draft:
        drafter.saw(np.zeros(VOCAB, np.float32))
        steps += 1
    drafter.end_steps()
    assert steps == 7  # behind the end of the constraint there is nothing to draft
    assert [draft.token for draft in drafter.drafts] == [one_way((0,) * n)[0] for n in range(7)]
    assert sampler.constraint is constraint
    assert constraint.tokens == ()
