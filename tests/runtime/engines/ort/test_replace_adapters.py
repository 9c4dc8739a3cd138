"""Adapters that ONNX Runtime cannot take: those from before go on working, or every later step says what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from lora_drop_runtime import BundleError, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.ort.device_memory import DeviceMemory

from tests.support.bundles import make_bundle, save_adapters

PROMPT = np.array([[7, 3, 11]])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle("llama", tmp_path_factory.mktemp("replaced") / "b", rank=2)


@pytest.fixture(scope="module")
def adapters(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sets that differ."""
    model, plan = bundle.manifest.model, bundle.manifest.plan
    root = tmp_path_factory.mktemp("adapters")
    first = save_adapters(root / "first", plan, model.hidden_size, model.fingerprint, rank=2)
    second = save_adapters(root / "second", plan, model.hidden_size, model.fingerprint, rank=2)
    tensors = root / "second" / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-4:] = np.float32(3).tobytes()
    tensors.write_bytes(bytes(data))
    return first, second


def lora_logits(session: Session) -> np.ndarray:
    session.prefill(PROMPT, max_new_tokens=4, k=3)
    return session.step([5]).copy()


class Refusing:
    """Stands for onnxruntime.InferenceSession; opens, but for the openings that are named by number."""

    def __init__(self, *refused: int) -> None:
        self.refused = refused
        self.real = onnxruntime.InferenceSession
        self.count = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count in self.refused:
            raise RuntimeError(f"out of memory, opening {self.count}")
        return self.real(*arguments, **options)


def test_the_adapters_from_before_go_on_working(bundle: Bundle, adapters: tuple[Path, Path], monkeypatch) -> None:
    """Those of the export, then those that were loaded."""
    first, second = adapters
    with Session.open(bundle.root, threads=1) as session:
        exported = lora_logits(session)
        monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing(1))
        with pytest.raises(BundleError, match="opening 1"):
            session.load_adapters(first)
        np.testing.assert_array_equal(lora_logits(session), exported)
        session.load_adapters(first)
        loaded = lora_logits(session)
        assert np.abs(loaded - exported).max() > 1e-3
        monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing(1))
        with pytest.raises(BundleError, match="opening 1"):
            session.load_adapters(second)
        np.testing.assert_array_equal(lora_logits(session), loaded)
        session.load_adapters(second)
        assert np.abs(lora_logits(session) - loaded).max() > 1e-3


def test_an_interruption_leaves_the_adapters_from_before(
    bundle: Bundle, adapters: tuple[Path, Path], monkeypatch
) -> None:
    with Session.open(bundle.root, threads=1) as session:
        exported = lora_logits(session)
        real, interrupted = onnxruntime.InferenceSession, []

        def interrupting(*arguments: Any, **options: Any) -> Any:
            if not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(onnxruntime, "InferenceSession", interrupting)
        with pytest.raises(KeyboardInterrupt):
            session.load_adapters(adapters[0])
        np.testing.assert_array_equal(lora_logits(session), exported)


def test_every_later_step_says_what_happened(bundle: Bundle, adapters: tuple[Path, Path], monkeypatch) -> None:
    """When the graphs cannot be had again at all: the first error is told, and no step ends in a KeyError."""
    with Session.open(bundle.root, threads=1) as session:
        exported = lora_logits(session)
        monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing(1, 2))
        with pytest.raises(BundleError, match="opening 1"):
            session.load_adapters(adapters[0])
        for _ in range(2):
            with pytest.raises(BundleError, match="has no graphs") as caught:
                lora_logits(session)
            assert "from before" in caught.value.note
            assert "Session.open" in caught.value.hint
        session.load_adapters(adapters[0])  # there is memory again
        assert np.abs(lora_logits(session) - exported).max() > 1e-3


def test_device_memory_is_replaced_where_it_lies(monkeypatch) -> None:
    """With OrtValues in host memory in the place of the GPU's: CUDA graphs hold the addresses."""
    monkeypatch.setattr(DeviceMemory, "device_type", "cpu")
    memory = DeviceMemory(onnxruntime, None)
    buffers = [memory.hold(name, np.full(8, value, np.uint8), (8,), "uint8") for value, name in enumerate("AB")]
    memory.replace("A", np.full(8, 10, np.uint8))
    for buffer, value in zip(buffers, (10, 1), strict=True):  # `read` asserts the address
        np.testing.assert_array_equal(memory.read(buffer), np.full(8, value, np.uint8))
