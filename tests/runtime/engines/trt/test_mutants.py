"""Mutants of the engine and the session: each of these mistakes makes the comparison with ONNX Runtime fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import BundleError, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.request import Request
from lora_drop_runtime.decoding.slots import Run, Slots
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.engines.trt.engine import TrtEngine
from lora_drop_runtime.engines.trt.step import EngineStep
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.support import fake_trt
from tests.support.device_steps import LORA, RAGGED, REFRESH, assert_close, ort_steps, steps
from tests.support.fake_trt import open_device_session


def _rebind(change: Callable[[StepKind, dict[str, Any], dict[str, Any]], None]) -> tuple[Any, str, Any]:
    prepare = TrtEngine.prepare

    def changed(self: TrtEngine, kind: StepKind, inputs: Any, outputs: Any) -> Any:
        inputs, outputs = dict(inputs), dict(outputs)
        change(kind, inputs, outputs)
        return prepare(self, kind, inputs, outputs)

    return TrtEngine, "prepare", changed


def _swap_kv(only: StepKind, layer: int) -> tuple[Any, str, Any]:
    def change(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        if kind is only:
            for names, prefix in ((inputs, "past"), (outputs, "present")):
                key, value = f"{prefix}_key.{layer}", f"{prefix}_value.{layer}"
                names[key], names[value] = names[value], names[key]

    return _rebind(change)


def _swap_layers(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if kind is LORA:
        for names, prefix in ((inputs, "past"), (outputs, "present")):
            a, b = f"{prefix}_key.0", f"{prefix}_key.1"
            names[a], names[b] = names[b], names[a]


def _write_elsewhere(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if kind is LORA:
        outputs["present_key.5"] = outputs["present_value.0"]


def _no_state_write(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if kind is LORA:
        outputs["present_state.4"] = outputs["present_state.6"]


def _after_prefill(change: Callable[[Any], None]) -> tuple[Any, str, Any]:
    prefill = Request.prefill

    def changed(self: Any, ids: Any, lengths: Any) -> None:
        prefill(self, ids, lengths)
        change(self)

    return Request, "prefill", changed


def _kept_off_by_one(request: Any) -> None:
    request.kept = [length - 1 for length in request.kept]


def _dropped_off_by_one(request: Any) -> None:
    request.dropped = [length + 1 for length in request.dropped]


def _without_copy_of(name: str) -> tuple[Any, str, Any]:
    """The step no longer copies a host array in, once it has run a first time."""
    enqueue = EngineStep._enqueue

    def changed(self: Any) -> None:
        address = self._addresses.get(name)
        if self._ran:
            self._copies_in = [copy for copy in self._copies_in if copy[0] != address]
        enqueue(self)

    return EngineStep, "_enqueue", changed


def _prepared_as(kind: StepKind) -> tuple[Any, str, Any]:
    """Steps of one token run another kind."""
    prepare = Slots._prepare

    def changed(self: Slots, wanted: StepKind, first: int, end: int, width: int, *rest: int) -> Any:
        return prepare(self, kind if width == 1 else wanted, first, end, width, *rest)

    return Slots, "_prepare", changed


def _reversed_parts(self: Bundle, target: str, table: Any = Bundle.weight_inputs) -> Any:
    import dataclasses

    return {k: dataclasses.replace(w, parts=w.parts[::-1]) for k, w in table(self, target).items()}


def _front_chunks(self: Request, ids: Any, lengths: Any) -> None:
    """Chunks from the front, all rows together: rows that have ended run on padding and lose logits and state."""
    for begin in range(0, ids.shape[1], self._chunk):
        parts = ids[:, begin : begin + self._chunk].tolist()
        runs = [Run(REFRESH, part, *at) for part, *at in zip(parts, self.kept, self.dropped, strict=True)]
        self.slots.run(REFRESH, runs, range(self.batch), once=True)
        self.kept = np.minimum(lengths, begin + self._chunk).tolist()
        self.dropped = list(self.kept)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "none": (PeriodicSchedule, "kind", PeriodicSchedule.kind),
    "K and V of a kept layer swapped in the LoRA step": _swap_kv(LORA, 5),
    "K and V of a kept layer swapped in the refresh": _swap_kv(REFRESH, 5),
    "two layers' K swapped in the LoRA step": _rebind(_swap_layers),
    "a missing K write": _rebind(_write_elsewhere),
    "a missing state write": _rebind(_no_state_write),
    "the kept slot off by one": _after_prefill(_kept_off_by_one),
    "the dropped slot off by one": _after_prefill(_dropped_off_by_one),
    "a stale len_kept": _without_copy_of("len_kept"),
    "a stale len_dropped": _without_copy_of("len_dropped"),
    "stale ids": _without_copy_of("input_ids"),
    "a refresh where a LoRA step is due, and the reverse": (
        PeriodicSchedule,
        "kind",
        lambda self, step, last=None, kind=PeriodicSchedule.kind: kind(self, step + 1),
    ),
    "the refresh engine for a LoRA step": _prepared_as(REFRESH),
    "the LoRA engine for a refresh": _prepared_as(LORA),
    "the state's sides never change": (Slots, "accept", lambda _: None),
    "parts of fused weights in the wrong order": (Bundle, "weight_inputs", _reversed_parts),
    "caches that are not zeroed": (CudaDevice, "zero", lambda *_: None),
    "no wait for the step": (CudaDevice, "synchronize", lambda *_: None),
    "chunks from the front": (Request, "prefill", _front_chunks),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(bundle: Bundle, monkeypatch, name: str) -> None:
    expected = ort_steps(bundle, 2)
    monkeypatch.setattr(fake_trt.FakeExecutionContext, "checks_aliases", False)  # the logits alone have to tell
    monkeypatch.setattr(*MUTANTS[name])
    session, _, _ = open_device_session(bundle, 2)
    ours = steps(session)
    if name == "none":
        assert_close(ours, expected)
    else:
        with pytest.raises(AssertionError):
            assert_close(ours, expected)


@pytest.mark.parametrize("of_key", ["kind", "shapes"])
def test_a_graph_found_by_less_than_all_its_bindings_shows(bundle: Bundle, monkeypatch, of_key: str) -> None:
    """Captured graphs kept by step kind alone, or by kind and shapes but not by address (the state's sides)."""
    prepare = TrtEngine.prepare
    kept: dict[Any, Any] = {}

    def wrong(self: TrtEngine, kind: StepKind, inputs: Any, outputs: Any) -> Any:
        step = prepare(self, kind, inputs, outputs)
        shapes = tuple(value.shape for value in inputs.values()) if of_key == "shapes" else None
        return kept.setdefault((kind, shapes), step) if step.keeps_context else step

    monkeypatch.setattr(TrtEngine, "prepare", wrong)
    session, _, _ = open_device_session(bundle)
    if of_key == "kind":
        session.generate([*RAGGED, [1]], 9, k=2)  # a larger batch first, so that no buffer is replaced
    ours = steps(session, 2)
    with pytest.raises(AssertionError):
        assert_close(ours, ort_steps(bundle, 2))


def test_an_in_place_output_elsewhere_is_refused(bundle: Bundle, monkeypatch) -> None:
    monkeypatch.setattr(*MUTANTS["a missing K write"])
    session, _, _ = open_device_session(bundle)
    with session, pytest.raises(BundleError, match="cannot run a step") as caught:
        steps(session)
    assert "present_key.5 must be bound to the address of past_key.5" in caught.value.note
