"""A directory that is there as a whole or not at all.

Enters: where it shall be, and a file by which its kind is known. Leaves: a temporary sibling to write into, which takes
the place when all went well and vanishes when it did not. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.errors import InputError


def _check_replaceable(out: Path, force: bool, marker: str, kind: str) -> None:
    """Refuse what must not be replaced: anything without `force`, and with it all but what has the marker."""
    if out.exists() and not force:
        raise InputError(
            "The output directory exists already.",
            note=f"{out} is not touched.",
            hint="Choose another --out, or replace it with --force.",
        )
    if out.exists() and not (out / marker).is_file():
        raise InputError(
            f"The output directory is not a {kind}, so --force will not replace it.",
            note=f"{out} has no {marker}.",
            hint="Choose another --out.",
        )


@contextlib.contextmanager
def staged_directory(out: Path, force: bool, marker: str = MANIFEST_NAME, kind: str = "bundle") -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        InputError: `out` exists, cannot be made, or the disk is full.
    """
    _check_replaceable(out, force, marker, kind)
    missing = [parent for parent in out.parents if not parent.exists()]  # the nearest first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(
            "The output directory cannot be made.", note=f"{out}: {error.strerror}.", hint="Choose another --out."
        ) from None
    old = root.with_name(f"{root.name}.old")
    try:
        root.chmod(0o755)
        yield root
        _check_replaceable(out, force, marker, kind)  # something may have come there in the meantime
        if out.exists():
            os.rename(out, old)
            try:
                os.rename(root, out)
            except BaseException:
                os.rename(old, out)
                raise
        else:
            os.rename(root, out)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            "The disk is full.",
            note=f"Writing beside {out} failed: {error.strerror}.",
            hint="Free some space, or choose another --out.",
        ) from None
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                for parent in missing:
                    parent.rmdir()
