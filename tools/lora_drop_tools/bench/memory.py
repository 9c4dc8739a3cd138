"""Memory of a process that opens a bundle and runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError

from lora_drop_tools.shared import machine

from .arms import TimedSession
from .requests import Ids


def report_memory(argument: str) -> None:
    """The body of the process that `Memory` is about; prints what it found as JSON."""
    options = json.loads(argument)
    ids = np.array(options["prompts"], np.int64)
    found = []
    with Session.open(options["bundle"], **options["session"]) as session:
        timed = TimedSession(session)
        for k in options["windows"]:
            timed.run(ids, options["new_tokens"], k)
            found.append({"k": k, "pss": machine.pss_bytes()})
    print(json.dumps(found))


def measure_memory(bundle: Bundle, windows: Sequence[int], prompts: Ids, new_tokens: int, session: Any) -> Any:
    options = {
        "bundle": str(bundle.root),
        "windows": list(windows),
        "prompts": prompts.tolist(),
        "new_tokens": new_tokens,
        "session": session,
    }
    code = "import sys; from lora_drop_tools.bench.memory import report_memory; report_memory(sys.stdin.read())"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(options), capture_output=True, text=True)
    if done.returncode:
        raise InputError(
            "The process that measures the memory failed.",
            note=(done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1],
            hint="Run the bundle with: lora-drop generate",
        )
    return json.loads(done.stdout.splitlines()[-1])
