"""What the system does not let be read is said to be so, and not to be absent or damaged."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.files import read_bounded

from lora_drop_export.checkpoint.open import open_checkpoint


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that may not be entered, whoever runs the tests."""
    plain, directory = os.stat, tmp_path / "locked"

    def stat(path: Any, **options: Any) -> os.stat_result:
        if isinstance(path, str | os.PathLike) and directory in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return plain(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    return directory


def test_a_bundle_or_a_model_in_a_locked_directory(locked: Path, tmp_path: Path) -> None:
    """The model's name is not asked of the hub."""
    for open_it in (Bundle.open, lambda path: open_checkpoint(str(path), tmp_path)):
        with pytest.raises(BundleError, match="cannot be looked at") as refused:
            open_it(locked / "it")
        assert f"{locked / 'it'}" in refused.value.note
        assert refused.value.note.endswith(": Permission denied.")
        assert "permissions" in refused.value.hint


def test_weights_that_may_not_be_read_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one user's checkpoint is for another: transformers writes it for its owner alone."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BundleError, match=r"A file cannot be read\.") as refused:
        read_tensors(file)
    assert refused.value.note == f"{file}: Permission denied."
    assert "permissions" in refused.value.hint


def test_a_process_with_too_many_files_is_not_sent_to_the_permissions(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "lora_drop.json").write_bytes(b"{}")

    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", full)
    for read in (read_tensors, lambda file: read_bounded(file, 64), lambda file: Bundle.open(file.parent)):
        with pytest.raises(BundleError, match="cannot be read") as refused:
            read(tmp_path / "lora_drop.json")
        assert refused.value.note == f"{tmp_path / 'lora_drop.json'}: Too many open files."
        assert refused.value.hint == "Raise the limit on open files (ulimit -n)."


def test_a_file_is_read_in_memory_of_its_own_size(tmp_path: Path) -> None:
    """Not of the largest that it may have: for a tokenizer that is a gigabyte, which a limit may not allow."""
    file = tmp_path / "tokenizer.json"
    file.write_bytes(bytes(1 << 20))
    tracemalloc.start()
    try:
        assert read_bounded(file, 1 << 30) == bytes(1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(BundleError, match=r"A file cannot be read\.") as refused:
        read_bounded(file, (1 << 20) - 1)
    assert "has more than 1048575 bytes" in refused.value.note
