"""A bundle after it was opened: what reads its files later, whatever has become of its place."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_drop_runtime.bundle.bundle import Bundle, WeightInput
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, OrtEntry
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError

from tests.support.bundles import make_bundle, record_again, save_adapters

TARGETS = ("ort", "openvino")
WEIGHTS = "weights/model.safetensors"


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


def other_weights(root: Path) -> None:
    """Let a bundle be what an export of a model of the same sizes makes."""
    file = root / "weights" / "model.safetensors"
    data = bytearray(file.read_bytes())
    half = len(data) // 2 // 4 * 4
    data[half:] = data[half:][4096:] + data[half:][:4096]  # other values of the same kind
    file.unlink()  # who has it mapped keeps it
    file.write_bytes(data)
    record_again(root)


def replaced(root: Path) -> None:
    """Put such a bundle where another one is."""
    shutil.copytree(root, root.with_name("new"))
    other_weights(root.with_name("new"))
    root.rename(root.with_name("old"))
    root.with_name("new").rename(root)


@pytest.mark.parametrize("change", [replaced, shutil.rmtree])
@pytest.mark.parametrize("target", TARGETS)
def test_adapters_for_a_bundle_that_is_gone(target: str, change: Callable[[Path], None], made: Path, tmp_path) -> None:
    """Its weights are read again with them; those of the one in its place are others."""
    root = tmp_path / "bundle"
    shutil.copytree(made / "bundle", root)
    with Session.open(root, target=target) as session:
        before = tokens(session)
        change(root)
        with pytest.raises(BundleError, match="no longer what was opened"):
            session.load_adapters(made / "adapters")
        assert tokens(session) == before
    if root.exists():
        with Session.open(root, target=target) as session:
            assert tokens(session) != before


def test_no_second_model_of_a_bundle_that_is_gone(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(made / "bundle", root)
    with Session.open(root, target="openvino", policy="backfill") as session:
        before = tokens(session)
        replaced(root)
        session.warm_up()
        assert tokens(session) == before


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_that_says_more_by_now(target: str, made: Path, tmp_path: Path) -> None:
    """A target was added, or a schedule calibrated."""
    root = tmp_path / "bundle"
    shutil.copytree(made / "bundle", root)
    with Session.open(root, target=target) as session:
        manifest = dataclasses.replace(Bundle.open(root).manifest, versions={"numpy": "9"}, targets={})
        (root / MANIFEST_NAME).write_text(manifest.to_json())
        session.load_adapters(made / "adapters")
        assert len(tokens(session)) == 12


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("ort/steps.onnx", lambda bundle: bundle.graph("ort/steps.onnx")),
        ("lora.onnx", Bundle.check_unchanged),
        (WEIGHTS, lambda bundle: bundle.mapped_part({}, "ort/steps.onnx", WEIGHTS, 0, 8)),
        (WEIGHTS, lambda bundle: list(bundle.mapped_parts(WeightInput("float32", (2,), ((WEIGHTS, 0, 8),))))),
        ("refresh.onnx", lambda bundle: bundle.weight_inputs("ort")),
    ],
)
def test_a_file_that_cannot_be_read(name: str, read: Callable[[Bundle], object], made: Path, tmp_path: Path) -> None:
    """Here since it is gone: root may read files that nobody may."""
    root = tmp_path / "bundle"
    shutil.copytree(made / "bundle", root)
    opened = Bundle.open(root)
    table = OrtEntry(steps="ort/steps.onnx", weights="refresh.onnx")  # a target's table of weights, here any file
    bundle = Bundle(root, dataclasses.replace(opened.manifest, targets={"ort": table}))
    (root / name).unlink()
    with pytest.raises(BundleError, match="cannot be read") as refused:
        read(bundle)
    assert refused.value.note == f"{root / name}: No such file or directory."


def test_a_file_that_may_not_be_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As linked weights that are their owner's alone; ONNX Runtime says «SystemError : 13» of the graph."""
    file, access = made / "bundle" / WEIGHTS, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file and access(path, mode))  # root has all
    with pytest.raises(BundleError, match="cannot be read") as refused:
        Session.open(made / "bundle")
    assert refused.value.note == f"{file}: Permission denied."
    assert "permissions" in refused.value.hint
