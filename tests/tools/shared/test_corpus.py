"""Texts that are read whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.files import ROWS
from lora_drop_tools.fit.files import _FORMATS
from lora_drop_tools.shared.corpus import read_texts


def test_rows_are_not_read_as_they_are(tmp_path: Path) -> None:
    """What `fit` reads row by row; layers were ranked on the names and marks of JSON."""
    assert set(ROWS) == _FORMATS.keys() - {".txt"}
    for suffix in ROWS:
        file = tmp_path / f"a{suffix}"
        file.write_text('{"text": "the tide"}\n', encoding="utf-8")
        with pytest.raises(InputError, match=r"A file of rows is no plain text\.\nNote: .*\nHint: Write the rows"):
            read_texts([file])
