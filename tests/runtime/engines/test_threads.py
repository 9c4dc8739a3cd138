"""Threads of a step where the user does not say how many: as many cores as the process may use."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime
import pytest
from lora_drop_runtime.engines import threads
from lora_drop_runtime.engines.ort.session_options import session_options


class Machine:
    """Files of /sys as the system would have them, and the processors that this process may use."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpus, self.groups, self._patch = root / "cpu", root / "cgroup", monkeypatch
        self.groups.mkdir()
        monkeypatch.setattr(threads, "_CPUS", self.cpus)
        monkeypatch.setattr(threads, "_GROUPS", self.groups)

    def processors(self, siblings: list[str], allowed: set[int]) -> None:
        for number, text in enumerate(siblings):
            folder = self.cpus / f"cpu{number}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{text}\n")
        self._patch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)

    def quota(self, text: str) -> None:
        (self.groups / "cpu.max").write_text(text)

    def old_quota(self, quota: str, period: str) -> None:
        (self.groups / "cpu").mkdir()
        (self.groups / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        (self.groups / "cpu" / "cpu.cfs_period_us").write_text(period)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


FOUR_CORES = ["0,4", "1,5", "2,6", "3,7"] * 2  # two threads each


@pytest.mark.parametrize(
    ("allowed", "count"),
    [(set(range(8)), 4), ({0, 1, 2, 3}, 4), ({0, 4}, 1), ({0, 4, 5}, 2), ({6}, 1)],
    ids=str,
)
def test_a_thread_for_each_core_that_may_be_used(machine: Machine, allowed: set[int], count: int) -> None:
    machine.processors(FOUR_CORES, allowed)
    assert threads.default_threads() == count


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("max 100000\n", 4),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("900000 100000\n", 4),
        ("nonsense", 4),
        ("", 4),
    ],
)
def test_no_more_than_a_container_grants(machine: Machine, quota: str, count: int) -> None:
    machine.processors(FOUR_CORES, set(range(8)))
    machine.quota(quota)
    assert threads.default_threads() == count


@pytest.mark.parametrize(
    ("quota", "period", "count"),
    [("-1\n", "100000\n", 4), ("250000\n", "100000\n", 3), ("100\n", "0\n", 4), ("x\n", "100000\n", 4)],
)
def test_control_groups_of_the_first_version(machine: Machine, quota: str, period: str, count: int) -> None:
    machine.processors(FOUR_CORES, set(range(8)))
    machine.old_quota(quota, period)
    assert threads.default_threads() == count


def test_a_machine_that_says_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each processor is a core then; and where there is no affinity, all are allowed."""
    machine.processors([], {0, 3, 5})
    assert threads.default_threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.default_threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.default_threads() == 1


def test_onnx_runtime_takes_no_other_cores(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone it makes a thread for each core of the machine, and binds it to that core."""
    machine.processors(FOUR_CORES, set(range(8)))
    machine.quota("200000 100000\n")
    assert session_options(onnxruntime, ".", None).intra_op_num_threads == 2
    assert session_options(onnxruntime, ".", 3).intra_op_num_threads == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # Windows, where it counts cores and not their threads
    assert session_options(onnxruntime, ".", None).intra_op_num_threads == 0
