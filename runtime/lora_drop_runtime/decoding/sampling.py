"""Choosing the next tokens.

Enters: the logits of one decode step, one row per request. Leaves: one token id per row.
In this order apply: bias, repetition penalty, presence and frequency penalty, constraint, temperature, top-k, top-p,
min-p, draw. It is that of transformers' `generate`, with the two penalties that it does not have where vLLM has them.
This module knows no text, no engine and no schedule, and not when a row is finished.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_drop_runtime.bounds import (
    BIAS,
    COUNT_PENALTY,
    PENALTY,
    SEED,
    SHARE,
    TEMPERATURE,
    TOKEN_ID,
    TOP_K,
    TOP_P,
)
from lora_drop_runtime.errors import BundleError, InputError, wrong_type

from .constraint import Constraint, forked

Ids = NDArray[np.int64]

MOST_BIASES = 1024  # each is added at each token
_REALS = {
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
    "repetition_penalty": PENALTY,
    "min_p": SHARE,
    "presence_penalty": COUNT_PENALTY,
    "frequency_penalty": COUNT_PENALTY,
}


def _checked_bias(given: Any) -> dict[int, float]:
    """A copy of the biases, by token id."""
    if not isinstance(given, Mapping):
        raise wrong_type("The sampling option logit_bias", given, "a mapping", "Use for example {50256: -100}.")
    if len(given) > MOST_BIASES:
        raise InputError(
            "The sampling option logit_bias has too many tokens.",
            note=f"It has {len(given)}, the most are {MOST_BIASES}.",
            hint="Use a constraint, where most tokens are to be left out.",
        )
    token, bias = "A token of the sampling option logit_bias", "A value of the sampling option logit_bias"
    return {TOKEN_ID.whole(token, one): BIAS.real(bias, value) for one, value in given.items()}


@dataclass(frozen=True)
class SamplingOptions:
    """How a request's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); top_k, top_p and min_p then change nothing.
        top_k: draw among the k likeliest tokens and those tied with the last of them; 0 is off.
        top_p: draw among the fewest tokens that hold this much probability; 1 is off.
        repetition_penalty: lowers, if above 1, the logits of tokens already seen; it acts on greedy too.
        seed: of the random streams; None draws another one each time.
        min_p: draw among the tokens that have at least this share of the likeliest one's probability; 0 is off.
        presence_penalty: is taken off the logits of tokens that the row has written, not of the prompt's; it acts on
            greedy too.
        frequency_penalty: the same, once for each time that the row has written them.
        logit_bias: is added to the logits of these tokens, on greedy too; of a model whose vocabulary has them.

    Raises:
        InputError: a value outside its range, or of another type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, bounds in _REALS.items():
            object.__setattr__(self, name, bounds.real(f"The sampling option {name}", getattr(self, name)))
        for name, bounds in {"top_k": TOP_K, "seed": SEED}.items():
            if (value := getattr(self, name)) is not None or name == "top_k":
                object.__setattr__(self, name, bounds.whole(f"The sampling option {name}", value))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def seeded(self, seed: int) -> SamplingOptions:
        """The same with another seed, which alone is checked: there may be a thousand biases."""
        other = copy.copy(self)
        object.__setattr__(other, "seed", SEED.whole("The sampling option seed", seed))
        return other

    @property
    def changes_with_the_text(self) -> bool:
        """Whether the tokens of a text change the logits of those behind them."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits change before temperature, which greedy notices."""
        return self.changes_with_the_text or bool(self.logit_bias)

    @property
    def takes_the_largest(self) -> bool:
        """Whether the largest logit is taken as it is: top-k, top-p and min-p change nothing at temperature 0."""
        return self.temperature == 0 and not self.changes_logits

    @property
    def on_host_alone(self) -> tuple[str, ...]:
        """The options in use that an engine which chooses tokens itself does not know."""
        names = [name for name in ("presence_penalty", "frequency_penalty", "logit_bias") if getattr(self, name)]
        return (*names, "min_p") if self.min_p and self.temperature else tuple(names)


def not_numbers(note: str) -> BundleError:
    return BundleError(
        "The model computed logits that are not numbers.",
        note=note,
        hint="Check the bundle with: lora-drop inspect --check; or export it with a wider --dtype.",
    )


@dataclass(frozen=True)
class Seen:
    """The tokens of a row, each once.

    Attributes:
        ids: int64 [N].
        counts: int64 [N], how often the row has written each; 0 of those that stand in the prompt alone.
    """

    ids: Ids
    counts: Ids

    @classmethod
    def of(cls, prompt: NDArray[np.integer[Any]]) -> Seen:
        ids = np.unique(prompt).astype(np.int64)
        return cls(ids, np.zeros_like(ids))

    def and_then(self, token: int) -> Seen:
        """The same behind one more token that the row has written."""
        places = np.flatnonzero(self.ids == token)
        if not places.size:
            return Seen(np.append(self.ids, token), np.append(self.counts, 1))
        counts = self.counts.copy()
        counts[places] += 1
        return Seen(self.ids, counts)


def penalize(scores: NDArray[np.float32], seen: Seen, options: SamplingOptions) -> NDArray[np.float32]:
    """A copy of the logits [V] under the options' bias, then their repetition penalty (Keskar et al. 2019), then their
    presence and frequency penalties (OpenAI's API): l − presence · [count > 0] − frequency · count."""
    scores = scores.copy()
    if options.logit_bias:
        biases = np.fromiter(options.logit_bias.values(), np.float64, len(options.logit_bias))
        scores[np.fromiter(options.logit_bias, np.int64, len(biases))] += biases
    if options.repetition_penalty != 1:
        chosen, penalty = scores[seen.ids], options.repetition_penalty
        scores[seen.ids] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
    if options.presence_penalty or options.frequency_penalty:
        scores[seen.ids] -= options.presence_penalty * (seen.counts > 0) + options.frequency_penalty * seen.counts
    return scores


def distribution(scores: NDArray[np.float32], options: SamplingOptions) -> tuple[Ids, NDArray[np.float64]]:
    """What is left to draw from after temperature (above 0), top-k, top-p and min-p.

    Args:
        scores: logits [V], bias and penalties already applied.

    Returns:
        ids int64 [C] and their probabilities float64 [C], which sum to 1. All other tokens have none.
    """
    vocab = len(scores)
    if 0 < options.top_k < vocab:
        # On the raw logits, which temperature does not reorder. Ties with the k-th stay.
        kth = vocab - options.top_k
        ids = np.flatnonzero(scores >= np.partition(scores, kth)[kth])
        scores = scores[ids]
    else:
        ids = np.arange(vocab)
    weights = np.exp((scores - scores.max()) / max(options.temperature, 1e-30))  # keeps float32 from overflow
    probs = weights / weights.sum(dtype=np.float64)
    if options.top_p < 1:
        # Tokens of less than (1 - p) / C each weigh less than 1 - p together, so that tail needs no sorting.
        head = np.flatnonzero(probs >= (1 - options.top_p) / len(probs))
        head = head[np.argsort(-probs[head], kind="stable")]  # ties: the lower id first, as argmax has it
        head = head[: np.searchsorted(np.cumsum(probs[head]), options.top_p) + 1]
        ids, probs = ids[head], probs[head] / probs[head].sum()
    if options.min_p:
        kept = probs >= options.min_p * probs.max()
        ids, probs = ids[kept], probs[kept] / probs[kept].sum()
    return ids, probs


def masked(scores: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """A copy of the logits [V], −∞ where a token is not allowed.

    Raises:
        InputError: the mask is of another shape or type, or allows nothing.
    """
    if getattr(allowed, "shape", None) != scores.shape or allowed.dtype != np.bool_ or not allowed.any():
        found = f"{allowed.dtype} {allowed.shape}" if isinstance(allowed, np.ndarray) else type(allowed).__name__
        raise InputError(
            "The constraint allows no token.",
            note=f"Its mask is {found}, needed is bool {scores.shape} with at least one token.",
            hint="Let is_over be true where a text has to end.",
        )
    return np.where(allowed, scores, np.float32(-np.inf))


class RowSampler:
    """The token choice of one row: its random stream, its constraint, and the tokens that the penalties have seen.

    Attributes:
        seen: replaced and never written, so that who keeps it can put it back.
        constraint: the row's own, which `remember` moves on; None allows every token.
    """

    def __init__(
        self,
        options: SamplingOptions,
        prompt: NDArray[np.integer[Any]],
        stream: np.random.SeedSequence,
        row: int,
        constraint: Constraint | None = None,
    ) -> None:
        self.options = options
        self.generator = np.random.default_rng(stream)
        self.seen = Seen.of(prompt)
        self.constraint = constraint
        self._row = row
        # Asked at each token
        self._changes_logits, self._counts = options.changes_logits, options.changes_with_the_text

    @property
    def is_over(self) -> bool:
        """Whether its constraint lets no further token follow."""
        return self.constraint is not None and self.constraint.is_over

    def penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [V] under bias and penalties, −∞ where the constraint does not allow a token.

        Raises:
            BundleError: the largest is NaN or infinite.
            InputError: the constraint allows no token.
        """
        return self._penalized(logits)[0]

    def _penalized(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """The same, and the index of the largest."""
        scores = penalize(logits, self.seen, self.options) if self._changes_logits else logits
        index = self.largest(scores)
        if self.constraint is not None:
            scores = masked(scores, self.constraint.allowed())
            index = self.largest(scores)
        return scores, index

    def largest(self, scores: NDArray[np.float32]) -> int:
        """Where the largest of scores [V] stands. Raises BundleError: it is NaN or infinite."""
        index = int(scores.argmax())
        largest = scores[index]
        if not math.isfinite(largest):
            raise not_numbers(f"The largest logit of row {self._row} is {largest}.")
        return index

    def draw(self, ids: Ids, probs: NDArray[np.float64]) -> int:
        """One of `ids` [C], whose probabilities need not sum to 1."""
        cumulative = np.cumsum(probs)
        cumulative /= cumulative[-1]  # the last is exactly 1 and random() below it: the index is in range
        return int(ids[np.searchsorted(cumulative, self.generator.random(), side="right")])

    def choose(self, scores: NDArray[np.float32]) -> int:
        """A token by penalized logits [V]."""
        if self.options.temperature > 0:
            return self.draw(*distribution(scores, self.options))
        return int(scores.argmax())

    def take(self, logits: NDArray[np.float32]) -> int:
        """Choose, and remember, a token by logits [V]. Raises as `penalized` does."""
        scores, largest = self._penalized(logits)
        token = largest if self.options.temperature == 0 else self.choose(scores)
        self.remember(token)
        return token

    def took(self, token: int) -> None:
        """A token was chosen elsewhere, with this row's next random number; remember it.

        Raises:
            BundleError: it is −1, since logits were no numbers.
        """
        if token < 0:
            raise not_numbers(f"The logits of row {self._row} have NaN or infinity among them.")
        if self.options.temperature > 0:
            self.generator.random()
        self.remember(token)

    def remember(self, token: int) -> None:
        """The token belongs to the text from now on."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._counts:
            self.seen = self.seen.and_then(token)


class Sampler:
    """The token choice of a batch of requests.

    Row `i` draws from its own stream, derived from the seed and `i` only: the batch size and the other rows
    do not change what it draws.

    Args:
        options: the same for all rows.
        prompts: int64 [T_i] for each row; seen by the repetition penalty alone.
        constraint: every row takes a fork of it.
    """

    def __init__(
        self,
        options: SamplingOptions,
        prompts: Sequence[NDArray[np.integer[Any]]],
        constraint: Constraint | None = None,
    ) -> None:
        streams = np.random.SeedSequence(options.seed).spawn(len(prompts))
        self.rows = [
            RowSampler(options, prompt, stream, row, forked(constraint))
            for row, (prompt, stream) in enumerate(zip(prompts, streams, strict=True))
        ]

    @property
    def over(self) -> NDArray[np.bool_]:
        """bool [B], rows whose constraint lets no further token follow."""
        return np.array([row.is_over for row in self.rows])

    def sample(self, logits: NDArray[np.float32], active: NDArray[np.bool_]) -> Ids:
        """Chooses, and remembers, one token for each active row.

        Args:
            logits: float32 [B, V], only read.
            active: bool [B].

        Returns:
            int64 [B], 0 for inactive rows.

        Raises:
            BundleError: the largest logit of an active row is NaN or infinite.
            InputError: the constraint of an active row allows no token.
        """
        assert len(logits) == len(active) == len(self.rows)
        tokens = np.zeros(len(logits), np.int64)
        for row, is_active in enumerate(active.tolist()):
            if is_active:
                tokens[row] = self.rows[row].take(logits[row])
        return tokens
