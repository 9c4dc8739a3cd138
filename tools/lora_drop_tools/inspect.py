"""`lora-drop inspect`: a bundle for a person to read.

Enters: a bundle. Leaves: text: layers as a strip, sizes, what the paper's equations predict, the verification.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, TextIO

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import NO_HEADS
from lora_drop_runtime.bundle.manifest import CHANNEL, Manifest, ModelFacts
from lora_drop_runtime.dtypes import short_name
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.sites import listed

from lora_drop_tools.shared import costs

MIB = 2**20


def _quantization(manifest: Manifest) -> list[str]:
    """How quantized weights are stored, and what that cost."""
    how = manifest.quantization
    if not how:
        return []
    zero_points = "symmetric" if how["symmetric"] else "with zero points"
    in_rows = how["block_size"] in (None, CHANNEL)
    blocks = "a scale for each row" if in_rows else f"blocks of {how['block_size']}, {zero_points}"
    line = f"weights      {short_name(manifest.model.weight_dtype)}, {blocks}, {how['method']}"
    if "perplexity" in how:
        cost = how["perplexity"]
        before, after = cost["float"], cost[manifest.model.weight_dtype]
        line += f"; perplexity {before:.2f} → {after:.2f} on {cost['tokens']} tokens"
        if "agreement" in cost:
            line += f", the most likely token is float's in {100 * cost['agreement']:.1f} %"
    lines = [line]
    if "forms" in how:
        forms = how["forms"]
        loss, bound = forms["measured"][forms["chosen"]]["perplexity"] / forms["float"] - 1, forms["bound"]
        found = "the fastest" if loss <= bound else "none"
        count = len(forms["measured"])
        of = f"of {count} {'form' if count == 1 else 'forms'} {found} within {100 * bound:.0f} % of perplexity"
        lines.append(f"             --block-size auto: {of}; this one costs {100 * loss:+.1f} %")
    for one in how.get("departures", ()):
        what = f"{one['weights']} ({one['count']})"
        zero_points = "symmetric" if one["symmetric"] else "with zero points"
        bits = f"int{one['bits']}, " if "bits" in one else ""
        blocks = "float" if one["block_size"] is None else f"{bits}blocks of {one['block_size']}, {zero_points}"
        lines.append(f"             {blocks}: {what}")
    return lines


def _sizes(manifest: Manifest) -> list[str]:
    groups: dict[str, int] = {}
    for name, record in manifest.files.items():
        group = name.partition("/")[0]
        groups[group] = groups.get(group, 0) + record.size_bytes
    return ["size on disk"] + [
        f"  {name:<14}{size / MIB:10.1f} MiB" if size >= MIB else f"  {name:<14}{size / 1024:10.1f} KiB"
        for name, size in groups.items()
    ]


def _targets(manifest: Manifest) -> list[str]:
    """What each target keeps on disk and, once opened, in memory, K/V cache and activations aside."""
    if not manifest.targets:
        return ["targets", "  none"]
    lines = ["targets         on disk      resident"]
    stored = sum(r.size_bytes for name, r in manifest.files.items() if name.startswith("weights/"))
    for target, entry in manifest.targets.items():
        disk = sum(r.size_bytes for name, r in manifest.files.items() if name.startswith(f"{target}/"))
        resident, what = entry.resident(stored)
        lines.append(f"  {target:<13}{disk / MIB:7.1f} MiB {resident / MIB:9.1f} MiB   {what}")
    return lines


def _states(model: ModelFacts) -> str:
    """Of layers with a recurrent state."""
    form = model.recurrence
    if form is None:
        return ""
    state = f"{form.heads} × {form.key_dim} × {form.value_dim}"
    return f", {len(model.recurrent_layers)} layers with states of {state}, convolutions over {form.taps} tokens"


def _heads(model: ModelFacts) -> str:
    """Query and K/V heads; where layers differ, with the values of a head as well, and short convolutions; and layers
    with a recurrent state."""
    convolutions = set(model.convolutions)
    kinds = dict.fromkeys(kind for layer, kind in enumerate(model.heads) if layer not in convolutions)
    kinds.pop(NO_HEADS, None)
    if len(kinds) == 1 and not convolutions:
        return f"{model.num_heads}/{model.kv_heads} heads{_states(model)}"
    heads = " and ".join(f"{kind.num_heads}/{kind.kv_heads} of {kind.head_dim}" for kind in kinds)
    taps = {model.windows[layer] for layer in convolutions}
    return f"{heads} heads" + "".join(f", convolutions over {tokens} tokens" for tokens in taps) + _states(model)


def _experts(model: ModelFacts) -> list[str]:
    """Of a mixture, what a token reads of it."""
    if not model.expert_bytes:
        return []
    read, stored = sum(map(model.read_bytes, range(model.num_layers))), sum(model.layer_bytes)
    return [
        f"experts      a token reads {model.expert_share:.1%} of their weights: {read / MIB:.1f} of the layers' "
        f"{stored / MIB:.1f} MiB"
    ]


def _kv_savings(manifest: Manifest) -> str:
    """Eq. 16 under each policy that the bundle runs, equal ones together."""
    plan, names = manifest.plan, dict[str, list[str]]()
    for policy in POLICIES.values():
        with contextlib.suppress(PlanError, InputError):
            plan.check_policy(policy)
            names.setdefault(f"{costs.kv_saving(manifest, plan.k, policy):.1%}", []).append(policy.name)
    return "; ".join(f"{saving} under {', '.join(which)}" for saving, which in names.items())


def _predictions(manifest: Manifest) -> list[str]:
    k, policy = manifest.plan.k, manifest.plan.refresh_policy
    looks_up = costs.looks_up(manifest, policy)
    half = min(manifest.limits.max_seq_len // 2, manifest.limits.max_prompt_len)
    lines = [
        f"predicted at batch 1 for k = {k} (prompt, then as many decode steps"
        + ("; as if every draft were accepted)" if policy.verifies else ")"),
        "  prompt   refresh     LoRA step   ceiling   Eq. 9   K/V full → LoRA-Drop",
    ]
    for prompt in sorted({min(128, half), half}):
        kept, dropped = costs.kv_entries(prompt, prompt, k, policy)
        refresh, lora = costs.step_bytes(manifest, kept, dropped, tokens=policy.refresh_tokens(k))
        lora_step = "–" if looks_up else f"{lora / MIB:.1f} MiB"
        by_macs = "–" if looks_up else f"{costs.macs_speedup(manifest, kept, k):.2f}×"
        base, ours = costs.kv_base_bytes(manifest, kept), sum(costs.kv_bytes(manifest, prompt, prompt, k, policy))
        lines.append(
            f"  {prompt:>6}   {refresh / MIB:7.1f} MiB {lora_step:>11}   "
            f"{costs.speedup_ceiling(manifest, prompt, prompt, k, policy):5.2f}×   "
            f"{by_macs:>6}  "
            f"{base / MIB:6.1f} → {ours / MIB:.1f} MiB ({1 - ours / base:.1%} saved)"
        )
    p95 = "a refresh" if costs.quantile_is_refresh(k, 0.95) else "a LoRA step"
    most = f"at most {costs.asymptotic_speedup(manifest, k):.3f}× with ρ_eff {costs.most_macs_share(manifest):.3f}"
    lines += [
        f"  Eq. 10: {'–' if looks_up else most}; Eq. 16, K/V of generated tokens saved: {_kv_savings(manifest)}",
        f"  Eq. 11: one token in {k + 1} takes a refresh, so the p95 latency is that of {p95}",
    ]
    if manifest.model.recurrent_layers:
        whole, paged = (manifest.model.recurrent_row_bytes(paged) / MIB for paged in (False, True))
        beside = f" ({paged:.1f} on openvino)" if "openvino" in manifest.targets else ""
        lines.append(f"  recurrent states: {whole:.1f} MiB a row{beside}, beside its K/V, however long it is")
    every, held = costs.kv_behind_windows(manifest)
    if held and "openvino" in manifest.targets:
        lines.append(
            f"  openvino forgets: behind {manifest.limits.max_seq_len} tokens layers with a window have "
            f"{held / MIB:.1f} MiB of K/V at most, of {every / MIB:.1f}"
        )
    return lines


def _figures(result: dict[str, Any]) -> str:
    return f"{result['steps']} steps, max abs error {result['max_abs_error']:.1e}"


def _schedule(plan: DropPlan) -> str:
    if not plan.k:
        return "k = 0: every step is a refresh"
    steps = f"k = {plan.k}: {plan.k} LoRA step{'s' if plan.k > 1 else ''}"
    if plan.refresh_policy.verifies:
        drafts = steps if plan.sites else f"k = {plan.k}: {plan.k} drafts from the text"
        return f"{drafts} at most, then a refresh that verifies what they chose"
    return f"{steps}, then a refresh"


def _drop_list(manifest: Manifest) -> list[str]:
    """The sites, and how much of the eligible layers they are."""
    plan, share = manifest.plan, costs.shares(manifest)
    eligible = len(plan.eligible_layers)
    if not plan.halves_alone:
        counted = f"{len(plan.dropped_layers)} of {eligible} eligible, ρ {plan.rho:.2f}, ρ_eff {plan.rho_eff:.3f}"
        return [f"drop list    {listed(plan.sites) or 'none'}: {counted}"]
    return [
        f"drop list    {listed(plan.sites)}",
        f"             {share.attentions:.0%} of the eligible attentions, {share.weight_bytes:.0%} of the eligible "
        f"layers' weight bytes; no more to read than at ρ {share.rho:.2f}",
    ]


def _calibration(manifest: Manifest) -> list[str]:
    return [
        f"{'':<13}{name}: threshold {one.threshold:.4g} for k = {one.k}, {one.policy}: "
        f"{one.held_out_agreement:.1%} agree "
        f"with {one.held_out_refresh_share:.1%} refreshes on other text"
        for name, one in manifest.calibration.items()
    ]


def describe(bundle: Bundle) -> list[str]:
    """The lines that `inspect` prints."""
    manifest = bundle.manifest
    model, plan, limits = manifest.model, manifest.plan, manifest.limits
    attentions, mlps = set(plan.dropped_attentions), set(plan.dropped_mlps)
    strip = "".join("█▄▀·"[(i in attentions) + 2 * (i in mlps)] for i in range(plan.num_layers))
    legend = "█ kept, · dropped on LoRA steps"
    if plan.halves_alone:
        legend += ", ▄ without its attention, ▀ without its MLP"
    adapters = f"rank {plan.rank}" if plan.rank else "no adapters"
    if plan.bare_sites:
        adapters += f", none for {listed(plan.bare_sites)}"
    lines = [
        f"model        {model.name} ({model.model_type}, {model.num_layers} layers, d {model.hidden_size}, "
        f"{_heads(model)}, {model.dtype}"
        f"{f', K/V {short_name(model.kv_dtype)}' if model.kv_dtype else ''})",
        *_experts(model),
        *_quantization(manifest),
        f"layers       {strip}   {legend}",
        *_drop_list(manifest),
        f"surrogate    {plan.surrogate}, {adapters}",
        f"schedule     {_schedule(plan)}; policy {plan.policy}",
        *_calibration(manifest),
        f"limits       {limits.max_seq_len} tokens, prompts of {limits.max_prompt_len}, batches of {limits.max_batch}",
        "",
        *_sizes(manifest),
        "",
        *_targets(manifest),
        "",
        *_predictions(manifest),
        "",
        "verification",
    ]
    for target in manifest.targets:
        result = manifest.verification.get(target, {"status": "not run"})
        detail = f", {_figures(result)}" if "steps" in result else f": {result['reason']}" if "reason" in result else ""
        lines.append(f"  {target:<14}{result['status']}{detail}")
        if "graphs_on_cpu" in result:
            on_cpu = result["graphs_on_cpu"]
            lines.append(f"  {'':<14}its graphs on ONNX Runtime's CPU: {on_cpu['status']}, {_figures(on_cpu)}")
    if not manifest.targets:
        lines.append("  graphs only, nothing to run")
    if cost := manifest.lora_steps:
        share = f"{cost['agreement']:.0%} of {cost['tokens']:.0f} places of a sample text"
        lines.append(f"  LoRA steps    the most likely token is that of all layers in {share}")
    return lines


def inspect(bundle: str | Path, *, check: bool = False, out: TextIO | None = None) -> Manifest:
    """Print what a bundle is; with `check`, hash every file.

    Raises:
        BundleError: the bundle is damaged, or with `check` a file's hash is not the recorded one.
    """
    opened = Bundle.open(bundle)
    print("\n".join(describe(opened)), file=out or sys.stdout)
    if check:
        opened.check_unchanged()
        print(f"all {len(opened.manifest.files)} files have their recorded hash", file=out or sys.stdout)
    return opened.manifest
