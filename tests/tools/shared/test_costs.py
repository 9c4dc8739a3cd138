"""The paper's equations: the paper's worked examples, and the same arithmetic written a second time."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from lora_drop_runtime.bundle.manifest import Manifest, ModelFacts
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_tools.shared import costs

from tests.support.costs import HEAD_DIM, HEAD_WEIGHTS, HEADS, KV_HEADS, LAYER_WEIGHTS, D, llama3_8b

WINDOWS = (0, 1, 2, 3, 5, 19)


# ── worked examples ────────────────────────────────────────────────────────────────────────────────────────────


def test_equation_10_worked() -> None:
    """n = 32, a = 4, ρ = 0.5, k = 3: 4 / (4 − 1.3125) = 1.488."""
    assert costs.asymptotic_speedup(llama3_8b(), 3) == pytest.approx(4 / 2.6875)
    assert f"{costs.asymptotic_speedup(llama3_8b(), 3):.3f}" == "1.488"
    # The note under Table III: 0.75 and k = 5 give 2.207, with 21 of 32 layers.
    assert f"{costs.asymptotic_speedup(llama3_8b(0.75), 5):.3f}" == "2.207"
    assert costs.asymptotic_speedup(llama3_8b(), 0) == 1


def test_equation_16_worked() -> None:
    """n = 32, a = 4, p = 0.5, w = 4: 0.875 · 0.5 · 0.75 = 32.8 %."""
    assert costs.kv_saving(llama3_8b(), 3) == pytest.approx(0.875 * 0.5 * 0.75)
    assert f"{costs.kv_saving(llama3_8b(), 3):.1%}" == "32.8%"
    assert costs.kv_saving(llama3_8b(), 0) == 0


def test_layers_with_a_window_read_no_more_than_it_has() -> None:
    """Of 32 layers every second one sees 128 tokens: at 4095 before, 16 · 4096 + 16 · 128 entries of 4 KiB."""
    manifest = llama3_8b(0.0)
    windowed = replace(manifest, model=replace(manifest.model, windows=(0, 128) * 16))
    (refresh, _), (less, _) = (costs.step_bytes(one, 4095, 4095) for one in (manifest, windowed))
    assert refresh - less == 16 * (4096 - 128) * 4096
    assert costs.step_bytes(manifest, 100, 100) == costs.step_bytes(windowed, 100, 100)
    assert costs.kv_base_bytes(windowed, 4096) == costs.kv_base_bytes(manifest, 4096)  # which are stored


def test_equation_12_worked() -> None:
    """LLaMA3-8B at 4096 tokens: 4096 · 32 · 2 · 8 · 128 · 2 B = 512 MiB."""
    assert costs.kv_base_bytes(llama3_8b(), 4096) == 512 * 2**20
    assert costs.kv_base_bytes(llama3_8b(dtype="float32"), 4096) == 1024 * 2**20


def test_equation_11_worked() -> None:
    """p95 is the refresh's for every k < 19."""
    assert [k for k in range(60) if costs.quantile_is_refresh(k, 0.95)] == list(range(19))
    assert [k for k in range(60) if costs.quantile_is_refresh(k, 0.5)] == [0]
    assert costs.slow_share(3) == 0.25
    assert costs.slow_share(0) == 1


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 0.99])
def test_equation_11_without_rounding(quantile: float) -> None:
    """At `1/(k+1) = 1 − p` exactly, the quantile is the LoRA step's; 1 − 0.9 is no float."""
    slow = 1 - Fraction(str(quantile))
    for k in range(120):
        assert costs.quantile_is_refresh(k, quantile) == (Fraction(1, k + 1) > slow), k


# ── the same arithmetic again ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize("context", [0, 1, 500, 8192])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("injection", ["block", "attn_mlp"])
def test_equation_9(k: int, context: int, rank: int, injection: str) -> None:
    """The mean over a cycle of multiply-adds in layers, over all of them: what Eq. 9 abbreviates."""
    manifest = llama3_8b(rank=rank, injection=injection)
    full = LAYER_WEIGHTS + 2 * HEADS * HEAD_DIM * context  # Q·Kᵀ and A·V
    surrogate = 2 * rank * D * (1 if injection == "block" else 2)
    refresh = 32 * full
    lora = 18 * full + 14 * surrogate
    assert costs.macs_speedup(manifest, context, k) == pytest.approx((k + 1) * refresh / (refresh + k * lora))


def test_equation_9_tends_to_equation_10() -> None:
    manifest = llama3_8b(rank=16)
    assert costs.macs_speedup(manifest, 10**9, 3) == pytest.approx(costs.asymptotic_speedup(manifest, 3), rel=1e-5)
    assert costs.macs_speedup(manifest, 0, 3) < costs.macs_speedup(manifest, 10**6, 3)
    assert costs.macs_speedup(llama3_8b(), 0, 3) == pytest.approx(costs.asymptotic_speedup(llama3_8b(), 3))


@pytest.mark.parametrize("k", WINDOWS)
def test_kv_of_a_request(k: int) -> None:
    """T + m entries in a kept layer, T + ⌊m/(k+1)⌋ in a dropped one."""
    manifest = llama3_8b()
    for prompt, steps in ((1, 0), (100, k), (100, k + 1), (1000, 777)):
        dropped = prompt + len([j for j in range(1, steps + 1) if j % (k + 1) == 0])
        assert costs.kv_entries(prompt, steps, k) == (prompt + steps, dropped)
        exact = prompt + max((j for j in range(steps + 1) if j % (k + 1) == 0), default=0)
        assert costs.kv_entries(prompt, steps, k, POLICIES["backfill"]) == (prompt + steps, exact)
        assert costs.kv_bytes(manifest, prompt, steps, k) == (
            18 * (prompt + steps) * 2 * KV_HEADS * HEAD_DIM * 2,
            14 * dropped * 2 * KV_HEADS * HEAD_DIM * 2,
        )
    # Generated tokens alone, over whole cycles: Eq. 16.
    before, after = (sum(costs.kv_bytes(manifest, 100, steps, k)) for steps in (0, 40 * (k + 1)))
    full = costs.kv_base_bytes(manifest, 40 * (k + 1))
    assert 1 - (after - before) / full == pytest.approx(costs.kv_saving(manifest, k))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rank", [0, 16])
def test_bytes_of_a_step(dtype: str, rank: int) -> None:
    """Weights read, valid K/V read and K/V written; lm_head whole, the embedding one row, adapters on LoRA steps."""
    manifest = llama3_8b(dtype=dtype, rank=rank)
    size = 4 if dtype == "float32" else 2
    entry = 2 * KV_HEADS * HEAD_DIM
    kept, dropped = 1000, 300  # valid entries before the step
    outside = HEAD_WEIGHTS + D
    kept_layers = 18 * (LAYER_WEIGHTS + kept * entry + entry)
    dropped_layers = 14 * (LAYER_WEIGHTS + dropped * entry + entry)
    adapters = 14 * (rank * D + D * rank)
    refresh, lora = costs.step_bytes(manifest, kept, dropped)
    assert refresh == size * (outside + kept_layers + dropped_layers)
    assert lora == size * (outside + kept_layers + adapters)


def test_layers_of_different_sizes() -> None:
    """A quantized or pruned model: each layer's own bytes count."""
    manifest = llama3_8b()
    layer_bytes = tuple(1000 * (i + 1) for i in range(32))
    others = {"attention_bytes": (0,) * 32, "kv_bytes": (0,) * 32, "head_bytes": 7, "embedding_row_bytes": 5}
    model = ModelFacts(**{**vars(manifest.model), "layer_bytes": layer_bytes, **others})
    manifest = Manifest(model, manifest.plan, manifest.limits, manifest.special_tokens)
    refresh, lora = costs.step_bytes(manifest, 0, 0)
    entry_bytes = 2 * KV_HEADS * HEAD_DIM * 2
    assert refresh == 12 + 1000 * 32 * 33 // 2 + 32 * entry_bytes
    dropped = sum(i + 1 for i in range(4, 31, 2))  # layers 4, 6, …, 30
    assert lora == refresh - 1000 * dropped - 14 * entry_bytes


@pytest.mark.parametrize(("rows", "share"), [(1, 0.25), (2, 1 - 0.75**2)])
def test_experts_that_no_token_is_sent_to_are_not_read(rows: int, share: float) -> None:
    """Half of each layer's bytes are those of experts, a quarter of which a token reads."""
    manifest = llama3_8b()
    facts = vars(manifest.model)
    of_experts = tuple(size // 2 for size in facts["layer_bytes"])
    model = ModelFacts(**{**facts, "expert_bytes": of_experts, "expert_share": 0.25})
    mixture = Manifest(model, manifest.plan, manifest.limits, manifest.special_tokens)
    before, after = (costs.step_bytes(one, 100, 100, rows) for one in (manifest, mixture))
    unread = of_experts[0] * (1 - share)
    assert before[0] - after[0] == pytest.approx(32 * unread)
    assert before[1] - after[1] == pytest.approx(18 * unread)
    assert costs.full_layer_macs(mixture, 0) == pytest.approx(costs.full_layer_macs(manifest, 0) * (0.5 + 0.5 * 0.25))


def test_a_refresh_of_several_tokens_reads_their_experts() -> None:
    """Under backfill k + 1 tokens are sent to experts at once, and of k LoRA steps each one token."""
    manifest = llama3_8b()
    facts = vars(manifest.model)
    of_experts = tuple(size // 2 for size in facts["layer_bytes"])
    model = ModelFacts(**{**facts, "expert_bytes": of_experts, "expert_share": 0.25})
    mixture = Manifest(model, manifest.plan, manifest.limits, manifest.special_tokens)
    kinds = costs.periodic_kinds(8, 3)
    by_one, by_four = (
        costs.bytes_of_steps(mixture, 100, kinds, policy=POLICIES[name]) for name in ("fill", "backfill")
    )
    more = 32 * of_experts[0] * (0.75 - 0.75**4)
    entries = [after - before for before, after in zip(by_one, by_four, strict=True)]
    assert entries[3] == pytest.approx(more, rel=1e-3)
    assert entries[7] == pytest.approx(more, rel=1e-3)
    dense = [costs.bytes_of_steps(manifest, 100, kinds, policy=POLICIES[name])[3] for name in ("fill", "backfill")]
    assert dense[0] == pytest.approx(dense[1], rel=1e-3)
    ceiling = costs.speedup_ceiling(mixture, 100, 8, 3, POLICIES["backfill"])
    full, lora = costs.step_bytes(mixture, 108, 108)
    assert ceiling == pytest.approx(4 * full / (3 * lora + full + more), rel=1e-3)


@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize(("prompt", "steps"), [(1, 0), (128, 128), (4000, 4000)])
def test_ceiling(k: int, rank: int, prompt: int, steps: int) -> None:
    """(k+1) · bytes of the full schedule / (bytes of a refresh + k · bytes of a LoRA step)."""
    manifest = llama3_8b(rank=rank)
    entry = 2 * KV_HEADS * HEAD_DIM
    kept = prompt + steps
    dropped = prompt + steps // (k + 1)
    outside = HEAD_WEIGHTS + D
    full = outside + 32 * (LAYER_WEIGHTS + (kept + 1) * entry)
    refresh = outside + 18 * (LAYER_WEIGHTS + (kept + 1) * entry) + 14 * (LAYER_WEIGHTS + (dropped + 1) * entry)
    lora = outside + 18 * (LAYER_WEIGHTS + (kept + 1) * entry) + 14 * 2 * rank * D
    expected = (k + 1) * full / (refresh + k * lora)
    assert costs.speedup_ceiling(manifest, prompt, steps, k) == pytest.approx(expected)
    if k == 0:
        assert expected == 1


def test_nothing_dropped_gains_nothing() -> None:
    manifest = llama3_8b(0.0, rank=0)
    assert costs.speedup_ceiling(manifest, 100, 100, 3) == 1
    assert costs.macs_speedup(manifest, 100, 3) == 1
    assert costs.asymptotic_speedup(manifest, 3) == 1
    assert costs.kv_saving(manifest, 3) == 0


@pytest.mark.parametrize(("rows", "k"), [(4, 3), (8, 1)])
def test_operations_limit_a_batch(rows: int, k: int) -> None:
    """By hand: LLaMA3-8B without context, k LoRA steps at their share of the bytes, a refresh as it was timed."""
    manifest = llama3_8b(0.5)
    own = 2 * (LAYER_WEIGHTS * 32 + HEAD_WEIGHTS) + rows * 2 * D + rows * 32 * 2 * 2 * KV_HEADS * HEAD_DIM
    dropped = len(manifest.plan.dropped_layers)
    saved = 2 * LAYER_WEIGHTS * dropped + rows * dropped * 2 * 2 * KV_HEADS * HEAD_DIM
    step, refresh = 0.125, 0.5
    wanted = (k + 1) * step / (k * step * (own - saved) / own + refresh)
    assert costs.operations_ceiling(manifest, 0, k, rows, step, refresh) == pytest.approx(wanted)
