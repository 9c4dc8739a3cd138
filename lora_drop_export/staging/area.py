"""A hidden directory beside a place, in which its next result is made.

    .NAME.xxxxxxxx.lora-drop/
        lock       held by the process as long as it lives, so that others can tell the dead; has its number
        new        the result that is being made
        scratch    what is needed on the way
        partial    an unfinished fit that is being saved
        journal    before directories are exchanged: which of them is the old one, and its files
        old        the old directory on its way out, where two cannot be exchanged at once

A process that is killed leaves its area. The next one that works on the same place finds it and settles it: the old
directory is put back where nothing came in its place, and the rest is removed. `settle` is also how a living process
ends, whatever ended it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lora_drop_runtime.command_line import held_signals, tell
from lora_drop_runtime.errors import InputError

from .owned import remove_files
from .rename import rename_new

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_SUFFIX = ".lora-drop"
_LONGEST_NAME = 200  # bytes of a place's name that an area's own can hold; file systems allow 255
_CONTENT = {"lock", "new", "scratch", "partial", "journal", "old"}
_LOCKED_BYTE = 1 << 30  # of a lock on Windows, where nobody else can read what is locked


@dataclass(frozen=True)
class Area:
    """An area of this process, whose lock it holds."""

    root: Path

    @property
    def new(self) -> Path:
        return self.root / "new"

    @property
    def old(self) -> Path:
        return self.root / "old"

    def write_journal(self, place: Path, files: Collection[str]) -> None:
        """Say, before the exchange, what is at `place` now: the files that a command of ours wrote."""
        inodes = {"old": place.lstat().st_ino, "new": self.new.lstat().st_ino}
        (self.root / "journal").write_text(json.dumps(inodes | {"files": sorted(files)}), encoding="utf-8")


def resolved(path: Path) -> Path:
    """The place that a path means, links followed.

    Raises:
        InputError: it cannot be found out, or has no name.
    """
    try:
        place = path.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.stat()  # which a name that is too long ends, and a circle of links, since Python 3.13 here alone
        up = next((one for one in (path, *path.parents) if one.name == ".."), None)
        if up is not None:  # from a folder that is not there nobody would find the result by that path
            up.lstat()
    except (OSError, RuntimeError, ValueError) as error:  # no working directory, a circle of links, a NUL
        raise InputError("The path cannot be used.", note=f"{path}: {error}.", hint="Choose another.") from None
    if not place.name:
        raise InputError("The path has no name.", note=f"{path} is {place}.", hint="Choose another.")
    return place


def _prefix(place: Path) -> str:
    name = os.fsencode(place.name)
    return f".{place.name}." if len(name) <= _LONGEST_NAME else f".{sha256(name).hexdigest()[:16]}."


def _areas(place: Path) -> list[Path]:
    """All areas of a place, of the living and the dead. A directory with anything else in it is none."""
    pattern = re.compile(re.escape(_prefix(place)) + r"[a-z0-9_]{8}" + re.escape(_SUFFIX))
    try:
        names = [name for name in os.listdir(place.parent) if pattern.fullmatch(name)]
    except OSError:
        return []
    found = []
    for root in (place.parent / name for name in sorted(names)):
        with contextlib.suppress(OSError):
            if not root.is_symlink() and set(os.listdir(root)) <= _CONTENT:
                found.append(root)
    return found


def _lock(descriptor: int) -> None:
    """Lock a file until its descriptor is closed.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system has none.
    """
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            raise BlockingIOError from None
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(path: Path) -> tuple[int | None, bool]:
    """(a descriptor that holds the lock, or None; whether another process holds it)."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError:
        return None, False
    held = False
    try:
        _lock(descriptor)
        if os.stat(path).st_ino == os.fstat(descriptor).st_ino:  # else the area was settled a moment before
            return descriptor, False
    except BlockingIOError:
        held = True
    except OSError:  # a file system without such locks
        pass
    os.close(descriptor)
    return None, held


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def _settle_exchange(root: Path, place: Path) -> bool:
    """Bring an exchange to its end, or undo it; whether all that is left in the area may be removed."""
    try:
        journal = json.loads((root / "journal").read_bytes())
        inodes, files = (journal["old"], journal["new"]), journal["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return not os.path.lexists(root / "old")  # none was begun
    replaced = next((path for path in (root / "new", root / "old") if _inode(path) == inodes[0]), None)
    if replaced is None:
        return not os.path.lexists(root / "old")
    at_place = _inode(place)
    if at_place is None:
        with contextlib.suppress(OSError):
            rename_new(replaced, place)
            return True
    return at_place == inodes[1] and remove_files(replaced, files)


def _settle(root: Path, place: Path, lock: int | None) -> None:
    """Bring an area to its end. What is neither the new result's nor the old one's by its journal is kept.

    Args:
        lock: a descriptor that holds the area's lock, and is closed.
    """
    try:
        is_settled = _settle_exchange(root, place)
        for name in sorted(_CONTENT - {"lock"}) if is_settled else ():
            path = root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    finally:
        if lock is not None:
            os.close(lock)  # first: Windows removes no file that is open
    if not is_settled:
        why = "which was not written by a command, or is open in one"
        tell(f"warning: {root} has what was at {place}, {why}; it stays")
        return
    with contextlib.suppress(OSError):
        (root / "lock").unlink()
        root.rmdir()


def settle_dead(place: Path) -> list[Path]:
    """Settle the areas that dead processes left at a place; returns those of the living."""
    living = []
    for root in _areas(place):
        descriptor, held = _locked(root / "lock")
        if held:
            living.append(root)
        elif descriptor is not None:
            _settle(root, place, descriptor)
    return living


def refuse_others(place: Path, but: Path | None = None) -> None:
    """Settle what dead processes left.

    Raises:
        InputError: a living one works on the same place; `but` is one's own area.
    """
    for root in settle_dead(place):
        if root != but:
            with contextlib.suppress(OSError):  # it is done by now
                process = (root / "lock").read_text(encoding="utf-8") or "unknown"
                raise InputError(
                    "Another command is writing there.",
                    note=f"{place}: process {process}.",
                    hint="Wait until it is done, or choose another --out.",
                )


def _make(place: Path) -> tuple[Path, int | None]:
    """A new area and the descriptor that holds its lock; None where the file system has no locks."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=_prefix(place), suffix=_SUFFIX, dir=place.parent))
        descriptor, held = _locked(root / "lock")
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a full disk: others are then refused without the number
                os.write(descriptor, str(os.getpid()).encode())
            return root, descriptor
        if root.exists() and not held:
            return root, None


@contextlib.contextmanager
def area_of(place: Path, parents: bool = True) -> Iterator[Area]:
    """An area for a place, settled at the end whatever happened.

    Args:
        place: resolved.
        parents: make the directories above it that are missing; they go as well where nothing came to be at `place`.

    Raises:
        OSError: it cannot be made.
    """
    missing = [parent for parent in place.parents if not parent.exists()]  # the nearest first
    descriptor: int | None = None
    root: Path | None = None
    settle_dead(place)
    try:
        if parents:
            place.parent.mkdir(parents=True, exist_ok=True)
        root, descriptor = _make(place)
        yield Area(root)
    finally:
        with held_signals():  # a second Ctrl-C waits until what the first one began is done
            if root is not None:
                _settle(root, place, descriptor)
            if parents and not os.path.lexists(place):
                with contextlib.suppress(OSError):
                    for parent in missing:
                        parent.rmdir()
