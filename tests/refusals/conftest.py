"""What cannot be served is refused: exit code 2, fact, Note and Hint on standard error, nothing changed on disk."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_drop_export.cli
from lora_drop_export.checkpoint.open import open_checkpoint
from tests.support.bundles import family, make_bundle
from tests.support.models import SIZES
from tests.support.refused import LIMITS, Refused

PARTS = re.compile(r"^error: .+\nNote: .+\nHint: .+\n\Z", re.MULTILINE)


def snapshot(directory: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a directory; times of directories may change, since a temporary file comes and goes."""
    entries = {}
    for path in directory.rglob("*"):
        stat = path.lstat()
        size_and_time = () if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
        entries[str(path.relative_to(directory))] = stat.st_mode, stat.st_ino, stat.st_nlink, *size_and_time
    return entries


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A directory with `model`, a tiny Llama with a tokenizer, and `bundle`, made from it."""
    place = tmp_path_factory.mktemp("place")
    source = family("llama")
    model = place / "model"
    shutil.copytree(source.directory, model)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    checkpoint = open_checkpoint(str(model), place / "scratch")
    made_from = dataclasses.replace(source, directory=model, checkpoint=checkpoint)
    make_bundle(made_from, place / "bundle", rank=4, **LIMITS)
    return place


@pytest.fixture
def refused(place, tmp_path, capsys) -> Refused:
    """Runs a command that must be refused, and returns its message."""

    def run(main: Callable[[list[str]], int], *arguments: object, words: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        before = snapshot(place), snapshot(tmp_path)
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert code == 2, printed.err
        message = PARTS.search(printed.err)
        assert message, printed.err
        for word in words:
            assert word in message[0]
        assert (snapshot(place), snapshot(tmp_path)) == before
        return message[0]

    return run


@pytest.fixture
def export_refused(refused, place) -> Iterator[Refused]:
    """The same for `lora-drop-export` on the tiny Llama, unless another model is given."""

    def run(*arguments: object, model: object = None, words: tuple[str, ...] = ()) -> str:
        model = place / "model" if model is None else model
        return refused(lora_drop_export.cli.main, "--model", model, "--out", place / "out", *arguments, words=words)

    yield run
    shutil.rmtree(place / "out", ignore_errors=True)  # of an export that was not refused


@pytest.fixture
def untraced(monkeypatch):
    """For refusals that may not cost a trace."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("the model was traced before the refusal")

    monkeypatch.setattr("lora_drop_export.compiler.export.trace", fail)


@pytest.fixture
def traced(monkeypatch):
    """For refusals after the trace: the tiny Llama's, made once."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: family("llama").traced)
