"""JSON as frozen dataclasses, read by their annotations.

Enters: bytes that anybody may have written. Leaves: objects whose fields have the types that their class says, or a
ValueError with one sentence that names the place. What JSON takes and a bundle never holds is refused: NaN and infinite
numbers, integers that need more than 63 bits or are negative, an object's key that is there twice, deep nesting.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, NoReturn

MOST_INTEGER = 2**63 - 1
MOST_NESTING = 50
_SHOWN_CHARACTERS = 40
# A terminal obeys them; it begins a line at some of the last, and turns the order of what it shows at others
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a truth value",
    float: "a number",
    type(None): "null",
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is no number")


def _integer(text: str) -> int:
    if len(text) > len(str(MOST_INTEGER)) or abs(value := int(text)) > MOST_INTEGER:
        raise ValueError(f"it holds an integer of {len(text)} digits, more than 63 bits hold")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:_SHOWN_CHARACTERS]}, which is too large a number")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twin = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"it says {_shown(twin)} twice")
    return found


def _nesting(value: Any, left: int = MOST_NESTING) -> None:
    if not left:
        raise ValueError(f"it is nested deeper than {MOST_NESTING} levels")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _nesting(inner, left - 1)


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is none, or holds what no bundle does; the sentence begins with «it».
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
            object_pairs_hook=_without_twins,
        )
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} in line {error.lineno}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_NESTING} levels") from None
    _nesting(value)
    return value


def _refuse(where: str, value: object, needed: str) -> NoReturn:
    found = _KINDS.get(type(value), "a number") if isinstance(value, dict | list | None) else _shown(value)
    raise ValueError(f"{where} is {found}, needed is {needed}")


@functools.cache
def _types_of(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _dataclass(cls: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _refuse(where, value, "an object")
    types_of = _types_of(cls)  # type: ignore[arg-type]  # a class is hashable
    surplus = [name for name in value if name not in types_of]
    if surplus:
        raise ValueError(f"{where} has {_shown(surplus[0])}, which is unknown")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise ValueError(f"{where} has no {field.name!r}")
    return cls(**{name: typed(types_of[name], item, f"{where}.{name}") for name, item in value.items()})


def _tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _refuse(where, value, "a list")
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{where} has {len(value)} elements, needed are {len(items)}")
    return tuple(typed(item, inner, f"{where}[{i}]") for i, (item, inner) in enumerate(zip(items, value, strict=True)))


def _scalar(annotation: Any, value: Any, where: str) -> Any:
    if annotation is int:
        if type(value) is not int or value < 0:
            _refuse(where, value, "a whole number of at least 0")
    elif annotation is float:
        if type(value) not in (int, float):
            _refuse(where, value, "a number")
        return float(value)
    elif annotation is str:
        if type(value) is not str:
            _refuse(where, value, "a text")
        if _CONTROL.search(value):
            _refuse(where, value, "a text without control characters")
    else:
        assert annotation is bool, annotation
        if type(value) is not bool:
            _refuse(where, value, "true or false")
    return value


def typed(annotation: Any, value: Any, where: str) -> Any:
    """A value of JSON as an annotation has it: dataclasses from objects, tuples from lists, mappings, scalars, None.

    Args:
        annotation: a dataclass; `tuple[X, ...]` or of a fixed length; `Mapping[str, X]`; int, float, str or bool, each
            also with `| None`; `object` for anything.
        value: as `parse_json` gives it.
        where: names the place in the message: `model.kv_heads`.

    Raises:
        ValueError: it is not of that type; integers are never negative.
    """
    origin = typing.get_origin(annotation)
    if annotation is object:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
        return typed(annotation, value, where)
    if origin is tuple:
        return _tuple(typing.get_args(annotation), value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            _refuse(where, value, "an object")
        of = typing.get_args(annotation)[1]
        return {
            _scalar(str, k, f"a key of {where}"): typed(of, item, f"{where}.{_shown(k)}") for k, item in value.items()
        }
    if dataclasses.is_dataclass(annotation):
        assert isinstance(annotation, type)
        return _dataclass(annotation, value, where)
    return _scalar(annotation, value, where)
