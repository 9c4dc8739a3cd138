"""How a command ends that is told to: by Ctrl-C, SIGTERM or SIGHUP."""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
from lora_drop_runtime.command_line import forget_signals, run_command
from lora_drop_runtime.errors import InputError

ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """As in a shell, whatever runs the tests."""
    before = {number: signal.getsignal(number) for number in ENDS}
    for number in ENDS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def code_of(command: Callable[[Sequence[str]], None]) -> int:
    try:
        return run_command(command, ())
    except SystemExit as end:
        return int(str(end.code))


def exit_code(number: int, wrap: bool = False) -> tuple[int, list[str]]:
    cleaned: list[str] = []

    def command(_: Sequence[str]) -> None:
        try:
            signal.raise_signal(number)  # to this thread: one that another takes comes a while later
        except BaseException as error:
            if wrap:  # as the C code of a module does whose import is interrupted
                raise ImportError("initialization failed") from error
            raise
        finally:
            cleaned.append("cleaned")

    return code_of(command), cleaned


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("number", ENDS)
def test_a_command_cleans_up_and_says_what_ended_it(number: int, wrap: bool) -> None:
    assert exit_code(number, wrap) == (ENDS[signal.Signals(number)], ["cleaned"])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # whoever called has its handlers back


class Held:
    """What a weak reference can point to."""


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_that_a_callback_lost_comes_again(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Python prints what is raised in the callback of a weak reference, and goes on."""
    lost: list[int] = []

    def told(_: object) -> None:
        lost.append(number)
        signal.raise_signal(number)

    def command(_: Sequence[str]) -> None:
        held = Held()
        reference = weakref.ref(held, told)
        del held
        assert reference() is None
        assert lost == [number]
        threading.Event().wait(600)

    report = sys.unraisablehook
    assert code_of(command) == ENDS[signal.Signals(number)]
    assert "Exception ignored" not in capfd.readouterr().err
    assert sys.unraisablehook is report


@pytest.mark.parametrize("number", ENDS)
def test_an_error_after_a_signal_is_the_signal_s(number: int) -> None:
    """C++ code makes an error of its own of it, which has no cause."""

    def command(_: Sequence[str]) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            said = InputError("It cannot be traced.", note="set_(): failed.", hint="None.")
        said.__context__ = None
        raise said

    assert code_of(command) == ENDS[signal.Signals(number)]


def test_an_error_after_a_ctrl_c_that_was_served_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a chat, where Ctrl-C ends a reply."""

    def command(_: Sequence[str]) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            forget_signals()
        raise InputError("What was typed is not UTF-8.")

    assert code_of(command) == 2
    assert capsys.readouterr().err == "error: What was typed is not UTF-8.\n"


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert exit_code(signal.SIGHUP) == (0, ["cleaned"])
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_what_ends_a_command_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Break, and a window that is closed, are SIGBREAK there, which nothing else has."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    assert exit_code(signal.SIGUSR1) == (128 + signal.SIGUSR1, ["cleaned"])
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_an_error_of_the_command_s_own_passes() -> None:
    def fail(_: Sequence[str]) -> None:
        raise ImportError("a bug")

    with pytest.raises(ImportError, match="a bug"):
        run_command(fail, ())
