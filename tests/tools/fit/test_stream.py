"""Streamed text against plain lists: every token once a pass, none that is held out, the same order after a resume."""

from __future__ import annotations

import ntpath
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import IterableDataset
from lora_drop_runtime.errors import InputError
from lora_drop_tools.fit import stream
from lora_drop_tools.fit.stream import HELD_OUT_WINDOWS, TokenStream, _parquet_rows, _parts, identity, open_documents

from tests.tools.fit.test_files import write

WINDOW, BATCH = 4, 2
HELD = HELD_OUT_WINDOWS * WINDOW
END = 10**6


def encode(text: str) -> torch.Tensor:
    return torch.tensor([int(word) for word in text.split()], dtype=torch.int64)


def documents(count: int, length: int) -> list[str]:
    """Documents of the tokens 0, 1, 2, …; each has its own."""
    return [" ".join(map(str, range(n * length, (n + 1) * length))) for n in range(count)]


def opened(texts: Sequence[Any]) -> Callable[[], Any]:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in texts)

    return lambda: IterableDataset.from_generator(rows)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 40)


def make(texts: Sequence[Any], end: int | None = END, seed: int = 0) -> TokenStream:
    return TokenStream(opened(texts), encode, end, WINDOW, BATCH, seed)


def expected_tokens(texts: list[str], passes: int) -> list[int]:
    """What the windows hold, in the order of the text: passes through it, each without what is held out."""
    whole = [token for text in texts for token in [*map(int, text.split()), END]]
    return whole[HELD:] * passes


def test_blocks_hold_the_text_in_its_order_but_for_the_shuffle() -> None:
    texts = documents(30, 11)
    ours = make(texts)
    assert ours.per_block == 10
    assert ours.held_out.tolist() == [token for text in texts for token in [*map(int, text.split()), END]][:HELD]
    expected = expected_tokens(texts, 5)
    for number in range(20):  # 800 tokens: three and a half passes
        block = ours.block(number)
        in_order = np.array(expected[40 * number : 40 * (number + 1)]).reshape(10, WINDOW)
        assert sorted(map(tuple, block.tolist())) == sorted(map(tuple, in_order.tolist()))
        assert block.tolist() != in_order.tolist()


def test_the_seed_alone_decides_the_order() -> None:
    texts = documents(30, 11)
    first, same, other = make(texts), make(texts), make(texts, seed=1)
    for number in (0, 1, 3):
        assert torch.equal(first.block(number), same.block(number))
        assert not torch.equal(first.block(number), other.block(number))
    assert torch.equal(first.block(1), make(texts).block(1))  # backwards


def test_without_an_end_token_documents_touch() -> None:
    texts = documents(30, 11)
    block = make(texts, end=None).block(0)
    assert sorted(block.flatten().tolist()) == list(range(HELD, HELD + 40))


@pytest.mark.parametrize("number", [0, 1, 4, 7, 11])
def test_a_state_leads_to_the_same_blocks(number: int, tmp_path: Path) -> None:
    """In the middle of a document, of a pass, of a file; and nothing before it is read again."""
    texts = documents(30, 11)
    before = make(texts)
    expected = [before.block(n) for n in range(number + 4)]
    before.block(number)
    torch.save(before.state(), tmp_path / "state")
    read = list[str]()

    def counted(text: str) -> torch.Tensor:
        read.append(text)
        return encode(text)

    after = TokenStream(opened(texts), counted, END, WINDOW, BATCH, 0)
    read.clear()
    after.load(torch.load(tmp_path / "state", weights_only=True))
    for n in range(number, number + 4):
        assert torch.equal(after.block(n), expected[n])
        assert torch.equal(after.block(n), expected[n])  # as for its next batch: it is in memory
    assert len(read) * 12 <= 4 * 40 + HELD + 2 * 12  # the blocks, and once what is held out


def test_too_little_text() -> None:
    with pytest.raises(InputError, match=rf"(?s)too short.*{HELD - 12} tokens.*first {HELD}.*{HELD + WINDOW} tokens"):
        make([" ".join(["1"] * (HELD - 13))])
    make([" ".join(["1"] * (HELD + WINDOW - 1))]).block(3)


@pytest.mark.parametrize("left", [3, HELD])
def test_text_that_becomes_shorter_than_what_is_held_out(left: int) -> None:
    texts = documents(30, 11)
    ours = make(texts)
    ours.block(0)
    texts[:] = [" ".join(["1"] * (left - 1))]
    with pytest.raises(InputError, match=rf"(?s)become too short.*first {HELD} tokens"):
        ours.block(20)


def test_a_column_of_numbers() -> None:
    ours = make([*documents(30, 11), 5])
    with pytest.raises(InputError, match=r"(?s)no text.*a row has 5"):
        ours.block(6)


# ── files and datasets ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def both(tmp_path: Path) -> tuple[list[Path], str]:
    """A directory of three documents, and a dataset of two."""
    files = write(tmp_path / "in/a.jsonl", ["a1", "a2", "a3"])
    return [files.parent], str(write(tmp_path / "set/train.jsonl", ["d1", "d2"]).parent)


def test_a_dataset(both: tuple[list[Path], str]) -> None:
    assert [row["text"] for row in open_documents([], both[1], "text")] == ["d1", "d2"]
    with pytest.raises(InputError, match=r"(?s)no such column.*--text-column is content.*other, text"):
        open_documents([], both[1], "content")


def test_files_and_a_dataset_take_turns(both: tuple[list[Path], str]) -> None:
    """Until both have ended; and from every place on."""
    expected = ["a1", "d1", "a2", "d2", "a3", "d1"]  # the dataset begins again
    documents = open_documents(*both, "text")
    states = [documents.state_dict()]
    for row, text in zip(documents, expected, strict=True):
        assert row["text"] == text
        states.append(documents.state_dict())
    for n, state in enumerate(states):
        after = open_documents(*both, "text")
        after.load_state_dict(state)
        assert [row["text"] for row in after] == expected[n:]


def test_parquet_of_a_dataset_left_before_its_end(tmp_path: Path) -> None:
    """Readers of `datasets` abort the process at its end, or hang; and a place in the middle is found again."""
    for name in ("0", "1"):
        write(tmp_path / f"set/train-{name}.parquet", [f"{name} {n}" for n in range(3000)])
    program = """if True:
        import sys
        from lora_drop_tools.fit.stream import open_documents

        documents = open_documents([], sys.argv[1], "text")
        rows = iter(documents)
        begun = [next(rows)["text"] for _ in range(4000)]
        again = open_documents([], sys.argv[1], "text")
        again.load_state_dict(documents.state_dict())
        print(begun[-1], next(iter(again))["text"], sum(1 for _ in again), sep="|")
    """
    command = [sys.executable, "-c", program, str(tmp_path / "set")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "1 999|1 1000|2000\n"


def test_parquet_from_elsewhere_is_read_by_its_column() -> None:
    texts = ["one", "two"]
    with fsspec.open("memory://a.parquet", "wb") as file:
        pyarrow.parquet.write_table(pa.table({"text": texts, "other": range(2)}), file)
    assert list(_parquet_rows(["memory://a.parquet"], "text")) == [{"text": text} for text in texts]


def test_a_file_of_a_dataset_that_is_odd_is_named(tmp_path: Path) -> None:
    """Parquet behind the first file, without the column or damaged."""
    write(tmp_path / "set/a.parquet", ["one"])
    write(tmp_path / "set/b.parquet", ["one"], "content")
    rows = iter(open_documents([], str(tmp_path / "set"), "text"))
    assert next(rows) == {"text": "one"}
    with pytest.raises(InputError, match=r"(?s)no such column.*b\.parquet has content, other"):
        next(rows)
    (tmp_path / "set/b.parquet").write_bytes(b"damaged")
    rows = iter(open_documents([], str(tmp_path / "set"), "text"))
    assert next(rows) == {"text": "one"}
    with pytest.raises(InputError, match=r"(?s)cannot be read.*b\.parquet: ArrowInvalid"):
        next(rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_local_datasets_need_no_network(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may each pass through them wait for one that does not answer."""
    asked = list[str]()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("asked"))
    open_documents([], str(write(tmp_path / f"set/a{suffix}", ["one"]).parent), "text")
    assert not asked


def test_missing_datasets() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_documents([], "nobody/nothing-of-the-kind", "text")
    with pytest.raises(InputError, match="no name"):
        open_documents([], ":part", "text")


def test_a_name_that_is_no_utf8_is_a_name(tmp_path: Path) -> None:
    names = ("a", os.fsdecode(b"\xff"), os.fsdecode(b"\xfe"))
    for name in names:
        (tmp_path / name).write_text("the tide")
    assert len({identity([tmp_path / name]) for name in names}) == 3


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name:config", ("owner/name", "config")),
        (r"C:\texts", (r"C:\texts", "")),
        (r"C:\texts:config", (r"C:\texts", "config")),
        (r"\\server\share\texts:config", (r"\\server\share\texts", "config")),
        (":config", ("", "config")),
    ],
)
def test_a_dataset_in_a_directory_of_windows(dataset, parts, monkeypatch) -> None:
    monkeypatch.setattr(os.path, "splitdrive", ntpath.splitdrive)
    assert _parts(dataset) == parts
