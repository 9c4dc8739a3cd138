"""Sampling against transformers' logits processors, in the order in which `generate` applies them; OpenAI's penalties,
which it does not have, against their formula in numpy."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.decoding.sampling import MOST_BIASES, RowSampler, Sampler, SamplingOptions, distribution
from lora_drop_runtime.errors import BundleError, InputError
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 500
ALL = np.array([True])


def logits_of(seed: int, shape: tuple[int, ...] = (VOCAB,)) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 3).astype(np.float32)


NONE = np.array([], np.int64)


def our_probabilities(
    scores: np.ndarray, prompt: np.ndarray, options: SamplingOptions, written: np.ndarray = NONE
) -> np.ndarray:
    row = RowSampler(options, prompt, np.random.SeedSequence(0), 0)
    for token in written.tolist():
        row.remember(token)
    ids, probs = distribution(row.penalized(scores), options)
    dense = np.zeros(len(scores))
    dense[ids] = probs
    return dense


class CountPenalties(LogitsProcessor):
    """l − presence · [count > 0] − frequency · count, by what stands behind a prompt of so many tokens."""

    def __init__(self, options: SamplingOptions, prompt: int) -> None:
        self.options, self.prompt = options, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = np.bincount(input_ids[0, self.prompt :].numpy(), minlength=scores.shape[1])
        taken = self.options.presence_penalty * (counts > 0) + self.options.frequency_penalty * counts
        return scores - torch.from_numpy(taken.astype(np.float32))


def hf_scores(
    scores: np.ndarray, prompt: np.ndarray, options: SamplingOptions, written: np.ndarray = NONE
) -> torch.Tensor:
    """The processors that greedy has, too."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    if options.logit_bias:
        processors.insert(0, SequenceBiasLogitsProcessor({(token,): x for token, x in options.logit_bias.items()}))
    processors.append(CountPenalties(options, len(prompt)))
    return processors(torch.from_numpy(np.append(prompt, written))[None], torch.from_numpy(scores)[None])


def hf_probabilities(
    scores: np.ndarray, prompt: np.ndarray, options: SamplingOptions, written: np.ndarray = NONE
) -> np.ndarray:
    processors = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    processed = processors(None, hf_scores(scores, prompt, options, written))
    return processed.softmax(-1)[0].numpy()


@pytest.mark.parametrize("top_k", [0, 1, 40, VOCAB, 10 * VOCAB])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 1.0])
def test_distribution_is_transformers(top_k: int, top_p: float) -> None:
    for temperature, penalty, seed in itertools.product((0.3, 1.0, 1.7), (1.0, 1.3, 0.8), range(5)):
        options = SamplingOptions(temperature, top_k, top_p, penalty)
        scores = logits_of(seed)
        seen = np.random.default_rng(seed).integers(0, VOCAB, 60)
        ours, theirs = our_probabilities(scores, seen, options), hf_probabilities(scores, seen, options)
        np.testing.assert_array_equal(ours > 0, theirs > 0, f"{options}")
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, err_msg=f"{options}")  # theirs is a float32 softmax


def any_options(random: np.random.Generator) -> SamplingOptions:
    """Each of them is off now and then."""

    def one(off: float, *others: float) -> float:
        return float(random.choice([off, off, *others]))

    tokens = random.choice(VOCAB, int(random.integers(0, 40)), replace=False).tolist()
    return SamplingOptions(
        temperature=one(1, 0.3, 0.8, 2.5),
        top_k=int(one(0, 1, 20, 300)),
        top_p=one(1, 0.3, 0.9, 0.999),
        repetition_penalty=one(1, 0.8, 1.2, 3),
        min_p=one(0, 0.001, 0.05, 0.3, 1),
        presence_penalty=one(0, *random.uniform(-2, 2, 3)),
        frequency_penalty=one(0, *random.uniform(-2, 2, 3)),
        logit_bias={token: float(random.choice([-100, -1.5, 0, 0.25, 3, 100])) for token in tokens},
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_distribution_under_any_options_is_transformers(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(50):
        options, scores = any_options(random), logits_of(int(random.integers(10**6)))
        prompt = random.integers(0, VOCAB, int(random.integers(1, 60)))
        written = random.integers(0, VOCAB, int(random.integers(0, 300))) // 5  # a hundred tokens, most of them often
        ours = our_probabilities(scores, prompt, options, written)
        theirs = hf_probabilities(scores, prompt, options, written)
        # Theirs is a float32 softmax, whose smallest numbers have few digits
        np.testing.assert_array_equal(ours > 1e-30, theirs > 1e-30, err_msg=str(options))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-30, err_msg=str(options))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_under_any_options_is_transformers_step_by_step(seed: int) -> None:
    """By the tokens that the sampler has chosen so far; what only changes a draw changes nothing."""
    random = np.random.default_rng(seed)
    for _ in range(5):
        options = dataclasses.replace(any_options(random), temperature=0)
        prompt, written = random.integers(0, VOCAB, 9), NONE
        sampler = Sampler(options, [prompt])
        for step in range(30):
            scores = logits_of(step % 2)
            expected = hf_scores(scores, prompt, options, written).argmax()
            written = np.append(written, sampler.sample(scores[None], ALL))
            assert written[-1] == expected


def test_min_p_comes_after_top_p() -> None:
    """As in transformers. The other way round top-p would count shares of what min-p has left, and keep two here."""
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    options = SamplingOptions(1.0, top_p=0.75, min_p=0.4)
    assert np.count_nonzero(our_probabilities(scores, NONE, options)) == 3
    assert np.count_nonzero(hf_probabilities(scores, NONE, options)) == 3
    three = np.array([0.4, 0.3, 0.2]) / 0.9
    assert np.searchsorted(np.cumsum(three), 0.75) + 1 == 2


def test_presence_and_frequency_count_what_was_written_and_not_the_prompt() -> None:
    logits = np.array([[4.0, 3.5, 1.0, -1.0]], np.float32)
    for options, tokens in (
        (SamplingOptions(presence_penalty=1.0), [0, 1, 0, 0, 0]),  # once, however often
        (SamplingOptions(frequency_penalty=1.0), [0, 1, 0, 1, 0]),
        (SamplingOptions(frequency_penalty=2.0), [0, 1, 0, 1, 2]),
        (SamplingOptions(presence_penalty=-2.0, logit_bias={0: -1}), [1, 1, 1, 1, 1]),
    ):
        sampler = Sampler(options, [np.array([0, 0, 0])])
        assert [int(sampler.sample(logits, ALL)[0]) for _ in tokens] == tokens, options


def test_a_bias_of_100_chooses_and_of_minus_100_bans() -> None:
    scores = logits_of(0)
    best = int(scores.argmax())
    for temperature in (0.0, 1.0):
        for bias, allowed in (({17: 100}, lambda token: token == 17), ({best: -100}, lambda token: token != best)):
            sampler = Sampler(SamplingOptions(temperature, seed=0, logit_bias=bias), [np.array([1])])
            assert all(allowed(int(sampler.sample(scores[None], ALL)[0])) for _ in range(50))


def test_what_an_engine_may_choose_by_itself() -> None:
    """Top-k, top-p and min-p change nothing at temperature 0."""
    for options, largest, host in (
        (SamplingOptions(top_k=3, top_p=0.5, min_p=0.5), True, ()),
        (SamplingOptions(repetition_penalty=1.1), False, ()),
        (SamplingOptions(temperature=1, top_k=3), False, ()),
        (SamplingOptions(temperature=1, min_p=0.1), False, ("min_p",)),
        (SamplingOptions(presence_penalty=0.1), False, ("presence_penalty",)),
        (SamplingOptions(frequency_penalty=-0.1), False, ("frequency_penalty",)),
        (SamplingOptions(logit_bias={3: 0}), False, ("logit_bias",)),
        (SamplingOptions(temperature=1, min_p=1, logit_bias={3: 1}), False, ("logit_bias", "min_p")),
    ):
        assert options.takes_the_largest == largest, options
        assert options.on_host_alone == host, options


def test_options_are_values() -> None:
    """They can be compared, hashed, copied and sent, and hold what they were given."""
    given = {np.int64(3): 1, 5: np.float32(-0.5)}
    options = SamplingOptions(logit_bias=given)
    given[7] = 1
    assert options.logit_bias == {3: 1.0, 5: -0.5}
    assert [type(one) for pair in options.logit_bias.items() for one in pair] == [int, float] * 2
    for other in (dataclasses.replace(options), pickle.loads(pickle.dumps(options))):
        assert other == options
        assert hash(other) == hash(options)
    assert options != SamplingOptions()


def test_ties() -> None:
    """Top-k and min-p keep all that tie with the last; top-p keeps the lowest ids, as many as transformers."""
    scores = np.zeros(20, np.float32)
    best = [2, 3, 7, 11, 12, 18]
    scores[best] = 5
    for options, kept in [
        (SamplingOptions(1.0, top_k=3), best),
        (SamplingOptions(1.0, top_p=0.5), best[:4]),
        (SamplingOptions(1.0, top_k=5, top_p=0.6), best[:4]),
        (SamplingOptions(1.0, top_p=1e-9), best[:1]),
        (SamplingOptions(1.0, top_p=1e-20), best[:1]),  # 1 − p is 1, and all six have the same share
        (SamplingOptions(1.0, top_k=1, top_p=1e-20), best[:1]),
        (SamplingOptions(1.0, min_p=1.0), best),
        (SamplingOptions(1.0, top_p=0.5, min_p=1.0), best[:4]),
    ]:
        assert np.flatnonzero(our_probabilities(scores, NONE, options)).tolist() == kept
        if options.top_p > 1e-16:  # transformers keeps one there, too, whatever it is
            assert np.count_nonzero(hf_probabilities(scores, NONE, options)) == len(kept)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    scores = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for top_p, kept in [(0.25, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)]:
        ids, probs = distribution(scores, SamplingOptions(1.0, top_p=top_p))
        assert len(ids) == kept
        assert math.isclose(probs.sum(), 1)


def test_draws_follow_the_distribution() -> None:
    options = SamplingOptions(temperature=0.8, top_k=6, top_p=0.9, seed=11)
    scores, draws = logits_of(3), 20_000
    sampler = Sampler(options, [np.array([1])])
    counts = np.bincount([sampler.sample(scores[None], ALL)[0] for _ in range(draws)], minlength=VOCAB)
    expected = hf_probabilities(scores, np.array([], np.int64), options)
    assert not counts[expected == 0].any()
    # Five standard deviations of a binomial count.
    assert (abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected))).all()


def test_greedy_is_argmax_and_reads_only() -> None:
    logits = logits_of(0, (3, VOCAB))
    logits.setflags(write=False)
    tokens = Sampler(SamplingOptions(), [np.array([1])] * 3).sample(logits, np.ones(3, bool))
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_penalty_acts_on_greedy_and_remembers_prompt_and_generated_tokens() -> None:
    logits = np.array([[4.0, 3.5, 3.0, -1.0], [4.0, 3.5, 3.0, -1.0]], np.float32)
    logits.setflags(write=False)
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), [np.array([0, 0]), np.array([3])])
    rows = [sampler.sample(logits, np.ones(2, bool)).tolist() for _ in range(4)]
    assert rows == [[1, 0], [2, 1], [0, 2], [0, 0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalty_over_a_generation_is_transformers(temperature: float) -> None:
    """Each step's expectation is computed from the ids that the sampler has returned so far."""
    options = SamplingOptions(temperature, top_k=1, repetition_penalty=1.5, seed=0)
    seen = np.array([5, 9, 9])
    sampler = Sampler(options, [seen])
    for step in range(20):
        scores = logits_of(step % 3)
        expected = hf_probabilities(scores, seen, SamplingOptions(1.0, repetition_penalty=1.5)).argmax()
        token = sampler.sample(scores[None], ALL)
        assert token[0] == expected
        seen = np.append(seen, token)


def generate(seed: int | None, actives: np.ndarray) -> np.ndarray:
    """Samples one token per step and row where active; the logits of a row depend only on step and row."""
    steps, rows = actives.shape
    sampler = Sampler(SamplingOptions(1.0, 50, 0.95, 1.2, seed), [np.array([row]) for row in range(rows)])
    logits = [np.stack([logits_of(100 * step + row) for row in range(rows)]) for step in range(steps)]
    return np.array([sampler.sample(logits[step], actives[step]) for step in range(steps)])


def test_a_seed_repeats_a_run_and_no_seed_does_not() -> None:
    actives = np.ones((12, 2), bool)
    np.testing.assert_array_equal(generate(7, actives), generate(7, actives))
    assert (generate(7, actives) != generate(8, actives)).any()
    assert (generate(None, actives) != generate(None, actives)).any()


def test_rows_do_not_depend_on_each_other() -> None:
    full = generate(7, np.ones((12, 3), bool))
    actives = np.ones((12, 3), bool)
    actives[4:, 1] = False  # row 1 finishes early
    ragged = generate(7, actives)
    np.testing.assert_array_equal(ragged[:, [0, 2]], full[:, [0, 2]])
    np.testing.assert_array_equal(ragged[:4, 1], full[:4, 1])
    assert not ragged[4:, 1].any()
    np.testing.assert_array_equal(generate(7, np.ones((12, 1), bool))[:, 0], full[:, 0])  # another batch size


def test_rows_have_streams_of_their_own() -> None:
    sampler = Sampler(SamplingOptions(1.0, seed=0), [np.array([1])] * 2)
    flat = np.zeros((2, VOCAB), np.float32)
    draws = np.array([sampler.sample(flat, np.ones(2, bool)) for _ in range(10)])
    assert (draws[:, 0] != draws[:, 1]).any()


def test_inactive_rows_are_not_looked_at() -> None:
    logits = np.full((2, VOCAB), np.nan, np.float32)
    logits[1] = logits_of(0)
    tokens = Sampler(SamplingOptions(), [np.array([1])] * 2).sample(logits, np.array([False, True]))
    assert tokens.tolist() == [0, logits[1].argmax()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(temperature: float, bad: float) -> None:
    logits = logits_of(0, (1, VOCAB))
    logits[0, 17] = bad
    with pytest.raises(BundleError, match=str(bad)):
        Sampler(SamplingOptions(temperature), [np.array([1])]).sample(logits, ALL)


def test_a_tiny_temperature_is_greedy() -> None:
    sampler = Sampler(SamplingOptions(1e-300), [np.array([1])])
    assert sampler.sample(logits_of(0, (1, VOCAB)), ALL) == logits_of(0).argmax()


def test_masked_logits_are_never_drawn() -> None:
    logits = np.full((1, VOCAB), -math.inf, np.float32)
    logits[0, [3, 400]] = 1
    sampler = Sampler(SamplingOptions(1.0, seed=0), [np.array([1])])
    assert {int(sampler.sample(logits, ALL)[0]) for _ in range(50)} == {3, 400}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 3),
        ("frequency_penalty", -math.inf),
        ("frequency_penalty", math.nan),
    ],
)
def test_options_out_of_range_are_named_with_their_value(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"(?s){name}.*{value}.*Hint:"):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        ({5: 101}, ("value of the sampling option logit_bias is too large", "It is 101", "100")),
        ({5: math.nan}, ("value of the sampling option logit_bias is not a number",)),
        ({5: "1"}, ("value of the sampling option logit_bias must be a number", "'1'")),
        ({-1: 1}, ("token of the sampling option logit_bias is too small", "It is -1")),
        ({"5": 1}, ("token of the sampling option logit_bias must be a whole number", "'5'")),
        ({True: 1}, ("token of the sampling option logit_bias must be a whole number",)),
        ({10**40: 1}, ("token of the sampling option logit_bias is too large",)),
        (dict.fromkeys(range(MOST_BIASES + 1), 1), ("too many", f"It has {MOST_BIASES + 1}", str(MOST_BIASES))),
        ([(5, 1)], ("logit_bias has the wrong type", "mapping")),
        (None, ("logit_bias has the wrong type",)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else repr(value)[:20],
)
def test_biases_that_are_refused(bias: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        SamplingOptions(logit_bias=bias)
    assert all(word in str(refused.value) for word in words)
    assert "Hint:" in str(refused.value)
    SamplingOptions(logit_bias=dict.fromkeys(range(MOST_BIASES), -100))


def test_other_options_alone_stay_with_another_seed() -> None:
    options = SamplingOptions(0.7, 5, 0.9, 1.1, None, 0.1, 0.2, 0.3, {3: 1.5})
    assert options.seeded(7) == SamplingOptions(0.7, 5, 0.9, 1.1, 7, 0.1, 0.2, 0.3, {3: 1.5})
    assert options.seed is None
    with pytest.raises(InputError, match="The sampling option seed"):
        options.seeded(-1)
