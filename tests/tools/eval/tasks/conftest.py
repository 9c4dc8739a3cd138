"""Shared by the tests of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bundles import make_bundle
from tests.support.tokenizers import character_tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What lm-eval's libraries keep of the tests' files goes with them."""
    pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 tokens, batches of 8; the tokenizer has a token for each character."""
    root = tmp_path_factory.mktemp("eval") / "tiny"
    make_bundle("llama", root, drop_ratio=0.5, max_seq_len=256)
    character_tokenizer(root)
    return root
