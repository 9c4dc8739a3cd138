"""What a long command prints while it works: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, Protocol, TextIO, cast

from lora_drop_runtime.errors import one_line


class Progress(Protocol):
    def __call__(self, what: str, done: int, total: int, /, begun: int = 0) -> None:
        """Say how many of all bytes or steps are done, `begun` of them by an earlier run."""


LINE_SECONDS = 30.0  # without a word, after which a line says how far something is where there is no terminal


class _Unfailing:
    """A stream whose lines a full disk behind it, or a reader who went away, loses; neither ends hours of work.

    Of a pipe that nobody reads rich itself would end the program with 1, the code of a wrong result.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class Console:
    """Writes to standard error, so that a command's result can be piped."""

    def __init__(self) -> None:
        import rich.console

        self._says = True
        self._said = time.monotonic()
        self.rich = rich.console.Console(file=cast("IO[str]", _Unfailing(sys.stderr)), highlight=False)
        if not self.rich.is_terminal:
            self.rich.width = 100  # room for a table's headings
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers; read when tqdm is first imported

    def say(self, text: str) -> None:
        """Print lines; what a name of a checkpoint's may hold beside text is escaped."""
        if self._says:
            self._print("\n".join(map(one_line, text.split("\n"))))

    def _print(self, text: str) -> None:
        self._said = time.monotonic()
        self.rich.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def without_lines(self) -> Iterator[None]:
        """Say nothing of the parts of what has been announced; bars are shown all the same."""
        says, self._says = self._says, False
        try:
            yield
        finally:
            self._says = says

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Show that something is going on, and how long it took."""
        begin = time.perf_counter()
        if self.rich.is_terminal:
            with self.rich.status(what):
                yield
        else:
            yield
        self.say(f"{what}: {time.perf_counter() - begin:.1f} s")

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """A bar over bytes or steps; elsewhere a line at the end, and one where nothing was said for half a minute.

        A count that is less than the one before begins anew: the time that is left is its own.
        """
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        begin = time.monotonic()
        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=self.rich,
            transient=True,
            disable=not self.rich.is_terminal,
        )
        with bar:
            task = bar.add_task(what, total=None)
            before, since, last = 0, begin, begin

            def update(description: str, done: int, total: int, /, begun: int = 0) -> None:
                nonlocal before, since, last
                if done < before:
                    since = last
                    bar.reset(task)
                bar.update(task, description=description, completed=done, total=total)
                now = time.monotonic()
                before, last = done, now
                if not self.rich.is_terminal and 0 < done < total and now - self._said >= LINE_SECONDS:
                    left = (now - since) * (total - done) / max(1, done - begun)
                    self._print(f"{description}: {done / total:.0%}, {left:.0f} s left")

            yield update
        self.say(f"{what}: {time.monotonic() - begin:.1f} s")
