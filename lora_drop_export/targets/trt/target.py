"""TensorRT and TensorRT-RTX as targets: lower, build both engines, write what the manifest says of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.manifest import Limits, Manifest
from lora_drop_runtime.decoding.request import PREFILL_CHUNK
from lora_drop_runtime.engines.ort.providers import PROVIDERS
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console

from .build import EngineBuilder
from .ep_context import ep_context_model
from .lower import trt_from_neutral
from .profiles import lora_profiles, refresh_profiles
from .weight_inputs import check_one_copy

_ENGINE_CODE_BYTES = 32 << 20  # kernels of an engine; more than that is weights


def static_slots(plan: DropPlan, limits: Limits) -> dict[str, int]:
    """Slots that the largest request of a bundle's limits needs in each cache group, at the plan's own k and policy."""
    prompt, steps = limits.max_prompt_len, limits.max_seq_len - limits.max_prompt_len - 1
    dropped = plan.refresh_policy.dropped_slots(prompt, steps, PeriodicSchedule(plan.k))
    return {"kept": limits.max_seq_len - 1, "dropped": dropped}


def _report_engine(kind: StepKind, size_bytes: int, weight_bytes: int, target: str, console: Console) -> None:
    """An engine's size beside the weights that it holds; says so when it holds one more than once."""
    held = f"of which {weight_bytes / 2**20:.1f} MiB are weights" if weight_bytes else "without weights"
    console.say(f"{target}: {kind.value} engine {size_bytes / 2**20:.1f} MiB, {held}")
    if weight_bytes and size_bytes > 1.5 * weight_bytes + _ENGINE_CODE_BYTES:
        console.say(
            f"warning: the {kind.value} engine is {size_bytes / weight_bytes:.1f} times its weights: profiles or "
            "compute capabilities hold copies of their own; --weight-sharing inputs holds none"
        )


def build_engines(
    root: Path,
    manifest: Manifest,
    graphs: Mapping[StepKind, Any],
    target: str,
    options: ExportOptions,
    console: Console,
    timing_cache: bytes,
) -> dict[str, Any]:
    plan, limits = manifest.plan, manifest.limits
    sharing = options.weight_sharing or "inputs"
    form = options.form(target)
    slots = static_slots(plan, limits)
    chunk = min(PREFILL_CHUNK, limits.max_prompt_len)
    profiles = {
        StepKind.REFRESH: refresh_profiles(min(plan.k, *(n - 1 for n in slots.values())), limits.max_batch, chunk),
        StepKind.LORA: lora_profiles(limits.max_batch),
    }
    entry: dict[str, Any] = {
        "form": form,
        "weight_sharing": sharing,
        "slots": slots,
        "prefill_chunk": chunk,
        "refresh_profiles": {
            name: [p["sequence"][0], p["sequence"][2]] for name, p in profiles[StepKind.REFRESH].items()
        },
        "graphs": {},
        "engine_bytes": {},
    }
    builder = EngineBuilder(target, root, options.builder, console, timing_cache)
    entry["version"], entry["compute_capabilities"] = builder.version, list(builder.compute_capabilities)
    entry |= {name: getattr(options.builder, name) for name in ("hardware_compatible", "version_compatible")}
    lower = functools.partial(
        trt_from_neutral, slots=slots, weight_sharing=sharing, form=form, alias=options.builder.alias
    )
    refresh = lower(graphs[StepKind.REFRESH])
    lora = lower(graphs[StepKind.LORA], refresh=refresh)
    for kind, lowered in ((StepKind.REFRESH, refresh), (StepKind.LORA, lora)):
        entry["graphs"][kind.value] = f"{target}/{kind.value}.onnx"
        (root / entry["graphs"][kind.value]).write_bytes(lowered.proto.SerializeToString())
        engine = builder.build(lowered.proto, profiles[kind])
        entry[kind.value] = f"{target}/{kind.value}.engine"
        (root / entry[kind.value]).write_bytes(engine)
        entry["engine_bytes"][kind.value] = len(engine)
        if target == "tensorrt-rtx":
            context = ep_context_model(lowered.proto, f"{kind.value}.engine", PROVIDERS["rtx"], builder.version)
            entry.setdefault("ep_context", {})[kind.value] = f"{target}/{kind.value}_context.onnx"
            (root / entry["ep_context"][kind.value]).write_bytes(context.SerializeToString())
        _report_engine(kind, len(engine), lowered.constant_bytes, target, console)
    if sharing == "inputs":
        weights = check_one_copy([refresh.weights, lora.weights])
        entry["weights"] = f"{target}/weights.json"
        (root / entry["weights"]).write_text(json.dumps({n: dataclasses.asdict(w) for n, w in weights.items()}) + "\n")
        entry["weight_bytes"] = sum(weight.size_bytes for weight in weights.values())
    else:
        entry["weight_bytes"] = refresh.constant_bytes + lora.constant_bytes
    if builder.timing_cache:
        entry["timing_cache"] = f"{target}/timing.cache"
        (root / entry["timing_cache"]).write_bytes(builder.timing_cache)
    return entry
