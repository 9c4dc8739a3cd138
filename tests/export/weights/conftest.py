"""Shared by the tests of weights in a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bundles import Family, make_bundle
from tests.support.stored_weights import PLAN, short, tokens


@pytest.fixture
def traced(monkeypatch) -> Callable[[Family], None]:
    """Exports take the trace of a short Llama, made once, or of the family that is set."""

    def use(source: Family) -> None:
        monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)

    use(short())
    return use


@pytest.fixture
def model(tmp_path) -> Path:
    """The tiny Llama's directory, in float32 and one file."""
    return shutil.copytree(short().directory, tmp_path / "model")


@pytest.fixture(scope="session")
def expected(tmp_path_factory) -> list[list[int]]:
    """What the tiny Llama generates."""
    return tokens(make_bundle(short(), tmp_path_factory.mktemp("expected") / "b", **PLAN))
