"""The name that a server gives its model, and the ids of requests."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

from lora_drop_runtime.errors import InputError

MOST_NAME_CHARACTERS = 128
_PART = r"[A-Za-z0-9][A-Za-z0-9._:@-]*"
_NAME = re.compile(rf"{_PART}(/{_PART})*", re.ASCII)  # what stands in a path of HTTP as it is
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")  # nothing that could end a header or a line of a log


def usable_name(given: str | None, name: str) -> str | None:
    """The model's name that was given as `name`; None is the bundle's.

    Raises:
        InputError: it is empty or too long, or a request could not name it in a path.
    """
    if given is None or (len(given) <= MOST_NAME_CHARACTERS and _NAME.fullmatch(given)):
        return given
    raise InputError(
        "The model cannot have such a name.",
        note=f"{name} is {given!r:.80}, of {len(given)} characters; possible are 1 to {MOST_NAME_CHARACTERS}: letters"
        " of ASCII, digits and . _ : @ -, in parts between slashes that begin with a letter or digit.",
        hint=f"Use for example {name} smollm2 or {name} team/smollm2:int4.",
    )


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that a request came with as `X-Request-ID`, if it has exactly one that is sane, else a new one.

    Args:
        headers: of the request, names in small letters.
    """
    given = [value for name, value in headers if name == b"x-request-id"]
    return given[0].decode() if len(given) == 1 and _ID.fullmatch(given[0]) else uuid.uuid4().hex
