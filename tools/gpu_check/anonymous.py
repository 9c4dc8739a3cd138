"""Takes out of a report what says whose machine it was: paths, and the names of user and host."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from typing import Any

# From the root, a home or a drive to a file; the file's own name stays
_PATH = re.compile(r"""(?:(?<![\w./…])/|~[\w.-]*/|\b[A-Za-z]:\\|\\\\)[^\s'"`:,;()<>|]*[/\\]([^\s'"`:,;()<>|/\\]*)""")


def _names() -> tuple[str, ...]:
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(OSError, KeyError):  # no such user in the system's table
        names.add(getpass.getuser())
    return tuple(sorted((name for name in names if len(name) > 1), key=len, reverse=True))


def anonymous(value: Any) -> Any:
    """The same JSON value with `…/file` for paths and `…` for the names."""
    if isinstance(value, dict):
        return {anonymous(key): anonymous(item) for key, item in value.items()}
    if isinstance(value, list):
        return [anonymous(item) for item in value]
    if not isinstance(value, str):
        return value
    text = _PATH.sub(r"…/\1", value)
    for name in _names():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "…", text)
    return text
