"""Items spread over a Ray cluster: what scoring.py and texts.py do in this process, done by workers.

Enters: the batches that this process would decode. Leaves: their numbers, as batches end. A worker decodes a batch as
this process would, so the numbers are the same. Ray is imported when a cluster is asked for.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError, LoraDropError, first_line
from lora_drop_runtime.text import TextCodec

from .scoring import Row, Score, Sums, Window, WindowK, score, score_windows
from .settings import EvalSettings
from .texts import Wish, Writer

CONNECT_SECONDS = 10
START_SECONDS = 300  # without any worker: opening a large bundle takes its time
FREED_SECONDS = 10  # within which a cluster says that the room of killed workers is free


class _Worker:
    """A bundle that is open under one policy, in a process of the cluster."""

    def open(
        self,
        root: Path,
        policy: str,
        target: str | None,
        provider: str | None,
        threads: int | None,
        lenience: float | None,
    ) -> None:
        """Not when the process starts: Ray would tell of an error there in its own words alone."""
        self._session = Session.open(root, policy=policy, target=target, provider=provider, threads=threads)
        self._writer = Writer(root, TextCodec.open(root / "tokenizer"), policy, target, provider, threads, lenience)

    def windows(self, windows: Sequence[Window], ks: Sequence[WindowK]) -> dict[WindowK, list[Sums]]:
        found: dict[WindowK, list[Sums]] = {}
        score_windows(self._session, windows, ks, found.__setitem__)
        return found

    def scores(self, rows: Sequence[Row], k: int) -> list[Score]:
        return score(self._session, rows, k)

    def texts(self, wishes: Sequence[Wish], k: int) -> list[str]:
        found: dict[int, str] = {}
        self._writer.write(wishes, k, len(wishes), found.__setitem__)
        return [found[index] for index in range(len(wishes))]


def _check_head(address: str) -> None:
    """Raises ValueError where no head of a cluster answers: Ray itself tries for minutes."""
    if address == "auto" or os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # with certificates, which Ray alone knows how to use
    import grpc  # as Ray does

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=CONNECT_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise ValueError("what listens there is no head of a Ray cluster") from None
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:  # of which Ray says more
                raise ValueError(error.details()) from None


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be part of a cluster, of none where it is None; `auto` is the one that runs on this machine.

    Raises:
        InputError: Ray is not installed, or there is no cluster.
    """
    if address is None:
        yield
        return
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "Ray is not installed.",
            note=f"--ray is {address}.",
            hint="pip install 'lora-drop-export[ray]', or leave --ray out.",
        )
    import ray

    try:
        _check_head(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(
            "The Ray cluster cannot be reached.",
            note=f"--ray is {address}: {first_line(error):.200}",
            hint="Give HOST:PORT of its head, as `ray start --head` prints it, or auto on one of its nodes; "
            "RAY_AUTH_MODE and its token have to be the same here and there.",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _no_room(note: str) -> InputError:
    return InputError(
        "The Ray cluster has no room for a worker.",
        note=note,
        hint="Wait until something ends there, or give a smaller --threads.",
    )


class Spread:
    """Workers for one bundle under one policy, as many as the cluster has room for. Use as a context manager.

    Raises:
        InputError: it has room for none.
    """

    def __init__(self, bundle: Bundle, policy: str, settings: EvalSettings) -> None:
        import ray

        on_gpu = bundle.target(settings.target)[1].on_device or settings.provider not in (None, "cpu")
        needed = {"GPU": 1} if on_gpu else {"CPU": settings.threads or 1}
        ((name, each),) = needed.items()
        free = ray.available_resources().get(name, 0)
        nodes = [node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]]
        largest = max(nodes, default=0)
        if min(free, largest) < each:
            raise _no_room(f"One takes {each} {name}; {free:g} are free, the largest node has {largest:g}.")
        worker = ray.remote(_Worker).options(**{f"num_{name.lower()}s": each})
        lenience = settings.lenience_under(policy)
        given = bundle.root.absolute(), policy, settings.target, settings.provider, settings.threads, lenience
        # No more than its nodes have places; one that others have taken meanwhile is never ready, and gets no batch
        places = sum(int(has // each) for has in nodes)
        self._resource, self._room = name, free
        self._workers = [worker.remote() for _ in range(min(int(free // each), places))]
        self._starting = {one.open.remote(*given): one for one in self._workers}
        self._free: list[Any] = []

    def __enter__(self) -> Spread:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Leave the cluster as it was, where others follow: their workers take the room of these."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        end = time.monotonic() + (FREED_SECONDS if error is None else 0)
        while ray.available_resources().get(self._resource, 0) < self._room and time.monotonic() < end:
            time.sleep(0.05)

    def _run(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Results by the calls' places, as they come."""
        import ray

        waiting = list(enumerate(calls))[::-1]
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while self._free and waiting:
                index, call = waiting.pop()
                worker = self._free.pop()
                running[getattr(worker, method).remote(*call)] = index, worker
            ended, _ = ray.wait([*running, *self._starting], timeout=None if running else START_SECONDS)
            if not ended:
                raise _no_room(f"None has started within {START_SECONDS} s.")
            try:
                found = ray.get(ended[0])
            except ray.exceptions.RayError as error:
                raise self._as_ours(error) from None
            if ended[0] in self._starting:
                self._free.append(self._starting.pop(ended[0]))
                continue
            index, worker = running.pop(ended[0])
            self._free.append(worker)
            yield index, found

    @staticmethod
    def _as_ours(error: Exception) -> LoraDropError:
        cause = getattr(error, "cause", error)
        if isinstance(cause, LoraDropError):
            return type(cause)(cause.fact, note=cause.note, hint=cause.hint)
        return BundleError(
            "A worker of the Ray cluster has failed.",
            note=f"{first_line(cause):.300}",
            hint="Run the command again: with --out it goes on from what is measured.",
        )

    def windows(
        self, batches: Sequence[Sequence[Window]], ks: Sequence[WindowK]
    ) -> Iterator[tuple[int, dict[WindowK, list[Sums]]]]:
        """As `score_windows`, a batch after the other as they end: its place, and what `done` would get."""
        return self._run("windows", [(batch, list(ks)) for batch in batches])

    def scores(self, batches: Sequence[Sequence[Row]], k: int) -> Iterator[tuple[int, list[Score]]]:
        """As `score`."""
        return self._run("scores", [(batch, k) for batch in batches])

    def texts(self, batches: Sequence[Sequence[Wish]], k: int) -> Iterator[tuple[int, list[str]]]:
        """As `Writer.write`."""
        return self._run("texts", [(batch, k) for batch in batches])
