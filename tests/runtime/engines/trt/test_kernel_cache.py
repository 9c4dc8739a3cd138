"""Kernels that TensorRT-RTX compiled are kept between sessions; a profile that is refused is an error."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from lora_drop_runtime import BundleError
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.trt.kernel_cache import CACHE_VARIABLE

from tests.support import fake_trt
from tests.support.device_steps import RAGGED
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_trt import FakeTrt, open_device_session


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bool]]:
    """What caches were given, and whether they took it."""
    seen: list[tuple[bytes, bool]] = []
    deserialize = fake_trt.FakeRuntimeCache.deserialize

    def look(self: fake_trt.FakeRuntimeCache, blob: bytes) -> bool:
        seen.append((blob, deserialize(self, blob)))
        return seen[-1][1]

    monkeypatch.setattr(fake_trt.FakeRuntimeCache, "deserialize", look)
    return seen


def run(bundle: Bundle, trt: FakeTrt | None = None) -> None:
    cuda = FakeCuda() if trt is None else trt.cuda
    session = open_device_session(bundle, cuda=cuda, trt=trt)[0]
    session.generate(RAGGED, 9)
    session.close()


def test_kernels_are_kept_for_the_next_session(bundle, folder, loaded):
    before = {file: file.read_bytes() for file in bundle.root.rglob("*") if file.is_file()}
    run(bundle)
    assert loaded == []
    files = {file: file.read_bytes() for file in folder.iterdir()}
    assert set(files.values()) == {b"compiled:k"}
    assert len(files) == 2  # a refresh engine and a LoRA engine
    run(bundle)
    assert loaded == [(b"compiled:k", True)] * 2
    assert {file: file.read_bytes() for file in folder.iterdir()} == files
    assert {file: file.read_bytes() for file in bundle.root.rglob("*") if file.is_file()} == before


def test_what_the_library_refuses_is_replaced(bundle, folder, loaded):
    """As after an update of the driver."""
    run(bundle)
    for file in folder.iterdir():
        file.write_bytes(b"of another driver")
    run(bundle)
    assert loaded == [(b"of another driver", False)] * 2
    assert {file.read_bytes() for file in folder.iterdir()} == {b"compiled:k"}


def test_a_folder_that_cannot_be_written_is_no_error(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    run(bundle)


def test_a_full_disk_keeps_no_part(bundle, folder, monkeypatch):
    """Each session would leave one, of a name of its own."""
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    run(bundle)
    assert list(folder.iterdir()) == []


def test_tensorrt_compiles_nothing_when_it_runs(bundle, folder):
    run(bundle, FakeTrt(FakeCuda(), rtx=False))
    assert not folder.exists()


def test_a_refused_profile_is_an_error(bundle):
    """The bindings raise; nothing of it was caught, and the reason was lost."""
    trt = FakeTrt(FakeCuda())
    session = open_device_session(bundle, cuda=trt.cuda, trt=trt)[0]
    trt.refuses_profiles = True
    with pytest.raises(BundleError, match=r"refuses an optimization profile[\s\S]*the profile cannot be set"):
        session.generate(RAGGED, 2)
    session.close()
    assert not trt.cuda.live
