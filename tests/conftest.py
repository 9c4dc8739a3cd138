"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Tiny matrices: more threads only wait for each other."""
    torch.set_num_threads(1)
