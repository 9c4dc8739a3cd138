"""Weights taken as they lie: copied, hard-linked and linked."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_drop_export.cli import main
from lora_drop_export.weights.store import copy_file
from lora_drop_export.weights.write import CHUNK_BYTES
from tests.support.stored_weights import export, short, tokens

pytestmark = pytest.mark.usefixtures("traced")


@pytest.mark.parametrize("target", ["ort", "none"])
@pytest.mark.parametrize("mode", ["copy", "link"])
def test_copied_or_linked(tmp_path, model, expected, target, mode):
    source = model / "model.safetensors"
    before = source.read_bytes()
    bundle = export(model, tmp_path / "out", "--weights", mode, "--target", target)
    stored = bundle.root / "weights" / "model.safetensors"
    assert bundle.manifest.model.dtype == "float32"
    assert stored.read_bytes() == before
    assert source.read_bytes() == before
    if mode == "link":
        assert stored.stat().st_ino == source.stat().st_ino
        assert stored.stat().st_nlink == 2
    else:
        assert stored.stat().st_ino != source.stat().st_ino
        assert stored.stat().st_nlink == source.stat().st_nlink == 1
    if target == "ort":
        assert tokens(bundle) == expected
    shutil.rmtree(model)
    if target == "ort":
        assert tokens(bundle) == expected
    assert not bundle.check_hashes()


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_sharded(tmp_path, expected, mode):
    model = tmp_path / "model"
    short().model.save_pretrained(model, max_shard_size="80KB")
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 3
    bundle = export(model, tmp_path / "out", "--weights", mode)
    assert sorted(f.name for f in bundle.root.glob("weights/*.safetensors")) == [f.name for f in shards]
    for shard in shards:
        stored = bundle.root / "weights" / shard.name
        assert filecmp.cmp(shard, stored, shallow=False)
        assert (stored.stat().st_ino == shard.stat().st_ino) == (mode == "link")
    assert tokens(bundle) == expected


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_shard_that_the_decoder_needs_nothing_of(tmp_path, expected, mode):
    """By their names the other ones were not all: the bundle was called a checkpoint whose shard is missing."""
    model = tmp_path / "model"
    short().model.save_pretrained(model, max_shard_size="80KB")
    (model / "model.safetensors.index.json").unlink()
    shards = sorted(model.glob("*.safetensors"))
    renamed = [f"model-{number:05}-of-{len(shards) + 1:05}.safetensors" for number in range(1, len(shards) + 2)]
    for shard, name in zip(shards, renamed, strict=False):
        shard.rename(model / name)
    save_file({"vision_tower.weight": torch.zeros(2, 2)}, model / renamed[-1])
    bundle = export(model, tmp_path / "out", "--weights", mode)
    stored = sorted(file.name for file in bundle.root.glob("weights/*.safetensors"))
    assert stored == [f"model-{number:05}.safetensors" for number in range(1, len(shards) + 1)]
    assert tokens(bundle) == expected
    assert tokens(export(bundle.root, tmp_path / "again", "--weights", mode)) == expected


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_files_of_our_own_names(tmp_path, model, expected, mode):
    """The adapters, zeros here, were written over such a file: with `link` over the checkpoint's own."""
    source = (model / "model.safetensors").rename(model / "adapters.safetensors")
    before = source.read_bytes()
    bundle = export(model, tmp_path / "out", "--weights", mode, "--rank", 4)
    assert source.read_bytes() == before
    assert {file.name for file in bundle.root.glob("weights/*.safetensors")} == {
        "adapters.safetensors",
        "model.adapters.safetensors",
    }
    assert tokens(bundle) == expected


def test_a_whole_file_is_read_without_an_index(tmp_path, expected):
    """transformers leaves the index of shards where it then writes one file."""
    model = tmp_path / "model"
    short().model.save_pretrained(model, max_shard_size="80KB")
    short().model.save_pretrained(model)
    assert (model / "model.safetensors.index.json").exists()
    assert tokens(export(model, tmp_path / "out")) == expected


def test_a_hub_repository_without_safetensors_gives_what_it_has(tmp_path, monkeypatch, expected):
    """The pickled files are asked for where there are no others, and only then."""
    snapshot = shutil.copytree(short().directory, tmp_path / "snapshot")
    asked: list[list[str]] = []

    def download(_: str, *, allow_patterns: list[str]) -> str:
        asked.append([pattern for pattern in allow_patterns if "bin" in pattern])
        if asked[-1]:
            torch.save(tensors, snapshot / "pytorch_model.bin")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert tokens(export("tiny/llama", tmp_path / "out")) == expected
    assert asked == [[]]
    tensors = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    assert tokens(export("tiny/llama", tmp_path / "other")) == expected
    assert asked == [[], [], ["pytorch_model*.bin"]]


@pytest.mark.parametrize(
    ("by_name", "shard_size", "mode"),
    [(True, "5GB", "copy"), (True, "80KB", "link"), (False, "5GB", "link"), (False, "80KB", "copy")],
)
def test_hub_cache(tmp_path, monkeypatch, expected, mode, shard_size, by_name):
    """snapshots/<revision>/model.safetensors is a symbolic link to ../../blobs/<hash>."""
    short().model.save_pretrained(tmp_path / "files", max_shard_size=shard_size)
    repository = tmp_path / "hub" / "models--tiny--llama"
    snapshot, blobs = repository / "snapshots" / ("c0ffee" * 6), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted((tmp_path / "files").iterdir())):
        blob = blobs / f"{index:064x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    bundle = export("tiny/llama" if by_name else snapshot, tmp_path / "out", "--weights", mode)
    assert bundle.manifest.model.name == ("tiny/llama" if by_name else snapshot.name)
    assert not any(path.is_symlink() for path in bundle.root.rglob("*"))
    stored = sorted(bundle.root.glob("weights/*.safetensors"))
    assert len(stored) == len(list(snapshot.glob("*.safetensors")))
    for file in stored:
        blob = blobs / file.stem
        assert filecmp.cmp(blob, file, shallow=False)
        assert (file.stat().st_ino == blob.stat().st_ino) == (mode == "link")
    assert tokens(bundle) == expected


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EXDEV, "another file system"), (errno.EPERM, "not permitted"), (errno.EMLINK, "links")]
)
def test_link_that_cannot_be_made(tmp_path, model, monkeypatch, capsys, code, reason):
    def fail(source: object, target: object, **_: Any) -> None:
        raise OSError(code, os.strerror(code), source, None, target)

    monkeypatch.setattr("os.link", fail)
    arguments = ["--model", str(model), "--out", str(tmp_path / "out"), "--weights", "link"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "cannot be linked" in message
    assert reason in message
    assert "--weights copy" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def other_file_system(tmp_path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no other file system here")
    with tempfile.TemporaryDirectory(dir=shared, prefix="lora-drop-test-") as directory:
        yield Path(directory)


def test_other_file_system(tmp_path, model, other_file_system, expected, capsys):
    bundle = export(model, other_file_system / "out")
    assert filecmp.cmp(model / "model.safetensors", bundle.root / "weights/model.safetensors", shallow=False)
    assert tokens(bundle) == expected
    arguments = ["--model", str(model), "--out", str(other_file_system / "linked"), "--weights", "link"]
    assert main(arguments) == 2
    assert "another file system" in capsys.readouterr().err
    assert [path.name for path in other_file_system.iterdir()] == ["out"]
    # The bundle itself can be moved across file systems
    moved = Path(shutil.move(bundle.root, tmp_path / "moved"))
    assert not bundle.root.exists()
    assert tokens(moved) == expected


def test_copy_is_whole(tmp_path):
    """More than one piece of it, with the progress that a bar needs."""
    content = np.random.default_rng(1).bytes(2 * CHUNK_BYTES + 12345)
    (tmp_path / "a").write_bytes(content)
    reported: list[tuple[int, int]] = []
    copy_file(tmp_path / "a", tmp_path / "b", lambda _, done, total: reported.append((done, total)))
    assert (tmp_path / "b").read_bytes() == content
    if reported:  # nothing is reported where the file system shares blocks
        assert reported[-1] == (len(content), len(content))
        assert [done for done, _ in reported] == sorted({done for done, _ in reported})
