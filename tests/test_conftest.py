"""The files that conftest.py gives out first exist: one that was moved would quietly come last."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import LONG


@pytest.mark.parametrize("name", LONG)
def test_long_files_are_there(name: str) -> None:
    assert (Path(__file__).parents[1] / name).is_file()
