"""Streamed text against plain lists: every token once a pass, none that is held out, the same order after a resume."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import zstandard
from datasets import IterableDataset
from lora_drop_runtime.errors import InputError
from lora_drop_tools.fit import stream
from lora_drop_tools.fit.stream import (
    HELD_OUT_WINDOWS,
    TokenStream,
    _parquet_rows,
    identity,
    is_streamed,
    open_documents,
)

WINDOW, BATCH = 4, 2
HELD = HELD_OUT_WINDOWS * WINDOW
END = 10**6


def encode(text: str) -> torch.Tensor:
    return torch.tensor([int(word) for word in text.split()], dtype=torch.int64)


def documents(count: int, length: int) -> list[str]:
    """Documents of the tokens 0, 1, 2, …; each has its own."""
    return [" ".join(map(str, range(n * length, (n + 1) * length))) for n in range(count)]


def opened(texts: list[str]) -> Callable[[], Any]:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in texts)

    return lambda: IterableDataset.from_generator(rows)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 40)


def make(texts: list[str], end: int | None = END, seed: int = 0) -> TokenStream:
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
    assert len(read) * 12 <= 4 * 40 + HELD + 2 * 12  # the blocks, and once what is held out


def test_too_little_text() -> None:
    with pytest.raises(InputError, match=rf"(?s)too short.*{HELD - 12} tokens.*first {HELD}.*{HELD + WINDOW} tokens"):
        make([" ".join(["1"] * (HELD - 13))])
    make([" ".join(["1"] * (HELD + WINDOW - 1))]).block(3)


def test_a_column_of_numbers() -> None:
    ours = make(documents(30, 11))
    ours._rows = iter([{"text": 5}])
    with pytest.raises(InputError, match="no text"):
        ours.block(0)


# ── files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    lines = "".join(json.dumps({column: text, "other": n}) + "\n" for n, text in enumerate(texts)).encode()
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({column: texts, "other": range(len(texts))}), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines))
    else:
        path.write_bytes("".join(texts).encode() if path.name.endswith(".txt") else lines)
    return path


TEXTS = ["one\n", "two\n\n", "  three ü\n", "four"]


@pytest.mark.parametrize("name", ["a [b] * {c} é.jsonl", "a * {c} é.jsonl.gz", "a * {c}.jsonl.zst", "a [b] ?.parquet"])
def test_formats(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, TEXTS, "content")
    assert is_streamed([file])
    assert [row["text"] for row in open_documents([file], None, "content")] == TEXTS
    with pytest.raises(InputError, match=r"(?s)no such column.*--text-column is text.*content, other"):
        open_documents([file], None, "text")


def test_plain_text_keeps_its_lines(tmp_path: Path) -> None:
    lines = [f"line {n}\n" for n in range(2500)]
    file = write(tmp_path / "text.txt", lines)
    assert not is_streamed([file])
    rows = [row["text"] for row in open_documents([file], None, "text")]
    assert all(row.endswith("\n") for row in rows)
    assert {len(row) >> 13 for row in rows[:-1]} == {1}  # the first line that ends behind so many bytes
    assert "".join(rows) == "".join(lines)
    file.write_bytes(b"one\r\ntwo\rthree")
    assert [row["text"] for row in open_documents([file], None, "text")] == ["one\ntwo\nthree"]


def test_plain_files_are_apart(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, [f"{name} {n}\n" for n in range(5000)] + ["end"])
    (tmp_path / "none.txt").write_bytes(b"")
    documents = open_documents([tmp_path], None, "text")
    rows = iter(documents)
    found = [next(rows)["text"] for _ in range(3)]
    again = open_documents([tmp_path], None, "text")
    again.load_state_dict(documents.state_dict())
    found += [row["text"] for row in again]
    for name in ("a.txt", "b.txt"):
        own = [row for row in found if row.startswith(name)]
        assert "".join(own) == (tmp_path / name).read_text()
    assert sum(row.startswith(("a.txt", "b.txt")) for row in found) == len(found)


def test_plain_files_are_read_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever one stops, of each file the same share was read, up to a row; also of more than are open at once."""
    sizes = {"a": 40, "b": 4, "c": 12, "d": 1}
    for name, size in sizes.items():
        write(tmp_path / f"{name}.txt", [name * 1023 + "\n"] * (9 * size))
    rows = [row["text"][0] for row in open_documents([tmp_path], None, "text")]
    assert {name: rows.count(name) for name in sizes} == sizes
    for n in range(len(rows)):
        shares = [rows[:n].count(name) / size for name, size in sizes.items()]
        assert max(shares) - min(shares) <= 1
        assert max(share - 1 / size for share, size in zip(shares, sizes.values(), strict=True)) <= min(shares)
    monkeypatch.setattr(stream, "_OPEN_FILES", 2)
    few = [row["text"][0] for row in open_documents([tmp_path], None, "text")]
    assert sorted(few) == sorted(rows)
    assert "b" in few[:3]
    assert few.index("c") > max(i for i, name in enumerate(few) if name == "b")


def test_a_directory_and_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    write(tmp_path / "in/b.jsonl", ["b1", "b2", "b3"])
    write(tmp_path / "in/deep/a.jsonl", ["a1"])
    write(tmp_path / "in/c.parquet", ["c1"])
    (tmp_path / "in/notes.md").write_text("not read")
    assert is_streamed([tmp_path / "in"])
    rows = [row["text"] for row in open_documents([tmp_path / "in"], None, "text")]
    assert set(rows) == {"a1", "b1", "b2", "b3", "c1"}
    assert [row for row in rows if row[0] != "c"] == ["b1", "b2", "b3", "a1"]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set/train.jsonl", ["d1", "d2"])
    assert [row["text"] for row in open_documents([], str(tmp_path / "set"), "text")] == ["d1", "d2"]


def test_parquet_left_before_its_end(tmp_path: Path) -> None:
    """Readers of `datasets` abort the process at its end, or hang; and a place in the middle is found again."""
    for name in ("set/train-0.parquet", "set/train-1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [f"{name} {n}" for n in range(3000)])
    program = """if True:
        import sys
        from pathlib import Path
        from lora_drop_tools.fit.stream import open_documents

        where = Path(sys.argv[1])
        for files, dataset in (([where], None), ([], str(where))):
            documents = open_documents(files, dataset, "text")
            rows = iter(documents)
            begun = [next(rows)["text"] for _ in range(4000)]
            again = open_documents(files, dataset, "text")
            again.load_state_dict(documents.state_dict())
            print(begun[-1], next(iter(again))["text"], sum(1 for _ in again), sep="|")
    """
    command = [sys.executable, "-c", program, str(tmp_path / "set")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "set/train-1.parquet 999|set/train-1.parquet 1000|2000\n" * 2


def test_parquet_from_elsewhere_is_read_by_its_column() -> None:
    with fsspec.open("memory://a.parquet", "wb") as file:
        pyarrow.parquet.write_table(pa.table({"text": TEXTS, "other": range(len(TEXTS))}), file)
    assert list(_parquet_rows(["memory://a.parquet"], "text")) == [{"text": text} for text in TEXTS]
    assert next(_parquet_rows(["memory://a.parquet"], "none")) == {"text": TEXTS[0], "other": 0}


def test_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may each pass through them wait for one that does not answer."""
    asked = list[str]()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("asked"))
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        open_documents([write(tmp_path / name, TEXTS)], None, "text")
    assert not asked


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text":', "cannot be read"),
        ("a.jsonl", b"", "empty, or ends too early"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.csv", b"text\nx\n", "format is not known"),
    ],
)
def test_damaged_files(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(open_documents([tmp_path / name], None, "text"))


def test_a_column_of_text_beside_one_of_numbers(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "a.jsonl").write_text('{"text": 5}')
    with pytest.raises(InputError, match=r"(?s)cannot be read.*together.*int64"):
        open_documents([tmp_path], None, "text")


def test_missing_files_and_datasets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_documents([tmp_path / "a.jsonl"], None, "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file with \.txt, \.jsonl"):
        open_documents([tmp_path / "empty"], None, "text")
    with pytest.raises(InputError, match="cannot be read"):
        open_documents([], "nobody/nothing-of-the-kind", "text")


def test_a_name_that_is_no_utf8_is_a_name(tmp_path: Path) -> None:
    names = ("a", os.fsdecode(b"\xff"), os.fsdecode(b"\xfe"))
    for name in names:
        (tmp_path / name).write_text("the tide")
    assert len({identity([tmp_path / name]) for name in names}) == 3
