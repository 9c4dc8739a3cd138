"""What TensorRT-RTX compiled for this machine's GPU, kept from one session to the next.

Enters: TensorRT-RTX's runtime cache of an engine, and what tells the engine from others. Leaves: a file in the user's
cache folder, for a bundle may lie where it cannot be written. The library itself refuses what another driver or GPU
made.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "LORA_DROP_CACHE"  # a folder; empty: nothing is kept


def _folder() -> Path | None:
    given = os.environ.get(CACHE_VARIABLE)
    if given is not None:
        return Path(given) if given else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-drop"
    except RuntimeError:  # a user without a home
        return None


class KernelCache:
    """The runtime cache of one engine, with what an earlier session compiled in it.

    Args:
        cache: a tensorrt_rtx.IRuntimeCache; a CUDA context is current.
        key: of the engine, the library and the GPU, as part of a file's name.
    """

    def __init__(self, cache: Any, key: str) -> None:
        folder = _folder()
        self.cache = cache
        self._file = None if folder is None else folder / f"{key}.cache"
        self._kept = b""
        with contextlib.suppress(OSError):
            data = b"" if self._file is None else self._file.read_bytes()
            if data and cache.deserialize(data):
                self._kept = data

    def save(self) -> None:
        """Keep what was compiled since. Where that cannot be, the next session compiles again."""
        if self._file is None:
            return
        with contextlib.suppress(Exception):  # a full disk, or a GPU that has failed: closing goes on
            data = bytes(self.cache.serialize())
            if data == self._kept:
                return
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}")
            try:
                part.write_bytes(data)
                part.replace(self._file)
            finally:
                part.unlink(missing_ok=True)
            self._kept = data
