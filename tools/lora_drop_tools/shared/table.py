"""Tables in plain text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

MIB = 2**20
_GAP = "  "


def _parts(widths: Sequence[int], leading: int, room: int) -> list[list[int]]:
    """The columns of each part of a table: the leading ones, and as many of the others as have room beside them."""
    parts = [[*range(leading)]]
    for column in range(leading, len(widths)):
        beside = sum(widths[i] + len(_GAP) for i in parts[-1])
        if len(parts[-1]) > leading and beside + widths[column] > room:
            parts.append([*range(leading)])
        parts[-1].append(column)
    return parts


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need: the first is text, the others end at the right.

    On a terminal that is too narrow the table is cut between columns into parts, which all have the columns that name a
    row: the first, and a second without a heading. A file or a pipe gets it whole.
    """
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines: list[str] = []
    for part in _parts(widths, 1 if all(headings[1:2]) else 2, room):
        lines += [""] if lines else []
        for line in zip(*(columns[i] for i in part), strict=True):
            cells = [
                f"{cell:>{widths[i]}}" if i else f"{cell:<{widths[i]}}" for cell, i in zip(line, part, strict=True)
            ]
            lines.append(_GAP.join(cells))
    return lines
