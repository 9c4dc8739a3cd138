"""The server's process: its socket, its signals, and its end.

SIGTERM, SIGINT and SIGHUP let what runs end, and answer what comes with 503 meanwhile; after the grace, or at a second
signal, what still runs is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI
from lora_drop_runtime.errors import InputError

from .driver import Driver

_FLUSH_SECONDS = 5  # for responses on their way, once nothing runs any more


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        InputError: the address cannot be had.
    """
    made: socket.socket | None = None
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
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


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def address(made: socket.socket) -> str:
    """`http://127.0.0.1:8000`"""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Whose first signal drains the driver before uvicorn closes anything."""

    def __init__(self, config: uvicorn.Config, driver: Driver, grace: float) -> None:
        super().__init__(config)
        self._driver, self._grace = driver, grace
        self._draining: asyncio.Task[None] | None = None

    async def _drain(self) -> None:
        cut = await self._driver.drain(self._grace)
        if cut:
            print(f"{cut} requests were cut, after {self._grace:g} s of grace or a second signal", file=sys.stderr)
        self.should_exit = True

    def _end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self._draining.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal's handler runs in the loop's thread, in the midst of anything
        asyncio.get_running_loop().call_soon_threadsafe(self._end)


def make_server(app: FastAPI, driver: Driver, grace: float) -> uvicorn.Server:
    """A server whose `run(sockets=[…])` returns when a signal has come and all is over.

    Args:
        app: of the driver.
        grace: seconds that what runs then may take.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",  # not what else is installed: the tests and the messages about sockets are of these
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        server_header=False,
    )
    server = _Server(config, driver, grace)
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, server.handle_exit)  # the others uvicorn handles
    return server
