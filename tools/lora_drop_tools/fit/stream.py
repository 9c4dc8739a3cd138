"""Text that is streamed, because it may be larger than memory and disk.

Enters: files, directories, a dataset of the Hub; what makes tokens of a text. Leaves: windows of token ids by number.

Documents are read in their order, an end token between them, and cut into windows; plain files are read beside each
other, since they may be of different kinds. The first windows are held out.
Of the others so many make a block, which is in memory and is shuffled. After the last document comes the first one
again. So what a window holds follows from its number and the seed; `state` is a way to a block without reading what
stands before it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lora_drop_runtime.errors import InputError, LoraDropError, counted, first_line

BLOCK_TOKENS = 1 << 20  # in memory and shuffled, at 8 bytes each
HELD_OUT_WINDOWS = 32  # of a stream, its first
_HASHED_BYTES = 1 << 20  # at the beginning and at the end of a file
_ROWS = 1000  # of a Parquet file, read at once
_ROW_BYTES = 1 << 13  # of plain text, read as one document
_OPEN_FILES = 64  # of plain text, at once
_FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
}  # suffix → what `datasets` calls it
_PACKAGES = {".jsonl.zst": "zstandard"}

Documents = Any  # an IterableDataset of rows with a `text`


def _format(file: Path) -> str | None:
    return next((suffix for suffix in sorted(_FORMATS, key=len, reverse=True) if file.name.endswith(suffix)), None)


def is_streamed(files: Sequence[Path]) -> bool:
    """Whether one of them is not a plain text, which is read whole."""
    return any(file.is_dir() or (_format(file) or ".txt") != ".txt" for file in files)


def _all_files(given: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by their suffix; of a directory all that have a known one, in the order of their names.

    Raises:
        InputError: one is missing or has another suffix, or a directory has none.
    """
    found: dict[str, list[Path]] = {}
    known = ", ".join(_FORMATS)
    for path in given:
        files = (
            sorted(file for file in path.rglob("*") if file.is_file() and _format(file)) if path.is_dir() else [path]
        )
        if not files:
            raise InputError("A directory has no text.", note=f"{path} has no file with {known}.", hint="Give another.")
        for file in files:
            suffix = _format(file)
            if suffix is None:
                raise InputError(
                    "The text's format is not known.",
                    note=f"{file} ends in none of {known}.",
                    hint="Rename it, or convert it.",
                )
            if not file.is_file():
                said = "is no file" if file.exists() else "does not exist"
                raise InputError("The text cannot be read.", note=f"{file} {said}.", hint="Give another --text.")
            found.setdefault(suffix, []).append(file)
    return found


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn whatever `datasets` and its readers throw into an error of ours."""
    try:
        yield
    except LoraDropError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        early = isinstance(cause, StopIteration | EOFError)
        said = "it is empty, or ends too early" if early else f"{type(cause).__name__}: {first_line(cause)}"
        raise InputError(
            "The text cannot be read.", note=f"{what}: {said}", hint="Give another --text or --dataset."
        ) from None


def require_package(package: str, why: str) -> None:
    """Refuse what needs a package of the extra `fit` that is missing."""
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{why} needs {package}.", note="It is not installed.", hint="pip install 'lora-drop-export[fit]'"
        )


def _parquet_rows(files: Sequence[str], column: str) -> Iterator[dict[str, Any]]:
    """Rows of local or remote files: of the column alone, or whole where there is none of that name.

    Not read by `datasets`: left before its end, its reader may hang or abort the process
    (github.com/apache/arrow/issues/45214).
    """
    import fsspec
    import pyarrow.parquet

    for name in files:
        with fsspec.open(name, "rb") as data:
            file = pyarrow.parquet.ParquetFile(data)
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                yield from batch.to_pylist()


@dataclass
class _PlainFile:
    """A plain text that is being read.

    Attributes:
        begun: where the others stood when it was opened.
    """

    data: BinaryIO
    size: int
    begun: float
    read: int = 0

    @property
    def place(self) -> float:
        return self.begun + self.read / max(1, self.size)


def _plain_rows(files: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Plain text, whole lines of some thousand bytes a row; none spans two files.

    The files are read beside each other, each as fast as its size says, so that all end together: whoever stops early
    has seen some of each. Of many so many are open, and others follow them.
    """
    waiting, reading = deque(files), list[_PlainFile]()
    with contextlib.ExitStack() as opened:
        while waiting or reading:
            while waiting and len(reading) < _OPEN_FILES:
                data = opened.enter_context(open(waiting.popleft(), "rb"))
                begun = min((one.place for one in reading), default=0.0)
                reading.append(_PlainFile(data, os.fstat(data.fileno()).st_size, begun))
            least = min(reading, key=lambda one: one.place)
            part = b"".join(least.data.readlines(_ROW_BYTES))
            if part:
                least.read += len(part)
                yield {"text": part.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")}
            else:
                least.data.close()
                reading.remove(least)


def _text_alone(dataset: Documents, column: str, what: str) -> Documents:
    """Rows of one column, under the name `text`.

    Raises:
        InputError: there is no row, or no such column.
    """
    with _readable(what):
        first = next(iter(dataset), None)
    if first is None:
        raise InputError("There is no text.", note=f"{what} holds nothing.", hint="Give another --text or --dataset.")
    if column not in first:
        raise InputError(
            "The text has no such column.",
            note=f"--text-column is {column}; {what} has {', '.join(sorted(first))}.",
            hint="Name one of them with --text-column.",
        )
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _rows(path: str, column: str, **where: Any) -> Documents:
    """The split `train` of what `datasets.load_dataset` finds."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    builder = datasets.load_dataset_builder(path, **where)
    files = (builder.config.data_files or {}).get("train")
    if isinstance(builder, Parquet) and files:
        return datasets.IterableDataset.from_generator(
            _parquet_rows, gen_kwargs={"files": list(files), "column": column}
        )
    return builder.as_streaming_dataset(split="train")


def open_documents(files: Sequence[Path], dataset: str | None, column: str) -> Documents:
    """The documents of files and of a dataset, taken in turns where they are of several kinds.

    Args:
        dataset: a name on the Hub or a local directory, maybe with a configuration: `NAME:CONFIG`; its split `train`.

    Raises:
        InputError: one cannot be found or read, or has no such column.
    """
    require_package("datasets", "A streamed text")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of an error, the error says
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it asks the network each time, also where the files are local
    parts = []
    for suffix, found in _all_files(files).items():
        if suffix in _PACKAGES:
            require_package(_PACKAGES[suffix], suffix)
        what = str(found[0]) if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
        names = [str(file.resolve()) for file in found]
        plain = suffix == ".txt"
        with _readable(what):
            if plain:
                part = datasets.IterableDataset.from_generator(_plain_rows, gen_kwargs={"files": tuple(names)})
            else:
                part = _rows(_FORMATS[suffix], column, data_files=list(map(glob.escape, names)))
        parts.append(_text_alone(part, "text" if plain else column, what))
    if dataset is not None:
        name, _, config = dataset.partition(":")
        if not name:
            raise InputError(
                "The dataset has no name.", note=f"--dataset is {dataset!r}.", hint="Use NAME or NAME:CONFIG."
            )
        with _readable(dataset):
            part = _rows(name, column, **({"name": config} if config else {}))
        parts.append(_text_alone(part, column, dataset))
    if len(parts) == 1:
        return parts[0]
    with _readable("the texts together"):  # it reads the first rows of each
        return datasets.interleave_datasets(parts, stopping_strategy="all_exhausted")


def _dataset_files(dataset: str | None) -> list[Path]:
    """All files of a dataset that is a local directory."""
    place = Path(dataset.partition(":")[0]) if dataset else None
    return sorted(file for file in place.rglob("*") if file.is_file()) if place is not None and place.is_dir() else []


def identity(files: Sequence[Path], dataset: str | None = None) -> str:
    """A hash of what the files are, those of a directory too: their names, sizes, beginnings and ends.

    Args:
        dataset: as in `open_documents`; of one on the Hub nothing is looked at.

    Raises:
        InputError: as `open_documents`.
    """
    plain = [file for file in files if not is_streamed([file])]
    streamed = _all_files([file for file in files if file not in plain])
    found = hashlib.sha256()
    for file in (*plain, *(file for group in streamed.values() for file in group), *_dataset_files(dataset)):
        try:
            with file.open("rb") as data:
                size = data.seek(0, io.SEEK_END)
                found.update(f"{file.name} {size} ".encode(errors="surrogateescape"))
                for place in (0, max(0, size - _HASHED_BYTES)):
                    data.seek(place)
                    found.update(data.read(_HASHED_BYTES))
        except OSError as error:
            raise InputError(
                "The text cannot be read.", note=f"{file}: {error.strerror}.", hint="Give another --text."
            ) from None
    return found.hexdigest()


class TokenStream:
    """Blocks of windows by number.

    Args:
        documents: opens rows with a `text`, from the first one on.
        encode: token ids int64 [N] of a text.
        end: the token between two documents; none where None.
        window: tokens of a window.
        batch: blocks hold a multiple of so many windows.
        seed: shuffles each block.

    Attributes:
        held_out: ids [HELD_OUT_WINDOWS · window], which no block holds.
        per_block: windows of a block.

    Raises:
        InputError: there is less text than what is held out and a window.
    """

    def __init__(
        self,
        documents: Callable[[], Documents],
        encode: Callable[[str], Any],
        end: int | None,
        window: int,
        batch: int,
        seed: int,
    ) -> None:
        import torch

        self._open, self._encode, self._window, self._seed = documents, encode, window, seed
        self._end = torch.tensor([] if end is None else [end], dtype=torch.int64)
        self.per_block = batch * max(1, BLOCK_TOKENS // (batch * window))
        self._held_tokens = HELD_OUT_WINDOWS * window
        self._block: Any = None
        self._state: dict[str, Any] = {}
        self._restart()
        self._skip = 0
        first = self._first_tokens(self._held_tokens, window)
        self.held_out, self._carry = first[: self._held_tokens], first[self._held_tokens :].clone()

    def _first_tokens(self, count: int, more: int) -> Any:
        """The first `count` tokens and at least `more`."""
        import torch

        parts, have = [], 0
        while have < count + more:
            parts.append(self._document())
            have += len(parts[-1])
            if self._passes > 1:
                raise InputError(
                    "The text is too short.",
                    note=f"It has {counted(have, 'token')}; the first {count} are held out, and a window is {more}.",
                    hint=f"Give more text, {count + more} tokens at least, or lower --window.",
                )
        return torch.cat(parts)

    def block(self, number: int) -> Any:
        """Ids [per_block, window], shuffled. Going on is cheap; for an earlier block all is read from the start.

        Raises:
            InputError: the text cannot be read any more.
        """
        if number < self._next - (self._block is not None):
            self._restart()
        while self._next <= number:
            place = {"next": self._next, "carry": self._carry, "held": self._skip}
            self._state = {**place, "documents": self._documents.state_dict()}
            windows = self._read(self.per_block * self._window).reshape(self.per_block, self._window)
            self._block = windows[np.random.default_rng([self._seed, self._next]).permutation(self.per_block)]
            self._next += 1
        return self._block

    def state(self) -> dict[str, Any]:
        """Where the last block begins, as `torch.save` takes it."""
        return self._state

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to a stream's `state`."""
        self._restart()
        if state:
            self._next, self._carry, self._skip = state["next"], state["carry"], state["held"]
            self._documents.load_state_dict(state["documents"])
            self._rows = iter(self._documents)

    def _restart(self) -> None:
        """Back to block 0."""
        import torch

        self._next, self._passes, self._block = 0, 0, None
        self._state = {}
        self._carry = torch.empty(0, dtype=torch.int64)
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._documents = self._open()
        self._rows = iter(self._documents)
        self._skip = self._held_tokens
        self._passes += 1

    def _document(self) -> Any:
        """Token ids of the next document, less what of them is held out."""
        import torch

        with _readable("a document on the way"):
            row = next(self._rows, None)
        if row is None:
            self._begin_pass()
            return torch.empty(0, dtype=torch.int64)
        text = row["text"]
        if text is not None and not isinstance(text, str):
            raise InputError(
                "The text's column holds no text.",
                note=f"A row has {text!r:.60}.",
                hint="Name another one with --text-column.",
            )
        ids = torch.cat([self._encode(text or ""), self._end])
        skipped = min(self._skip, len(ids))
        self._skip -= skipped
        return ids[skipped:]

    def _read(self, count: int) -> Any:
        """The next `count` tokens."""
        import torch

        parts, have = [self._carry], len(self._carry)
        while have < count:
            parts.append(self._document())
            have += len(parts[-1])
        joined = torch.cat(parts)
        self._carry = joined[count:].clone()
        return joined[:count]
