"""Results that are kept item by item, so that an evaluation can be cut off and go on.

Enters: an identity (bundle, engine, seed, version), keys and values. Leaves: one JSONL file for each identity in a
directory; its first line says what the results are of, every other holds one and its hash. Knows nothing of what is
measured.

Results of another bundle, version or seed lie in another file and are never read. The last line of a run that was
killed may be half written: it is cut off and its item done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_drop_runtime.command_line import refusal_hint
from lora_drop_runtime.errors import InputError

from lora_drop_tools.shared.results import refuse_in_bundle

FORMAT_VERSION = 2  # of a line, and of what the values mean
Key = tuple[str | int, ...]


def digest(value: Any) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _cannot_be_kept(error: OSError, path: Path) -> InputError:
    return InputError(
        "The results cannot be kept.",
        note=f"{error.filename or path}: {error.strerror}.",
        hint=f"{refusal_hint(error)} What was kept is kept.",
    )


class Store:
    """Values by key; a directory of None keeps them in memory alone.

    Raises:
        InputError: the directory cannot be written, or a line in the middle of the file is damaged.
    """

    def __init__(self, directory: Path | None, identity: Mapping[str, Any]) -> None:
        self._values: dict[Key, Any] = {}
        self._path: Path | None = None
        if directory is None:
            return
        refuse_in_bundle(directory, "--out")
        identity = {"format_version": FORMAT_VERSION, **identity}
        self._path = directory / f"{digest(identity)}.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._read()
            if not self._path.stat().st_size:
                self._append(identity)
        except OSError as error:
            raise _cannot_be_kept(error, self._path) from None

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __getitem__(self, key: Key) -> Any:
        return self._values[key]

    def __setitem__(self, key: Key, value: Any) -> None:
        self._values[key] = value
        if self._path is not None:
            entry = {"key": key, "value": value}
            self._append({**entry, "digest": digest(entry)})

    def _read(self) -> None:
        assert self._path is not None
        with self._path.open("a+b") as file:
            file.seek(0)
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):  # else a line that another run appends just now would be lost
                file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines()[1:], 2):
            try:
                entry = json.loads(line)
                if entry.pop("digest") != digest(entry):
                    raise ValueError
                self._values[tuple(entry["key"])] = entry["value"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise InputError(
                    "The results of an earlier run are damaged.",
                    note=f"Line {number} of {self._path} does not hold one as it was written.",
                    hint="Remove the line or the file; what is missing is measured again.",
                ) from None

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Raises InputError where it cannot be written; what was kept before stays."""
        assert self._path is not None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise _cannot_be_kept(error, self._path) from None
