"""Shared by the tests of `lora-drop eval`."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import make_bundle
from tests.support.tokenizers import character_tokenizer

LM_EVAL = ("arc", "gsm8k", "hellaswag", "humaneval", "lambada", "mbpp", "minerva_math", "mmlu/default", "piqa")
LM_EVAL += ("winogrande", "wsc273")


@pytest.fixture(scope="session", autouse=True)
def few_definitions() -> Iterator[None]:
    """Of lm-eval's own 14,000 files, which take seconds, those that tests name are read."""
    if importlib.util.find_spec("lm_eval") is None:
        yield
        return
    from lm_eval.tasks import _index

    build, own = _index.TaskIndex.build, Path(_index.__file__).parent

    def built(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        read = [[path / name for name in LM_EVAL] if path == own else [path] for path in paths]
        return build(itertools.chain(*read), **options)

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
