"""Shared by the tests of `lora-drop profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lora_drop_tools.profile.profile import profile
from lora_drop_tools.profile.result import Profile
from lora_drop_tools.profile.settings import ProfileSettings

from tests.support.models import FAMILIES
from tests.support.profiles import WINDOW, saved


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


@pytest.fixture(scope="session")
def short(text: Path) -> Callable[..., Profile]:
    """`profile` of little text."""
    options = {"tokens": 8 * WINDOW, "sensitivity_tokens": 2 * WINDOW, "window": WINDOW}
    return lambda model, out, **more: profile(str(model), ProfileSettings(text=(text,), out=out, **(options | more)))


@pytest.fixture(scope="session")
def made(
    llama_dir: Path, short: Callable[..., Profile], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Profile, Path]:
    out = tmp_path_factory.mktemp("made") / "deeper" / "profile"
    return short(llama_dir, out), out
