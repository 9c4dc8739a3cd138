"""Ends a process at each point of a staging where the file system is about to change, one run after the other.

Run as a program: it prints, as JSON, what was there after each end and after the next run, for each of its arguments,
such as directory,exchange,old,SIGKILL,force. The points are Python's own audit events (open below the place, mkdir,
rename, remove, flock, …), and either side of the renames through ctypes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_drop_runtime.command_line import run_command

from lora_drop_export.staging import rename
from lora_drop_export.staging.directory import staged_directory
from lora_drop_export.staging.file import write_file
from lora_drop_export.staging.inside import change_file
from lora_drop_export.staging.owned import Kind

MEMORY = "/dev/shm"  # where nobody waits for a disk
MARKER = "marker.json"
PLACE = "place with a name"
EXCHANGE = rename._renameat2


def _files(root: Path) -> frozenset[str] | None:
    return frozenset(json.loads((root / MARKER).read_text()))


KIND = Kind("thing", MARKER, _files)


def write_directory(root: Path, generation: str) -> None:
    names = [MARKER, "a", f"deep/er/{generation}"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(names) if name == MARKER else generation)


def stage_directory(place: Path, force: bool) -> None:
    with staged_directory(place, force, KIND) as root:
        root.with_name("scratch").mkdir()
        (root.with_name("scratch") / "much").write_text("much")
        write_directory(root, "new")


def stage_file(place: Path, force: bool) -> None:
    if place.exists() and not force:
        raise SystemExit(2)
    write_file(place, b"new", "--json")


def stage_inside(place: Path, force: bool) -> None:
    change_file(place, "a", lambda data: data.replace(b"old", b"new"), "--calibrate")


def held(path: Path) -> dict[str, str] | str | None:
    """All that lies at a path."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def _end_at(point: int, place: Path, number: int) -> None:
    """Have a signal sent to this process when it comes to its n-th point."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        paths = [str(a) for a in arguments if isinstance(a, str | os.PathLike)]
        if event.startswith(("lora_drop.", "os.", "shutil.", "fcntl.")) or (
            event == "open" and any(path.startswith(str(place.parent)) for path in paths)
        ):
            count += 1
            if count == point:
                os.kill(os.getpid(), number)

    genuine = rename._renameat2

    def audited(*arguments: Any) -> bool:
        sys.audit("lora_drop.rename")
        done = genuine(*arguments)
        sys.audit("lora_drop.rename")
        return done

    rename._renameat2 = audited
    sys.addaudithook(hook)


def in_child(body: Callable[[], object]) -> int:
    """The wait status of a process that runs `body` as a command does."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):  # which a process in the background may ignore
            signal.signal(number, signal.SIG_DFL)
        try:
            code = run_command(lambda _: body() and None, ())
        except SystemExit as end:
            code = int(end.code or 0)
        os._exit(code)
    return os.waitpid(pid, 0)[1]


def _one(stage: Callable[[Path, bool], None], old: bool, number: int, point: int, force_next: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as directory:
        place = Path(directory).resolve() / PLACE
        if old and stage is not stage_file:
            write_directory(place, "old")
        elif old:
            place.write_text("old")

        def ended() -> None:
            _end_at(point, place, number)
            stage(place, True)

        status = in_child(ended)
        first = {"at_place": held(place), "beside": sorted(set(os.listdir(directory)) - {PLACE})}
        following = in_child(lambda: stage(place, force_next))
        after = {"at_place": held(place), "beside": sorted(set(os.listdir(directory)) - {PLACE})}
        return {"point": point, "status": status, "first": first, "next_status": following, "after": after}


def results_of(what: str, how: str, old: str, name: str, following: str) -> list[dict[str, Any]]:
    """The results of all points, until one is not reached any more."""
    rename._renameat2 = EXCHANGE if how == "exchange" else lambda *_: False
    stage = {"directory": stage_directory, "file": stage_file, "inside": stage_inside}[what]
    number, results = signal.Signals[name], []
    while not results or results[-1]["status"]:
        results.append(_one(stage, old == "old", number, len(results) + 1, following == "force"))
    return results


if __name__ == "__main__":
    print(json.dumps({run: results_of(*run.split(",")) for run in sys.argv[1:]}))
