"""Runs one stage in this process: `python -m gpu_check.run_stage MODULE SETTINGS.json`. command.py starts it."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from gpu_check.job import STAND_IN, Failed, Job, first_line, what_lacks


def prepare_stand_in(work: Path) -> None:
    """What tests/conftest.py sets for those who use tests/support; it does so itself where it tests this."""
    os.environ.setdefault("LORA_DROP_TEST_TRACES", str(work))
    gc.set_threshold(100_000, 50, 50)


def main(module: str, settings: str) -> None:
    given = json.loads(Path(settings).read_text(encoding="utf-8"))
    deadline = time.monotonic() + given["seconds"]
    job = Job(Path(given["work"]), Path(given["report"]), given["stand_in"], given["states"], deadline)
    prepare_stand_in(job.work)
    passed = STAND_IN if job.stand_in else "pass"
    try:
        importlib.import_module(module).run(job)
        job.settle()
        job.save(state=passed, reason="")
    except Failed as failed:
        job.save(state="fail", reason=str(failed))
    except Exception as error:
        lacks = what_lacks(error)
        if lacks is None:
            traceback.print_exc()
        job.save(state="fail" if lacks is None else "skip", reason=lacks or first_line(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
