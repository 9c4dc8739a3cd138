"""What the paper's equations predict for a bundle.

Enters: a manifest, a context length. Leaves: costs per step, speed-ups, bytes of K/V (docs/algorithm.md).
Costs are multiply-adds per token in Eqs. 5–10 and bytes in the ceiling, because decoding is bound by bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_drop_runtime.bundle.adapters import weight_shapes
from lora_drop_runtime.bundle.manifest import CHANNEL, INTEGER_DTYPES, QUANTIZED_DTYPES, Manifest, ModelFacts
from lora_drop_runtime.bundle.paged_io import BLOCK
from lora_drop_runtime.decoding.batch import CHUNK, USUAL_BACK
from lora_drop_runtime.decoding.row_blocks import most_blocks
from lora_drop_runtime.decoding.statistics import Cycle
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
    if model.weight_dtype not in INTEGER_DTYPES or how["block_size"] == CHANNEL:
        return value  # a row's scale hardly counts
    of_block = BY_NAME["float32"].bits + (0 if how["symmetric"] else value)
    return value + of_block / int(how["block_size"])


def _attention_macs(manifest: Manifest, layers: Iterable[int], context: int) -> int:
    """QKᵀ and AV of one token over so many positions; of a recurrent state Sᵀk, its change, Sᵀq and the decay."""
    model, heads = manifest.model, manifest.model.heads
    state = 0 if model.recurrence is None else 4 * model.recurrence.state_values
    return sum(
        2 * context * heads[layer].num_heads * heads[layer].head_dim + state * (layer in model.recurrent_layers)
        for layer in layers
    )


def full_layer_macs(manifest: Manifest, context: int) -> float:
    """Eq. 5: `C_full(L) = A d² + B d L`, here a layer's weights plus QKᵀ and AV over L positions.

    Each weight that a token reads is one multiply-add, in however few bytes it is stored.
    """
    model = manifest.model
    weights = sum(map(model.read_bytes, range(model.num_layers))) / model.num_layers * 8 / _bits_per_weight(manifest)
    return weights + _attention_macs(manifest, range(model.num_layers), context) / model.num_layers


def surrogate_macs(manifest: Manifest) -> int:
    """Eq. 6: `C_LoRA = Θ(r d)`, of all surrogates: `2 r d` each, and `d²` at most for a run of neighbours."""
    return sum(math.prod(shape) for shape in weight_shapes(manifest.plan, manifest.model.hidden_size).values())


def dropped_weight_bytes(manifest: Manifest, rows: int = 1) -> int:
    """Bytes of weights that a LoRA step does not read, surrogates aside; under `fill` it reads what makes K and V."""
    model, plan = manifest.model, manifest.plan
    whole, saved = set(plan.dropped_layers), sum(model.read_bytes(i, rows) for i in plan.dropped_layers)
    saved += sum(model.attention_bytes[i] for i in plan.dropped_attentions if i not in whole)
    saved += sum(model.read_bytes(i, rows) - model.attention_bytes[i] for i in plan.dropped_mlps if i not in whole)
    if plan.refresh_policy.fills:
        saved -= sum(model.kv_bytes[i] for i in plan.dropped_attentions)
    return saved


def dropped_macs_share(manifest: Manifest, context: int) -> float:
    """ρ of Eqs. 7–10 as the share of all layers' multiply-adds that a LoRA step spares; |𝕃|/n for whole layers."""
    plan, model = manifest.plan, manifest.model
    if not plan.halves_alone and not plan.refresh_policy.fills:
        return plan.rho_eff
    full = model.num_layers * full_layer_macs(manifest, context)
    attention = _attention_macs(manifest, plan.dropped_attentions, context)
    return (dropped_weight_bytes(manifest) * 8 / _bits_per_weight(manifest) + attention) / full


def macs_speedup(manifest: Manifest, context: int, k: int) -> float:
    """Eq. 9: `S(L) = 1 / [(1 − ρ) + ρ/(k+1) + (ρk/(k+1)) γ(L)]`, with Eq. 8's γ; a term for each surrogate."""
    rho = dropped_macs_share(manifest, context)
    layers = manifest.model.num_layers * full_layer_macs(manifest, context)
    surrogates = surrogate_macs(manifest) / layers  # ρ γ
    return 1 / ((1 - rho) + rho / (k + 1) + k / (k + 1) * surrogates)


def most_macs_share(manifest: Manifest) -> float:
    """The largest ρ of Eqs. 7–10 at any context: that of the weights without one, of the attentions at a long one."""
    return max(dropped_macs_share(manifest, 0), manifest.plan.attention_share)


def asymptotic_speedup(manifest: Manifest, k: float) -> float:
    """Eq. 10: `S_∞ = (k+1) / ((k+1) − ρk)`, with the largest ρ at any context."""
    return (k + 1) / ((k + 1) - most_macs_share(manifest) * k)


@dataclass(frozen=True)
class Shares:
    """What a plan with halves drops of the eligible layers.

    Attributes:
        attentions: share of their attentions, whose K/V LoRA steps leave out.
        weight_bytes: share of the bytes of their weights that a LoRA step does not read.
        rho: the largest ρ of whole layers that leaves a LoRA step no more weights to read than this plan does.
    """

    attentions: float
    weight_bytes: float
    rho: float


def shares(manifest: Manifest) -> Shares:
    """Shares of the eligible layers; of a plan of whole layers all three are ρ, where layers are equal."""
    plan, model = manifest.plan, manifest.model
    sizes = sorted(map(model.read_bytes, plan.counted_layers), reverse=True)
    saved = dropped_weight_bytes(manifest)
    whole = 0
    while whole < len(sizes) and sum(sizes[: whole + 1]) <= saved:
        whole += 1
    count = max(1, len(sizes))
    rho = plan.rho if not plan.halves_alone and not plan.refresh_policy.fills else whole / count
    return Shares(len(plan.dropped_attentions) / count, saved / max(1, sum(sizes)), rho)


def slow_share(k: int) -> float:
    """Eq. 11: the share of tokens that take a refresh, `1/(k+1)`."""
    return 1 / (k + 1)


def quantile_is_refresh(k: int, quantile: float) -> bool:
    """Eq. 11: whether the p-quantile of the latency is the refresh's: `1/(k+1) > 1 − p`."""
    return slow_share(k) + quantile > 1  # 1 − 0.9 is less than 0.1 in floats, 0.1 + 0.9 is 1


def looks_up(manifest: Manifest, policy: Policy) -> bool:
    """Whether drafts come from the text, since no layer is dropped: then no step is a LoRA step."""
    return policy.verifies and not manifest.plan.sites


def kv_entries(prompt: int, steps: int, k: int, policy: Policy = _SKIP) -> tuple[int, int]:
    """Entries of a kept and of a dropped attention after `steps` decode steps: `T + m` and `T + ⌊m/(k+1)⌋ · e`.

    `e` are the entries that a refresh makes: one, and one for each LoRA step that the policy takes back. Where LoRA
    steps write them, too, or drafts are counted only when verified, there are as many as in a kept one.
    """
    if policy.keeps_up:
        return prompt + steps, prompt + steps
    return prompt + steps, prompt + steps // (k + 1) * policy.refresh_tokens(k)


def kv_bytes(manifest: Manifest, prompt: int, steps: int, k: int, policy: Policy = _SKIP) -> tuple[int, int]:
    """Eq. 13 with the prompt's entries: bytes of valid K/V of kept and of dropped attentions, one row."""
    kept, dropped = kv_entries(prompt, steps, k, policy)
    plan, model = manifest.plan, manifest.model
    return (
        kept * model.token_kv_bytes(plan.kept_attentions),
        dropped * model.token_kv_bytes(plan.dropped_attentions),
    )


def kv_bytes_of_cycles(manifest: Manifest, prompt: int, steps: int, steps_at: Sequence[float], policy: Policy) -> int:
    """Bytes of valid K/V of one row under a schedule that is known by what it did.

    Args:
        steps_at: how many steps were refreshes, first LoRA steps after one, second ones, and so on.
    """
    longer = [*steps_at[1:], 0]
    made = sum((n - more) * policy.refresh_tokens(c) for c, (n, more) in enumerate(zip(steps_at, longer, strict=True)))
    plan, model = manifest.plan, manifest.model
    dropped = prompt + (steps if policy.fills else round(steps * made / sum(steps_at)))
    kept_bytes = (prompt + steps) * model.token_kv_bytes(plan.kept_attentions)
    return kept_bytes + dropped * model.token_kv_bytes(plan.dropped_attentions)


def kv_base_bytes(manifest: Manifest, tokens: int) -> int:
    """Eq. 12: bytes of K/V of the full model, one row."""
    return tokens * manifest.model.token_kv_bytes(range(manifest.model.num_layers))


def kv_behind_windows(manifest: Manifest) -> tuple[int, int]:
    """Bytes of K/V of a row of all tokens that a bundle allows, in layers with a window and convolutions: of all its
    tokens, and at most where a batch with paged caches forgets what they do not see."""
    model, whole = manifest.model, manifest.limits.max_seq_len
    every = most = 0
    for layer, window in enumerate(model.windows):
        seen = most_blocks(window, USUAL_BACK, CHUNK, BLOCK) * BLOCK
        if window and seen < whole:
            every += whole * model.token_kv_bytes([layer])
            most += seen * model.token_kv_bytes([layer])
    return every, most


def kv_saving(manifest: Manifest, k: int, policy: Policy = _SKIP) -> float:
    """Eq. 16: `(1 − a/n) · p · (1 − e/w)`, w = k + 1, per generated token; the paper's refresh makes e = 1 entry.

    `(1 − a/n) · p` is the share of dropped attentions, here by their bytes, which layers may differ in.
    """
    plan, model = manifest.plan, manifest.model
    dropped = model.token_kv_bytes(plan.dropped_attentions) / model.token_kv_bytes(range(plan.num_layers))
    return dropped * (1 - policy.refresh_tokens(k) / (k + 1)) * policy.leaves_holes


def _kv_read(model: ModelFacts, layers: Iterable[int], entries: int) -> int:
    """Bytes of K and V that a token of one row reads in these layers; with a window not those before it."""
    windows = {n: size for n, size in enumerate(model.windows) if size and n not in model.recurrent_layers}
    return sum(min(entries, windows.get(layer, entries)) * model.token_kv_bytes([layer]) for layer in layers)


def _states_read(model: ModelFacts, layers: Iterable[int]) -> int:
    """Bytes of the recurrent states of a row in these layers."""
    values = 0 if model.recurrence is None else model.recurrence.state_values
    return values * BY_NAME["float32"].size_bytes * len({*layers} & {*model.recurrent_layers})


def step_bytes(
    manifest: Manifest, context: int, dropped_context: int, rows: int = 1, tokens: int = 1
) -> tuple[int, int]:
    """Bytes that a refresh and a LoRA step move for a batch: weights read once, valid K/V read, K/V written; recurrent
    states read, and by a refresh written.

    Args:
        context, dropped_context: entries of a kept and of a dropped attention before the step, the same in all rows.
        tokens: that a refresh runs of each row, which decide how many experts it reads.
    """
    model, plan = manifest.model, manifest.plan
    outside = model.head_bytes + rows * model.embedding_row_bytes
    refreshed, weights = (
        sum(model.read_bytes(i, rows * count) for i in range(model.num_layers)) for count in (tokens, 1)
    )
    kept_kv = rows * _kv_read(model, plan.kept_attentions, context + 1)
    dropped_kv = rows * _kv_read(model, plan.dropped_attentions, dropped_context + 1)
    kept_states, dropped_states = (
        rows * _states_read(model, layers) for layers in (plan.kept_attentions, plan.dropped_attentions)
    )
    states = 2 * (kept_states + dropped_states)
    written = rows * model.token_kv_bytes(plan.dropped_attentions) * plan.refresh_policy.fills
    adapters = surrogate_macs(manifest) * BY_NAME[model.dtype].size_bytes
    lora = outside + weights - dropped_weight_bytes(manifest, rows) + kept_kv + written + adapters
    return outside + refreshed + kept_kv + dropped_kv + states, lora + kept_states


def entries_made(kinds: Sequence[StepKind], policy: Policy) -> list[int]:
    """Entries of a dropped attention that there are after each step, beside the prompt's."""
    if policy.keeps_up:
        return [*range(1, len(kinds) + 1)]
    entries, made, lora_steps = [], 0, 0
    for kind in kinds:
        if kind is StepKind.REFRESH:
            made, lora_steps = made + policy.refresh_tokens(lora_steps), 0
        else:
            lora_steps += 1
        entries.append(made)
    return entries


def periodic_kinds(steps: int, k: int) -> list[StepKind]:
    """Of the decode steps 1 … `steps`."""
    schedule = PeriodicSchedule(k)
    return [schedule.kind(step) for step in range(1, steps + 1)]


def bytes_of_steps(
    manifest: Manifest, prompt: int, kinds: Sequence[StepKind], rows: int = 1, policy: Policy = _SKIP
) -> list[int]:
    """Bytes that each decode step moves, at its own context, given the kinds of all of them.

    Of the tokens that a refresh takes back only the entries that later steps read count, so that a ceiling stays one;
    and in a mixture the experts that they are sent to.
    """
    moved, dropped, lora_steps = [], [0, *entries_made(kinds, policy)], 0
    for done, kind in enumerate(kinds):
        tokens = policy.refresh_tokens(lora_steps)
        refresh, lora = step_bytes(manifest, prompt + done, prompt + dropped[done], rows, tokens)
        moved.append(refresh if kind is StepKind.REFRESH else lora)
        lora_steps = 0 if kind is StepKind.REFRESH else lora_steps + 1
    return moved


def request_bytes(manifest: Manifest, prompt: int, steps: int, k: int, rows: int = 1) -> list[int]:
    """`bytes_of_steps` of the periodic schedule, under `skip`."""
    return bytes_of_steps(manifest, prompt, periodic_kinds(steps, k), rows)


def request_ceiling(manifest: Manifest, prompt: int, steps: int, moved: Sequence[int], rows: int = 1) -> float:
    """The byte-weighted ceiling over a whole request: bytes of the full schedule over those that LoRA-Drop moved.

    Unlike `speedup_ceiling` it takes the steps that the request really has, which need not be whole cycles.

    Args:
        steps: after which each row has as many tokens more.
        moved: bytes of all steps, or cycles, that made them.
    """
    return sum(request_bytes(manifest, prompt, steps, 0, rows)) / sum(moved)


def operations_ceiling(
    manifest: Manifest, prompt: int, k: int, rows: int, step_seconds: float, refresh_seconds: float
) -> float:
    """What a cycle of a batch allows whose refreshes run k + 1 tokens of every row, when operations are counted too.

    (k + 1) · T(B) / (k · T(B) · bytes_LoRA / bytes_refresh + T(B · (k + 1))), where T(n) is the time of a prompt chunk
    of n tokens of one row at that context. Such a refresh is bound by arithmetic, and below 1 it cannot pay.

    Args:
        step_seconds, refresh_seconds: T(B) and T(B · (k + 1)), of the same run.
    """
    refresh, lora = step_bytes(manifest, prompt, prompt, rows)
    return (k + 1) * step_seconds / (k * step_seconds * lora / refresh + refresh_seconds)


def verified_bytes(manifest: Manifest, prompt: int, cycles: Sequence[Cycle]) -> list[int]:
    """Bytes that each cycle of a request under a policy that verifies moves: the LoRA steps that ran, and the refresh.

    Each at the context of the shortest row that was going. Of drafts only the entries that stay count, so that a
    ceiling stays one.
    """
    lengths = [prompt] * len(cycles[0].made) if cycles else []
    moved = []
    for cycle in cycles:
        rows = sum(made > 0 for made in cycle.made)
        context = min(length for length, made in zip(lengths, cycle.made, strict=True) if made)
        refresh, _ = step_bytes(manifest, context, context, rows, max(cycle.lora_steps + 1, *cycle.made))
        lora = sum(step_bytes(manifest, context + step, context, rows)[1] for step in range(cycle.lora_steps))
        moved.append(refresh + lora)
        lengths = [length + made for length, made in zip(lengths, cycle.made, strict=True)]
    return moved


def speedup_ceiling(manifest: Manifest, prompt: int, steps: int, k: int, policy: Policy = _SKIP) -> float:
    """docs/algorithm.md's byte-weighted ceiling at the end of a request, full schedule over LoRA-Drop.

    Drafts that are looked up in the text take no LoRA step.
    """
    kept, dropped = kv_entries(prompt, steps, k, policy)
    full, _ = step_bytes(manifest, kept, kept)
    refresh, lora = step_bytes(manifest, kept, dropped, tokens=policy.refresh_tokens(k))
    return (k + 1) * full / (refresh + k * lora * (not looks_up(manifest, policy)))
