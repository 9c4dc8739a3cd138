"""Writes that the system refuses: a user's error, not ours."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from lora_drop_runtime.errors import InputError, LoraDropError

_REFUSED = {  # what it means, and what to do about it
    errno.ENOSPC: ("The disk is full.", "Free some space, or choose another {option}."),
    errno.EDQUOT: ("The disk quota is used up.", "Remove files of yours, or choose another {option}."),
    errno.EFBIG: ("A file would be larger than is allowed here.", "Raise the limit (ulimit -f), or write less."),
    errno.EROFS: ("The file system has become read-only.", "Choose another {option}."),
}
# How libraries in Rust say what the system said: «No space left on device (os error 28)», «Os { code: 28, kind: …»; and
# shutil.copytree: a list with «[Errno 28] No space left on device», or «[WinError 112] …»
_SAID = re.compile(r"(?:\(os error |\bOs \{ code: |\[Errno |\[WinError )(\d+)\b")
_OF_WINDOWS = {112: errno.ENOSPC}  # a number of its own


def refused_write(error: BaseException) -> int | None:
    """The system's number of an error that says that nothing more can be written; None of any other."""
    number = error.errno if isinstance(error, OSError) else None
    if said := None if number else _SAID.search(str(error)):
        number = int(said[1])
        if sys.platform == "win32":
            number = _OF_WINDOWS.get(number, number)
    return number if number in _REFUSED else None


@contextlib.contextmanager
def refused_writes(place: Path, option: str) -> Iterator[None]:
    """Turn an error that says that nothing more can be written into an InputError; others pass.

    Args:
        place: where the result shall be.
        option: that the user chose it with.
    """
    try:
        yield
    except LoraDropError:
        raise
    except Exception as error:
        number = refused_write(error)
        if number is None:
            raise
        fact, hint = _REFUSED[number]
        # Of a copy the second name is what was written, the first what was read
        where = getattr(error, "filename2", None) or getattr(error, "filename", None) or f"beside {place}"
        raise InputError(
            fact,
            note=f"Writing {where} failed: {os.strerror(number)}. What was at {place} is untouched.",
            hint=hint.format(option=option),
        ) from None
