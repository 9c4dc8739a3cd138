"""Tables are whole in a file, and in parts where the terminal is too narrow."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from lora_drop_tools.shared.table import table

HEADINGS = ("bundle", "tokens/s", "p50 ms", "p95 ms")
ROWS = (("one", "10.00", "1.0", "2.00"), ("three", "7.00", "11.0", "3.00"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes standard output a terminal of so many columns."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def make(columns: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", Terminal())

    return make


def test_a_file_gets_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert table(HEADINGS, ROWS) == [
        "bundle  tokens/s  p50 ms  p95 ms",
        "one        10.00     1.0    2.00",
        "three       7.00    11.0    3.00",
    ]


@pytest.mark.parametrize(("room", "parts"), [(32, 1), (31, 2), (24, 2), (23, 2), (21, 3), (5, 3)])
def test_a_narrow_terminal_gets_parts(room: int, parts: int, terminal: Callable[[int], None]) -> None:
    terminal(room)
    lines = table(HEADINGS, ROWS)
    blocks = "\n".join(lines).split("\n\n")
    assert len(blocks) == parts
    assert all(len(line) <= max(room, len("bundle  tokens/s")) for line in lines)
    found = [block.splitlines() for block in blocks]
    assert all(lines[0].startswith("bundle  ") for lines in found)
    cells = [
        [line.split("  ", 1)[1].replace("p50 ms", "p50").replace("p95 ms", "p95").split() for line in b] for b in found
    ]
    rest = [[word for block in cells for word in block[row]] for row in range(3)]
    assert rest[1] == list(ROWS[0][1:])
    assert rest[2] == list(ROWS[1][1:])
    assert rest[0] == ["tokens/s", "p50", "p95"]


def test_a_second_column_without_a_heading_names_the_row_too(terminal: Callable[[int], None]) -> None:
    terminal(20)
    lines = table(("text", "", "first", "second"), [("a", "KL", "1", "2"), ("a", "agree", "3", "4")])
    assert lines == [
        "text         first",
        "a        KL      1",
        "a     agree      3",
        "",
        "text         second",
        "a        KL       2",
        "a     agree       4",
    ]
