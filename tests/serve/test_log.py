"""Standard error that is read late or never: nothing waits for it, and lines that it gets are whole and in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator

import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.text import TextCodec
from lora_drop_serve import log as log_module
from lora_drop_serve.log import Log

from tests.support.serving import serving

PAGES = 1 << 16  # bytes that a pipe holds
LINES = [f"{number} ".ljust(300, "x") for number in range(PAGES // 100)]  # three times as many


@contextlib.contextmanager
def piped() -> Iterator[int]:
    """Within it standard error is a pipe, of which this is the end to read from."""
    ends = os.pipe()
    with os.fdopen(ends[1], "w") as written, contextlib.redirect_stderr(written):  # not before pytest's own
        yield ends[0]
    os.close(ends[0])


async def lines_of(reader: int, count: int) -> list[str]:
    """The first so many."""
    taken = b""
    while taken.count(b"\n") < count:
        taken += await asyncio.to_thread(os.read, reader, PAGES)
    return taken.decode().splitlines()


def test_what_nobody_reads_waits_and_comes_whole_and_in_order() -> None:
    async def said() -> list[str]:
        log = Log()
        for line in LINES:
            log.say(line)
        found = asyncio.create_task(lines_of(reader, len(LINES)))
        await log.close()
        return await found

    with piped() as reader:
        assert asyncio.run(said()) == LINES


def test_lines_beyond_the_most_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MOST_LINES", 5)
    monkeypatch.setattr(log_module, "_takes_a_line", lambda: takes)

    async def said() -> list[str]:
        nonlocal takes
        log = Log()
        for line in LINES[:12]:
            log.say(line)
        takes = True
        await log.close()
        log.say("later")
        return await lines_of(reader, 7)

    takes = False
    with piped() as reader:
        *first, warning, last = asyncio.run(said())
    assert first == LINES[:5]
    assert warning.startswith("warning: 7 lines are left out here")
    assert last == "later"


def test_the_end_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_CLOSE_SECONDS", 0.01)

    async def said() -> None:
        log = Log()
        for line in LINES:
            log.say(line)
        await log.close()

    with piped():
        asyncio.run(said())


def test_a_server_answers_though_nobody_reads_its_log(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_CLOSE_SECONDS", 0.01)
    batch = Batch.open(bundle.root, slots=1, threads=1)
    with piped(), serving(batch, TextCodec.open(bundle.root / "tokenizer"), log_requests=True) as served:
        for _ in range(PAGES // 200):
            assert served.http.get("/v1/models").status_code == 200
