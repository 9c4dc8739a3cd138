"""What messages are made of."""

from __future__ import annotations

import pytest
from lora_drop_runtime.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such file"), "no such file"),
        (ValueError("  It has 3 rows.\nand more"), "It has 3 rows"),
        (ValueError(""), "ValueError"),
        (ValueError("..."), "ValueError"),
    ],
)
def test_first_line(error: Exception, said: str) -> None:
    """A message puts its own full stop behind it."""
    assert first_line(error) == said
