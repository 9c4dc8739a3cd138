"""Adapters exchanged in device memory, and bfloat16 on the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lora_drop_runtime import InputError, Session
from lora_drop_runtime.dtypes import bfloat16_from_float32, float32_from_bfloat16

from tests.support.bundles import save_adapters
from tests.support.device_steps import assert_close, steps
from tests.support.fake_trt import TARGET, open_device_session


def test_load_adapters_is_what_onnx_runtime_does(bundles, tmp_path: Path) -> None:
    made = bundles("recurrent, attn_mlp")
    plan = made.manifest.plan
    matrices = {}
    generator = np.random.default_rng(9)
    for site in plan.sites:
        a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (64, 2)))
        matrices[site] = (SimpleNamespace(numpy=lambda a=a: a), SimpleNamespace(numpy=lambda b=b: b), 0.05)
    directory = save_adapters(tmp_path / "a", plan, 64, None, rank=2, matrices=matrices)
    session, engine, _ = open_device_session(made)
    with (
        session,
        Session.open(made.root, target="ort", threads=1) as other,
        Session.open(made.root, target=TARGET, provider="cpu", threads=1) as same_graphs,
    ):
        before = steps(session)
        captures = engine.captures
        for each in (session, other, same_graphs):
            each.load_adapters(directory)
        after = steps(session)
        assert engine.captures == captures  # the same memory, so the same graphs
        assert_close(after, steps(other))
        assert_close(after, steps(same_graphs))
        np.testing.assert_array_equal(before[0], after[0])
        assert np.abs(before[2] - after[2]).max() > 1e-2


def test_adapters_inside_the_engines_stay(bundles) -> None:
    made = bundles("recurrent", "llama", "constants")
    session, _, _ = open_device_session(made)
    with session, pytest.raises(InputError, match="cannot be replaced") as caught:
        session.load_adapters(made.root.parent / "adapters")
    assert "constants" in caught.value.note
    assert "--weight-sharing inputs" in caught.value.hint


def test_bfloat16_bits() -> None:
    import ml_dtypes

    generator = np.random.default_rng(2)
    bits = generator.integers(0, 2**32, 100_000, np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 1], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    ours = float32_from_bfloat16(bfloat16_from_float32(values))
    np.testing.assert_array_equal(ours, expected.astype(np.float32))
