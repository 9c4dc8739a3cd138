"""Text in files: every document once and as it was written, of each file as much as of the others, and the way back."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from lora_drop_runtime.errors import InputError
from lora_drop_tools.fit import files as reading
from lora_drop_tools.fit.files import FileDocuments, has_columns, is_streamed
from lora_drop_tools.shared.corpus import read_texts

TEXTS = ["one\n", "two\n\n", "  three ü\n", "four"]
SUFFIXES = [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    """The texts: as rows, or one behind the other in plain text."""
    lines = "".join(json.dumps({column: text, "other": n}) + "\n" for n, text in enumerate(texts)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        rows = pa.table({column: texts, "other": range(len(texts))})
        pyarrow.parquet.write_table(rows, path, row_group_size=7)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        half = len(lines) // 2
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    else:
        path.write_bytes("".join(texts).encode() if path.name.endswith(".txt") else lines)
    return path


def read(*files: Path, column: str = "text") -> list[str]:
    return [row["text"] for row in FileDocuments(files, column)]


@pytest.mark.parametrize("name", ["a [b] * {c} é.jsonl", "a * {c} é.jsonl.gz", "a * {c}.jsonl.zst", "a [b] ?.parquet"])
def test_formats(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, TEXTS, "content")
    assert is_streamed([file])
    assert has_columns([tmp_path])
    assert read(file, column="content") == TEXTS
    with pytest.raises(InputError, match=r"(?s)no such column.*--text-column is text.*content, other"):
        FileDocuments([file], "text")


def test_plain_text_keeps_its_lines(tmp_path: Path) -> None:
    lines = [f"line {n}\n" for n in range(2500)]
    file = write(tmp_path / "text.txt", lines)
    assert not is_streamed([file])
    assert is_streamed([tmp_path])
    assert not has_columns([tmp_path, tmp_path / "whatever its name"])
    rows = read(file)
    assert all(row.endswith("\n") for row in rows)
    assert {len(row) >> 13 for row in rows[:-1]} == {1}  # the first line that ends behind so many bytes
    assert "".join(rows) == "".join(lines)
    file.write_bytes(b"one\r\ntwo\rthree")
    assert read(file) == ["one\ntwo\nthree"]


@pytest.mark.parametrize("word", ["word ", "漢", "\r\n\r\n", "x" * 50000 + "\n"])
def test_a_long_line_is_many_rows(word: str, tmp_path: Path) -> None:
    """As of text8, whose 100 MB are one; and a file that ends in one."""
    text = "begin\n" + word * (200_000 // len(word)) + "end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    rows = read(tmp_path / "a.txt")
    assert "".join(rows) == text.replace("\r\n", "\n")
    assert max(map(len, rows)) <= 2 * 2**13
    assert len(rows) < 200_000 * len(word.encode()) // len(word) // 2**12


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Nor is anything else taken for one."""
    file = tmp_path / "a.txt"
    file.write_text("\ufeffthe tide\n\ufeffturns", encoding="utf-8")
    assert "".join(read(file)) == read_texts([file])[0] == "the tide\n\ufeffturns"


def test_lines_of_json(tmp_path: Path) -> None:
    """Blank lines, ends of lines of another system, nulls, a row without the column, half a surrogate pair, a mark."""
    file = tmp_path / "a.jsonl"
    lines = [b'\xef\xbb\xbf{"text": "a\\nb"}\r', b"", b'{"text": null}', b'{"other": 1}']
    file.write_bytes(b"\n".join([*lines, rb'{"text": "\ud83d"}', rb'{"text": "\ud83d\ude00"}']))
    assert read(file) == ["a\nb", None, None, "?", "\U0001f600"]


def test_packed_files_of_several_members(tmp_path: Path) -> None:
    """A line goes over an end, a member holds nothing; gzip is padded by zeros, zstandard has a frame to be skipped."""
    parts = [b'{"text": "one"}\n{"te', b"", b'xt": "two"}\n', b'{"text": "three"}']
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0{}{}"
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(part) + b"\0" * 9000 for part in parts))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(part) + skipped for part in parts))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert read(tmp_path / name) == ["one", "two", "three"]


def test_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "in/b.jsonl", ["b1", "b2", "b3"])
    write(tmp_path / "in/deep/a.jsonl", ["a1"])
    write(tmp_path / "in/c.parquet", ["c1"])
    write(tmp_path / "in/d.jsonl", [])
    (tmp_path / "in/notes.md").write_text("not read")
    found = read(tmp_path / "in")
    assert sorted(found) == ["a1", "b1", "b2", "b3", "c1"]
    assert sorted(found[:3]) == ["a1", "b1", "c1"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_are_read_beside_each_other(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever one stops, of each file the same share was read, up to a row; also of more than are open at once."""
    sizes = {"a": 10, "b": 4, "c": 6, "d": 1}
    random = np.random.default_rng(0)
    for name, size in sizes.items():
        plain = suffix == ".txt"  # a line is a row, where it has no more than 16 KiB
        rows = [name * 9000 + "\n" if plain else name + random.bytes(300_000).hex() for _ in range(size)]
        write(tmp_path / f"{name}{suffix}", rows)
    found = [row[0] for row in read(tmp_path)]
    assert {name: found.count(name) for name in sizes} == sizes
    for n in range(len(found)):
        counts = {name: found[:n].count(name) for name in sizes}
        ahead = 0.5  # rows; of what is packed 128 KiB are read at once
        most = max((counts[name] - 1) / size for name, size in sizes.items())
        assert most <= min((counts[name] + ahead) / size for name, size in sizes.items())
    monkeypatch.setattr(reading, "_OPEN_FILES", 2)
    few = [row[0] for row in read(tmp_path)]
    assert sorted(few) == sorted(found)
    first, second, third, _ = dict.fromkeys(few)
    assert {*few[:3]} == {first, second}
    assert few.index(third) > min(max(i for i, name in enumerate(few) if name == one) for one in (first, second))


def test_of_many_files_a_sample_comes_first(tmp_path: Path) -> None:
    """Whose names say what they are of: the first quarter has some of each kind."""
    for n in range(150):
        write(tmp_path / f"code/{n}.txt", [f"code {n}"])
        write(tmp_path / f"prose/{n}.txt", [f"prose {n}"])
    found = read(tmp_path)
    assert sorted(found) == sorted(f"{kind} {n}" for kind in ("code", "prose") for n in range(150))
    assert 25 < sum(row.startswith("code") for row in found[:75]) < 50
    assert read(tmp_path) == found


def test_of_a_packed_file_little_is_read_at_once(tmp_path: Path) -> None:
    """Else all but the first row of a small one comes behind all others."""
    random = np.random.default_rng(0)
    write(tmp_path / "a.jsonl.gz", [f"a {random.bytes(250).hex()}" for _ in range(200)])
    write(tmp_path / "b.jsonl", [f"b {random.bytes(250).hex()}" for _ in range(2000)])
    found = [row["text"][0] for row in itertools.islice(FileDocuments([tmp_path], "text"), 1100)]
    assert 90 < found.count("a") < 110


def test_plain_files_are_apart(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, [f"{name} {n}\n" for n in range(5000)] + ["end"])
    (tmp_path / "none.txt").write_bytes(b"")
    found = read(tmp_path)
    for name in ("a.txt", "b.txt"):
        own = [row for row in found if row.startswith(name)]
        assert "".join(own) == (tmp_path / name).read_text()
    assert sum(row.startswith(("a.txt", "b.txt")) for row in found) == len(found)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
def test_a_state_leads_to_the_rows_behind_it(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every row, of one format and of all, and of more files than are open at once."""
    monkeypatch.setattr(reading, "_OPEN_FILES", 3)
    for n, one in enumerate([suffix] * 4 if suffix else SUFFIXES):
        write(tmp_path / f"{n}{one}", [f"{n} {row} " + "ü" * 3000 * (row % 3) + "\n" for row in range(3 + 4 * n)])
    expected = read(tmp_path)
    documents = FileDocuments([tmp_path], "text")
    states = [documents.state_dict(), *(documents.state_dict() for _ in documents)]
    assert len(states) == len(expected) + 1
    for n, state in enumerate(states):
        after = FileDocuments([tmp_path], "text")
        after.load_state_dict(json.loads(json.dumps(state)))
        assert [row["text"] for row in after] == expected[n:]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_state_of_packed_files_leads_to_the_same_turns(suffix: str, tmp_path: Path) -> None:
    """Files of many reads each, whose readers are ahead of the rows."""
    random = np.random.default_rng(0)
    for name, count in (("a", 150), ("b", 90), ("c", 220)):
        sizes = random.integers(10, 6000, count)
        write(tmp_path / f"{name}{suffix}", [f"{name}{n} {random.bytes(size).hex()}" for n, size in enumerate(sizes)])
    documents = FileDocuments([tmp_path], "text")
    found = [(row["text"].split()[0], documents.state_dict()) for row in documents]
    for n in range(0, len(found), 40):
        after = FileDocuments([tmp_path], "text")
        after.load_state_dict(found[n][1])
        assert [row["text"].split()[0] for row in after] == [name for name, _ in found[n + 1 :]]


def test_parquet_left_before_its_end(tmp_path: Path) -> None:
    """Readers of `datasets` abort the process at its end, or hang."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", [f"{name}{n}" for n in range(3000)])
    program = """if True:
        import itertools, sys
        from pathlib import Path
        from lora_drop_tools.fit.files import FileDocuments

        print(*(row["text"] for row in itertools.islice(FileDocuments([Path(sys.argv[1])], "text"), 4000)))
    """
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split() == list(itertools.chain(*((f"a{n}", f"b{n}") for n in range(2000))))


def test_of_a_large_group_of_rows_little_is_in_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = pa.table({"text": [random.bytes(1000).hex() for _ in range(16000)]})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    assert pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    del rows
    documents = FileDocuments([tmp_path], "text")
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    assert len(next(iter(documents))["text"]) == 2000
    peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert peak < 16e6


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text":',
            "cannot be read.*a.jsonl: .*no JSON: b'{\"text\":': Expecting value\nHint",
        ),
        ("a.jsonl", b'{"text": "x"}\n["text"]', "cannot be read.*a.jsonl: .*no object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "cannot be read.*a.jsonl: .*no JSON: b'{.*utf-8"),
        ("a.jsonl", b"", "no text.*a.jsonl"),
        ("a.jsonl", b'{"text": 5}', "no text.*a.jsonl: a row has 5"),
        ("a.jsonl", b'{"text": "x"}\n{"text": NaN}', "no text.*a.jsonl: a row has nan"),
        ("a.jsonl.gz", b"no gzip", "cannot be read.*a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12], "cannot be read.*ends too early"),
        ("a.jsonl.zst", b"no zstd", "cannot be read.*a.jsonl.zst"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 9)[:-2], "cannot be read.*ends too early"),
        ("a.parquet", b"no parquet", "cannot be read.*a.parquet"),
        ("a.txt", b"\xff", "cannot be read.*a.txt: UnicodeDecodeError"),
        ("a.csv", b"text\nx\n", "format is not known"),
    ],
)
def test_damaged_files(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"(?s){said}"):
        read(tmp_path / name)


def test_every_file_is_tried_before_any_work(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    write(tmp_path / "b.jsonl", TEXTS, "content")
    with pytest.raises(InputError, match=r"(?s)no such column.*b\.jsonl has content, other"):
        FileDocuments([tmp_path], "text")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        FileDocuments([tmp_path / "a.jsonl"], "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file with \.txt, \.jsonl"):
        FileDocuments([tmp_path / "empty"], "text")


def test_a_directory_in_a_directory_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", TEXTS)
    write(tmp_path / "locked/b.jsonl", TEXTS)
    genuine = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return genuine(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for given in (tmp_path, tmp_path / "locked"):
        with pytest.raises(InputError, match=r"(?s)cannot be read.*locked: Permission denied"):
            FileDocuments([given], "text")


def test_what_the_machine_lacks_is_no_fault_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are open beside each other, more of them than a low limit allows."""
    documents = FileDocuments([write(tmp_path / f"{n}.txt", TEXTS) for n in range(3)], "text")
    genuine = Path.open
    found: list[Exception] = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), MemoryError()]

    def opened(path: Path, mode: str = "r") -> Any:
        if path.name == "1.txt":
            raise found[0]
        return genuine(path, mode)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(InputError, match="cannot be read") as refused:
        list(documents)
    assert refused.value.hint == "Raise the limit on open files (ulimit -n)."
    del found[0]
    with pytest.raises(MemoryError):
        list(FileDocuments([tmp_path / "1.txt"], "text"))


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        file = write(tmp_path / f"a{suffix}", TEXTS).rename(tmp_path / os.fsdecode(b"\xff" + suffix.encode()))
        assert "".join(read(file)) == "".join(TEXTS)
