"""How a command ends that is told to: by Ctrl-C, SIGTERM or SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import pytest
from lora_drop_runtime.command_line import run_command

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

    try:
        return run_command(command, ()), cleaned
    except SystemExit as end:
        return int(str(end.code)), cleaned


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("number", ENDS)
def test_a_command_cleans_up_and_says_what_ended_it(number: int, wrap: bool) -> None:
    assert exit_code(number, wrap) == (ENDS[signal.Signals(number)], ["cleaned"])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # whoever called has its handlers back


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert exit_code(signal.SIGHUP) == (0, ["cleaned"])
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_an_error_of_the_command_s_own_passes() -> None:
    def fail(_: Sequence[str]) -> None:
        raise ImportError("a bug")

    with pytest.raises(ImportError, match="a bug"):
        run_command(fail, ())
