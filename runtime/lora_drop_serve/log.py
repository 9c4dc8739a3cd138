"""What a server says on standard error while it serves, which holds nothing up where it is read slowly or by nobody.

Enters: lines, on the event loop. Leaves: the same in their order, as standard error takes them. A pipe that nobody
reads is full after some hundred, and who writes to it then stands still.
"""

from __future__ import annotations

import asyncio
import select
import sys
from collections import deque

from lora_drop_runtime.command_line import tell

MOST_LINES = 10_000  # that wait; each has some hundred bytes
_RETRY_SECONDS = 0.1
_CLOSE_SECONDS = 5


def _takes_a_line() -> bool:
    """Whether standard error takes a line of up to a page (4096 bytes) at once, as what is no file does."""
    try:
        poll = select.poll()
        poll.register(sys.stderr, select.POLLOUT)
    except (AttributeError, OSError, TypeError, ValueError):
        return True
    return bool(poll.poll(0))


class Log:
    """Lines on standard error. Belongs to an event loop."""

    def __init__(self) -> None:
        self._lines = deque[str]()
        self._left_out = 0  # behind those
        self._is_waiting = False

    def say(self, line: str) -> None:
        """Write it, now or once there is room. It is left out, and counted, where too many wait."""
        if len(self._lines) >= MOST_LINES:
            self._left_out += 1
            return
        if self._left_out:
            self._lines.append(f"warning: {self._left_out} lines are left out here: nobody read those before")
            self._left_out = 0
        self._lines.append(line)
        self._write()

    async def close(self) -> None:
        """Give the reader some seconds for what is left."""
        clock = asyncio.get_running_loop().time
        until = clock() + _CLOSE_SECONDS
        while self._lines and clock() < until:
            await asyncio.sleep(_RETRY_SECONDS)  # by which `_retry` comes

    def _write(self) -> None:
        while self._lines and _takes_a_line():
            tell(self._lines.popleft())
        if self._lines and not self._is_waiting:
            self._is_waiting = True
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self._is_waiting = False
        self._write()
