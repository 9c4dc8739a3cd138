"""What a long command says where there is no terminal."""

from __future__ import annotations

import errno
import io
import os
from types import SimpleNamespace

import pytest

from lora_drop_export import console as console_module
from lora_drop_export.console import Console


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line after half a minute without a word, of parts too; none where others speak, or at the end."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    console = Console()
    with console.progress("rounding") as progress, console.without_lines():
        for done in range(11):
            clock.now = 100 + 20 * done
            progress("rounding, layer 3" if done == 4 else "rounding", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "rounding: 20%, 160 s left",
        "rounding, layer 3: 40%, 120 s left",
        "rounding: 60%, 80 s left",
        "rounding: 80%, 40 s left",
        "rounding: 200.0 s",
    ]
    with console.progress("distillation") as progress:
        for done in range(5):
            clock.now += 20
            progress("distillation", done, 5)
            console.say(f"step {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*(f"step {done}" for done in range(5)), "distillation: 100.0 s"]


def test_a_count_that_begins_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The time that is left is that of its own steps."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with Console().progress("closed form") as progress:
        for what, total, seconds in (("closed form", 3, 400), ("gates", 4, 40)):
            for done in range(1, total + 1):
                clock.now += seconds
                progress(what, done, total)
    assert capsys.readouterr().err.splitlines() == [
        "closed form: 33%, 800 s left",
        "closed form: 67%, 400 s left",
        "gates: 25%, 120 s left",
        "gates: 50%, 80 s left",
        "gates: 75%, 40 s left",
        "closed form: 1360.0 s",
    ]


def test_what_an_earlier_run_has_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It took this one no time."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with Console().progress("distillation") as progress:
        for done in range(7, 11):
            clock.now += 50
            progress("distillation", done, 10, begun=6)
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [f"distillation: {done}0%, {50 * (10 - done)} s left" for done in (7, 8, 9)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_lines_that_nobody_can_take_end_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of work ended for the disk of their log, or with rich's exit code 1 for a reader that went away."""

    class Refusing(io.StringIO):
        def flush(self) -> None:
            raise OSError(number, os.strerror(number))

    stream = Refusing()
    monkeypatch.setattr("sys.stderr", stream)
    console = Console()
    console.say("one")
    console.rich.print("two")
    with console.progress("three") as progress:
        progress("three", 1, 1)
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == ["one", "two", "three"]


def test_a_terminal_does_not_obey_names(capsys: pytest.CaptureFixture[str]) -> None:
    Console().say("no place for blk.0.\x1b]0;title\x07\u202e\nnext")
    assert capsys.readouterr().err == "no place for blk.0.\\x1b]0;title\\x07\\u202e\nnext\n"
