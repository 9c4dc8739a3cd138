"""Text that is streamed, because it may be larger than memory and disk.

Enters: files, directories, a dataset of the Hub; what makes tokens of a text. Leaves: windows of token ids by number.

Documents are taken in their order, an end token between them, and cut into windows. The first windows are held out.
Of the others so many make a block, which is in memory and is shuffled. After the last document comes the first one
again. So what a window holds follows from its number and the seed; `state` is a way to a block without reading what
stands before it.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.errors import InputError, counted

from .files import (
    ROWS_AT_ONCE,
    FileDocuments,
    all_files,
    check_text,
    is_streamed,
    no_such_column,
    readable,
    require_package,
)

BLOCK_TOKENS = 1 << 20  # in memory and shuffled, at 8 bytes each
HELD_OUT_WINDOWS = 32  # of a stream, its first
_HASHED_BYTES = 1 << 20  # at the beginning and at the end of a file

Documents = Any  # iterable rows with a `text`, and what `datasets.IterableDataset` has for its state


def _parquet_rows(files: Sequence[str], column: str) -> Iterator[dict[str, Any]]:
    """Rows of local or remote files, of the column alone.

    Not read by `datasets`: left before its end, its reader may hang or abort the process
    (github.com/apache/arrow/issues/45214).

    Raises:
        InputError: a file cannot be read or has no such column.
    """
    import fsspec
    import pyarrow.parquet

    for name in files:
        with readable(name), fsspec.open(name, "rb") as data:
            file = pyarrow.parquet.ParquetFile(data)
            if column not in file.schema_arrow.names:
                raise no_such_column(column, name, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                yield from batch.to_pylist()


def _open_dataset(dataset: str, column: str) -> Documents:
    """Rows of a dataset's split `train`, under the name `text`.

    Raises:
        InputError: it cannot be found or read, or has no row or no such column.
    """
    require_package("datasets", "--dataset")
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of an error, the error says
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it asks the network each time, also where the files are local
    path, _, config = dataset.partition(":")
    if not path:
        raise InputError("The dataset has no name.", note=f"--dataset is {dataset!r}.", hint="Use NAME or NAME:CONFIG.")
    with readable(dataset):
        builder = datasets.load_dataset_builder(path, **({"name": config} if config else {}))
        files = (builder.config.data_files or {}).get("train")
        if isinstance(builder, Parquet) and files:
            given = {"files": list(files), "column": column}
            rows: Documents = datasets.IterableDataset.from_generator(_parquet_rows, gen_kwargs=given)
        else:
            rows = builder.as_streaming_dataset(split="train")
        first = next(iter(rows), None)
    if first is None:
        raise InputError("There is no text.", note=f"{dataset}: empty.", hint="Give another --dataset.")
    if column not in first:
        raise no_such_column(column, dataset, list(first))
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


class _Turns:
    """Documents of two kinds in turns. The one that ends first begins again, until the other one has ended, too."""

    def __init__(self, kinds: Sequence[Callable[[], Documents]]) -> None:
        self._kinds = kinds
        self._documents = [kind() for kind in kinds]
        self._ended, self._next = [False] * len(kinds), 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = [iter(documents) for documents in self._documents]
        while True:
            turn = self._next
            if (row := next(rows[turn], None)) is not None:
                self._next = (turn + 1) % len(rows)
                yield row
                continue
            self._ended[turn] = True
            if all(self._ended):
                return
            self._documents[turn] = self._kinds[turn]()
            rows[turn] = iter(self._documents[turn])

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is, and where each stands."""
        states = [documents.state_dict() for documents in self._documents]
        return {"next": self._next, "ended": list(self._ended), "documents": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state of the same kinds."""
        self._next, self._ended = state["next"], list(state["ended"])
        for documents, one in zip(self._documents, state["documents"], strict=True):
            documents.load_state_dict(one)


def open_documents(files: Sequence[Path], dataset: str | None, column: str) -> Documents:
    """The documents of files and of a dataset, in turns where there are both.

    Args:
        dataset: a name on the Hub or a local directory, maybe with a configuration: `NAME:CONFIG`; its split `train`.

    Raises:
        InputError: one cannot be found or read, or has no such column.
    """
    kinds: list[Callable[[], Documents]] = []
    if files:
        kinds.append(functools.partial(FileDocuments, files, column))
    if dataset is not None:
        kinds.append(functools.partial(_open_dataset, dataset, column))
    return _Turns(kinds) if kinds[1:] else kinds[0]()


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
    streamed = all_files([file for file in files if file not in plain])
    found = hashlib.sha256()
    for file in (*plain, *streamed, *_dataset_files(dataset)):
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

        with readable("a document on the way"):
            row = next(self._rows, None)
        if row is None:
            self._begin_pass()
            return torch.empty(0, dtype=torch.int64)
        text = row["text"]
        check_text(text, "a document on the way")
        ids = torch.cat([self._encode(text or ""), self._end])
        skipped = min(self._skip, len(ids))
        self._skip -= skipped
        return ids[skipped:]

    def _read(self, count: int) -> Any:
        """The next `count` tokens. Raises InputError where none are left: the files became shorter meanwhile."""
        import torch

        parts, have, last = [self._carry], len(self._carry), self._passes
        while have < count:
            parts.append(self._document())
            have += len(parts[-1])
            if len(parts[-1]):
                last = self._passes
            elif self._passes > last + 1:  # else it would be read again and again
                raise InputError(
                    "The text has become too short.",
                    note=f"Now it has no more than the first {self._held_tokens} tokens, which are held out.",
                    hint="Put back the files that the fit began with, and go on by --resume.",
                )
        joined = torch.cat(parts)
        self._carry = joined[count:].clone()
        return joined[:count]
