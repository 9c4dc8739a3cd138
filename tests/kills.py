"""Kills commands at random moments: `python -m tests.kills --count 200` prints what was there afterwards.

Export, add-target, fit and profile run on a tiny model, in processes forked from this one, which has imported all. They
are sent SIGKILL, SIGTERM, SIGINT or SIGHUP: at any moment, near the end, or when two directories are exchanged. Then
`--out` must hold the old result or the new one, byte by byte, and nothing may lie beside it after the next run. The
export takes a trace that was made before; tracing writes nothing. tests/export/staging has every point of an exchange.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lora_drop_tools.cli
import onnxruntime  # noqa: F401  # and others below: imported before processes are forked
import polygraphy.cuda  # noqa: F401
import rich.progress  # noqa: F401
import rich.table  # noqa: F401
import torch

import lora_drop_export.cli
import lora_drop_export.compiler.export
from lora_drop_export.compiler.add_target import add_target  # noqa: F401
from lora_drop_export.decoder import loaded  # noqa: F401
from tests.support.models import FAMILIES
from tests.support.profiles import saved

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
TINY_FIT = (
    "--drop-layers",
    "3,5",
    "--window",
    32,
    "--batch",
    2,
    "--closed-form-tokens",
    512,
    "--steps",
    4,
    "--threads",
    1,
)
TINY_PROFILE = ("--tokens", 64, "--sensitivity-tokens", 32, "--window", 32, "--k", 3, "--rankings", "influence")


@dataclass(frozen=True)
class Command:
    """A command, and what makes the old result that it replaces.

    Attributes:
        fresh: whether it can also run where nothing is.
    """

    name: str
    run: Callable[[], int]
    make_old: Callable[[], int]
    resume: Callable[[], int] | None = None
    fresh: bool = True


def tree(root: Path) -> str | None:
    """A hash of all names and contents below a directory, None where there is none."""
    if not root.exists():
        return None
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path.relative_to(root)}\0{path.is_dir()}\0".encode())
        digest.update(b"" if path.is_dir() else hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def commands(scratch: Path, out: Path) -> list[Command]:
    model, text = saved(FAMILIES["llama"](), scratch / "model"), scratch / "text"
    text.write_text(" ".join(f"w{number}" for number in random.Random(0).choices(range(131), k=4000)))

    def exported(*more: object) -> Callable[[], int]:
        arguments = ["--out", out, *more]
        return functools.partial(lora_drop_export.cli.main, [str(argument) for argument in arguments])

    def tool(name: str, *more: object) -> Callable[[], int]:
        arguments = [name, model, "--text", text, "--out", out, *more]
        return functools.partial(lora_drop_tools.cli.main, [str(argument) for argument in arguments])

    new, alone = ("--model", model, "--max-seq-len", 64), ("--threads", 1)
    add = exported("--add-target", "ort", *alone)
    return [
        Command("export", exported(*new, *alone, "--force"), exported(*new, "--target", "none")),
        Command("add-target", add, exported(*new, "--target", "none"), fresh=False),
        Command(
            "fit",
            tool("fit", *TINY_FIT, "--rank", 3, "--force"),
            tool("fit", *TINY_FIT, "--rank", 2),
            resume=tool("fit", *TINY_FIT, "--rank", 3, "--resume"),
        ),
        Command("profile", tool("profile", *TINY_PROFILE, "--force"), tool("profile", *TINY_PROFILE, "--seed", 1)),
    ]


def start(body: Callable[[], int], log: str = os.devnull) -> int:
    """The process that runs a command; what it prints goes to a file."""
    pid = os.fork()
    if not pid:
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):  # which a process in the background may ignore
            signal.signal(number, signal.SIG_DFL)
        code = 1
        try:
            code = body()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def finished(body: Callable[[], int]) -> float:
    """Seconds that a run takes which nobody ends; it must succeed."""
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as log:
        status = os.waitpid(start(body, log.name), 0)[1]
        if status:
            raise SystemExit(f"A run that nobody ended failed with status {status}:\n{log.read()}")
    return time.perf_counter() - begin


def beside(out: Path) -> list[str]:
    return sorted(set(os.listdir(out.parent)) - {out.name})


def wait_for_the_exchange(pid: int, out: Path) -> None:
    """Until the process is about to exchange directories, or is done."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for name in os.listdir(out.parent):
            if name.startswith(f".{out.name}.") and os.path.exists(out.parent / name / "journal"):
                return
        time.sleep(0.0002)  # leaves most of a core to the process


class Trials:
    """Kills, and counts what was there afterwards."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.out = scratch / "place" / "out"
        self.out.parent.mkdir()
        self.kept = scratch / "old"
        self.kept.mkdir()
        self.counts: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.failures: list[str] = []
        self.hits = 0  # of commands that were not done before the signal came
        self.facts: dict[str, tuple[str | None, str | None, float]] = {}  # hash of old and new, seconds of a run

    def prepare(self, command: Command) -> None:
        finished(command.make_old)
        shutil.copytree(self.out, self.kept / command.name, copy_function=shutil.copy2)
        seconds = finished(command.run)
        self.facts[command.name] = tree(self.kept / command.name), tree(self.out), seconds
        shutil.rmtree(self.out)

    def trial(self, command: Command, number: signal.Signals) -> None:
        if command.name not in self.facts:
            self.prepare(command)
        old, new, seconds = self.facts[command.name]
        if command.fresh and self.random.random() < 0.25:
            old = None
        else:
            shutil.copytree(self.kept / command.name, self.out)
        moment = self.random.choice(["any", "late", "exchange"])
        log = self.kept / "log"
        pid = start(command.run, str(log))
        if moment == "exchange":
            wait_for_the_exchange(pid, self.out)
        else:
            time.sleep(seconds * self.random.uniform(0 if moment == "any" else 0.8, 1.05))
        os.kill(pid, number)
        status = os.waitpid(pid, 0)[1]
        found, left = tree(self.out), beside(self.out)
        what = "old" if found == old else "new" if found == new else "damaged"
        code = os.waitstatus_to_exitcode(status)
        partial = (self.out.with_name("out.partial") / "settings.json").exists()
        self._next_run(command.resume if partial and command.resume and self.random.random() < 0.5 else command.run)
        again, left_again = tree(self.out), beside(self.out)
        title = f"{command.name}, {number.name}, {moment}"
        if what == "damaged" or code not in (0, -number, EXIT_CODES.get(number)):
            printed = log.read_text(errors="replace")
            self.failures.append(f"{title}: exit code {code}, --out is {what}, beside it {left}\n{printed}")
        if again != new or left_again:
            self.failures.append(f"{title}: after the next run --out is not the new one, or {left_again} is left")
        self.counts[command.name, number.name, what if code else "done before"] += 1
        self.hits += bool(code)
        self.counts["left until the next run" if left and left != ["out.partial"] else "nothing left", number.name] += 1
        shutil.rmtree(self.out, ignore_errors=True)

    def _next_run(self, body: Callable[[], int]) -> None:
        os.waitpid(start(body), 0)


def run(count: int, seed: int) -> Trials:
    """All trials; the directory of the traces must be said in the environment (tests/conftest.py)."""
    from tests.support.bundles import family

    torch.set_num_threads(1)
    traced = family("llama").traced
    lora_drop_export.compiler.export.trace = lambda *_, **__: traced
    with tempfile.TemporaryDirectory(prefix="lora-drop-kills-") as directory:
        scratch = Path(directory).resolve()
        trials = Trials(scratch, seed)
        known = commands(scratch, trials.out)
        for index in itertools.count():
            if trials.hits == count:
                break
            trials.trial(known[index % len(known)], SIGNALS[(index + index // len(known)) % len(SIGNALS)])
            if sys.stderr.isatty() or trials.hits % 10 == 0:
                failed = f", {len(trials.failures)} failures" if trials.failures else ""
                print(f"{trials.hits} of {count}{failed}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr)
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill commands at random moments and look at what is left.")
    parser.add_argument("--count", type=int, default=200, help="Kill so many (default 200).")
    parser.add_argument("--seed", type=int, default=0, help="Choose the moments by this number (default 0).")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-drop-traces-") as traces:
        os.environ.setdefault("LORA_DROP_TEST_TRACES", traces)
        trials = run(given.count, given.seed)
    for what, count in sorted(trials.counts.items()):
        print(f"{count:5}  {', '.join(what)}")
    print(*trials.failures, sep="\n")
    print(f"{trials.hits} kills, {len(trials.failures)} failures")
    return 1 if trials.failures else 0


if __name__ == "__main__":
    sys.exit(main())
