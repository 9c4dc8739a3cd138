"""What the paper's equations predict for a bundle.

Enters: a manifest, a context length. Leaves: costs per step, speed-ups, bytes of K/V (docs/algorithm.md).
Costs are multiply-adds per token in Eqs. 5–10 and bytes in the ceiling, because decoding is bound by bytes.
"""

from __future__ import annotations

from lora_drop_runtime.bundle.manifest import QUANTIZED_DTYPES, Manifest
from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES, Policy
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

_SKIP = POLICIES[DEFAULT_POLICY]  # the paper's, whose equations these are


def _bits_per_weight(manifest: Manifest) -> float:
    """What a layer's weight takes in the bundle: a quantized one with its share of a scale and a zero point.

    As if all of a layer were in blocks of the size that was asked for. Norms are not, nor a matrix whose rows that size
    does not divide: counted so they are a few per cent too many, which γ in Eq. 9 hardly shows.
    """
    model, how = manifest.model, manifest.quantization
    if model.weight_dtype not in QUANTIZED_DTYPES:
        return BY_NAME[model.dtype].bits
    value = BY_NAME[model.weight_dtype].bits
    of_block = BY_NAME["float32"].bits + (0 if how["symmetric"] else value)
    return value + of_block / int(how["block_size"])


def full_layer_macs(manifest: Manifest, context: int) -> float:
    """Eq. 5: `C_full(L) = A d² + B d L`, here a layer's weights plus QKᵀ and AV over L positions.

    Each weight is one multiply-add, in however few bytes it is stored.
    """
    model = manifest.model
    weights = sum(model.layer_bytes) / model.num_layers * 8 / _bits_per_weight(manifest)
    return weights + 2 * model.num_heads * model.head_dim * context


def surrogate_macs(manifest: Manifest) -> float:
    """Eq. 6: `C_LoRA = Θ(r d)`: two products per surrogate, `2 r d` each."""
    sites = len(manifest.plan.sites) / max(1, len(manifest.plan.drop_layers))
    return 2 * manifest.plan.rank * manifest.model.hidden_size * sites


def macs_speedup(manifest: Manifest, context: int, k: int) -> float:
    """Eq. 9: `S(L) = 1 / [(1 − ρ) + ρ/(k+1) + (ρk/(k+1)) γ(L)]`, with Eq. 8's γ."""
    rho = manifest.plan.rho_eff
    gamma = surrogate_macs(manifest) / full_layer_macs(manifest, context)
    return 1 / ((1 - rho) + rho / (k + 1) + rho * k / (k + 1) * gamma)


def asymptotic_speedup(manifest: Manifest, k: int) -> float:
    """Eq. 10: `S_∞ = (k+1) / ((k+1) − ρk)`."""
    return (k + 1) / ((k + 1) - manifest.plan.rho_eff * k)


def slow_share(k: int) -> float:
    """Eq. 11: the share of tokens that take a refresh, `1/(k+1)`."""
    return 1 / (k + 1)


def quantile_is_refresh(k: int, quantile: float) -> bool:
    """Eq. 11: whether the p-quantile of the latency is the refresh's: `1/(k+1) > 1 − p`."""
    return slow_share(k) + quantile > 1  # 1 − 0.9 is less than 0.1 in floats, 0.1 + 0.9 is 1


def kv_entries(prompt: int, steps: int, k: int, policy: Policy = _SKIP) -> tuple[int, int]:
    """Entries of a kept and of a dropped layer after `steps` decode steps: `T + m` and `T + ⌊m/(k+1)⌋ · e`.

    `e` are the entries that a refresh makes: one, and one for each LoRA step that the policy takes back.
    """
    return prompt + steps, prompt + steps // (k + 1) * policy.refresh_tokens(k)


def kv_bytes(manifest: Manifest, prompt: int, steps: int, k: int, policy: Policy = _SKIP) -> tuple[int, int]:
    """Eq. 13 with the prompt's entries: bytes of valid K/V in kept and in dropped layers, one row."""
    kept, dropped = kv_entries(prompt, steps, k, policy)
    plan, token_bytes = manifest.plan, manifest.model.token_kv_bytes
    return kept * len(plan.kept_layers) * token_bytes, dropped * len(plan.drop_layers) * token_bytes


def kv_reserved_bytes(manifest: Manifest, prompt: int, steps: int, k: int, policy: Policy = _SKIP) -> int:
    """Bytes of the K/V slots that one row of a request needs in all layers."""
    plan, dropped = manifest.plan, policy.dropped_slots(prompt, steps, PeriodicSchedule(k))
    slots = (prompt + steps) * len(plan.kept_layers) + dropped * len(plan.drop_layers)
    return slots * manifest.model.token_kv_bytes


def kv_base_bytes(manifest: Manifest, tokens: int) -> int:
    """Eq. 12: bytes of K/V of the full model, one row."""
    return tokens * manifest.model.num_layers * manifest.model.token_kv_bytes


def kv_saving(manifest: Manifest, k: int, policy: Policy = _SKIP) -> float:
    """Eq. 16: `(1 − a/n) · p · (1 − e/w)`, w = k + 1, per generated token; the paper's refresh makes e = 1 entry."""
    return manifest.plan.rho_eff * (1 - policy.refresh_tokens(k) / (k + 1))


def step_bytes(manifest: Manifest, context: int, dropped_context: int, rows: int = 1) -> tuple[int, int]:
    """Bytes that a refresh and a LoRA step move for a batch: weights read once, valid K/V read, K/V written.

    The contexts are the entries of a kept and of a dropped layer before the step, the same in all rows.
    """
    model, plan = manifest.model, manifest.plan
    outside = model.head_bytes + rows * model.embedding_row_bytes
    kept_weights = sum(model.layer_bytes[i] for i in plan.kept_layers)
    kept_kv = rows * len(plan.kept_layers) * (context + 1) * model.token_kv_bytes
    dropped_weights = sum(model.layer_bytes[i] for i in plan.drop_layers)
    dropped_kv = rows * len(plan.drop_layers) * (dropped_context + 1) * model.token_kv_bytes
    adapters = len(plan.sites) * 2 * plan.rank * model.hidden_size * BY_NAME[model.dtype].size_bytes
    lora = outside + kept_weights + kept_kv + adapters
    return outside + kept_weights + kept_kv + dropped_weights + dropped_kv, lora


def request_bytes(
    manifest: Manifest, prompt: int, steps: int, k: int, rows: int = 1, policy: Policy = _SKIP
) -> list[int]:
    """Bytes that each of the decode steps 1 … `steps` moves, at its own context.

    Of the tokens that a refresh takes back only the entries that later steps read count, so that a ceiling stays one.
    """
    schedule, moved = PeriodicSchedule(k), []
    for step in range(1, steps + 1):
        refresh, lora = step_bytes(manifest, *kv_entries(prompt, step - 1, k, policy), rows)
        moved.append(refresh if schedule.kind(step) is StepKind.REFRESH else lora)
    return moved


def request_ceiling(
    manifest: Manifest, prompt: int, steps: int, k: int, rows: int = 1, policy: Policy = _SKIP
) -> float:
    """The byte-weighted ceiling over a whole request: bytes of all its steps, full schedule over LoRA-Drop.

    Unlike `speedup_ceiling` it takes the steps that the request really has, which need not be whole cycles.
    """
    full, ours = (sum(request_bytes(manifest, prompt, steps, window, rows, policy)) for window in (0, k))
    return full / ours


def speedup_ceiling(manifest: Manifest, prompt: int, steps: int, k: int, policy: Policy = _SKIP) -> float:
    """docs/algorithm.md's byte-weighted ceiling at the end of a request, full schedule over LoRA-Drop."""
    kept, dropped = kv_entries(prompt, steps, k, policy)
    full, _ = step_bytes(manifest, kept, kept)
    refresh, lora = step_bytes(manifest, kept, dropped)
    return (k + 1) * full / (refresh + k * lora)
