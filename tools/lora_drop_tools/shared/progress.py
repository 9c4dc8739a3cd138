"""How far a long command is: a bar on a terminal, plain lines elsewhere.

Enters: how much there is to do, and what has been done of it. Leaves: text on standard error. Needs no package.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from lora_drop_runtime.command_line import tell

BAR_WIDTH = 24
LINE_SECONDS = 30.0  # between two lines where there is no terminal


class Progress:
    """Use as a context manager, which prints at the end what was done and how long it took.

    Args:
        what: names the work.
        total: how many `advance` will count.
        stream: standard error when None.
    """

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self._what, self._total = what, total
        self._stream = stream or sys.stderr
        self._bar = self._stream.isatty()
        self._done = 0

    def __enter__(self) -> Progress:
        self._begun = self._shown = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._stream.write("\r\033[K")
        if kind is None and self._total:
            self._line(f"{self._done} in {time.monotonic() - self._begun:.1f} s")

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        share = min(1.0, self._done / max(1, self._total))
        left = f"{self._done} of {self._total}, {(now - self._begun) * (1 - share) / max(share, 1e-9):.0f} s left"
        if self._bar:
            filled = round(BAR_WIDTH * share)
            self._stream.write(f"\r\033[K{self._what} {'█' * filled}{'░' * (BAR_WIDTH - filled)} {left}")
            self._stream.flush()
        elif self._done < self._total and now - self._shown >= LINE_SECONDS:
            self._shown = now
            self._line(left)

    def _line(self, text: str) -> None:
        tell(f"{self._what}: {text}", self._stream)
