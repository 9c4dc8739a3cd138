"""What conftest.py does for a parallel run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONG


@pytest.mark.parametrize("name", LONG)
def test_long_files_are_there(name: str) -> None:
    """One that was moved would quietly come last."""
    assert (Path(__file__).parents[1] / name).is_file()


DIES = """
import os, pytest

@pytest.mark.parametrize("number", range(10))
def test_one(number):
    if number == 5:
        os.kill(os.getpid(), 9)
"""


def test_a_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    """Without the hook the run would wait until this one's limit."""
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_dies.py").write_text(DIES)
    (tmp_path / "test_lives.py").write_text("def test_one():\n    pass\n")
    options = ["-p", "xdist", "-p", "tests.conftest", "-n", "1", "--dist", "loadfile"]
    # A base of its own: in the shared one it would clear away what older runs left there
    command = [sys.executable, "-m", "pytest", *options, f"--basetemp={tmp_path}/base", str(tmp_path)]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # to import them takes each process a second
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == pytest.ExitCode.INTERNAL_ERROR
    assert "a process died in test_dies.py::test_one[5]" in run.stdout
