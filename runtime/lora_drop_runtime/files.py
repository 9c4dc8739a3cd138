"""Files that a user names, or that came with a model: asked after and read without surprises.

Enters: a path. Leaves: what is there; an error of ours where it cannot be read. A device or a pipe is no file here:
reading it may never end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from .errors import BundleError, InputError

# What the process or the system lacks to open or read a file, and what to do about it
LACKING = {
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENFILE: "Close other programs.",
    errno.ENOMEM: "Free some memory.",
}

ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")  # of files that `lora-drop fit` streams


def is_utf8(text: str) -> bool:
    """Whether text can be written down: a name or an argument that was no UTF-8 has halves of characters instead."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a zero byte
        return 0


def is_file(path: Path) -> bool:
    """Whether an ordinary file is there; False, too, where the system does not even take the name."""
    return stat.S_ISREG(_mode(path))


def is_directory(path: Path) -> bool:
    """Whether a directory is there; as `is_file`."""
    return stat.S_ISDIR(_mode(path))


def is_device(path: Path) -> bool:
    """Whether a device is there, which may have no end; a pipe has one."""
    return stat.S_ISCHR(mode := _mode(path)) or stat.S_ISBLK(mode)


def refuse_locked(path: Path) -> None:
    """Refuse a path behind a directory that may not be entered: what is there looks as if it were absent.

    Raises:
        BundleError: it is behind one.
    """
    try:
        os.stat(path)
    except PermissionError as error:
        raise BundleError(
            "A path cannot be looked at.",
            note=f"{path}: {error.strerror}.",
            hint="Check the permissions of the directories above it.",
        ) from None
    except (OSError, ValueError):
        pass


def refuse_rows(path: Path) -> None:
    """Refuse a file of rows where plain text is read: their names and marks are no text.

    Raises:
        InputError: it is one, by its name.
    """
    if path.name.endswith(ROWS):
        raise InputError(
            "A file of rows is no plain text.",
            note=f"{path} ends in one of {', '.join(ROWS)}, which lora-drop fit alone reads row by row.",
            hint="Write the rows' texts into a UTF-8 text file, and give that.",
        )


def reading_hint(error: OSError, otherwise: str) -> str:
    """What to do about a file that cannot be read, where the process or the system lacks something; else the other."""
    return LACKING.get(error.errno or 0, otherwise)


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The content of an ordinary file.

    Raises:
        BundleError: it cannot be read, or is larger than such a file ever is.
    """
    hint = "Copy it again, and check its permissions."
    reason = "is no ordinary file" if _mode(path) else "was not found"
    try:
        if is_file(path):
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(min(size, most_bytes) + 1)  # Python asks the system for as many at once
            if len(data) <= most_bytes:
                return data
            reason = f"has more than {most_bytes} bytes"
    except OSError as error:
        reason, hint = f"{error.strerror}", reading_hint(error, hint)
    raise BundleError("A file cannot be read.", note=f"{path}: {reason}.", hint=hint) from None
