"""Sampling against transformers' logits processors, in the order in which `generate` applies them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lora_drop_runtime.decoding.sampling import Sampler, SamplingOptions, distribution, penalize
from lora_drop_runtime.errors import BundleError, InputError
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 500
ALL = np.array([True])


def logits_of(seed: int, shape: tuple[int, ...] = (VOCAB,)) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 3).astype(np.float32)


def our_probabilities(scores: np.ndarray, seen: np.ndarray, options: SamplingOptions) -> np.ndarray:
    ids, probs = distribution(penalize(scores, seen, options.repetition_penalty), options)
    dense = np.zeros(len(scores))
    dense[ids] = probs
    return dense


def hf_probabilities(scores: np.ndarray, seen: np.ndarray, options: SamplingOptions) -> np.ndarray:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    processed = processors(torch.from_numpy(seen)[None], torch.from_numpy(scores)[None])
    return processed.softmax(-1)[0].numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 40, VOCAB, 10 * VOCAB])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_distribution_is_transformers(temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    options = SamplingOptions(temperature, top_k, top_p, penalty)
    for seed in range(5):
        scores = logits_of(seed)
        seen = np.random.default_rng(seed).integers(0, VOCAB, 60)
        ours, theirs = our_probabilities(scores, seen, options), hf_probabilities(scores, seen, options)
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)  # theirs is a float32 softmax


def test_ties() -> None:
    """Top-k keeps all that tie with the k-th; top-p keeps the lowest ids, as many as transformers."""
    scores = np.zeros(20, np.float32)
    best = [2, 3, 7, 11, 12, 18]
    scores[best] = 5
    unseen = np.array([], np.int64)
    for options, kept in [
        (SamplingOptions(1.0, top_k=3), best),
        (SamplingOptions(1.0, top_p=0.5), best[:4]),
        (SamplingOptions(1.0, top_k=5, top_p=0.6), best[:4]),
        (SamplingOptions(1.0, top_p=1e-9), best[:1]),
        (SamplingOptions(1.0, top_p=1e-20), best[:1]),  # 1 − p is 1, and all six have the same share
        (SamplingOptions(1.0, top_k=1, top_p=1e-20), best[:1]),
    ]:
        assert np.flatnonzero(our_probabilities(scores, unseen, options)).tolist() == kept
        if options.top_p > 1e-16:  # transformers keeps one there, too, whatever it is
            assert np.count_nonzero(hf_probabilities(scores, unseen, options)) == len(kept)


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
    ],
)
def test_options_out_of_range_are_named_with_their_value(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"(?s){name}.*{value}.*Hint:"):
        SamplingOptions(**{name: value})
