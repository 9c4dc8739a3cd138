"""Progress in lines and as a bar."""

from __future__ import annotations

import errno
import io

from lora_drop_tools.shared.progress import Progress


def test_progress_in_lines_and_as_a_bar() -> None:
    lines = io.StringIO()
    with Progress("text", 3, lines) as progress:
        progress.advance(3)
    assert lines.getvalue().startswith("text: 3 in ")
    nothing = io.StringIO()
    with Progress("text", 0, nothing):
        pass
    assert nothing.getvalue() == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with Progress("text", 4, terminal) as progress:
        progress.advance()
    assert "█" * 6 + "░" * 18 + " 1 of 4" in terminal.getvalue()


def test_a_full_disk_behind_the_lines_ends_nothing() -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    lines = Full()
    with Progress("text", 1, lines) as progress:
        progress.advance()
    assert lines.getvalue().startswith("text: 1 in ")
