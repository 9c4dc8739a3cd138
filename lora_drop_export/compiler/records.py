"""Size and hash of a bundle's files. Those of the weights are hashed while the graphs are made."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from lora_drop_runtime.bundle.bundle import record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, FileRecord


class HashedMeanwhile:
    """Hashes the files of a directory, all that are there now, in a thread that holds nobody up.

    Nobody has to wait for it when the command fails: it is a daemon, and only reads.
    """

    def __init__(self, directory: Path) -> None:
        self._files = sorted(path for path in directory.iterdir() if path.is_file())
        self._records: dict[Path, FileRecord] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for file in self._files:
                self._records[file] = record_file(file)
        except OSError as error:  # of the disk; or the command has failed, and the file is gone
            self._error = error

    def records(self) -> dict[Path, FileRecord]:
        """Waits for the rest. Raises OSError where a file cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._records


def file_records(root: Path, known: Mapping[Path, FileRecord]) -> dict[str, FileRecord]:
    """Of every file but the manifest, by its name; `known` are not hashed again."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = {file.relative_to(root).as_posix(): file for file in files}
    return {name: known.get(file) or record_file(file) for name, file in names.items() if name != MANIFEST_NAME}
