"""Other runtimes on the same weights, for `lora-drop bench --peers`.

Enters: names, the model that they load, the bundle's precision. Leaves: `Peer`s that generate greedily when asked, each
in a process of its own (worker.py), and for every other name the reason why it cannot take part.
Knows no bundle and no schedule.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

from lora_drop_runtime.engines.ort.package import TELEMETRY_OFF

from lora_drop_tools.shared.machine import pss_bytes

from .options import PEERS, PeerOptions, check_named, reason_against

WORKER = Path(__file__).with_name("worker.py")
PREPARE_SECONDS, OPEN_SECONDS = 3600.0, 900.0  # building a model, loading it; a request has no limit of its own
STOP_SECONDS = 5.0
PREPARED, ANSWERED = {"model", "built"}, {"tokens", "prefill_seconds", "step_seconds"}  # what a worker says


class PeerError(Exception):
    """A peer does not do what was asked; the message is the reason, in one line."""


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _start(command: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
    """Leads a group of processes: what it starts ends with it."""
    own = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", TELEMETRY_OFF: "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=log, env=os.environ | own, start_new_session=True, bufsize=0
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone; macOS says the latter of that
        os.killpg(process.pid, signal.SIGKILL)


def _prepared(record: Path) -> dict[str, Any]:
    """What an earlier run has left; nothing where it is damaged."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() >= PREPARED else {}


class Peer:
    """One runtime, loaded; use as a context manager.

    Args:
        name: of `PEERS`, or whatever `command` understands.
        command: starts a worker that speaks worker.py's protocol, without the arguments.
        source: what `prepare` reads.
        precision: of the weights.
        directory: where `prepare` puts what it makes, and where the worker's log goes.
        threads: of the runtime.
        capacity: tokens of the longest request.

    Attributes:
        built: what it loads, in words; `model_bytes` is the size of that.
        version: of the runtime, in the Python that runs it.
        pss: of the worker after `warm_up`.

    Raises:
        PeerError: it cannot be prepared or loaded.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        source: Path,
        precision: str,
        directory: Path,
        threads: int,
        capacity: int,
    ) -> None:
        self.name = name
        self.pss: dict[str, int] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / f"{name}.log"
        record = directory / f"{name}.json"  # of what an earlier run prepared
        identity = {"source": str(source), "bytes": _size(source), "precision": precision}
        prepared = _prepared(record)
        if prepared.get("identity") != identity or not Path(str(prepared["model"])).exists():
            begin = time.perf_counter()
            arguments = {"source": str(source), "precision": precision, "out": str(directory), "threads": threads}
            with (
                self._log.open("wb") as log,
                _start([*command, "prepare", name, json.dumps(arguments)], log) as process,
            ):
                self._process, self._unread = process, b""
                try:
                    prepared = self._read(PREPARED, PREPARE_SECONDS)
                finally:
                    _kill(process)
            prepared |= {"identity": identity, "seconds": time.perf_counter() - begin}
            part = record.with_suffix(".part")
            part.write_text(json.dumps(prepared), encoding="utf-8")
            part.replace(record)
        self.built = str(prepared["built"])
        self.model_bytes = _size(Path(str(prepared["model"])))
        arguments = {"model": prepared["model"], "threads": threads, "capacity": capacity}
        with self._log.open("ab") as log:
            self._process, self._unread = _start([*command, "serve", name, json.dumps(arguments)], log), b""
        try:
            self.version: str | None = self._read({"ready"}, OPEN_SECONDS).get("version")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """One greedy request.

        Returns:
            `tokens` (N), `prefill_seconds` to the first of them, `step_seconds` (N − 1).

        Raises:
            PeerError: it failed.
        """
        assert self._process.stdin is not None
        request = json.dumps({"prompt": list(prompt), "new_tokens": new_tokens}).encode() + b"\n"
        with contextlib.suppress(OSError):  # it is gone; reading says why
            while request:
                request = request[self._process.stdin.write(request) :]
        return self._read(ANSWERED, None)

    def warm_up(self, prompt: Sequence[int], new_tokens: int) -> None:
        """A request that nobody sees; then the memory is measured.

        Raises:
            PeerError: it failed.
        """
        self.generate(prompt, new_tokens)
        self.pss = pss_bytes(self.pid)

    def close(self) -> None:
        """End the worker: it leaves when its input ends, or is killed."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        _kill(process)
        process.wait()

    def _line(self, seconds: float | None) -> str:
        """The next line that it prints; a part of one is no answer."""
        assert self._process.stdout is not None
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise PeerError(f"no answer within {seconds:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise PeerError(f"{self._end()}{self._last_words()}")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace")

    def _read(self, keys: Set[str], seconds: float | None) -> dict[str, Any]:
        """Its next answer, which has these keys."""
        line = self._line(seconds)
        answer: Any = None
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise PeerError(str(answer["error"]))
        if not isinstance(answer, dict) or not keys <= answer.keys():
            raise PeerError(f"its answer is not understood: {line.strip()[:200]}")
        return answer

    def _end(self) -> str:
        try:
            return f"it ended with code {self._process.wait(STOP_SECONDS)}"
        except subprocess.TimeoutExpired:
            return "it says nothing more"

    def _last_words(self) -> str:
        lines = [
            line.strip()
            for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
        return f": {lines[-1][-200:]}" if lines else ""


def open_peers(
    options: PeerOptions,
    precision: str,
    threads: int,
    prompt: Sequence[int],
    new_tokens: int,
    scratch: Path,
    opened: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[list[Peer], dict[str, str]]:
    """Load the peers and warm each up on the longest request before the next one is loaded.

    Args:
        opened: closes those that are ready.

    Returns:
        Those that are ready, and the reason for each that is not.

    Raises:
        InputError: a peer that was named is not.
    """
    ready: list[Peer] = []
    reasons: dict[str, str] = {}
    for name in options.names:
        reason = reason_against(name, options, precision)
        if reason is None:
            say(f"peer {name}: preparing and loading")
            command = [options.pythons.get(name, sys.executable), str(WORKER)]
            directory = (options.cache or scratch) / f"{name}-{precision}"
            peer = None
            try:
                source = options.models[PEERS[name].reads]
                capacity = len(prompt) + new_tokens
                peer = Peer(name, command, source, precision, directory.resolve(), threads, capacity)
                peer.warm_up(prompt, new_tokens)
                opened.callback(peer.close)
                ready.append(peer)
                continue
            except (PeerError, OSError) as error:
                reason = str(error)
                if peer is not None:
                    peer.close()
        check_named(options, {name: reason})
        say(f"peer {name}: left out, {reason}")
        reasons[name] = reason
    return ready, reasons


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lora-drop-peers-")
