"""A JSON schema as llguidance (1.9) follows it to the letter.

Enters: a schema, as JSON makes it. Leaves: one without what llguidance would get wrong:

1. A class of all control characters without `"` or `\\`, such as `[^"]`, allows these two. One without U+0000 does not.
2. A whole number that one bound excludes is allowed where the other is less than 1 away. A bound next to it, which is
   included, does not allow it.
3. An integer of `const` or `enum` beyond 2⁵³ is written rounded. It is refused.
4. Names of properties that are texts, as zod writes for records, are a keyword that it does not know. All are texts.
5. A format that JSON Schema has not, such as pydantic's `path`, is a note, which llguidance refuses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_drop_runtime.errors import InputError

_NEXT = 2.0**-40  # from 1 to a number next to it; llguidance does not read all digits of the very next
_EXACT = 1 << 53  # integers up to here are floats
_NEGATED = re.compile(r"(\\.)|\[\^", re.DOTALL)
_FORMATS = (  # of JSON Schema; llguidance follows some, and refuses the others
    *(
        "date-time",
        "time",
        "date",
        "duration",
        "email",
        "idn-email",
        "hostname",
        "idn-hostname",
        "ipv4",
        "ipv6",
        "uuid",
    ),
    *("uri", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer", "relative-json-pointer", "regex"),
)
_VALUES = ("const", "enum", "default", "examples")  # no schemas in them
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # their keys are no keywords


def _pattern(pattern: str) -> str:
    """Case 1, for classes that are negated."""
    return _NEGATED.sub(lambda found: found[1] or r"[^\x00", pattern)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _include_bounds(schema: dict[str, Any]) -> None:
    """Case 2."""
    tighter: Any
    for sign, least, most, tighter in ((1, "Minimum", "Maximum", max), (-1, "Maximum", "Minimum", min)):
        bound: Any = schema.get(f"exclusive{least}")
        if not _is_number(bound) or bound % 1:
            continue
        low, high = sorted((bound, bound + sign))
        others: list[Any] = [schema.get(most.lower()), schema.get(f"exclusive{most}")]
        if any(_is_number(other) and low < other < high for other in others):
            within, given = bound + sign * _NEXT * max(abs(bound), 1), schema.get(least.lower())
            schema[least.lower()] = tighter(within, given) if _is_number(given) else within
            del schema[f"exclusive{least}"]


def _check_integers(value: Any) -> None:
    """Case 3."""
    if isinstance(value, int) and abs(value) > _EXACT:
        raise InputError(
            "An integer of the JSON schema is too large.",
            note=f"It is {str(value)[:40]}, in const or enum; up to {_EXACT} they are followed exactly.",
            hint="Use texts there.",
        )
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        _check_integers(part)


def followed(schema: Any) -> Any:
    """The schema, or a part of one.

    Raises:
        InputError: case 3.
    """
    if isinstance(schema, list | tuple):
        return [followed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, part in schema.items():
        if name == "propertyNames" and part in (True, {}, {"type": "string"}):
            continue
        if name == "format" and isinstance(part, str) and part not in _FORMATS:
            continue
        if name in ("const", "enum"):
            _check_integers(part)
        if name in _BY_NAME and isinstance(part, Mapping):
            is_pattern = name == "patternProperties"
            found[name] = {_pattern(key) if is_pattern else key: followed(one) for key, one in part.items()}
        elif name == "pattern" and isinstance(part, str):
            found[name] = _pattern(part)
        else:
            found[name] = part if name in _VALUES else followed(part)
    _include_bounds(found)
    return found
