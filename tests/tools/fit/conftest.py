"""A tiny model with a tokenizer, and a text of its words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from lora_drop_tools.fit import stages

from tests.support.tokenizers import with_tokenizer


@pytest.fixture(scope="package", autouse=True)
def little_held_out() -> Iterator[None]:
    """Half of the batches that stages are judged by: that takes longer than to learn four."""
    with mock.patch.object(stages, "_HELD_OUT_BATCHES", 2):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of tiny words for the tiny tokenizer."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"t{n}" for n in random.integers(0, 120, 4000)))
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that knows t0 … t130."""
    return with_tokenizer("llama", tmp_path_factory.mktemp("model"))
