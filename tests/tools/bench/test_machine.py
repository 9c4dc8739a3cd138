"""`lora-drop bench`: what it measures of the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lora_drop_tools.bench.memory import _failed
from lora_drop_tools.shared import machine


def test_bandwidth() -> None:
    found = machine.read_bandwidth(2, 2**20)
    assert found.buffer_bytes == 2**20
    assert found.bytes_per_second == max(found.all_kernels.values()) == found.all_kernels[found.kernel] > 0
    assert "2 thread(s)" in found.describe()


def test_memory_and_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/smaps_rollup").write_text("00-ff ---p\nRss: 9 kB\nPss: 7 kB\nPss_Anon: 4 kB\nPss_File: 3 kB\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.pss_bytes() == {"total": 7168, "anonymous": 4096, "file": 3072}
    assert machine.pss_bytes(12) is None
    assert machine.available_bytes() is None
    assert machine.cpu_time() is None
    begin, end = machine.CpuTime(10, 100, 50), machine.CpuTime(20, 115, 60)
    assert machine.foreign_cores(begin, end) == 0.5
    assert machine.foreign_cores(begin, None) is None
    assert machine.foreign_cores(machine.CpuTime(10, 100, 50), machine.CpuTime(20, 101, 60)) == 0
    assert machine.physical_cores() >= 1
    (tmp_path / "cpuinfo").write_text("".join(f"physical id : 0\ncore id : {i // 2}\n\n" for i in range(4)))
    assert machine.physical_cores() <= 2
    assert machine.machine_facts()["versions"]["numpy"] == np.__version__


def test_the_processor_of_an_arm_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux names it by numbers there; a machine may have two kinds of cores."""
    cores = "".join(
        f"processor\t: {core}\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU part\t: {part}\n\n"
        for core, part in enumerate(["0xd05", "0xd05", "0xd0b"])
    )
    (tmp_path / "cpuinfo").write_text(cores)
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.machine_facts()["cpu"] == "implementer 0x41 part 0xd05, implementer 0x41 part 0xd0b"
    (tmp_path / "cpuinfo").write_text(f"model name\t: AMD EPYC\n{cores}")
    assert machine.machine_facts()["cpu"] == "AMD EPYC"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            "NoDeviceError('There is no GPU.', note='0 devices.', hint='Take one.')",
            ("There is no GPU.", "0 devices.", "Take one."),
        ),
        (
            "ValueError('a bug')",
            ("The process that measures the memory failed.", "ValueError: a bug", "Run the bundle"),
        ),
    ],
)
def test_the_process_that_measures_memory_says_why_it_failed(raised: str, told: tuple[str, str, str]) -> None:
    code = f"from lora_drop_runtime import NoDeviceError; raise {raised}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    error = _failed(done.stderr, done.returncode)
    assert (error.fact, error.note) == told[:2]
    assert error.hint is not None
    assert error.hint.startswith(told[2])
