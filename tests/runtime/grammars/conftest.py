"""Tiny bundles with tokenizers of bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.grammars import grammar, trial

from tests.support.bundles import make_bundle
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture(scope="module", autouse=True)
def tried_once() -> Iterator[None]:
    """A grammar that several tests of a file have is compiled apart once, which takes an interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "compile_apart", functools.cache(trial.compile_apart))
        yield


@pytest.fixture(scope="module", params=["characters", "merges"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three of eight layers dropped, window 3."""
    root = tmp_path_factory.mktemp("grammars") / "b"
    make_bundle("llama", root, drop_layers=(3, 4, 6), k=3, max_batch=8, max_seq_len=256)
    byte_tokenizer(root, merged=request.param == "merges", calls=True)
    return Bundle.open(root)
