"""Renames that never replace what nobody looked at, and one that exchanges two directories at once.

Linux has them as flags of renameat2. Elsewhere, and on file systems without them, `exchange` says so, and `rename_new`
looks first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # this kernel, file system or sandbox has it not


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Whether it was done; False where there is no such call.

    Raises:
        OSError: it cannot be done.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or a C library without it
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False, and nothing done, where the system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    if not _renameat2(source, target, _NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target))
        os.rename(source, target)


def is_held(place: Path) -> bool:
    """Whether we may neither rename nor replace what is at a place: it is another user's, as is its sticky folder.

    Such a folder, like /tmp, lets everybody make files, and nobody take another's away.
    """
    if sys.platform == "win32" or os.geteuid() == 0 or not os.path.lexists(place):
        return False
    folder = place.parent.stat()
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (folder.st_uid, place.lstat().st_uid)
