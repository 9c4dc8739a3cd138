"""Sessions opened, closed and side by side; adapters exchanged."""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from itertools import chain, islice

import numpy as np
import pytest
from lora_drop_runtime.bundle.bundle import record_file
from lora_drop_runtime.bundle.manifest import OrtEntry
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError, PlanError
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from safetensors.numpy import save_file

from tests.support.decoding import PLAN, RECURRENT, assert_refused, continued
from tests.support.fake_engine import HIDDEN, FakeEngine, make_manifest, open_session


def test_closing_frees_the_engine_once() -> None:
    with open_session(PLAN)[0] as session:
        engine = session._engine
        session.generate([1], 3)
    session.close()
    assert engine.times_closed == 1


def test_caches_are_freed_by_close_and_before_the_next_request_allocates() -> None:
    """An open stream does not keep them."""
    caches: list[list[weakref.ref[np.ndarray]]] = [[]]  # per request

    class Engine(FakeEngine):
        def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
            assert not any(ref() is not None for ref in chain.from_iterable(caches[:-1]))
            buffer = np.zeros(shape, dtype)
            if name.startswith("past_"):
                caches[-1].append(weakref.ref(buffer))
            return buffer

    session, engine = open_session(RECURRENT, engine=Engine(RECURRENT))
    streams = []
    for _ in range(2):
        streams.append(session.stream([4, 2], 9))
        list(islice(streams[-1], 6))
        engine.forget()
        assert [ref() is not None for ref in caches[-1]] == [True] * 12
        caches.append([])
    session.close()
    assert not any(ref() is not None for ref in chain.from_iterable(caches))


def test_two_sessions_do_not_touch_each_other() -> None:
    engine = FakeEngine(PLAN)
    one, _ = open_session(PLAN, k=2, engine=engine)
    two, _ = open_session(PLAN, k=0, engine=engine)
    streams = one.stream([4, 2], 9), two.stream([1, 2, 3], 9)
    tokens = list(zip(*streams, strict=True))
    assert [a for a, _ in tokens] == continued([4, 2], 9)
    assert [b for _, b in tokens] == continued([1, 2, 3], 9)


def test_load_adapters_replaces_them_and_ends_the_request(tmp_path) -> None:
    a, b = np.ones((2, HIDDEN), np.float32), np.full((HIDDEN, 2), 3, np.float32)
    tensors = {f"model.layers.{i}.lora_{part}.weight": x for i in (3, 4) for part, x in (("A", a * i), ("B", b * i))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    session, engine = open_session(RECURRENT)
    session.prefill(np.array([[1, 2]]), max_new_tokens=9)
    session.step([1])
    session.load_adapters(tmp_path)
    (weights,) = engine.adapters
    assert set(weights) == {f"surrogate.{layer}.lora_{part}" for layer in (3, 4) for part in "AB"}
    for layer in (3, 4):
        np.testing.assert_array_equal(weights[f"surrogate.{layer}.lora_A"], a * layer)
        np.testing.assert_array_equal(weights[f"surrogate.{layer}.lora_B"], b * layer * 4)  # s = alpha / r = 4
    assert_refused(lambda: session.step([1]), "no running request")
    assert list(session.stream([4, 2], 9)) == continued([4, 2], 9)
    plain, _ = open_session(PLAN)
    assert_refused(lambda: plain.load_adapters(tmp_path), "no room for adapters", "rank 0")
    session.close()
    assert_refused(lambda: session.load_adapters(tmp_path), "closed")


def test_open_refuses_before_it_loads_an_engine(tmp_path) -> None:
    """The bundle's graph is none, so loading it would fail with another error."""
    manifest = make_manifest(PLAN)
    ort = {"ort": OrtEntry("s.onnx")}
    for name, targets in (("ort", ort), ("none", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.onnx").write_bytes(b"no graph")
        files = {"s.onnx": record_file(tmp_path / name / "s.onnx")}
        written = dataclasses.replace(manifest, targets=targets, files=files)
        (tmp_path / name / "lora_drop.json").write_text(written.to_json())
    assert_refused(lambda: Session.open(tmp_path / "ort", policy="backfil"), "policy", "'backfil'", "skip")
    assert_refused(lambda: Session.open(tmp_path / "ort", threads=0), "threads", "0")
    assert_refused(lambda: Session.open(tmp_path / "ort", k=-1), "k is too small", "-1", error=PlanError)
    for name, options, fact, *note in (
        ("ort", {"provider": "npu"}, "provider", "'npu'", "cpu"),
        ("none", {}, "no target", "none"),
        ("ort", {"target": "rtx"}, "target", "'rtx'", "ort"),
        ("nowhere", {}, "no bundle", "nowhere"),
    ):
        call = functools.partial(Session.open, tmp_path / name, **options)
        assert_refused(call, fact, *note, error=BundleError)
    with pytest.raises(InputError, match="policy"):
        Session(open_session(PLAN)[0].bundle, FakeEngine(PLAN), PeriodicSchedule(3), policy="painless")
