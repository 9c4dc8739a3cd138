"""A JSON schema as llguidance (1.9) follows it to the letter.

Enters: a schema, as JSON makes it. Leaves: one without what llguidance would get wrong:

1. A class of all control characters without `"` or `\\`, such as `[^"]`, allows these two. One without U+0000 does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NEGATED = re.compile(r"(\\.)|\[\^", re.DOTALL)
_VALUES = ("const", "enum", "default", "examples")  # no schemas in them
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # their keys are no keywords


def _pattern(pattern: str) -> str:
    """Case 1, for classes that are negated."""
    return _NEGATED.sub(lambda found: found[1] or r"[^\x00", pattern)


def followed(schema: Any) -> Any:
    """The schema, or a part of one."""
    if isinstance(schema, list | tuple):
        return [followed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, part in schema.items():
        if name in _BY_NAME and isinstance(part, Mapping):
            is_pattern = name == "patternProperties"
            found[name] = {_pattern(key) if is_pattern else key: followed(one) for key, one in part.items()}
        elif name == "pattern" and isinstance(part, str):
            found[name] = _pattern(part)
        else:
            found[name] = part if name in _VALUES else followed(part)
    return found
