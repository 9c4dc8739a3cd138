"""Runs programs that a model wrote, for HumanEval, MBPP and their like.

Enters: Python source. Leaves: whether it ran to its end. The program runs in a process of its own (guard.py), isolated
(`-I`), in an empty directory, without an environment, input or output, under limits of time, memory, file size and
processes. It is cut off from the user's files, from the network and from other processes by the system's namespaces.

Where namespaces cannot be had, nothing is run, unless that is asked for by name: then an audit hook and the limits are
all there is, which contain accidents (endless loops, forks, full disks, deleted files) and are no jail.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from lora_drop_runtime.errors import InputError

from .guard import FAILED, NOT_APART, READY

TIMEOUT_SECONDS = 10.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
PROCESSES = 64  # and threads, of a program that is cut off: they are counted by themselves there
BOX_BYTES = 16 * 2**20  # of all files that a program writes, in memory
_GUARD_SECONDS = 5.0  # to end a program
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_PYTHON = ("stdlib", "platstdlib", "purelib", "platlib")


def _visible() -> list[str]:
    """What a program sees of this machine: Python, its packages and the system's libraries.

    Where Python is below the home directory, so are these folders of it and nothing else.
    """
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    installed = [
        *(sysconfig.get_path(name) for name in _PYTHON),
        *(sysconfig.get_path(name, vars={**base, "installed_base": sys.base_prefix}) for name in _PYTHON[:2]),
    ]
    libraries = str(Path(sys.base_prefix) / "lib")
    paths = [*_SYSTEM, libraries, *installed]
    ordered = dict.fromkeys(path for path in paths if path)
    return [path for path in ordered if not any(path.startswith(f"{other}/") for other in ordered)]


def _run(source: str, timeout_seconds: float, apart: bool, listen: bool = False) -> tuple[bool, int, str]:
    """Whether the program ran to its end, the exit code, and with `listen` what came on standard error."""
    secret = secrets.token_hex(16)
    reader, writer = os.pipe()
    options = {
        "pipe": writer,
        "seconds": max(1, round(timeout_seconds)),
        "memory": MEMORY_BYTES,
        "file_bytes": FILE_BYTES,
        "box_bytes": BOX_BYTES,
        "processes": PROCESSES if apart else 0,
        "visible": _visible() if apart else None,
    }
    with tempfile.TemporaryDirectory(prefix="lora-drop-program-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), json.dumps(options)],
            cwd=directory,
            env={"OPENBLAS_NUM_THREADS": "1"},  # threads count as processes
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if listen else subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(writer,),
        )
        os.close(writer)
        said = told = b""
        try:
            given = f"{secret}\n{source}".encode("utf-8", "replace")
            said = process.communicate(given, timeout=timeout_seconds)[1] or b""
        except subprocess.TimeoutExpired:
            pass
        finally:
            if apart and process.poll() is None:  # the guard ends the program, which may have left the group
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GUARD_SECONDS)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.set_blocking(reader, False)
            with contextlib.suppress(BlockingIOError):
                told = os.read(reader, 2 * len(READY + secret.encode()))
            os.close(reader)
        code = FAILED if told and process.returncode == NOT_APART else process.returncode  # the program's own
        return told == READY + secret.encode(), code, said.decode("utf-8", "replace").strip()


@functools.cache
def why_not_apart() -> str:
    """Why programs cannot be cut off on this machine; empty where they can."""
    if not sys.platform.startswith("linux"):
        return f"there are no namespaces on {sys.platform}"
    passed, code, said = _run("pass", 60.0, apart=True, listen=True)
    return "" if passed else said or f"the attempt ended with {code}"


def check_apart(what: str, unsafe: bool) -> None:
    """Refuse to run programs where they cannot be cut off, unless that is asked for.

    Raises:
        InputError: they cannot; `what` says who wants to.
    """
    if not hasattr(os, "killpg"):
        raise InputError(
            "Programs that a model writes cannot be run here.",
            note=f"{what} runs them; {sys.platform} has no limits for what a process starts.",
            hint="Leave it out, or run it on Linux.",
        )
    if not unsafe and (reason := why_not_apart()):
        raise InputError(
            "Programs that a model writes cannot be cut off from this machine.",
            note=f"{what} runs them; {reason}.",
            hint="Leave it out, run it where user namespaces are allowed, or trust the model with "
            "lora-drop eval --unsafe-code.",
        )


def runs_to_its_end(source: str, timeout_seconds: float = TIMEOUT_SECONDS, *, unsafe: bool = False) -> bool:
    """Run a program; False when it raises, ends itself, or meets a limit.

    Args:
        unsafe: do not cut it off from files and network, see the module's docstring.

    Raises:
        InputError: it cannot be cut off.
    """
    check_apart("The task", unsafe)
    passed, code, _ = _run(source, timeout_seconds, apart=not unsafe)
    assert code != NOT_APART, "it was possible before"
    return passed
