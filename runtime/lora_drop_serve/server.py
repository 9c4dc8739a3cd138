"""The server's process: its socket, its signals, and its end.

SIGTERM, SIGINT, SIGHUP and Windows' SIGBREAK turn /ready to 503. After the drain delay what runs may end, and what
comes is answered with 503 meanwhile; after the grace, or at a second signal, what still runs is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
import sys
from collections.abc import Generator
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from lora_drop_runtime.command_line import signal_handlers
from lora_drop_runtime.errors import InputError
from uvicorn.protocols.http.h11_impl import H11Protocol

from .driver import Driver
from .errors import ApiError, malformed, too_slow
from .log import Log
from .records import Records

HEAD_SECONDS = 60  # that a client may take for a request's line and headers
MOST_EARLY_BYTES = 1 << 16  # that are read of a next request while the one before is answered
MOST_STALL_SECONDS = 60  # that a reader may leave what is sent to it lie
_FLUSH_SECONDS = 5  # for responses on their way, once nothing runs any more


def _bare(host: str) -> str:
    """Without the brackets that an IPv6 address has in URLs."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        InputError: the address cannot be had.
    """
    made: socket.socket | None = None
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(_bare(host), port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # where two may then listen there
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
        made.listen(2048)
    except (OSError, UnicodeError) as error:
        if made is not None:
            made.close()
        raise InputError(
            "The server cannot listen there.",
            note=f"{host} port {port}: {error}.",
            hint="Choose another --port or --host, or end what listens there.",
        ) from None
    return made


def is_local(made: socket.socket) -> bool:
    """Whether only this machine reaches it, whatever its address was called."""
    return ipaddress.ip_address(made.getsockname()[0]).is_loopback


def address(made: socket.socket) -> str:
    """`http://127.0.0.1:8000`"""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Protocol(H11Protocol):
    """HTTP of one connection, whose errors are the API's objects too, whose requests have to come in time, and whose
    answers have to be taken.

    uvicorn bounds how long a connection may lie idle between two requests; this bounds how long one may take for the
    head of a request, and how long its reader may take nothing. What its body may take, the application says.
    """

    _limit: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def _watch(self) -> None:
        """Let time run exactly while a head is awaited."""
        is_awaited = self.cycle is None or self.cycle.response_complete
        if is_awaited and self._limit is None:
            self._limit = self.loop.call_later(HEAD_SECONDS, self._end, too_slow("head", HEAD_SECONDS))
        elif not is_awaited:
            self._stop_watching()

    def _stop_watching(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _end(self, error: ApiError) -> None:
        """Say it where an answer may still begin, and close."""
        if self.transport.is_closing():
            return
        is_idle = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not is_idle:
            records: Records = cast(FastAPI, self.config.app).state.records
            record = records.begin("other", ())
            body = json.dumps(error.body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            headers |= records.headers(record)
            answer = h11.Response(status_code=error.status, headers=list(headers.items()), reason=error.reason)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            records.refuse(record, error)
            records.end(record)
        self.transport.close()

    def _look_at_reader(self, left: int) -> None:
        """Cut one that has taken nothing of so many bytes since the last look."""
        size = self.transport.get_write_buffer_size()
        if size == left:
            self.transport.abort()  # closed alone it would keep them for its reader
        else:
            self._stall = self.loop.call_later(MOST_STALL_SECONDS, self._look_at_reader, size)

    def _stop_looking(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_at_reader(0)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_looking()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self._stop_looking()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends. Who waits for a body finds out, and who takes nothing of its answer is cut off in time."""
        super().shutdown()
        if self.cycle is not None:
            self.cycle.message_event.set()
        self.loop.call_later(_FLUSH_SECONDS, self.transport.abort)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()
        # uvicorn reads no more behind a request until it is answered, and would not see that its client leaves
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < MOST_EARLY_BYTES:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        self._end(malformed())


class _Server(uvicorn.Server):
    """Whose first signal drains the driver before uvicorn closes anything."""

    def __init__(self, config: uvicorn.Config, driver: Driver, grace: float, delay: float) -> None:
        super().__init__(config)
        self._driver, self._grace, self._delay = driver, grace, delay
        self._draining: asyncio.Task[None] | None = None

    async def _drain(self) -> None:
        log: Log = cast(FastAPI, self.config.app).state.log
        if self._delay:
            log.say(f"ending: /ready says so, and new requests are still served for {self._delay:g} s")
        cut = await self._driver.drain(self._grace, self._delay)
        if cut:
            log.say(f"{cut} request{'' if cut == 1 else 's'} cut, after {self._grace:g} s of grace or a second signal")
        self.should_exit = True

    def _end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self._driver.cut()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's, with SIGHUP, and without those that are ignored, as by `nohup`."""
        before = {number: handler for number, handler in signal_handlers().items() if handler is not None}
        with super().capture_signals():
            for number, handler in before.items():
                signal.signal(number, handler if handler is signal.SIG_IGN else self.handle_exit)
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal's handler runs in the loop's thread, in the midst of anything
        asyncio.get_running_loop().call_soon_threadsafe(self._end)


def make_server(app: FastAPI, driver: Driver, grace: float, drain_delay: float = 0.0) -> uvicorn.Server:
    """A server whose `run(sockets=[…])` returns when a signal has come and all is over.

    Args:
        app: of the driver.
        grace: seconds that what runs then may take.
        drain_delay: seconds before it, in which /ready already says 503 and new requests are served.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",  # not what else is installed: the tests and the messages about sockets are of these
        http=Protocol,
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_FLUSH_SECONDS + 1,  # by then all connections are cut off
        server_header=False,
    )
    return _Server(config, driver, grace, drain_delay)
