"""`lora-drop eval`: what is kept of an evaluation that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools.eval.store import Store


def test_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "a/b", {"bundle": "x"})
    store["skip", 3, "task", 5] = [1.5, True]
    store["skip", 3, "task", 6] = "text\nof two lines"
    (path,) = (tmp_path / "a/b").iterdir()
    assert json.loads(path.read_text().splitlines()[0])["bundle"] == "x"
    again = Store(tmp_path / "a/b", {"bundle": "x"})
    assert again["skip", 3, "task", 5] == [1.5, True]
    assert again["skip", 3, "task", 6] == "text\nof two lines"
    other = Store(tmp_path / "a/b", {"bundle": "y"})
    assert ("skip", 3, "task", 5) not in other
    # A run that was killed while it wrote
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    cut = Store(tmp_path / "a/b", {"bundle": "x"})
    assert ("skip", 3, "task", 5) in cut
    assert ("skip", 3, "task", 6) not in cut
    cut["skip", 3, "task", 6] = "text\nof two lines"
    assert path.read_bytes() == whole
    path.write_bytes(whole[:20])  # in its first line
    assert ("skip", 3, "task", 5) not in Store(tmp_path / "a/b", {"bundle": "x"})
    path.write_bytes(whole.replace(b'"task", 5]', b'"task", 5'))
    with pytest.raises(InputError, match="damaged"):
        Store(tmp_path / "a/b", {"bundle": "x"})
    # JSON, but not what was measured; and too deep to be read
    for there, other_text in ((b"1.5, true", b"1.6, true"), (b"[1.5, true]", b"null"), (b'{"key"', b"[" * 100_000)):
        path.write_bytes(whole.replace(there, other_text))
        with pytest.raises(InputError, match=r"Line 2 of .* does not hold one as it was written"):
            Store(tmp_path / "a/b", {"bundle": "x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be kept"):
        Store(tmp_path / "file", {})
    with pytest.raises(InputError, match="a part of it is no directory"):
        Store(tmp_path / "file" / "x", {})
    memory = Store(None, {})
    memory["a", 1] = 2
    assert memory["a", 1] == 2
