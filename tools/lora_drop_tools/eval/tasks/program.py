"""Runs a program that a model wrote, for HumanEval.

Enters: Python source. Leaves: whether it ran to its end. The program runs in a process of its own, isolated (`-I`), in
an empty directory, without an environment, input or output, under limits of time, memory, file size and processes, and
with an audit hook that refuses to start processes, to signal others, to use the network and to write elsewhere.

That contains accidents: endless loops, forks, full disks, deleted files. It is no jail for hostile code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

TIMEOUT_SECONDS = 10.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
PASSED = 77  # how the guard ends; whatever a program ends with itself is a failure
# Runs before the program, in its process. An audit hook cannot be taken away again.
_GUARD = """
import os, resource, sys
seconds, memory, file_bytes = (int(value) for value in sys.argv[1:4])
source = sys.stdin.read()
for name, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", file_bytes), ("NPROC", 0), ("CORE", 0), ("NOFILE", 64)):
    hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))

def guard(event, arguments, here=os.getcwd(), join=os.path.join, real=os.path.realpath, fs=os.fsdecode):
    if event.startswith(("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.chroot", "subprocess.",
                         "socket.", "signal.pthread_kill", "pty.")):
        raise PermissionError("a generated program may not use " + event)
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        paths = [path] if writes and not isinstance(path, int) else []
    elif event in ("os.remove", "os.rmdir", "os.rename", "os.truncate", "os.mkdir", "os.chmod", "os.chown", "os.link",
                   "os.symlink", "os.chdir", "shutil.rmtree"):
        paths = [path for path in arguments[:2] if isinstance(path, (str, bytes))]
    else:
        return
    for path in paths:
        if real(join(here, fs(path))) != here and not real(join(here, fs(path))).startswith(here + os.sep):
            raise PermissionError("a generated program may not change " + fs(path))

sys.addaudithook(guard)
exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
os._exit(%d)
"""


def runs_to_its_end(source: str, timeout_seconds: float = TIMEOUT_SECONDS) -> bool:
    """Run a program; False when it raises, ends itself, or meets a limit."""
    limits = (str(max(1, round(timeout_seconds))), str(MEMORY_BYTES), str(FILE_BYTES))
    with tempfile.TemporaryDirectory(prefix="lora-drop-program-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _GUARD % PASSED, *limits],
            cwd=directory,
            env={"OPENBLAS_NUM_THREADS": "1"},  # threads count as processes
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(source.encode("utf-8", "replace"), timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode == PASSED
