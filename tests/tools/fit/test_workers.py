"""A fit under torchrun: what the processes that are not the first one must leave alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools.fit.distill import Workers
from lora_drop_tools.fit.fit import fit
from lora_drop_tools.fit.settings import FitSettings
from lora_drop_tools.fit.stages import Report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Alone(Workers):
    """One of two processes whose other one is only imagined."""

    events: list[str] = field(default_factory=list)

    def agree(self, tensors: list[Any]) -> None:
        self.events.append("agree")

    def average(self, tensors: list[Any]) -> None:
        self.events.append("average")

    def wait(self, device: str) -> None:
        self.events.append("wait")


@pytest.fixture
def settings(tmp_path: Path) -> FitSettings:
    """Of 400 tokens of text; the model lies beside it."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 6}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **size)).save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(32)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"t{n}" for n in np.random.default_rng(0).integers(0, 32, 400)))
    return FitSettings(
        text=(tmp_path / "text",), out=tmp_path / "out", window=20, batch=1, rank=2, closed_form_tokens=20, steps=2
    )


def joins(workers: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def joined(device: str) -> Iterator[Workers]:
        yield workers
        workers.events.append("left")

    monkeypatch.setattr(Workers, "joined", joined)


def test_as_many_processes_go_on_as_began(
    settings: FitSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's batches and, of --tokens, the number of steps follow from how many they are."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "__call__", interrupted)
    joins(Alone(0, 1), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(str(tmp_path / "model"), settings)
    monkeypatch.undo()
    joins(Alone(0, 2), monkeypatch)
    with pytest.raises(InputError, match=r"(?s)begun with other options.*processes 1"):
        fit(str(tmp_path / "model"), dataclasses.replace(settings, resume=True))
    joins(Alone(0, 1), monkeypatch)
    assert fit(str(tmp_path / "model"), dataclasses.replace(settings, resume=True)).settings["processes"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_removes_what_an_unfinished_fit_has_reached(
    rank: int, settings: FitSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fast process may be done before the first one has written: it waits, and touches nothing."""
    workers = Alone(rank, 2)
    joins(workers, monkeypatch)
    partial = tmp_path / "out.partial"
    if rank:
        partial.mkdir()
        (partial / "begin.pt").write_text("the first process's")
    fit(str(tmp_path / "model"), settings)
    assert (tmp_path / "out" / "fit.json").exists() == (rank == 0)
    if rank:
        assert [(file.name, file.read_text()) for file in partial.iterdir()] == [("begin.pt", "the first process's")]
    else:
        assert not partial.exists()
    assert workers.events == ["agree", "average", "average", "wait", "left"]
