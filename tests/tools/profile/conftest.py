"""Shared by the tests of `lora-drop profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_tools.profile.profile import profile
from lora_drop_tools.profile.result import Profile
from lora_drop_tools.profile.settings import ProfileSettings

from tests.support.models import FAMILIES
from tests.support.profiles import WINDOW, saved, without_figures


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(FAMILIES["llama"](), tmp_path_factory.mktemp("profile") / "tiny-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 windows and a half."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    ids = np.random.default_rng(1).integers(0, 131, 20 * WINDOW + WINDOW // 2)
    file.write_text(" ".join(f"w{i}" for i in ids))
    return file


def profile_of(text: Path, model: Path, out: Path, **options: Any) -> Profile:
    """`profile` of little text."""
    sizes = {"tokens": 8 * WINDOW, "sensitivity_tokens": 2 * WINDOW, "window": WINDOW}
    return profile(str(model), ProfileSettings(text=(text,), out=out, **(sizes | options)))


@pytest.fixture(scope="session")
def short(text: Path) -> Callable[..., Profile]:
    """`profile` of little text, without figures."""

    def run(model: Path, out: Path, **options: Any) -> Profile:
        with without_figures():
            return profile_of(text, model, out, **options)

    return run


@pytest.fixture(scope="session")
def made(llama_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path]:
    """The whole of it."""
    out = tmp_path_factory.mktemp("made") / "deeper" / "profile"
    return profile_of(text, llama_dir, out), out
