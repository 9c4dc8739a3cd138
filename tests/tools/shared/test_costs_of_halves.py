"""Bytes, multiply-adds and K/V of plans with halves, and under `fill`, counted again by hand."""

from __future__ import annotations

import pytest
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_tools.shared import costs

from tests.support.costs import (
    ATTENTION_WEIGHTS,
    HEAD_DIM,
    HEAD_WEIGHTS,
    HEADS,
    KV_HEADS,
    KV_WEIGHTS,
    LAYER_WEIGHTS,
    D,
    llama3_8b,
)

SITES = ("4", "6.attn", "7.attn", "9.mlp", "11.attn", "11.mlp")
# 2 layers, 2 attentions and an MLP; 4 attentions in all
SAVED = 2 * LAYER_WEIGHTS + 2 * ATTENTION_WEIGHTS + (LAYER_WEIGHTS - ATTENTION_WEIGHTS)
ENTRY = 2 * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_of_a_step(policy: str) -> None:
    manifest = llama3_8b(sites=SITES, rank=16, policy=policy, bare_sites=("6.attn",))
    kept, dropped = 1000, 300 if policy == "skip" else 1000
    adapters = 5 * 2 * 16 * D
    every = HEAD_WEIGHTS + D + 32 * LAYER_WEIGHTS
    refresh, lora = costs.step_bytes(manifest, kept, dropped)
    assert refresh == 2 * (every + 28 * (kept + 1) * ENTRY + 4 * (dropped + 1) * ENTRY)
    filled = 4 * (KV_WEIGHTS + ENTRY) if policy == "fill" else 0
    assert lora == 2 * (every - SAVED + 28 * (kept + 1) * ENTRY + adapters + filled)


def test_shares() -> None:
    share = costs.shares(llama3_8b(sites=SITES))
    assert share.attentions == 4 / 28
    assert share.weight_bytes == pytest.approx(SAVED / (28 * LAYER_WEIGHTS))
    assert share.rho == (SAVED // LAYER_WEIGHTS) / 28  # 3 whole layers would save as much or less
    filled = costs.shares(llama3_8b(sites=SITES, policy="fill"))
    assert filled.weight_bytes == pytest.approx((SAVED - 4 * KV_WEIGHTS) / (28 * LAYER_WEIGHTS))
    whole = costs.shares(llama3_8b())
    assert (whole.attentions, whole.weight_bytes, whole.rho) == (0.5, 0.5, 0.5)
    assert costs.shares(llama3_8b(injection="attn_mlp")) == whole


def test_a_plan_stands_under_a_ratio_only_when_it_reads_no_more() -> None:
    """All attentions of a quarter of the layers save less than one layer in ten."""
    share = costs.shares(llama3_8b(sites=tuple(f"{i}.attn" for i in range(3, 10))))
    assert 7 * ATTENTION_WEIGHTS < 2 * LAYER_WEIGHTS
    assert share.rho == 1 / 28
    assert share.attentions == 0.25


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_kv(policy: str, k: int) -> None:
    """Eq. 13 counts the layers whose attention is dropped; only `skip` saves."""
    manifest = llama3_8b(sites=SITES, policy=policy)
    how, steps = POLICIES[policy], 40 * (k + 1)
    kept, dropped = costs.kv_bytes(manifest, 100, steps, k, how)
    assert kept == 2 * ENTRY * 28 * (100 + steps)
    assert dropped == 2 * ENTRY * 4 * (100 + (steps // (k + 1) if policy == "skip" else steps))
    saving = 4 / 32 * (1 - 1 / (k + 1)) if policy == "skip" else 0
    assert costs.kv_saving(manifest, k, how) == pytest.approx(saving)


@pytest.mark.parametrize("policy", ["skip", "fill"])
@pytest.mark.parametrize("context", [0, 4096])
def test_equation_9(policy: str, context: int) -> None:
    manifest = llama3_8b(sites=SITES, rank=16, policy=policy)
    attending = 2 * HEADS * HEAD_DIM * context
    full = 32 * (LAYER_WEIGHTS + attending)
    filled = 4 * KV_WEIGHTS if policy == "fill" else 0
    lora = full - SAVED - 4 * attending + filled + 6 * 2 * 16 * D
    assert costs.macs_speedup(manifest, context, 3) == pytest.approx(4 * full / (full + 3 * lora))
