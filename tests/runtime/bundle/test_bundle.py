"""A bundle after it was opened: what reads its files later, whatever has become of its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_drop_runtime.decoding.session import Session

from tests.support.bundles import make_bundle, save_adapters

TARGETS = ("ort", "openvino")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `bundle`, for both engines, and `adapters` for it."""
    place = tmp_path_factory.mktemp("made")
    bundle = make_bundle("llama", place / "bundle", rank=4, targets=TARGETS)
    model = bundle.manifest.model
    save_adapters(place / "adapters", bundle.manifest.plan, model.hidden_size, model.fingerprint)
    return place


def tokens(session: Session) -> list[int]:
    return session.generate([7, 3, 11], 12)[0].tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_the_working_directory_changes(target: str, made: Path, tmp_path: Path, monkeypatch) -> None:
    with Session.open(made / "bundle", target=target) as session:
        session.load_adapters(made / "adapters")
        wanted = tokens(session)
    monkeypatch.chdir(made)
    with Session.open("bundle", target=target) as session:
        monkeypatch.chdir(tmp_path)
        session.load_adapters(made / "adapters")
        assert tokens(session) == wanted
