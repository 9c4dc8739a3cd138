"""Shared by the tests of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bundles import make_bundle
from tests.support.tokenizers import character_tokenizer


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is fetched, and what lm-eval's libraries keep of the tests' files goes with them."""
    pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
            patch.setattr(name, True)
        patch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 tokens, batches of 8; the tokenizer has a token for each character."""
    root = tmp_path_factory.mktemp("eval") / "tiny"
    make_bundle("llama", root, drop_ratio=0.5, max_seq_len=256)
    character_tokenizer(root)
    return root
