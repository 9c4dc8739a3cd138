"""Shared by all tests."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Tiny matrices: more threads only wait for each other."""
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The controller of a parallel run removes what its workers shared (tests/bundles.py)."""
    run = session.config.getoption("testrunuid", None)
    if run and not hasattr(session.config, "workerinput"):
        shutil.rmtree(Path(tempfile.gettempdir()) / f"lora-drop-traces-{run}", ignore_errors=True)
