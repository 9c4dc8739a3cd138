"""A served bundle that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.text import TextCodec

from tests.support.serving import Served, serving, word_bundle


@pytest.fixture(scope="package")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return word_bundle(tmp_path_factory.mktemp("serve") / "b")


@pytest.fixture(scope="package")
def served(bundle: Bundle) -> Iterator[Served]:
    batch = Batch.open(bundle.root, slots=4, policy="backfill", threads=1, keep_prefixes=True)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as server:
        yield server
