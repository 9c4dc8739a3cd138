"""No test asserts how long something took: what it asserts then is the machine, and how busy that is.

What does not depend on the machine can be asserted: calls, allocations, nodes, bytes. Times are printed by
`python -m tests.overhead`, or measured by `lora-drop bench`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMES = ("time", "perf_counter", "monotonic", "process_time", "thread_time")
CLOCKS = {*NAMES, *(f"{name}_ns" for name in NAMES)}
EXCEPTIONS = {
    "kills.py",  # kills at random moments of a run, whose time it takes first: a command
    "overhead.py",  # prints times: a command, which pytest does not collect
    "test_no_wall_clock.py",  # this one, whose examples are text
}
LEAST_TIMEOUT_SECONDS = 600.0  # of a process that should end by itself: a net, which no busy machine falls into


def clocks_read(source: str) -> list[str]:
    """What a module does that depends on the clock, also in programs that it has as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "timeit"):
            found += [f"line {node.lineno}: {a.name} is imported" for a in node.names if a.name in CLOCKS | {"timeit"}]
        elif isinstance(node, ast.Import):
            found += [f"line {node.lineno}: timeit is imported" for alias in node.names if alias.name == "timeit"]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "time" and node.attr in CLOCKS:
                found.append(f"line {node.lineno}: time.{node.attr} is read")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [
                f"line {node.lineno}: time.{name} is read by a program"
                for name in CLOCKS
                if f"time.{name}(" in node.value
            ]
        elif isinstance(node, ast.keyword) and node.arg == "timeout" and isinstance(node.value, ast.Constant):
            seconds = node.value.value
            if isinstance(seconds, int | float) and seconds < LEAST_TIMEOUT_SECONDS:
                found.append(f"line {node.value.lineno}: a timeout of {seconds} s is short")
    return found


def test_no_test_reads_a_clock() -> None:
    for file in TESTS.rglob("*.py"):
        if file.relative_to(TESTS).as_posix() not in EXCEPTIONS:
            assert clocks_read(file.read_text()) == [], file


@pytest.mark.parametrize(
    "source",
    [
        "import time\nbegin = time.perf_counter()",
        "import time\nassert time.monotonic() < 3",
        "import time\nclock = time.time_ns",
        "from time import perf_counter",
        "import timeit",
        "subprocess.run(command, timeout=60)",
        "PROGRAM = 'import time; print(' + 'time.time())'",
    ],
)
def test_the_guard_sees_a_clock(source: str) -> None:
    assert len(clocks_read(source)) == 1


def test_the_guard_lets_programs_sleep_and_fall_into_a_wide_net() -> None:
    assert clocks_read("import time\ntime.sleep(0.1)\nsubprocess.run(command, timeout=600)\ndatetime.time(3)") == []
