"""Drafts from a row's own text: prompt look-up.

Enters: the tokens of a row, one after another. Leaves: what followed the last of them at their latest earlier
occurrence. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable

SIZES = (3, 2)  # of the n-grams that are looked up, the longest first (docs/algorithm.md says why no single tokens)


class Text:
    """A row's tokens, and where each n-gram of them was last followed by another token."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._after: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in SIZES)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One token more; a few look-ups, whatever the length of the text."""
        end = len(self.tokens)
        for size, after in zip(SIZES, self._after, strict=True):
            if end >= size:
                after[tuple(self.tokens[end - size :])] = end
        self.tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """Up to `count` tokens; none where the last tokens are new.

        A continuation that runs into the end of the text goes on with itself, as the period of a repetition.
        """
        for size, after in zip(SIZES, self._after, strict=True):
            begin = after.get(tuple(self.tokens[-size:]))
            if begin is not None:
                drafts: list[int] = []
                for place in range(begin, begin + count):
                    known = place - len(self.tokens)
                    drafts.append(self.tokens[place] if known < 0 else drafts[known])
                return drafts
        return []
