"""One file of a directory that a command wrote, replaced while no other command writes there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_drop_runtime.errors import InputError

from .area import area_of, refuse_others, resolved
from .failures import refused_writes


@contextlib.contextmanager
def _refused(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            "The file cannot be replaced.",
            note=f"{file}: {error.strerror}. It is as it was.",
            hint="Make the directory and the one above it writable, or copy it to where they are.",
        ) from None


def check_changeable(directory: Path, name: str) -> None:
    """Refuse before any work what `change_file` could not do after it. Raises InputError."""
    place = resolved(directory)
    refuse_others(place)
    with _refused(place / name), area_of(place):
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def change_file(directory: Path, name: str, change: Callable[[bytes], bytes], option: str) -> None:
    """Let a file hold what `change` makes of its content, as a whole or not at all.

    The new content is made beside the directory, as a new directory would be, so that nothing foreign is ever left in
    it, and one that is being replaced as a whole is not changed meanwhile.

    Args:
        directory: exists, and has the file.
        option: that the user chose it with.

    Raises:
        InputError: another command writes there, or the file cannot be replaced; it is as it was.
    """
    place = resolved(directory)
    refuse_others(place)
    file = place / name
    with _refused(file), refused_writes(place, option), area_of(place) as area:
        refuse_others(place, but=area.root)
        data = change(file.read_bytes())
        with area.new.open("wb") as new:
            new.write(data)
            new.flush()
            os.fsync(new.fileno())
        area.new.chmod(file.stat().st_mode & 0o7777)
        os.replace(area.new, file)
