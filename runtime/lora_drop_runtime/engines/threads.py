"""How many threads a step takes where the user does not say: engines see neither a container's quota nor, always, the
cores that a process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_GROUPS = Path("/sys/fs/cgroup")


def _quota(available: int) -> int:
    """Cores that the control group grants, at most those available."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = map(int, (_GROUPS / "cpu.max").read_text(encoding="utf-8").split())  # "max" sets no limit
        return min(available, math.ceil(limit / period))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit, period = (
            int((_GROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period")
        )
        return min(available, math.ceil(limit / period)) if limit > 0 else available
    return available


def default_threads() -> int:
    """One for each physical core that this process may use, no more than its quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = str(cpu)
        with contextlib.suppress(OSError):
            siblings = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8").strip()
        cores.add(siblings)
    return max(1, _quota(len(cores)))
