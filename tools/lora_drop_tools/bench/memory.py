"""Memory of a process that opens a bundle and runs it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError

from lora_drop_tools.shared import machine

from .arms import SessionOptions, TimedSession
from .requests import Ids
from .result import Memory, Request


def report_memory(argument: str) -> None:
    """The body of the process that `Memory` is about; prints what it found as JSON."""
    given = json.loads(argument)
    ids = np.array(given["prompts"], np.int64)
    found = []
    with TimedSession.open(Bundle.open(given["bundle"]), SessionOptions(**given["options"])) as timed:
        for k in given["windows"]:
            timed.run(ids, given["new_tokens"], k)
            found.append(machine.pss_bytes())
    print(json.dumps(found))


def _said(stderr: str) -> str:
    """What an error of ours said, or else the last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    notes = [line.removeprefix("Note: ") for line in lines if line.startswith("Note: ")]
    return (notes or lines[-1:] or [""])[0]


def measure_memory(
    name: str, bundle: Bundle, windows: Sequence[int | str], request: Request, prompts: Ids, options: SessionOptions
) -> list[Memory]:
    """Memory under each window, one after the other in one process.

    Raises:
        InputError: the process failed.
    """
    given = {
        "bundle": str(bundle.root),
        "windows": list(windows),
        "prompts": prompts.tolist(),
        "new_tokens": request.new_tokens,
        "options": dataclasses.asdict(options),
    }
    code = f"import sys; from {__name__} import report_memory; report_memory(sys.stdin.read())"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        raise InputError(
            "The process that measures the memory failed.",
            note=_said(done.stderr) or f"It ended with code {done.returncode}.",
            hint="Run the bundle with: lora-drop generate",
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return [Memory(name, k, request, pss) for k, pss in zip(windows, found, strict=True)]
