"""`python -m tests.support.forked_stages …`: `python tools/gpu_check.py`, whose stages are forks of one process.

That one has imported what each stage takes seconds to import, and nothing of this project's but the command.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gpu_check import command, run_stage

IMPORTED = ("torch.onnx", "transformers.models.llama.modeling_llama", "onnxscript", "onnx_graphsurgeon", "polygraphy")
BASELINE = "gpu_check.decode"  # which runs one that imports the same
NO_ONNX_RUNTIME = "gpu_check.device"  # as on a Jetson, whose command names this stage (docs/tensorrt.md)


class Forked:
    """As subprocess.Popen of a stage."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: BinaryIO, **_: Any
    ) -> None:
        sys.stdout.flush()
        self.pid, self.returncode = os.fork(), None
        if self.pid:
            return
        module, settings = arguments[-2:]
        os.setsid()
        for stream in (1, 2):
            os.dup2(stdout.fileno(), stream)
        os.chdir(cwd)
        os.environ.update(env)
        if module == NO_ONNX_RUNTIME:
            sys.modules["onnxruntime"] = None
        if module == BASELINE:
            importlib.import_module(module).subprocess = ForkingModules
        code = 1
        with contextlib.suppress(BaseException):
            run_stage.main(module, settings)
            code = 0
        os._exit(code)  # what is the parent's to tidy up stays

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        left = timeout
        while (code := self.poll()) is None:
            if left <= 0:
                raise subprocess.TimeoutExpired("a stage", timeout)
            time.sleep(command.POLL_S)
            left -= command.POLL_S
        return code


class Forking:
    """As the module subprocess, for the command."""

    DEVNULL, TimeoutExpired, Popen = subprocess.DEVNULL, subprocess.TimeoutExpired, Forked


class ForkingModules:
    """As the module subprocess, for a stage that runs `python -m MODULE ARGUMENTS…` for what it prints."""

    PIPE = subprocess.PIPE

    @staticmethod
    def run(arguments: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(writes, 1)
            code = 1
            with contextlib.suppress(BaseException):
                sys.argv = list(arguments[2:])
                runpy.run_module(arguments[2], run_name="__main__")
                sys.stdout.flush()
                code = 0
            os._exit(code)
        os.close(writes)
        with open(reads, encoding="utf-8") as printed:
            text = printed.read()
        return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    command.subprocess = Forking
    sys.exit(command.main())
