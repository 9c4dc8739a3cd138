"""Shared by the tests of `lora-drop eval`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import make_bundle
from tests.support.tokenizers import character_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_index() -> Iterator[None]:
    """lm-eval's own 14,000 files are read once; those of other directories each time."""
    if importlib.util.find_spec("lm_eval") is None:
        yield
        return
    from lm_eval.tasks import _index

    build, kept = _index.TaskIndex.build, dict[str, Any]()

    def built(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in paths:
            own = path == Path(_index.__file__).parent
            if own and not kept:
                kept.update(build([path], **options))
            found |= kept if own else build([path], **options)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index.TaskIndex, "build", staticmethod(built))
        yield


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 tokens, batches of 8, half of the eligible layers dropped; the tokenizer has a token for each character."""
    root = tmp_path_factory.mktemp("eval") / "tiny"
    make_bundle("llama", root, drop_ratio=0.5)
    character_tokenizer(root)
    return root
