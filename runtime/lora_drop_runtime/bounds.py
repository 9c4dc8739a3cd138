"""The numbers that a user may give: their bounds, said once, and one check of a number.

Enters: a number as the user gave it, under the name that the user knows it by. Leaves: a plain int or float, or an
error with both values. Options (command_line.py) and arguments of the Python interface are checked alike.

An upper bound is above all that makes sense, and below what takes a machine with it.
"""

from __future__ import annotations

import numbers
import operator
import os
from dataclasses import dataclass
from typing import Any

from .errors import InputError, is_truth_value


def _said(number: float) -> str:
    """`64`, `0.5`; a large power of two as one: `2^63 − 1`."""
    if isinstance(number, int) and number > 10**6:
        for value, rest in ((number, ""), (number + 1, " − 1")):
            if value & (value - 1) == 0:
                return f"2^{value.bit_length() - 1}{rest}"
    return f"{number:g}" if isinstance(number, float) else str(number)


def _given(value: object) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 100:
        return f"{'−' if value < 0 else ''}2^{value.bit_length() - 1} or beyond"  # Python refuses to write the longest
    text = str(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:40]}…"


@dataclass(frozen=True)
class Bounds:
    """least ≤ x ≤ most; with `open` least < x. NaN lies in none.

    str() is how `--help` and messages say it: `1 to 64`, `above 0, at most 1`.
    """

    least: float
    most: float
    open: bool = False

    @property
    def hint(self) -> str:
        return f"Use a number {'' if self.open else 'from '}{self}."

    def __str__(self) -> str:
        least, most = _said(self.least), _said(self.most)
        return f"above {least}, at most {most}" if self.open else f"{least} to {most}"

    def _check(self, name: str, value: float, why: str, error: type[InputError]) -> None:
        if self.least < value <= self.most or (value == self.least and not self.open):
            return
        if value > self.most:
            fact, bound = "is too large", f"the largest possible is {_said(self.most)}"
        elif value <= self.least:
            fact, bound = "is too small", f"the smallest possible is {_said(self.least)}"
            bound = f"it has to be above {_said(self.least)}" if self.open else bound
        else:
            fact, bound = "is not a number", f"possible is {self}"
        reason = f", {why}" if why else ""
        raise error(f"{name} {fact}.", note=f"It is {_given(value)}; {bound}{reason}.", hint=self.hint)

    def whole(self, name: str, value: Any, *, why: str = "", error: type[InputError] = InputError) -> int:
        """A whole number within the bounds, as an int; numpy's are taken, bools and floats are not.

        Args:
            name: as the user knows it, `--threads` or `threads`.
            why: a bound is where it is, for the message.
            error: what is raised.

        Raises:
            InputError: another type, or out of bounds.
        """
        try:
            if is_truth_value(value):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise error(
                f"{name} must be a whole number.",
                note=f"It is {_given(value)}, of type {type(value).__name__}; possible is {self}.",
                hint=self.hint,
            ) from None
        self._check(name, number, why, error)
        return number

    def real(self, name: str, value: Any, *, why: str = "", error: type[InputError] = InputError) -> float:
        """A number within the bounds, as a float; whole numbers and numpy's are taken, bools are not.

        Raises:
            InputError: another type, or out of bounds, which infinity and NaN are.
        """
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise error(
                f"{name} must be a number.",
                note=f"It is {_given(value)}, of type {type(value).__name__}; possible is {self}.",
                hint=self.hint,
            )
        self._check(name, value, why, error)  # type: ignore[arg-type]  # a Real compares like a float
        number = float(value)
        self._check(name, number, why, error)  # a Fraction above 0 may be 0 as a float
        return number


# More only wait for each other; thousands take all memory. 64 leave scripts alone that were written elsewhere
THREADS = Bounds(1, min(1024, max(64, 4 * (os.cpu_count() or 1))))
SEED = Bounds(0, 2**63 - 1)  # what numpy and PyTorch both take
TOKENS = Bounds(1, 2**24)  # of a request, a prompt, a window: above any model's context
K = Bounds(0, 2**24)  # LoRA steps between two refreshes
BATCH = Bounds(1, 4096)  # rows at once
RANK = Bounds(1, 2**16)  # of adapters; the model's hidden size is the next bound
COUNT = Bounds(1, 2**31 - 1)  # of repeats, items, windows, steps, tokens of a text
TOKEN_ID = Bounds(0, 2**31 - 1)  # whatever the vocabulary
COUNT_OR_NONE = Bounds(0, 2**31 - 1)
LAYERS = Bounds(0, 2**12)  # the deepest models that there are have 1000

# As float32 computes with them, neither overflowing nor vanishing
TEMPERATURE = Bounds(0, 1000)
TOP_K = Bounds(0, 2**31 - 1)
TOP_P = Bounds(0, 1, open=True)
PENALTY = Bounds(0.001, 1000)
COUNT_PENALTY = Bounds(-2, 2)  # presence and frequency, as OpenAI's API has them
BIAS = Bounds(-100, 100)  # likewise
SHARE = Bounds(0, 1)
LENIENCE = Bounds(0, 1, open=True)
