"""The tokens of one request as they are made, and who may ask for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator

import numpy as np
import numpy.typing as npt

from . import checks
from .sampling import Ids

Chosen = Generator[tuple[Ids, npt.NDArray[np.bool_]], None, None]  # a token per row, whether the row is still going


class Usage:
    """Which thread is inside a session or batch. None is shut out by itself, even where an interrupt left it there."""

    def __init__(self, what: str = "session") -> None:
        self._what = what
        self._inside: dict[str, int] = {}

    def enter(self) -> None:
        """Begin a call. Raises InputError while another thread's is running."""
        me = threading.get_ident()
        if self._inside.setdefault("thread", me) != me:  # one bytecode of C: no thread comes between
            raise checks.used_by_another_thread(self._what)

    def leave(self) -> None:
        self._inside.pop("thread", None)


class TokenStream(Iterator[int]):
    """Iterates over the tokens of one request; `close` cancels it. Threads may take turns.

    Args:
        chosen: makes the tokens, of one row.
        usage: of the session.
        begin: is told before the first token that the request begins.

    Attributes:
        thread: that asked last.
        is_over: no token will come.
    """

    def __init__(self, chosen: Chosen, usage: Usage, begin: Callable[[TokenStream], None]) -> None:
        self._chosen, self._usage = chosen, usage
        self._begin: Callable[[TokenStream], None] | None = begin
        self.thread = threading.get_ident()
        self.is_over = False

    def __next__(self) -> int:
        self._usage.enter()
        try:
            self.thread = threading.get_ident()
            if self._begin is not None:
                self._begin(self)
                self._begin = None
            tokens, _ = next(self._chosen)
        except BaseException:
            self.is_over = self._begin is None
            raise
        finally:
            self._usage.leave()
        return int(tokens[0])

    def close(self) -> None:
        """End the request; safe to call again."""
        self._usage.enter()
        try:
            self._chosen.close()
            self.is_over = True
        finally:
            self._usage.leave()
