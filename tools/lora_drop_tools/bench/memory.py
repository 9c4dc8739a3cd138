"""Memory of a process that opens a bundle and runs it."""

from __future__ import annotations

import dataclasses
import json
import re
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
    with TimedSession.open(Bundle.open(given["bundle"]), SessionOptions(**given["options"])) as timed:
        timed.run(ids, given["new_tokens"], given["window"])
        print(json.dumps(machine.pss_bytes()))


def _failed(stderr: str, code: int) -> InputError:
    """The error that the process ended with, where it is one of ours."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    ours = re.search(r"^(?:[\w.]+: )?(.+)\nNote: (.+)\nHint: (.+)\Z", "\n".join(lines[-3:]))
    if ours is not None:
        return InputError(ours[1], note=ours[2], hint=ours[3])
    return InputError(
        "The process that measures the memory failed.",
        note=lines[-1] if lines else f"It ended with code {code}.",
        hint="Run the bundle with: lora-drop generate",
    )


def measure_memory(
    name: str, bundle: Bundle, windows: Sequence[int | str], request: Request, prompts: Ids, options: SessionOptions
) -> list[Memory]:
    """Memory under each window, in a process of its own: an engine keeps what another one has made it hold.

    Raises:
        InputError: a process failed.
    """
    given = {
        "bundle": str(bundle.root),
        "prompts": prompts.tolist(),
        "new_tokens": request.new_tokens,
        "options": dataclasses.asdict(options),
    }
    code = f"import sys; from {__name__} import report_memory; report_memory(sys.stdin.read())"
    found = []
    for k in windows:
        told = json.dumps(given | {"window": k})
        # -P: modules of the directory that the user is in are none of ours
        done = subprocess.run([sys.executable, "-P", "-c", code], input=told, capture_output=True, text=True)
        if done.returncode:
            raise _failed(done.stderr, done.returncode)
        found.append(Memory(name, k, request, json.loads(done.stdout.splitlines()[-1])))
    return found
