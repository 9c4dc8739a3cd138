"""Files of text that are read beside each other, since they may be of different kinds.

Enters: files and directories. Leaves: their documents, one by one, and a state with which another reader goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lora_drop_runtime.errors import InputError, LoraDropError, first_line
from lora_drop_runtime.files import reading_hint

_ROWS_AT_ONCE = 1000  # of a Parquet file
_ROW_BYTES = 1 << 13  # of plain text, read as one document
_PACKED_BYTES = 1 << 12
_OPEN_FILES = 64  # at once

Rows = Iterator[tuple[Any, int, float]]  # a document, where the file stands behind it, and what share of it that is


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn whatever readers throw into an error of ours; too little memory is no fault of the text."""
    try:
        yield
    except (LoraDropError, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        early = isinstance(cause, StopIteration | EOFError)
        said = "it is empty, or ends too early" if early else f"{type(cause).__name__}: {first_line(cause)}"
        hint = "Give another --text or --dataset."
        hint = reading_hint(cause, hint) if isinstance(cause, OSError) else hint
        raise InputError("The text cannot be read.", note=f"{what}: {said}", hint=hint) from None


def require_package(package: str, why: str) -> None:
    """Refuse what needs a package of the extra `fit` that is missing."""
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{why} needs {package}.", note="It is not installed.", hint="pip install 'lora-drop-export[fit]'"
        )


def no_such_column(column: str, what: str, has: Sequence[str]) -> InputError:
    return InputError(
        "The text has no such column.",
        note=f"--text-column is {column}; {what} has {', '.join(sorted(has)) or 'none'}.",
        hint="Name one of them with --text-column.",
    )


def check_text(found: Any, what: str) -> None:
    """Refuse what a column holds, where it is no text and not nothing."""
    if found is not None and not isinstance(found, str):
        raise InputError(
            "The text's column holds no text.",
            note=f"{what}: a row has {found!r:.60}.",
            hint="Name another one with --text-column.",
        )


def _some_lines(data: BinaryIO) -> bytes:
    """Whole lines of some thousand bytes. A longer one is cut behind a space, or at least between two characters."""
    part = data.read(_ROW_BYTES) + data.readline(_ROW_BYTES)
    if len(part) < 2 * _ROW_BYTES or part.endswith(b"\n"):
        return part
    end = part.rfind(b" ") + 1 or next((n for n in range(len(part) - 1, 0, -1) if part[n] & 0xC0 != 0x80), len(part))
    data.seek(end - len(part), os.SEEK_CUR)
    return part[:end]


def _plain(file: Path, column: str, place: int) -> Rows:
    """Lines of some thousand bytes a row; a place is in bytes."""
    with file.open("rb") as data:
        size = os.fstat(data.fileno()).st_size
        data.seek(place)
        while part := _some_lines(data):
            text = part.decode("utf-8" if place else "utf-8-sig")  # a file may begin with a mark, which is no text
            place += len(part)
            yield text.replace("\r\n", "\n").replace("\r", "\n"), place, place / size


def _as_it_lies(data: BinaryIO, place: int) -> BinaryIO:
    data.seek(place)
    return data


def _members(packed: BinaryIO, unpacker: Callable[[], Any]) -> Iterator[bytes]:
    """What members hold that stand one behind the other. Little is read at once, so that a file's place tells much.

    Args:
        unpacker: of one member, as `zlib` and `zstandard` make it.

    Raises:
        EOFError: a member has no end. Where files are read by `stream_reader`, `zstandard` does not say so.
    """
    member: Any = None  # that has begun
    while data := packed.read(_PACKED_BYTES):
        while data := data if member else data.lstrip(b"\0"):  # gzip files may be padded
            member = member or unpacker()
            yield member.decompress(data)
            data, member = (member.unused_data, None) if member.eof else (b"", member)
    if member:
        raise EOFError


class _Stream(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._piece = pieces, io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (count := self._piece.readinto(buffer)):
            if (piece := next(self._pieces, None)) is None:
                return 0
            self._piece = io.BytesIO(piece)
        return count


def _packed(unpacker: Callable[[], Any]) -> Callable[[BinaryIO, int], Any]:
    """The place is found line by line, as it was come to, and not by a seek: so `data` stands where it stood then."""

    def unpacked(data: BinaryIO, place: int) -> Any:
        lines = io.BufferedReader(_Stream(_members(data, unpacker)))
        while place > 0 and (line := lines.readline()):
            place -= len(line)
        return lines

    return unpacked


def _gzip() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _writable(text: Any) -> Any:
    """The text with a question mark for each half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else text


def _object(line: bytes) -> dict[str, Any]:
    """Raises ValueError, which shows the line: where it errs, as JSON says it, is always in «line 1»."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise ValueError(f"a line is no JSON: {line[:40]!r}: {said}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a line is no object: {line[:40]!r}")
    return row


def _json_lines(unpacked: Callable[[BinaryIO, int], Any]) -> Callable[[Path, str, int], Rows]:
    """A reader of lines with an object each; a place is in unpacked bytes. A row without the column has no text."""

    def rows(file: Path, column: str, place: int) -> Rows:
        known = place > 0
        with file.open("rb") as packed:
            size = os.fstat(packed.fileno()).st_size
            for line in unpacked(packed, place):
                place += len(line)
                if not line.strip():
                    continue
                row = _object(line)
                if not known and column not in row:
                    raise no_such_column(column, str(file), list(row))
                known = True
                yield _writable(row.get(column)), place, packed.tell() / size

    return rows


def parquet_rows(data: Any, column: str, what: str, place: int = 0) -> Rows:
    """Rows of a file that is open; a place is a row's number.

    Not read by `datasets`: left before its end, its reader may hang or abort the process
    (github.com/apache/arrow/issues/45214).

    Raises:
        InputError: there is no such column in `what`, as a message calls the file.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(data) as table:
        if column not in table.schema_arrow.names:
            raise no_such_column(column, what, table.schema_arrow.names)
        end = 0
        for group in range(table.num_row_groups):
            begin, end = end, end + table.metadata.row_group(group).num_rows
            if end <= place:
                continue
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
                for row, text in enumerate(batch.column(0).to_pylist(), begin):
                    if row >= place:
                        yield text, row + 1, (row + 1) / table.metadata.num_rows
                begin += batch.num_rows


def _parquet(file: Path, column: str, place: int) -> Rows:
    """Of a file that is not mapped whole groups of rows are in memory, which may be most of it."""
    import pyarrow as pa

    with pa.memory_map(os.fsencode(file)) as data:
        yield from parquet_rows(data, column, str(file), place)


@dataclass(frozen=True)
class _Format:
    """How files of a suffix are read.

    Attributes:
        rows: documents of a file behind a place.
        package: what it needs of the extra `fit`.
    """

    rows: Callable[[Path, str, int], Rows]
    package: str | None = None


_FORMATS = {
    ".txt": _Format(_plain),
    ".jsonl": _Format(_json_lines(_as_it_lies)),
    ".jsonl.gz": _Format(_json_lines(_packed(_gzip))),
    ".jsonl.zst": _Format(_json_lines(_packed(_zstandard)), "zstandard"),
    ".parquet": _Format(_parquet, "pyarrow"),
}


def _suffix(file: Path) -> str | None:
    return next((suffix for suffix in sorted(_FORMATS, key=len, reverse=True) if file.name.endswith(suffix)), None)


def _format(file: Path) -> _Format:
    return _FORMATS[_suffix(file) or ".txt"]


def is_streamed(files: Sequence[Path]) -> bool:
    """Whether one of them is not a plain text, which is read whole."""
    return any(file.is_dir() or _format(file).rows is not _plain for file in files)


def _of_directory(path: Path) -> list[Path]:
    """All files that have a known suffix, in the order of their names. Links to directories are not followed.

    Raises:
        InputError: a directory cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            "The text cannot be read.",
            note=f"{error.filename}: {error.strerror}.",
            hint="Allow it to be read, or give the other directories.",
        )

    found = (Path(place, name) for place, _, names in os.walk(path, onerror=refuse) for name in names)
    return sorted(file for file in found if _suffix(file) and file.is_file())


def all_files(given: Sequence[Path]) -> list[Path]:
    """The files; of a directory all that have a known suffix.

    Raises:
        InputError: one is missing or has another suffix, or a directory has none or cannot be read.
    """
    found = list[Path]()
    known = ", ".join(_FORMATS)
    for path in given:
        files = _of_directory(path) if path.is_dir() else [path]
        if not files:
            raise InputError("A directory has no text.", note=f"{path} has no file with {known}.", hint="Give another.")
        for file in files:
            if _suffix(file) is None:
                raise InputError(
                    "The text's format is not known.",
                    note=f"{file} ends in none of {known}.",
                    hint="Rename it, or convert it.",
                )
            if not file.is_file():
                said = "is no file" if file.exists() else "does not exist"
                raise InputError("The text cannot be read.", note=f"{file} {said}.", hint="Give another --text.")
        found += files
    return found


def has_columns(files: Sequence[Path]) -> bool:
    """Whether one of them, those of a directory too, has rows with columns. Raises as `all_files`."""
    found = [one for file in files for one in (all_files([file]) if file.is_dir() else [file])]
    return any(_format(file).rows is not _plain for file in found)


@dataclass
class _Place:
    """Where the reading of a file stands.

    Attributes:
        file: its number.
        begun: where the others stood when it was opened.
        place: what its reader goes on from.
        share: of the file that was read.
    """

    file: int
    begun: float
    place: int = 0
    share: float = 0.0

    @property
    def reached(self) -> float:
        return self.begun + self.share


class FileDocuments:
    """Rows with a `text`: documents of files, which are read beside each other, each as fast as its length says.

    So all end together, and whoever stops early has seen some of each. Some are open at once, and others follow them.
    Of more files these are a sample: their order is random, but the same each time.

    Args:
        column: of rows, which holds the text.

    Raises:
        InputError: there is no row, no such column, or a file that cannot be read; on the way a row holds no text.
    """

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self._files, self._column = all_files(files), column
        self._order = np.random.default_rng(0).permutation(len(self._files)).tolist()
        self._opened = 0
        self._reading = list[tuple[_Place, Rows]]()
        for package in {one for file in self._files if (one := _format(file).package)}:
            require_package(package, "A text of this format")
        self._check_beginnings()

    def _rows(self, place: _Place) -> Rows:
        file = self._files[place.file]
        with readable(str(file)):
            for row in _format(file).rows(file, self._column, place.place):
                check_text(row[0], str(file))
                yield row

    def _check_beginnings(self) -> None:
        """See that each file can be read, as far as its first row says, and that one has a row."""
        has_rows = False
        for n in range(len(self._files)):
            has_rows |= next(self._rows(_Place(n, 0.0)), None) is not None
        if not has_rows:
            what = str(self._files[0]) + (f" and {len(self._files) - 1} more" if self._files[1:] else "")
            raise InputError("There is no text.", note=f"{what}: empty.", hint="Give another --text.")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            while self._opened < len(self._files) and len(self._reading) < _OPEN_FILES:
                new = _Place(self._order[self._opened], min((one.reached for one, _ in self._reading), default=0.0))
                self._reading.append((new, self._rows(new)))
                self._opened += 1
            if not self._reading:
                return
            least = min(self._reading, key=lambda one: one[0].reached)
            place, rows = least
            if (row := next(rows, None)) is None:
                self._reading.remove(least)
                continue
            text, place.place, place.share = row
            yield {"text": text}

    def state_dict(self) -> dict[str, Any]:
        """Where each file stands."""
        return {"opened": self._opened, "reading": [asdict(place) for place, _ in self._reading]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state of the same files."""
        self._opened = state["opened"]
        places = [_Place(**place) for place in state["reading"]]
        self._reading = [(place, self._rows(place)) for place in places]
