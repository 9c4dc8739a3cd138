"""A file that holds a whole result or what it held before."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from lora_drop_runtime.errors import InputError

from .area import area_of, resolved
from .failures import refused_writes
from .rename import is_held


def is_replaced(path: Path) -> bool:
    """Whether `write_file` replaces a path as a whole: anything but a device or a pipe, which it writes to."""
    return not path.exists() or path.is_file()


def _mode(place: Path) -> int:
    """Permissions of the file that is there, or of a new one."""
    if place.exists():
        return stat.S_IMODE(place.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_file(path: Path, data: bytes, option: str, parents: bool = False) -> None:
    """Write a whole file, or leave what is there.

    Args:
        option: that the user chose the path with.
        parents: make the directories above it.

    Raises:
        InputError: it cannot be written.
    """
    place = resolved(path)
    try:
        if not is_replaced(place):
            place.write_bytes(data)
            return
        with refused_writes(place, option), area_of(place, parents) as area:
            with area.new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            area.new.chmod(_mode(place))
            os.replace(area.new, place)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(
            "The results cannot be written.", note=f"{path}: {error.strerror}.", hint=f"Give another {option}."
        ) from None


def check_writable(path: Path, option: str, parents: bool = False) -> None:
    """Refuse before any work what could not be written after it.

    Args:
        parents: whether the directories above it will be made.

    Raises:
        InputError: nothing can be made beside it.
    """
    place = resolved(path)
    try:
        if is_replaced(place) or parents:
            with area_of(place, parents):
                if is_held(place):
                    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
                return
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            "The results cannot be written.", note=f"{path}: {error.strerror}.", hint=f"Give another {option}."
        ) from None
