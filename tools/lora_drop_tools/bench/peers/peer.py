"""Other runtimes on the same weights, for `lora-drop bench --peers`.

Enters: names, the model that they load, the bundle's precision. Leaves: `Peer`s that generate greedily when asked, each
in a process of its own (peer_worker.py), and for every other name the reason why it cannot take part.
Knows no bundle and no schedule.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_runtime.errors import InputError

from lora_drop_tools.shared.machine import pss_bytes

WORKER = Path(__file__).with_name("worker.py")
PREPARE_SECONDS, OPEN_SECONDS = 3600.0, 900.0  # building a model, loading it; a request has no limit of its own
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class PeerKind:
    """What a peer needs.

    Attributes:
        module: what shows that it is installed.
        package: its name for pip.
        reads: `directory` (Hugging Face) or `gguf`.
        precisions: of a bundle's weights, that it can compute with too.
        note: why it may not be installable.
    """

    module: str
    package: str
    reads: str
    precisions: tuple[str, ...]
    note: str = ""


PEERS = {
    "onnxruntime-genai": PeerKind("onnxruntime_genai", "onnxruntime-genai", "directory", ("float32", "int8", "int4")),
    "llama.cpp": PeerKind("llama_cpp", "llama-cpp-python", "gguf", ("float32", "int8", "int4")),
    "transformers": PeerKind("transformers", "transformers", "directory", ("float32",)),
    "optimum-onnx": PeerKind(
        "optimum.onnxruntime",
        "optimum-onnx",
        "directory",
        ("float32",),
        "0.1.0 wants transformers < 4.58, so an environment of its own: --peer-python optimum-onnx=PYTHON",
    ),
}
READS = {"directory": "a Hugging Face directory", "gguf": "a .gguf file"}


class PeerError(Exception):
    """A peer does not do what was asked; the message is the reason, in one line."""


@dataclass(frozen=True)
class PeerOptions:
    """What was asked for, checked; `models` has a path per kind of source, no `cache` is a temporary one."""

    names: tuple[str, ...]
    models: Mapping[str, Path]
    cache: Path | None
    pythons: Mapping[str, str]


def peer_options(
    names: Sequence[str],
    model: str | Path | Sequence[str | Path] | None,
    cache: str | Path | None,
    pythons: Sequence[str],
) -> PeerOptions:
    """Check what a user gave; no names are all names.

    Raises:
        InputError: an unknown peer, no model, a model that is neither a directory nor a .gguf file, or two of a kind.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise InputError(
            "Unknown peer.",
            note=f"{unknown[0]!r} was given, {', '.join(PEERS)} are known.",
            hint="Use --peers alone for all that can run, or --peers with names, separated by commas.",
        )
    models: dict[str, Path] = {}
    for path in [Path(model)] if isinstance(model, (str, Path)) else map(Path, model or ()):
        kind = "directory" if (path / "config.json").is_file() else "gguf" if path.suffix == ".gguf" else None
        if kind is None or not path.exists():
            raise InputError(
                "The model for the peers cannot be read.",
                note=f"{path} is neither a Hugging Face directory (with config.json) nor a .gguf file.",
                hint="Give --model DIR, --model FILE.gguf, or both.",
            )
        if kind in models:
            raise InputError(
                "There are two models of one kind for the peers.",
                note=f"{models[kind]} and {path}: a peer loads one of them.",
                hint="Give one directory, one .gguf file, or one of each.",
            )
        models[kind] = path.resolve()
    if not models:
        raise InputError(
            "The peers have no model to load.",
            note="--peers needs --model: a bundle's weights are in no form that others read.",
            hint="Give the checkpoint that the bundle was made from: --model DIR or --model FILE.gguf, or both.",
        )
    chosen: dict[str, str] = {}
    for text in pythons:
        name, _, path_text = text.partition("=")
        if name not in PEERS or not Path(path_text).is_file():
            raise InputError(
                "The Python of a peer is not understood.",
                note=f"{text!r} was given; needed is NAME=PATH, NAME one of {', '.join(PEERS)}.",
                hint="For example --peer-python optimum-onnx=venv/bin/python.",
            )
        chosen[name] = path_text
    return PeerOptions(tuple(names) or tuple(PEERS), models, None if cache is None else Path(cache), chosen)


def reason_against(name: str, options: PeerOptions, precision: str) -> str | None:
    """Why a peer cannot take part, as far as that is known before any work; None when it can."""
    kind = PEERS[name]
    if precision not in kind.precisions:
        return f"it runs {', '.join(kind.precisions)} on the CPU, the bundle's weights are {precision}"
    if kind.reads not in options.models:
        given = READS[next(iter(options.models))]
        return f"it loads {READS[kind.reads]}, --model gives {given}"
    if name not in options.pythons and not _is_installed(kind.module):
        return f"not installed: pip install {kind.package}" + (f"; {kind.note}" if kind.note else "")
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


class Peer:
    """One runtime, loaded; use as a context manager.

    Args:
        name: of `PEERS`, or whatever `command` understands.
        command: starts a worker that speaks peer_worker.py's protocol, without the arguments.
        source: what `prepare` reads.
        precision: of the weights.
        directory: where `prepare` puts what it makes, and where the worker's log goes.
        threads: of the runtime.
        capacity: tokens of the longest request.

    Attributes:
        built: what it loads, in words; `model_bytes` is the size of that.
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
        prepared = json.loads(record.read_text()) if record.is_file() else {}
        if prepared.get("identity") != identity or not Path(prepared["model"]).exists():
            begin = time.perf_counter()
            arguments = {"source": str(source), "precision": precision, "out": str(directory), "threads": threads}
            with self._log.open("w") as log, _start([*command, "prepare", name, json.dumps(arguments)], log) as process:
                self._process = process
                try:
                    prepared = self._read(PREPARE_SECONDS)
                finally:
                    process.kill()
            prepared |= {"identity": identity, "seconds": time.perf_counter() - begin}
            record.write_text(json.dumps(prepared))
        self.built = str(prepared["built"])
        self.model_bytes = _size(Path(prepared["model"]))
        arguments = {"model": prepared["model"], "threads": threads, "capacity": capacity}
        with self._log.open("a") as log:
            self._process = _start([*command, "serve", name, json.dumps(arguments)], log)
        try:
            self._read(OPEN_SECONDS)
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
        try:
            self._process.stdin.write(json.dumps({"prompt": list(prompt), "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; reading says why
        return self._read(None)

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
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _read(self, seconds: float | None) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise PeerError(f"no answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"it ended with code {self._process.wait()}{self._last_words()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"its answer is not understood: {line.strip()[:200]}") from None
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1][-200:]}" if lines else ""


def open_peers(
    options: PeerOptions,
    precision: str,
    threads: int,
    prompt: Sequence[int],
    new_tokens: int,
    scratch: Path,
    say: Callable[[str], None],
) -> tuple[list[Peer], dict[str, str]]:
    """Load the peers and warm each up on the longest request before the next one is loaded.

    Returns:
        Those that are ready, and the reason for each that is not.
    """
    ready: list[Peer] = []
    reasons: dict[str, str] = {}
    for name in options.names:
        reason = reason_against(name, options, precision)
        if reason is None:
            say(f"peer {name}: preparing and loading")
            command = [options.pythons.get(name, sys.executable), "-P", str(WORKER)]
            directory = (options.cache or scratch) / f"{name}-{precision}"
            peer = None
            try:
                source = options.models[PEERS[name].reads]
                capacity = len(prompt) + new_tokens
                peer = Peer(name, command, source, precision, directory.resolve(), threads, capacity)
                peer.warm_up(prompt, new_tokens)
                ready.append(peer)
                continue
            except (PeerError, OSError) as error:
                reason = str(error)
                if peer is not None:
                    peer.close()
        say(f"peer {name}: left out, {reason}")
        reasons[name] = reason
    return ready, reasons


def peer_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(PEERS[name].package)
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lora-drop-peers-")


def _start(command: Sequence[str], log: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
