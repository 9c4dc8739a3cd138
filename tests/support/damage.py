"""Damage for fuzz tests: what may be wrong with JSON and with bytes, as hypothesis draws it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]

# What no value should be. Texts lead out of the bundle, over the limits of the system, or into a terminal
TEXTS = ["", ".", "..", "../secret", "/etc/passwd", "/dev/zero", "a/../../b", "weights", "x" * 300, "\x1b[2J", "\x00"]
TEXTS += ["\ud800", "float32", "int4", "ort", "skip", "\u202e", "-1", "1e400"]
NUMBERS: list[float] = [0, 1, -1, 2, 3, 7, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308]
NUMBERS += [float("nan"), float("inf")]
OTHERS: list[Any] = [None, True, False, [], {}, [None], [[]], {"a": 1}, [1, 2, 3], ["x"], [0.5]]


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """The way to every value of a JSON text, to the text itself as well."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*here, key))


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(OTHERS),
    st.integers(-(2**70), 2**70),
    st.text(max_size=8),
    st.builds(_deep, st.sampled_from([3, 60, 400])),
)


def _set(data: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return data


def _get(data: Any, place: Place) -> Any:
    for key in place:
        data = data[key]
    return data


@st.composite
def damaged_json(draw: Callable[..., Any], text: str) -> bytes:
    """A JSON text in which one value is another, gone, there twice or renamed, or that is cut or scrambled."""
    data = copy.deepcopy(json.loads(text))
    place = draw(st.sampled_from(list(places(data))))
    how = draw(st.sampled_from(["value"] * 6 + ["gone", "renamed", "extra", "swapped", "twice", "bytes", "cut"]))
    if how == "bytes":
        return draw(damaged_bytes(text.encode()))
    if how == "cut":
        return text.encode()[: draw(st.integers(0, len(text)))]
    holder = _get(data, place[:-1]) if place else None
    if how == "value" or holder is None:
        data = _set(data, place, draw(VALUES))
    elif how == "gone":
        del holder[place[-1]]
    elif how == "swapped":
        other = draw(st.sampled_from(list(places(data))))
        data = _set(data, place, copy.deepcopy(_get(data, other)))
    elif isinstance(holder, dict):
        value = holder.pop(place[-1]) if how == "renamed" else holder[place[-1]]
        holder[draw(st.sampled_from(TEXTS))] = value
        if how == "twice":
            key = json.dumps(place[-1])
            return json.dumps(data).replace(f"{key}:", f"{key}: 0, {key}:", 1).encode()
    else:
        holder.insert(0, draw(VALUES))
    return json.dumps(data).encode()


@st.composite
def damaged_bytes(draw: Callable[..., Any], content: bytes, most: int | None = None) -> bytes:
    """Bytes of which some are others, gone or new; the damage begins before `most`."""
    at = draw(st.integers(0, max(0, min(most or len(content), len(content)) - 1)))
    how = draw(st.sampled_from(["flip", "flip", "flip", "overwrite", "insert", "delete", "cut"]))
    new = draw(st.binary(min_size=1, max_size=8))
    if how == "flip":
        flipped = bytearray(content or b"\0")
        flipped[at] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if how == "overwrite":
        return content[:at] + new + content[at + len(new) :]
    if how == "insert":
        return content[:at] + new + content[at:]
    return content[:at] + content[at + len(new) :] if how == "delete" else content[:at]


def write(path: Path, content: bytes) -> None:
    """Into a file of its own, which may have been a link to others."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
