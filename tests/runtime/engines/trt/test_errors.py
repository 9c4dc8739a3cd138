"""Everything is freed whatever fails, and every failure is told with its reason."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import BundleError, InputError, Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.errors import NoDeviceError

from tests.support import fake_trt
from tests.support.bundles import record_again
from tests.support.device_steps import RAGGED, assert_close, ort_steps, steps
from tests.support.fake_cuda import FakeCuda, cudaError_t
from tests.support.fake_trt import TARGET, FakeTrt, change_manifest, open_device_session


def test_everything_is_freed(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    session.generate(RAGGED, 9)
    stream = session.stream(RAGGED[0], 9)
    next(stream)
    assert {"blocks", "pinned", "streams", "executables", "users"} <= set(cuda.live)
    session.close()
    session.close()
    engine.close()
    assert not cuda.live
    with pytest.raises(InputError, match="closed"):
        next(stream)


def test_everything_is_freed_whichever_call_fails(bundle: Bundle) -> None:
    """CUDA fails at each of its calls in turn, while opening, in a request and in capture."""
    session, _, cuda = open_device_session(bundle)
    opened = cuda.called
    session.generate(RAGGED[:1], 6)
    used = cuda.called
    session.close()
    assert opened > 40
    step = used // 40
    for number in [*range(1, 8), *range(8, used, step)]:
        cuda = FakeCuda()
        cuda.fail_at_call = number
        try:
            session, engine, _ = open_device_session(bundle, cuda=cuda)
        except BundleError:
            assert number <= opened
        else:
            with session:
                try:
                    session.generate(RAGGED[:1], 6)
                except BundleError as error:
                    reason = error.note
                else:  # a capture that failed
                    reason = engine.capture_note
            assert "cudaErrorIllegalAddress" in reason
        assert not cuda.live, f"call {number} of {opened} and {used}"


def test_a_step_that_fails_in_tensorrt(bundle: Bundle, monkeypatch) -> None:
    session, _, cuda = open_device_session(bundle)
    session.generate(RAGGED, 3)
    monkeypatch.setattr(
        fake_trt.FakeExecutionContext, "execute_async_v3", lambda self, _: self._refuse("cuBLAS has failed")
    )
    with pytest.raises(BundleError, match="cannot run a step") as caught:
        session.generate(RAGGED, 3)
    assert "cuBLAS has failed" in caught.value.note
    session.close()
    assert not cuda.live


def refused(call: Callable[[], Any], fact: str, *note: str, error: type[BundleError] = BundleError) -> None:
    with pytest.raises(BundleError) as caught:
        call()
    assert type(caught.value) is error
    assert fact in caught.value.fact
    for value in note:
        assert value in caught.value.note
    assert caught.value.hint


def test_no_driver_no_gpu(bundle: Bundle) -> None:
    cuda = FakeCuda()
    cuda.fail["cudaGetDeviceCount"] = cudaError_t.cudaErrorInsufficientDriver
    refused(lambda: CudaDevice(cuda), "no GPU", "cudaErrorInsufficientDriver in words", error=NoDeviceError)
    cuda = FakeCuda()
    cuda.cudaGetDeviceCount = lambda: (cudaError_t.cudaSuccess, 0)  # type: ignore[method-assign]
    refused(lambda: CudaDevice(cuda), "no GPU", "0 devices", error=NoDeviceError)


def test_another_gpu_architecture(bundle: Bundle) -> None:
    cuda = FakeCuda(capability=(9, 0))
    call = functools.partial(open_device_session, bundle, cuda=cuda)
    refused(call, "other GPUs", "9.0", "8.6, 8.9, 12.0", error=NoDeviceError)
    assert not cuda.live


def test_another_version_of_tensorrt(bundle: Bundle) -> None:
    cuda = FakeCuda()
    call = functools.partial(open_device_session, bundle, cuda=cuda, trt=FakeTrt(cuda, version="1.8.0.1"))
    refused(call, "cannot load an engine", "1.7.1.116", "1.8.0.1", "plan file is not compatible: expecting 1.8.0.1")
    assert not cuda.live


@pytest.mark.parametrize("module", ["tensorrt_rtx", "cuda.bindings.runtime"])
def test_a_module_that_is_not_installed(bundle: Bundle, monkeypatch, module: str) -> None:
    import importlib

    def missing(name: str) -> Any:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return SimpleNamespace()

    monkeypatch.setattr(importlib, "import_module", missing)
    fact = "library of the target" if module == "tensorrt_rtx" else "CUDA bindings"
    with pytest.raises(BundleError, match=fact) as caught:
        Session.open(bundle.root, target=TARGET)
    assert module in caught.value.note
    assert "pip install" in caught.value.hint


def test_out_of_device_memory(bundle: Bundle) -> None:
    cuda = FakeCuda(memory_bytes=1 << 20)
    refused(
        lambda: open_device_session(bundle, cuda=cuda),
        "out of memory",
        "The weights",
        "free are 1.0 of 1.0",
        error=NoDeviceError,
    )
    assert not cuda.live


@pytest.mark.parametrize(
    ("size", "buffer"), [(1_250_000, "buffer past_"), (1_684_500, "buffer state."), (1_689_500, "buffer logits")]
)
def test_a_smaller_request_gets_the_memory_of_one_that_did_not_fit(bundle: Bundle, size: int, buffer: str) -> None:
    cuda = FakeCuda(memory_bytes=size)
    session, _, _ = open_device_session(bundle, cuda=cuda)
    with session:
        refused(lambda: session.generate([[1, 2, 3]] * 4, 5), "out of memory", buffer, "MiB", error=NoDeviceError)
        assert len(session.generate([[1, 2, 3]], 5)[0]) == 5  # and goes on with what fits
    assert not cuda.live


def test_the_plugin_library(copy: Bundle, monkeypatch, tmp_path: Path) -> None:
    entry = copy.manifest.targets[TARGET]
    assert isinstance(entry, TrtEntry)
    made = change_manifest(copy, dataclasses.replace(entry, form="plugin"))
    library = tmp_path / "plugin.so"
    monkeypatch.setenv("LORA_DROP_PLUGIN_LIB", str(library))
    cuda = FakeCuda()
    trt = FakeTrt(cuda)
    call = functools.partial(open_device_session, made, cuda=cuda, trt=trt)
    refused(call, "attention plugin is needed", str(library))
    library.write_bytes(b"something else")
    refused(call, "plugin cannot be loaded", "invalid ELF header")
    assert not cuda.live
    library.write_bytes(b"a plugin library")
    session, _, _ = call()
    again, _, _ = open_device_session(made, cuda=FakeCuda(), trt=trt)  # a library loads once in a process
    assert trt.libraries == [str(library)]
    again.close()
    assert_close(steps(session, 1), ort_steps(made, 1))
    session.close()
    assert trt.libraries == [str(library)]  # engines may outlive whoever loaded it
    monkeypatch.delenv("LORA_DROP_PLUGIN_LIB")
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    refused(call, "attention plugin is needed", "plugins/build/liblora_drop_plugin.so")


def test_engines_for_newer_gpus_and_versions(copy: Bundle) -> None:
    """hardware_compatible: any GPU from Ampere on; version_compatible: the engine brings code, to be allowed."""
    entry = copy.manifest.targets[TARGET]
    assert isinstance(entry, TrtEntry)
    newer = FakeCuda(capability=(10, 3))
    refused(lambda: open_device_session(copy, cuda=newer), "other GPUs", "10.3", "8.6", error=NoDeviceError)
    made = change_manifest(copy, dataclasses.replace(entry, hardware_compatible=True))
    for capability in ((8, 0), (10, 3)):
        session, _, _ = open_device_session(made, cuda=FakeCuda(capability=capability))
        session.close()
    refused(
        lambda: open_device_session(made, cuda=FakeCuda(capability=(7, 5))), "other GPUs", "7.5", error=NoDeviceError
    )
    for kind in StepKind:
        path = copy.root / entry.engine(kind)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host_code": True}))
    refused(lambda: open_device_session(copy), "cannot load an engine", "host code")
    session, _, _ = open_device_session(change_manifest(copy, dataclasses.replace(entry, version_compatible=True)))
    session.close()


def test_a_damaged_table_of_weights(copy: Bundle) -> None:
    path = copy.root / TARGET / "weights.json"
    table = json.loads(path.read_text())
    name = "model.norm.weight"
    whole = table[name]
    size = path.stat().st_size
    for entry, fact in (
        ({**whole, "parts": [[*whole["parts"][0][:2], 128]]}, "table of weights is damaged"),
        ({**whole, "shape": [65]}, "table of weights is damaged"),
        ({**whole, "shape": [-64]}, "table of weights is damaged"),
        ({**whole, "dtype": 1}, "table of weights is damaged"),
        ({**whole, "dtype": "complex"}, "table of weights is damaged"),
        (None, "does not fit the bundle's manifest"),
        ({**whole, "parts": [["../secret", *whole["parts"][0][1:]]]}, "names weights that are not there"),
        ({**whole, "parts": [[whole["parts"][0][0], 10**9, whole["parts"][0][2]]]}, "names weights that are not there"),
    ):
        text = json.dumps({k: v for k, v in {**table, name: entry}.items() if v is not None})
        path.write_text(text.ljust(size))
        record_again(copy.root)
        refused(lambda: open_device_session(Bundle.open(copy.root)), fact)


def test_a_step_outside_the_profiles(copy: Bundle) -> None:
    entry = copy.manifest.targets[TARGET]
    assert isinstance(entry, TrtEntry)
    made = change_manifest(copy, dataclasses.replace(entry, prefill_chunk=5))
    session, _, _ = open_device_session(made)
    with session:
        refused(lambda: session.prefill(np.array([[1, 2, 3, 4, 5]])), "not built", "(1, 5)", "(1, 1) to (4, 4)")


def test_a_signal_in_the_logger_s_callback_is_not_lost(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings drop what a callback raises: a stand-in calls the logger and drops it likewise."""
    deserialize, logged = fake_trt.FakeRuntime.deserialize_cuda_engine, []

    def calls_back(self: fake_trt.FakeRuntime, serialized_engine: bytes) -> Any:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)  # to this thread, at once
            self._logger.log(fake_trt.ILogger.Severity.WARNING, "a line")
        logged.extend(self._logger.warnings)
        return deserialize(self, serialized_engine)

    monkeypatch.setattr(fake_trt.FakeRuntime, "deserialize_cuda_engine", calls_back)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    cuda = FakeCuda()
    try:
        with pytest.raises(KeyboardInterrupt):
            open_device_session(bundle, cuda=cuda)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert logged == ["a line"]
    assert not cuda.live
