"""Constraints without a grammar: a rule says which tokens may follow the ones so far."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

Rule = Callable[[tuple[int, ...]], Collection[int]]  # what may follow; nothing where the text is over


class Ruled:
    """A `Constraint` that asks a rule anew for every token."""

    def __init__(self, rule: Rule, vocab_size: int, tokens: tuple[int, ...] = ()) -> None:
        self.rule, self.vocab_size, self.tokens = rule, vocab_size, tokens

    @property
    def is_over(self) -> bool:
        return not self.rule(self.tokens)

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self.vocab_size, np.bool_)
        mask[list(self.rule(self.tokens))] = True
        return mask

    def accept(self, token: int) -> None:
        assert token in self.rule(self.tokens), (self.tokens, token)
        self.tokens += (token,)

    def fork(self) -> Ruled:
        return Ruled(self.rule, self.vocab_size, self.tokens)
