"""Shared by all tests."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Tiny matrices: more threads only wait for each other."""
    torch.set_num_threads(1)


TRACES = "LORA_DROP_TEST_TRACES"


def pytest_configure(config: pytest.Config) -> None:
    """The workers of a parallel run share traces (tests/support/bundles.py) in a directory that the controller owns."""
    if not hasattr(config, "workerinput"):
        directory = tempfile.mkdtemp(prefix="lora-drop-traces-")
        os.environ[TRACES] = directory
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
