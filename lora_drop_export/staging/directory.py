"""A directory that is there as a whole or not at all.

Enters: where it shall be, and what kind of directory it is. Leaves: a directory to write into, which takes the place
when all went well and vanishes when it did not. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from lora_drop_runtime.errors import InputError

from .area import Area, area_of, refuse_others, resolved
from .failures import refused_writes
from .owned import Kind, foreign_entries, owned_files, refuse_foreign, refuse_inside
from .rename import exchange, rename_new

_FLUSHABLE = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY  # files of others are linked, which may be read-only


def _flush(root: Path) -> None:
    """Have everything on disk before what it replaces is removed: some file systems say only then that it is full."""
    for directory, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(os.path.join(directory, name), _FLUSHABLE)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno != errno.EINVAL:  # of a file system that cannot
                    raise
            finally:
                os.close(descriptor)


def _replace(area: Area, place: Path, kind: Kind, files: frozenset[str]) -> None:
    """Let the new directory take the place of the old one, which is then in the area.

    The old one is looked through again when nobody can find it by its name any more; with files that came there in the
    last moment it goes back.
    """
    if exchange(area.new, place):
        foreign = foreign_entries(area.new, files)
        if foreign:
            exchange(area.new, place)
    else:
        rename_new(place, area.old)
        foreign = foreign_entries(area.old, files)
        if not foreign:
            rename_new(area.new, place)  # where it fails the area puts the old one back
    refuse_foreign(place, kind, foreign)


def _publish(area: Area, place: Path, force: bool, kind: Kind) -> None:
    """Make the result visible at its place."""
    replaces = os.path.lexists(place)
    if replaces:
        _flush(area.new)
        files = owned_files(place, force, kind)
        area.new.chmod(stat.S_IMODE(place.stat().st_mode) | stat.S_IRWXU)  # whom the old one was kept from
        area.write_journal(place, files)
    try:
        if replaces:
            _replace(area, place, kind, files)
        else:
            rename_new(area.new, place)
    except FileExistsError:  # a moment ago
        owned_files(place, False, kind)
        raise
    except OSError as error:
        raise InputError(
            "The result cannot take its place.",
            note=f"{place}: {error.strerror}. What was there is there.",
            hint="Choose another --out.",
        ) from None


@contextlib.contextmanager
def staged_directory(out: Path, force: bool, kind: Kind) -> Iterator[Path]:
    """A directory to write into that becomes `out` when the block ends well, and vanishes when it does not.

    Its siblings `scratch` and `partial` are for what is needed on the way; they vanish too.

    Args:
        out: a link leads to the directory that is meant.
        force: replace a directory that a command of ours wrote, and nothing else.

    Raises:
        InputError: `out` must not be replaced, cannot be made, another command writes there, or the disk is full.
    """
    place = resolved(out)
    refuse_others(place)
    refuse_inside(place, kind)
    owned_files(place, force, kind)
    with refused_writes(place, "--out"), contextlib.ExitStack() as stack:
        try:
            area = stack.enter_context(area_of(place))
            refuse_others(place, but=area.root)
            area.new.mkdir()
        except OSError as error:
            file = next(
                (parent for parent in place.parents if os.path.lexists(parent) and not os.path.isdir(parent)), None
            )
            raise InputError(
                "The output directory cannot be made.",
                note=f"{out}: {error.strerror if file is None else f'{file} is not a directory'}.",
                hint="Choose another --out.",
            ) from None
        yield area.new
        _publish(area, place, force, kind)
