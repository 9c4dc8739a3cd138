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
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.errors import InputError, counted

from .files import (
    FileDocuments,
    all_files,
    check_text,
    is_streamed,
    no_such_column,
    parquet_rows,
    readable,
    require_package,
)

BLOCK_TOKENS = 1 << 20  # in memory and shuffled, at 8 bytes each
HELD_OUT_WINDOWS = 32  # of a stream, its first
_HASHED_BYTES = 1 << 20  # at the beginning and at the end of a file

Documents = Any  # iterable rows with a `text`, and what `datasets.IterableDataset` has for its state


def _parquet_rows(files: Sequence[str], column: str) -> Iterator[dict[str, Any]]:
    """Rows of local or remote files, of the column alone.

    Raises:
        InputError: a file cannot be read or has no such column.
    """
    import fsspec

    for name in files:
        with readable(name), fsspec.open(name, "rb") as data:
            for text, _, _ in parquet_rows(data, column, name):
                yield {column: text}


def _parts(dataset: str) -> tuple[str, str]:
    """Name or directory, and configuration, of `NAME:CONFIG`. On Windows a directory may begin with `C:`."""
    drive, rest = os.path.splitdrive(dataset)
    name, _, config = rest.partition(":")
    return drive + name, config


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
    path, config = _parts(dataset)
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
    place = Path(_parts(dataset)[0]) if dataset else None
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


class _Tokens:
    """The text's token ids, pass after pass, without the first ones of each pass.

    Args:
        documents, encode, end: as for `TokenStream`.
        left_out: tokens at the beginning of each pass.
        from_the_first: the first pass has them.
    """

    def __init__(
        self,
        documents: Callable[[], Documents],
        encode: Callable[[str], Any],
        end: int | None,
        left_out: int,
        from_the_first: bool = False,
    ) -> None:
        import torch

        self._open, self._encode, self._left_out = documents, encode, left_out
        self._end = torch.tensor([] if end is None else [end], dtype=torch.int64)
        self._read = torch.empty(0, dtype=torch.int64)  # and not taken
        self._begin_pass(0 if from_the_first else left_out)

    def _begin_pass(self, skip: int) -> None:
        self._documents = self._open()
        self._rows = iter(self._documents)
        self._skip = skip

    def _next_document(self) -> Any:
        """Its ids, less those that are left out. None at the end of a pass; then the next one begins."""
        import torch

        with readable("a document on the way"):
            row = next(self._rows, None)
        if row is None:
            self._begin_pass(self._left_out)
            return None
        check_text(row["text"], "a document on the way")
        ids = torch.cat([self._encode(row["text"] or ""), self._end])
        skipped = min(self._skip, len(ids))
        self._skip -= skipped
        return ids[skipped:]

    def take(self, count: int, of_this_pass: bool = False) -> Any:
        """The next `count` ids; fewer where this pass, or a whole one, has none left."""
        import torch

        parts, have, ends = [self._read], len(self._read), 0
        while have < count and ends < (1 if of_this_pass else 2):
            ids = self._next_document()
            if ids is None:
                ends += 1
            elif len(ids):
                ends = 0
                parts.append(ids)
                have += len(ids)
        joined = torch.cat(parts)
        self._read = joined[count:].clone()
        return joined[:count]

    def give_back(self, ids: Any) -> None:
        """Let `take` begin with what was taken."""
        import torch

        self._read = torch.cat([ids, self._read])

    def state(self) -> dict[str, Any]:
        """What leads to the same tokens, as `torch.save` takes it."""
        return {"carry": self._read, "held": self._skip, "documents": self._documents.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to a `state` of the same text."""
        self._read, self._skip = state["carry"], state["held"]
        self._documents.load_state_dict(state["documents"])
        self._rows = iter(self._documents)


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
        self._window, self._seed, self._held = window, seed, HELD_OUT_WINDOWS * window
        self.per_block = batch * max(1, BLOCK_TOKENS // (batch * window))
        self._begin = functools.partial(_Tokens, documents, encode, end, self._held)
        self._go_to(self._begin(from_the_first=True))
        first = self._tokens.take(self._held + window, of_this_pass=True)
        if len(first) < self._held + window:
            raise InputError(
                "The text is too short.",
                note=f"It has {counted(len(first), 'token')}; the first {self._held} are held out, and a window is "
                f"{window}.",
                hint=f"Give more text, {self._held + window} tokens at least, or lower --window.",
            )
        self.held_out = first[: self._held]
        self._tokens.give_back(first[self._held :])

    def _go_to(self, tokens: _Tokens, number: int = 0) -> None:
        """Where the next block is that of a number, and begins with these tokens."""
        self._tokens, self._next = tokens, number
        self._block, self._state = None, dict[str, Any]()

    def block(self, number: int) -> Any:
        """Ids [per_block, window], shuffled. Going on is cheap; for an earlier block all is read from the start.

        Raises:
            InputError: the text cannot be read any more, or files became shorter meanwhile than what is held out.
        """
        if number < self._next - (self._block is not None):
            self._go_to(self._begin())
        while self._next <= number:
            self._state = {"next": self._next, **self._tokens.state()}
            ids = self._tokens.take(self.per_block * self._window)
            if len(ids) < self.per_block * self._window:  # it would be read again and again
                raise InputError(
                    "The text has become too short.",
                    note=f"Now it has no more than the first {self._held} tokens, which are held out.",
                    hint="Put back the files that the fit began with, and go on by --resume.",
                )
            windows = ids.reshape(self.per_block, self._window)
            self._block = windows[np.random.default_rng([self._seed, self._next]).permutation(self.per_block)]
            self._next += 1
        return self._block

    def state(self) -> dict[str, Any]:
        """Where the last block begins, as `torch.save` takes it."""
        return self._state

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to a stream's `state`."""
        self._go_to(self._begin(), state["next"] if state else 0)
        if state:
            self._tokens.load(state)
