"""A tiny model with a tokenizer, and a text of its words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.tokenizers import with_tokenizer


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
