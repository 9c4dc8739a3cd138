"""The key that clients have to send."""

from __future__ import annotations

import os

from lora_drop_runtime.errors import InputError

KEY_VARIABLE = "LORA_DROP_API_KEY"


def usable_key(given: str | None, name: str) -> str | None:
    """The key that was given as `name`, the variable's when None; None lets everybody in.

    Raises:
        InputError: it is empty, a secret that was not loaded, or nobody could send it.
    """
    key = os.environ.get(KEY_VARIABLE) if given is None else given
    if key is None:
        return None
    if not key.strip():
        said = "is empty"
    elif key != key.strip():
        said = "begins or ends with white space"
    elif set(key) & set("\n\v\f\r"):  # which no header of HTTP may have
        said = "has a line break"
    else:
        return key
    raise InputError(
        "The API key cannot be used.",
        note=f"{KEY_VARIABLE if given is None else name} {said}.",
        hint="Give a key, or none at all to let everybody in.",
    )
