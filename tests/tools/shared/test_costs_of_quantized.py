"""Eq. 9 counts operations: it says the same of a model whatever its weights are stored as."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Limits, Manifest, ModelFacts, SpecialTokens
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_tools import inspect
from lora_drop_tools.shared import costs

from tests.support.bundles import family, make_bundle, save_adapters

D, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 576, 9, 3, 64, 1536, 30  # SmolLM2-135M
MATRICES = 2 * D * HEADS * HEAD_DIM + 2 * D * KV_HEADS * HEAD_DIM + 3 * D * FFN
NORMS = 2 * D
DROPPED = (3, 4, 5, 6, 7, 13, 14)
RANK, K, CONTEXT = 64, 3, 1024


def manifest(weight_dtype: str, layer_bytes: float, quantization: dict[str, Any]) -> Manifest:
    model = ModelFacts(
        name="smol",
        model_type="llama",
        fingerprint="",
        num_layers=LAYERS,
        hidden_size=D,
        vocab_size=49152,
        num_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        context_length=2048,
        dtype="float32",
        windows=(0,) * LAYERS,
        layer_bytes=(int(layer_bytes),) * LAYERS,
        attention_bytes=(0,) * LAYERS,
        kv_bytes=(0,) * LAYERS,
        head_bytes=0,
        embedding_row_bytes=0,
        weight_dtype=weight_dtype,
    )
    plan = DropPlan(num_layers=LAYERS, sites=DROPPED, rank=RANK)
    return Manifest(model, plan, Limits(2048, 2048, 1), SpecialTokens(), quantization=quantization)


@pytest.mark.parametrize(
    ("weight_dtype", "bytes_per_weight", "quantization"),
    [
        ("float32", 4, {}),
        ("int8", 1 + 4 / 32, {"block_size": 32, "symmetric": True}),
        ("int4", 1 / 2 + (4 + 1 / 2) / 32, {"block_size": 32, "symmetric": False}),
        ("int4", 1 / 2 + 4 / 128, {"block_size": 128, "symmetric": True}),
        ("int8", 1, {"block_size": "channel", "symmetric": True}),
        ("float8_e4m3fn", 1, {"block_size": None, "symmetric": True}),
    ],
)
def test_equation_9(weight_dtype: str, bytes_per_weight: float, quantization: dict[str, Any]) -> None:
    """A float32 scale and a zero point for each block, norms as float32.

    Layers 3 to 7 share a matrix [d, d], which is smaller than their factors, 13 and 14 a pair of twice the rank.
    """
    stored = manifest(weight_dtype, MATRICES * bytes_per_weight + NORMS * 4, quantization)
    full = MATRICES + NORMS + 2 * HEADS * HEAD_DIM * CONTEXT  # QKᵀ and AV over the context
    surrogates = D * D + 2 * (2 * RANK) * D
    rho, rho_gamma = len(DROPPED) / LAYERS, surrogates / (LAYERS * full)
    expected = 1 / ((1 - rho) + rho / (K + 1) + K / (K + 1) * rho_gamma)
    assert costs.macs_speedup(stored, CONTEXT, K) == pytest.approx(expected, rel=2e-5)
    assert f"{costs.macs_speedup(stored, 128, K):.2f}" == "1.21"


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_inspect_prints_it(dtype: str | None, tmp_path: Path) -> None:
    """8 layers of 30848 parameters, two dropped; a down projection of 96 columns has smaller blocks than 32."""
    source = family("llama")
    plan = DropPlan(num_layers=8, sites=(3, 5))
    adapters = save_adapters(tmp_path / "adapters", plan, 64, source.checkpoint.fingerprint(), rank=16)
    bundle = make_bundle("llama", tmp_path / "bundle", drop_layers=(3, 5), adapters=adapters, dtype=dtype, k=3)
    out = io.StringIO()
    inspect(bundle.root, out=out)
    (line,) = [line for line in out.getvalue().splitlines() if line.split()[:1] == ["64"]]
    gamma = 2 * 16 * 64 / (30848 + 2 * 64 * 128)  # after 64 + 64 tokens
    assert line.split()[6] == f"{1 / (0.75 + 0.25 / 4 + 0.25 * 3 / 4 * gamma):.2f}×"
    assert Bundle.open(bundle.root).manifest.model.weight_dtype == (dtype or "float32")
