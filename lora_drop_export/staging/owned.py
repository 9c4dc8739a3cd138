"""Which files of a directory a command of ours wrote; nothing else is ever removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_drop_runtime.errors import InputError

from .rename import is_held

_NAMED = 3  # files that a message names


@dataclass(frozen=True)
class Kind:
    """A kind of directory that a command writes.

    Attributes:
        name: for messages: `bundle`.
        marker: the file that says what was written.
        files: names of all files that were written, relative to the directory; None where the marker is not ours.
    """

    name: str
    marker: str
    files: Callable[[Path], frozenset[str] | None]


def shown(names: Iterable[str]) -> str:
    """A few names for a message, escaped where they are no plain text."""
    given = sorted(names)
    few = [name if name.isprintable() else ascii(name)[1:-1] for name in given[:_NAMED]]
    more = f" and {len(given) - _NAMED} more" if given[_NAMED:] else ""
    return ", ".join(few) + more


def _folders(files: Collection[str]) -> set[str]:
    """The folders that files lie in, "." among them; none for names that lead outside."""
    inside = (name for name in map(PurePosixPath, files) if ".." not in name.parts and not name.is_absolute())
    return {"."} | {str(parent) for name in inside for parent in name.parents}


def foreign_entries(root: Path, files: Collection[str]) -> list[str]:
    """What lies in a directory and is not among `files`: files, links, directories that hold none of them.

    A link and what lies on another file system are never ours.
    """
    folders = _folders(files)
    device = root.lstat().st_dev
    found: list[str] = []

    def look(directory: Path, prefix: str) -> None:
        with os.scandir(directory) as entries:
            for entry in entries:
                name = prefix + entry.name
                if not entry.is_dir(follow_symlinks=False):
                    if name not in files or not entry.is_file(follow_symlinks=False):
                        found.append(name)
                elif name not in folders or os.lstat(entry.path).st_dev != device:  # the entry says 0 on Windows
                    found.append(f"{name}/")
                else:
                    look(directory / entry.name, f"{name}/")

    look(root, "")
    return sorted(found)


def remove_files(root: Path, files: Collection[str]) -> bool:
    """Remove these files of a directory and the directories that are then empty; whether it is gone as well.

    What else lies there, or came there meanwhile, stays.
    """
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(directory, name)
            if path.relative_to(root).as_posix() in files and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not os.path.lexists(root)


def _refusal(fact: str, note: str, hint: str = "Choose another --out.") -> InputError:
    return InputError(fact, note=note, hint=hint)


def refuse_foreign(place: Path, kind: Kind, foreign: Collection[str]) -> None:
    """Raise InputError where there is something foreign."""
    if foreign:
        files = "1 entry that is" if len(foreign) == 1 else f"{len(foreign)} entries that are"
        raise _refusal(
            f"The {kind.name} at --out holds more than was written there, so it will not be replaced.",
            f"{place} has {files} not of this {kind.name}: {shown(foreign)}.",
            "Move them away, or choose another --out.",
        )


def refuse_inside(place: Path, kind: Kind) -> None:
    """Raise InputError where `place` would be a foreign entry of another one, which --force then replaces no more."""
    for parent in place.parents:
        if os.path.isfile(parent / kind.marker) and kind.files(parent) is not None:
            raise _refusal(f"The output directory would lie inside a {kind.name}.", f"{place} is below {parent}.")


def _refuse_locked(place: Path, kind: Kind, files: Collection[str]) -> None:
    """Raise InputError where a folder may not be changed: the system would not rename it, or its files would stay."""
    if is_held(place):
        raise _refusal(
            f"The {kind.name} at --out is another user's, so it cannot be replaced.",
            f"In {place.parent}, which is sticky, only its owner may.",
        )
    for folder in sorted(place / name for name in _folders(files)):
        if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise _refusal(
                f"The {kind.name} at --out may not be changed, so it cannot be replaced.",
                f"{folder} is not readable and writable to you.",
                "Change its permissions (chmod u+rwx), or choose another --out.",
            )


def owned_files(place: Path, force: bool, kind: Kind) -> frozenset[str]:
    """The names of all files at `place`, every one of which a command of ours wrote; none where nothing is there.

    Raises:
        InputError: it must not be replaced: without `force`, or since it is not ours, or not ours alone.
    """
    if not os.path.lexists(place):
        return frozenset()
    ours = (place / kind.marker).is_file()
    if not force:
        raise _refusal(
            "The output directory exists already.",
            f"{place} is not touched.",
            "Choose another --out, or replace it with --force." if ours else "Choose another --out.",
        )
    fact = f"The output directory is not a {kind.name}, so --force will not replace it."
    if not ours:
        raise _refusal(fact, f"{place} has no {kind.marker}." if place.is_dir() else f"{place} is not a directory.")
    files = kind.files(place)
    if files is None:
        raise _refusal(fact, f"{place / kind.marker} is not one that this program wrote.")
    if os.path.ismount(place):
        raise _refusal("The output directory is a mount point, so it cannot be replaced.", f"{place} is one.")
    working = Path(os.path.realpath("."))
    if place == working or place in working.parents:
        raise _refusal(
            "The output directory is the one that this command runs in, so it cannot be replaced.",
            f"The current directory is {working}; it would be gone.",
            f"Use: cd {place.parent}, and --out {place.name}",
        )
    _refuse_locked(place, kind, files)
    refuse_foreign(place, kind, foreign_entries(place, files))
    return files
