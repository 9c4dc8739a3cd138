"""Which drafts of a row are accepted: the rule of speculative sampling (Leviathan et al. 2023; Chen et al. 2023).

Enters: drafts, each with what it was drawn from, and the verifier's logits at each of them. Leaves: the tokens that the
verifier would have chosen itself, greedily or, where it draws, in distribution. Knows no engine and no cache.

With p the verifier's distribution and q the draft's, both after all sampling options and the constraint, a draft d is
accepted with probability min(1, p(d) / q(d)); else a token is drawn from max(p − q, 0), normalized. A draft that was
looked up, or taken greedily, is accepted iff it is the token that the verifier chooses itself. So a seed draws the same
tokens with looked-up drafts as without, however many there are. Penalties count drafts as if they had been accepted.

Lenience l below 1 (Leviathan et al., A.5) takes l q for q there, and then also of a draft that was looked up, whose q
is 1. A greedy one is accepted iff p(d) is at least l times the largest probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sampling import Ids, RowSampler, distribution

Distribution = tuple[Ids, NDArray[np.float64]]  # ids [C] and their probabilities [C]


@dataclass(frozen=True)
class Draft:
    """A token that the verifier is to judge; `drawn_from` is None where it was looked up, or taken greedily."""

    token: int
    drawn_from: Distribution | None = None


def drafted(row: RowSampler, logits: NDArray[np.float32]) -> tuple[Draft, float]:
    """A draft by a LoRA step's logits [V], and the probability of the likeliest token there.

    The probability does not depend on what was drawn: who stops at a low one changes no distribution.
    """
    scores = row.penalized(logits)
    if row.options.temperature > 0:
        ids, probs = distribution(scores, row.options)
        return Draft(row.draw(ids, probs), (ids, probs)), float(probs.max())
    token = int(scores.argmax())
    return Draft(token), float(1 / np.exp(scores - scores[token]).sum(dtype=np.float64))


def _probability(ids: Ids, probs: NDArray[np.float64], token: int) -> float:
    return float(probs[ids == token].sum())


def judged(row: RowSampler, scores: NDArray[np.float32], draft: Draft, lenience: float = 1.0) -> int:
    """The verifier's token by penalized logits [V]: the draft's, if it is accepted."""
    if draft.drawn_from is None and lenience == 1:
        return row.choose(scores)
    if row.options.temperature == 0:
        best = row.choose(scores)
        return draft.token if scores[draft.token] >= scores[best] + math.log(lenience) else best
    ids, probs = distribution(scores, row.options)
    drawn_from = draft.drawn_from or (np.array([draft.token]), np.ones(1))
    ours, theirs = _probability(ids, probs, draft.token), lenience * _probability(*drawn_from, draft.token)
    if row.generator.random() * theirs < ours:
        return draft.token
    rest = np.zeros(len(scores))
    rest[ids] = probs
    rest[drawn_from[0]] -= lenience * drawn_from[1]
    left = np.flatnonzero(rest > 0)
    return row.draw(left, rest[left]) if left.size else draft.token  # p = q but for their last bits


def verified(row: RowSampler, drafts: Sequence[Draft], logits: NDArray[np.float32], lenience: float = 1.0) -> list[int]:
    """The accepted drafts and one token of the verifier's; the row remembers them. Nothing behind the end of its
    constraint.

    Args:
        logits: float32 [n + 1, V], after the row's last token and after each of the n drafts.
    """
    tokens: list[int] = []
    for place, draft in enumerate(drafts):
        tokens.append(judged(row, row.penalized(logits[place]), draft, lenience))
        row.remember(tokens[-1])
        if tokens[-1] != draft.token or row.is_over:
            return tokens
    tokens.append(row.choose(row.penalized(logits[len(drafts)])))
    row.remember(tokens[-1])
    return tokens
