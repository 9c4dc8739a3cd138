"""What a chat template may spend, and what its operations cost.

Enters: an operation and its arguments, before it is done. Leaves: nothing, or TooMuch. An operation reads and makes no
more than it pays for: numbers in its arguments are bounded, and by them how much it makes of what it is given. What is
kept is bounded by what is made.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.utils import Namespace

MOST_STEPS = 250_000
MOST_CHARACTERS = 1 << 24
STEPS_PER_CHARACTER = 4  # a longer chat may spend more
CHARACTERS_PER_CHARACTER = 64
MOST_NUMBER = 100_000  # in an argument: a width, a count
MOST_BITS = 4096  # of an integer that an operator makes
MOST_NESTING = 64  # of lists in lists
MOST_INDENT = 16  # of JSON
MOST_DIGITS = 100  # that are rounded to
SLOT = 8  # what an element of a list takes, in characters

# Of all filters and tests those that read no more than is said here; others may read all that they are given
_CHEAP = """_step length count first last default d attr defined undefined none boolean false true integer number
mapping sequence iterable callable sameas escaped odd even divisibleby filter test"""
_ONE_LEVEL = "_sliced _looped list reverse batch slice map select reject selectattr rejectattr items unique groupby"
_FREE, _SHALLOW = frozenset(_CHEAP.split()), frozenset(_ONE_LEVEL.split())
_REPEATED = ("indent", "wordwrap")  # filters that put a text in many places
_SPLITTING = ("split", "rsplit", "splitlines", "list")  # a character can become an object
_NUMBERS = re.compile(r"\d+")


class TooMuch(jinja2.TemplateError):
    """The template asks for more than it may have."""


def text_size(value: Any, most: int, depth: int = MOST_NESTING) -> int:
    """Characters that a value's text has at most, but for quotes and escapes; counted no further than `most`."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        parts: Iterable[Any] = (part for pair in value.items() for part in pair)
    elif isinstance(value, list | tuple | set | type({}.keys()) | type({}.values()) | type({}.items())):
        parts = value
    elif isinstance(value, range):
        return SLOT * len(value)
    elif isinstance(value, Namespace):
        raise TooMuch("it uses a namespace as a value")
    else:
        return MOST_BITS // 3 if isinstance(value, int) and value.bit_length() > 64 else SLOT
    if not depth:
        raise TooMuch(f"it nests lists deeper than {MOST_NESTING} levels")
    total = 0
    for part in parts:
        total += SLOT + text_size(part, most - total, depth - 1)
        if total > most:
            break
    return total


class Budget:
    """What is left to a rendering with these variables."""

    def __init__(self, variables: object) -> None:
        characters = text_size(variables, 1 << 40)
        self.steps = MOST_STEPS + STEPS_PER_CHARACTER * characters
        self.characters = MOST_CHARACTERS + CHARACTERS_PER_CHARACTER * characters

    def pay(self, characters: int) -> None:
        """For a step that reads and makes so much."""
        self.steps -= 1
        self.characters -= characters
        if self.steps < 0:
            raise TooMuch("it takes too many steps; is there a loop without an end?")
        if self.characters < 0:
            raise TooMuch("it makes too much text")


_SPENT: ContextVar[Budget] = ContextVar("spent")


@contextlib.contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """What is paid for inside comes out of this budget."""
    token = _SPENT.set(budget)
    try:
        yield
    finally:
        _SPENT.reset(token)


def _own_size(value: Any) -> int:
    """Of a value without what its elements hold."""
    if isinstance(value, str):
        return len(value)
    return SLOT * len(value) if isinstance(value, list | tuple | range | Mapping) else SLOT


def _paying(items: Iterator[Any]) -> Iterator[Any]:
    """What a generator gives: nobody knows before how much that is."""
    for item in items:
        _SPENT.get().pay(SLOT)
        yield item


def _known_end(value: Any) -> Any:
    return _paying(value) if isinstance(value, Iterator) else value


def _number(value: int, most: int = MOST_NUMBER) -> int:
    if abs(value) > most:
        raise TooMuch(f"it gives a function a number above {most}")
    return abs(value)


def _largest_number(values: Iterable[Any]) -> int:
    """Among arguments; 1 where there is none."""
    return max((1, *(_number(value) for value in values if isinstance(value, int))))


def _widths(format_spec: str) -> int:
    """The numbers in a format, together."""
    return sum(_number(int(text) if len(text) < 9 else MOST_NUMBER + 1) for text in _NUMBERS.findall(format_spec))


def pay_for_text(value: Any, times: int = 1) -> Any:
    """Pay for a value's text, `times` over; returns the value."""
    budget = _SPENT.get()
    budget.pay(times * text_size(value, budget.characters))
    return value


def pay_for_field(value: Any, format_spec: str) -> None:
    """For one field of `str.format`."""
    budget = _SPENT.get()
    budget.pay(len(format_spec) + _widths(format_spec) + text_size(value, budget.characters))


def _pay_for_percent(text: str, values: Any) -> None:
    """For `text % values`: each field may take all values, and be as wide as a number among them."""
    arguments = (
        values if isinstance(values, tuple) else tuple(values.values()) if isinstance(values, Mapping) else (values,)
    )
    budget = _SPENT.get()
    widest = _largest_number(arguments) if "*" in text else 0
    each = widest + text_size(arguments, budget.characters)
    budget.pay(len(text) + _widths(text) + text.count("%") * each)


def pay_for_operator(operator: str, left: Any, right: Any) -> None:
    """For `+`, `*`, `**` or `%`."""
    if operator == "%" and isinstance(left, str):
        _pay_for_percent(left, right)
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise TooMuch(f"it computes a number of more than {MOST_BITS} bits")
        _SPENT.get().pay(SLOT)
    elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        _SPENT.get().pay(max(1, times) * _own_size(repeated))
    else:
        _SPENT.get().pay(_own_size(left) + _own_size(right))


def pay_for_json(value: Any, indent: Any, separators: Any) -> None:
    """For text in which any character may be escaped, and any element stand on an indented line of its own."""
    line = 0 if indent is None else 1 + (len(indent) if isinstance(indent, str) else _number(int(indent), MOST_INDENT))
    if line > 1 + MOST_INDENT:
        raise TooMuch(f"it indents JSON by more than {MOST_INDENT}")
    between = 1 if separators is None else max(1, text_size(separators, MOST_CHARACTERS))
    pay_for_text(value, times=12 + between + line * MOST_NESTING // SLOT)


def _joined(items: Iterable[Any], separator: Any) -> list[Any]:
    """The items as a list, paid for as they come."""
    found = []
    for item in items:
        pay_for_text((item, separator))
        found.append(item)
    return found


def _pay_for_replacing(text: Any, args: tuple[Any, ...]) -> None:
    if isinstance(text, str) and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        found = text.count(args[0]) if args[0] else len(text) + 1
        _SPENT.get().pay(found * len(args[1]))


def pay_for_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """For a method of a text, a list or a dictionary; returns the arguments to call it with."""
    args = tuple(map(_known_end, args))
    if not isinstance(owner, str):
        _SPENT.get().pay(SLOT if name in ("get", "items", "keys", "values") else _own_size(owner))
        return args if name in ("get", "items", "keys", "values") else pay_for_text(args)
    if name == "join" and len(args) == 1:
        return (_joined(args[0], owner),)
    if name == "replace":
        _pay_for_replacing(owner, args)
    numbers = () if name in ("replace", "split", "rsplit", "find", "count", "index", "rfind", "startswith") else args
    pay_for_text((owner, args, tuple(kwargs.values())), SLOT if name in _SPLITTING else _largest_number(numbers))
    return args


def pay_for_function(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """For a macro or another function that copies no more than its arguments themselves; returns them."""
    _SPENT.get().pay(sum(map(_own_size, (*args, *kwargs.values()))))
    return tuple(map(_known_end, args))


def pay_for_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """For a filter; returns the value to give to it."""
    budget, others = _SPENT.get(), (*args, *kwargs.values())
    value = _known_end(value)
    if name in _FREE:
        budget.pay(max(0, value) if name == "_step" else 0)
        return value
    if name == "_read":
        return pay_for_text(value)
    if name == "join":
        return _joined(value, others)
    if name == "sum":
        value = _joined(value, "")
        budget.pay(len(value) * sum(map(_own_size, value)) if any(not isinstance(v, int | float) for v in value) else 0)
    elif name == "replace":
        _pay_for_replacing(str(pay_for_text(value)), args)
    elif name == "format":
        _pay_for_percent(str(pay_for_text(value)), kwargs or args)
    elif name == "round":
        _number(next((v for v in others if isinstance(v, int)), 0), MOST_DIGITS)
    elif name in _SHALLOW:
        copies = _largest_number(others) if name in ("batch", "slice") else 1
        budget.pay(copies * _own_size(value) * (SLOT if name in _SPLITTING and isinstance(value, str) else 1))
        return value
    repeated = max((len(v) for v in others if isinstance(v, str)), default=1) if name in _REPEATED else 1
    pay_for_text((value, others), times=max(repeated, 1 if name == "int" else _largest_number(others)))
    return value


def pay_for_test(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """For a test; returns the value to give to it."""
    if name in _FREE:
        _SPENT.get().pay(0)
        return value
    pay_for_text((value, args))
    return _known_end(value)
