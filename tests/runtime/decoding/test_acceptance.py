"""What the rule of acceptance makes of drafts, against the distribution that the verifier alone draws from.

χ² over some 10⁴ draws a test, with fixed seeds: small vocabularies, all kinds of filters, drafts that were drawn and
drafts that were looked up, near to the verifier and far from it. The expected frequencies are computed here, from the
definitions, not by the code under test.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from lora_drop_runtime.decoding.acceptance import Draft, drafted, judged, verified
from lora_drop_runtime.decoding.sampling import RowSampler, SamplingOptions
from lora_drop_runtime.errors import BundleError

DRAWS = 100_000  # of which each case has a part
LEAST_P = 1e-3  # the seeds are fixed: a right rule passes always, a wrong one has p-values of 0

LOGITS = np.array([2.0, 1.5, 1.5, 0.3, -0.5, -1.0, -4.0], np.float32)
NEAR = LOGITS + np.array([-0.3, 0.4, 0.1, -0.2, 0.3, 0.0, 1.0], np.float32)
FAR = LOGITS[::-1].copy()
FILTERS = {
    "temperature 1": SamplingOptions(1.0),
    "temperature 0.6": SamplingOptions(0.6),
    "temperature 2": SamplingOptions(2.0),
    "top-k 3": SamplingOptions(1.0, top_k=3),
    "top-k 2, ties": SamplingOptions(0.8, top_k=2),
    "top-p 0.7": SamplingOptions(1.0, top_p=0.7),
    "all": SamplingOptions(1.3, top_k=5, top_p=0.8),
    "penalty": SamplingOptions(1.0, repetition_penalty=1.7),
    "min-p 0.3": SamplingOptions(1.0, min_p=0.3),
    "counts": SamplingOptions(1.2, presence_penalty=0.4, frequency_penalty=0.3),
    "bias": SamplingOptions(0.9, logit_bias={0: -1.5, 3: 1}),
    "all of them": SamplingOptions(
        1.3, 6, 0.9, 1.2, min_p=0.05, presence_penalty=-0.51, frequency_penalty=0.43, logit_bias={6: 4.07, 1: -0.6}
    ),
}
WRITTEN = [2, 0, 2]  # by the row, before it is asked


def expected(logits: np.ndarray, options: SamplingOptions, prompt: list[int], written: Sequence[int]) -> np.ndarray:
    """Probabilities [V] by the definitions of bias, penalties, temperature, top-k, top-p and min-p, token by token."""
    scores = [float(x) + options.logit_bias.get(token, 0) for token, x in enumerate(logits)]
    for token in {*prompt, *written}:
        penalty = options.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(written).items():
        scores[token] -= options.presence_penalty + options.frequency_penalty * count
    kept = set(range(len(scores)))
    if options.top_k:
        kth = sorted(scores, reverse=True)[options.top_k - 1]
        kept = {token for token in kept if scores[token] >= kth}
    weights = {token: math.exp(scores[token] / options.temperature) for token in kept}
    total = sum(weights.values())
    probs = {token: weight / total for token, weight in weights.items()}
    order, held, nucleus = sorted(kept, key=lambda token: (-probs[token], token)), 0.0, set()
    for token in order:
        nucleus.add(token)
        held += probs[token]
        if held > options.top_p:
            break
    nucleus = {token for token in nucleus if probs[token] >= options.min_p * probs[order[0]]}
    total = sum(probs[token] for token in nucleus)
    return np.array([probs[token] / total if token in nucleus else 0.0 for token in range(len(scores))])


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Of Pearson's χ²; outcomes without probability must not have been drawn."""
    assert not counts[probs == 0].any()
    wanted = probs[probs > 0] * counts.sum()
    statistic, freedom = float(((counts[probs > 0] - wanted) ** 2 / wanted).sum()), int((probs > 0).sum()) - 1
    if not freedom:
        return 1.0
    # The upper regularized gamma function Q(freedom / 2, statistic / 2), by its recurrence from Q(1/2) or Q(1)
    x, half = statistic / 2, 0.5 if freedom % 2 else 1.0
    tail = math.erfc(math.sqrt(x)) if freedom % 2 else math.exp(-x)
    while half < freedom / 2:
        tail += math.exp(half * math.log(x) - x - math.lgamma(half + 1)) if x else 0.0
        half += 1
    return tail


def row(options: SamplingOptions, prompt: Sequence[int] = (1, 4), written: Sequence[int] = ()) -> RowSampler:
    sampler = RowSampler(options, np.array(prompt, np.int64), np.random.SeedSequence(7), 0)
    for token in written:
        sampler.remember(token)
    return sampler


def test_the_p_value_is_that_of_the_tables() -> None:
    """5 % points of the χ² distribution."""
    for freedom, point in ((1, 3.841), (2, 5.991), (3, 7.815), (4, 9.488), (6, 12.592)):
        probs = np.full(freedom + 1, 1 / (freedom + 1))
        counts = np.full(freedom + 1, 1e6)
        shift = math.sqrt(point * 1e6 / 2)  # adds `point` to the statistic
        counts[0], counts[1] = counts[0] + shift, counts[1] - shift
        assert p_value(counts, probs) == pytest.approx(0.05, abs=1e-4)
    assert p_value(np.array([60_000.0, 40_000.0]), np.array([0.5, 0.5])) < 1e-12


@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        *((name, "far") for name in FILTERS),  # most drafts are rejected
        *((name, "near") for name in [*FILTERS][::2]),
        ("temperature 1", "same"),
        ("all of them", "same"),
    ],
)
def test_drawn_drafts_leave_the_verifiers_distribution(name: str, drafter: str) -> None:
    options, theirs = FILTERS[name], {"far": FAR, "near": NEAR, "same": LOGITS}[drafter]
    sampler = row(options, written=WRITTEN)
    scores = sampler.penalized(LOGITS)
    counts = np.zeros(len(LOGITS))
    accepted = 0
    for _ in range(DRAWS // 40):
        draft, _ = drafted(sampler, theirs)
        token = judged(sampler, scores, draft)
        accepted += token == draft.token
        counts[token] += 1
    target, draft_probs = (expected(logits, options, [1, 4], WRITTEN) for logits in (LOGITS, theirs))
    assert p_value(counts, target) > LEAST_P
    share = np.minimum(target, draft_probs).sum()  # what the rule accepts, at least: min(p, q)
    assert abs(accepted / counts.sum() - share) < 5 * math.sqrt(0.25 / counts.sum())


@pytest.mark.parametrize(
    ("name", "token"), [(name, token) for row, name in enumerate(FILTERS) for token in ((0, 2, 6) * 2)[row % 3 :][:2]]
)
def test_looked_up_drafts_leave_the_verifiers_distribution(name: str, token: int) -> None:
    options = FILTERS[name]
    sampler = row(options, written=WRITTEN)
    scores = sampler.penalized(LOGITS)
    counts = np.bincount(
        [judged(sampler, scores, Draft(token)) for _ in range(DRAWS // 40)], minlength=len(LOGITS)
    ).astype(float)
    assert p_value(counts, expected(LOGITS, options, [1, 4], WRITTEN)) > LEAST_P


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
def test_a_seed_draws_the_same_tokens_whatever_was_looked_up(options: SamplingOptions) -> None:
    """The n-th token is where the n-th random number falls in the distribution, whatever the drafts and how many."""
    stream = np.random.default_rng(np.random.SeedSequence(7))
    wanted = list[int]()
    for _ in range(200):
        probs = expected(LOGITS, options, [1, 4], wanted)
        order = np.arange(len(probs)) if options.top_p == 1 else np.argsort(-probs, kind="stable")
        reached = np.cumsum(probs[order])
        wanted.append(int(order[np.argmax(reached > stream.random() * reached[-1])]))
    sampler, drafts, made = row(options), np.random.default_rng(0), list[int]()
    while len(made) < len(wanted):
        count = int(drafts.integers(4))
        guesses = [Draft(int(token)) for token in drafts.integers(3, size=count)]
        made += verified(sampler, guesses, np.stack([LOGITS] * (count + 1)))
    assert made[: len(wanted)] == wanted


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(1.0, top_k=3, repetition_penalty=1.3),
        SamplingOptions(1.0, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.8, logit_bias={2: 0.7}),
    ],
    ids=["repetition", "counts"],
)
def test_all_tokens_of_a_cycle_are_distributed_as_without_drafts(options: SamplingOptions, looked_up: bool) -> None:
    """Over a model with memory: the joint distribution of a text's next two tokens, however many a cycle makes."""
    generator = np.random.default_rng(11)
    model = generator.standard_normal((4, 4)).astype(np.float32)  # logits after each token
    draft_model = model + generator.standard_normal((4, 4)).astype(np.float32)
    probs = np.zeros((4, 4))
    for first, p in enumerate(expected(model[0], options, [0], [])):
        probs[first] = p * expected(model[first], options, [0], [first])
    counts = np.zeros((4, 4))
    sampler = row(options, (0,))
    start = sampler.seen
    for _ in range(DRAWS // 25):
        sampler.seen, drafts = start, []
        if looked_up:
            drafts = [Draft(2), Draft(1)]
        else:
            last = 0
            for _ in range(2):
                drafts.append(drafted(sampler, draft_model[last])[0])
                last = drafts[-1].token
                sampler.remember(last)
            sampler.seen = start
        logits = np.stack([model[0], *(model[draft.token] for draft in drafts)])
        tokens = verified(sampler, drafts, logits)
        if len(tokens) == 1:  # the next cycle's
            tokens.append(verified(sampler, [], model[tokens[0]][None])[0])
        counts[tokens[0], tokens[1]] += 1
    assert p_value(counts.ravel(), probs.ravel()) > LEAST_P


@pytest.mark.parametrize("lenience", [0.9, 0.4, 0.05])
@pytest.mark.parametrize("drafter", ["far", "near", "looked up"])
@pytest.mark.parametrize("name", ["temperature 1", "all", "counts"])
def test_lenience_draws_no_token_more_often_than_it_says(name: str, drafter: str, lenience: float) -> None:
    """The whole distribution, and its bound p / lenience (Leviathan et al., A.5)."""
    options = FILTERS[name]
    sampler = row(options, written=WRITTEN)
    scores = sampler.penalized(LOGITS)
    p = expected(LOGITS, options, [1, 4], WRITTEN)
    if drafter == "looked up":
        q = np.eye(len(LOGITS))[2]
    else:
        theirs = FAR if drafter == "far" else NEAR
        q = expected(theirs, options, [1, 4], WRITTEN)
    accepted = np.minimum(q, p / lenience)  # q, with probability min(1, p / (lenience · q))
    rest = np.maximum(p - lenience * q, 0)
    wanted = accepted + (1 - accepted.sum()) * (rest / rest.sum() if rest.any() else 0)
    assert (wanted <= p / lenience + 1e-12).all()
    counts = np.zeros(len(LOGITS))
    for _ in range(DRAWS // 40):
        draft = Draft(2) if drafter == "looked up" else drafted(sampler, theirs)[0]
        counts[judged(sampler, scores, draft, lenience)] += 1
    assert p_value(counts, np.where(wanted < 1e-12, 0, wanted)) > LEAST_P


def test_lenience_accepts_greedily_what_has_its_share_of_the_likeliest_tokens_probability() -> None:
    logits = np.stack([LOGITS, LOGITS])  # of the first token e^2, of the others e^1.5 = 0.61 of it, 0.18, 0.08, 0.05, …
    for lenience, last in ((1.0, 0), (0.62, 0), (0.6, 2), (0.19, 2), (0.18, 3), (0.05, 4), (0.04, 5), (1e-3, 6)):
        for token in range(7):
            made = verified(row(SamplingOptions()), [Draft(token)], logits, lenience)
            assert made == ([token, 0] if token <= last else [0]), (lenience, token)
    biased = SamplingOptions(logit_bias={3: 1.5, 1: -100})  # after its options: 1.8 against 2.0
    assert verified(row(biased), [Draft(3)], logits, 0.8) == [3, 0]
    assert verified(row(biased), [Draft(1)], logits, 1e-9) == [0]


def test_greedy_accepts_what_the_verifier_would_choose_under_its_penalty() -> None:
    sampler = row(SamplingOptions(0.0, repetition_penalty=10.0), (6,))
    logits = np.stack([LOGITS, LOGITS, LOGITS])
    tokens = verified(sampler, [Draft(0), Draft(1)], logits)
    assert tokens == [0, 1, 2]  # each is taken once: the penalty sees them in order
    assert sorted(sampler.seen.ids.tolist()) == [0, 1, 2, 6]
    assert verified(row(SamplingOptions()), [Draft(3), Draft(0)], logits) == [0]
    sampler = row(SamplingOptions(frequency_penalty=0.4), (0,))
    assert verified(sampler, [Draft(0), Draft(0)], logits) == [0, 0, 1]  # 2.0, 1.6 and 1.2 against 1.5
    assert verified(sampler, [Draft(2), Draft(0)], logits) == [2, 0, 1]  # 1.1 and 1.5; then 1.2, 1.1, 1.1


def test_the_confidence_is_the_likeliest_tokens_probability_whatever_is_drawn() -> None:
    for options in (SamplingOptions(), SamplingOptions(0.7, top_k=4)):
        of = options if options.temperature else SamplingOptions(1.0)
        assert drafted(row(options), LOGITS)[1] == pytest.approx(expected(LOGITS, of, [], []).max(), rel=1e-6)


def test_logits_that_are_no_numbers_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(BundleError, match="not numbers"):
            verified(row(SamplingOptions()), [Draft(0)], np.full((2, 7), bad, np.float32))
