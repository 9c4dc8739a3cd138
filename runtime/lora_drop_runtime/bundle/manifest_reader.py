"""From the bytes of `lora_drop.json` to a `Manifest` whose every value has its type and fits the others.

Enters: what anybody may have written. Leaves: a manifest, or a BundleError that names the value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_drop_runtime.bounds import LAYERS, K
from lora_drop_runtime.dtypes import CACHE_DTYPES, MODEL_DTYPES
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import ADAPTIVE, StepKind

from .graph_io import GATED, GATED_DELTA, NO_HEADS
from .manifest import (
    ATTENTION_FORMS,
    CHANNEL,
    ENTRIES,
    FORMAT_VERSION,
    INTEGER_DTYPES,
    QUANTIZED_DTYPES,
    WEIGHT_SHARINGS,
    Calibration,
    FileRecord,
    Limits,
    Manifest,
    ModelFacts,
    OrtEntry,
    OtherEntry,
    SpecialTokens,
    TargetEntry,
    TrtEntry,
)
from .typed_json import parse_json, typed

_COUNTS = ("num_layers", "hidden_size", "vocab_size", "num_heads", "kv_heads", "head_dim", "context_length")


def _damaged(path: Path, reason: str) -> BundleError:
    return BundleError(
        "The bundle's manifest is damaged.",
        note=f"{path}: {reason}.",
        hint="Copy the whole bundle again, or export the model again.",
    )


def _check_positive(where: str, holder: object, *names: str) -> None:
    for name in names:
        if getattr(holder, name) < 1:
            raise ValueError(f"{where}.{name} is {getattr(holder, name)}, needed is a whole number of at least 1")


def _check_one_of(where: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{where} is {value!r:.40}, known are {', '.join(map(str, known))}")


def _check_model(model: ModelFacts) -> None:
    """Whether the model's figures fit each other."""
    _check_positive("model", model, *_COUNTS)
    if model.num_layers > LAYERS.most:  # each is looked at beside each other
        raise ValueError(f"model.num_layers is {model.num_layers}, more than {LAYERS.most}")
    may_lack = ("layer_heads", "expert_bytes")
    for what in ("windows", "layer_bytes", "attention_bytes", "kv_bytes", *may_lack):
        found = len(getattr(model, what))
        if found != model.num_layers and (what not in may_lack or found):
            raise ValueError(f"model.{what} has {found} elements, model.num_layers is {model.num_layers}")
    halves = zip(model.layer_bytes, model.attention_bytes, model.kv_bytes, strict=True)
    if any(not 0 <= kv <= attention <= layer for layer, attention, kv in halves):
        raise ValueError("model.kv_bytes are more than model.attention_bytes, or those more than model.layer_bytes")
    experts = zip(model.layer_bytes, model.attention_bytes, model.expert_bytes, strict=False)
    if any(not 0 <= of_experts <= layer - attention for layer, attention, of_experts in experts):
        raise ValueError("model.expert_bytes are more than model.layer_bytes less model.attention_bytes")
    if not 0 < model.expert_share <= 1:
        raise ValueError(f"model.expert_share is {model.expert_share}, needed is a number above 0, 1 at most")
    if not sum(model.layer_bytes):
        raise ValueError("model.layer_bytes are all 0")
    for n, heads in enumerate(model.layer_heads):
        if heads != NO_HEADS:
            _check_positive(f"model.layer_heads[{n}]", heads, "num_heads", "kv_heads", "head_dim")
    if set(model.layer_heads) == {NO_HEADS}:
        raise ValueError("model.layer_heads has no layer with attention")
    if (model.recurrence is None) != (not model.recurrent_layers):
        raise ValueError("model.recurrence and model.recurrent_layers are not there together")
    if any(not 0 <= layer < model.num_layers for layer in model.recurrent_layers):
        raise ValueError(f"model.recurrent_layers names layers that the model does not have; it has {model.num_layers}")
    if len(set(model.recurrent_layers)) < len(model.recurrent_layers):
        raise ValueError("model.recurrent_layers names a layer twice")
    if model.recurrence is not None:
        *sizes, rule = (field.name for field in dataclasses.fields(model.recurrence))
        _check_positive("model.recurrence", model.recurrence, *sizes)
        _check_one_of("model.recurrence.decays", model.recurrence.decays, (1, model.recurrence.key_dim))
        _check_one_of(f"model.recurrence.{rule}", model.recurrence.rule, (GATED_DELTA, GATED))
    _check_one_of("model.dtype", model.dtype, MODEL_DTYPES)
    _check_one_of("model.weight_dtype", model.weight_dtype, MODEL_DTYPES + QUANTIZED_DTYPES)
    _check_one_of("model.kv_dtype", model.kv_dtype, (None, *CACHE_DTYPES))


def _check_limits(limits: Limits, context_length: int) -> None:
    _check_positive("limits", limits, "max_seq_len", "max_prompt_len", "max_batch")
    for name, value, bound in (
        ("max_seq_len", limits.max_seq_len, context_length),
        ("max_prompt_len", limits.max_prompt_len, limits.max_seq_len - 1),
    ):
        if value > bound:
            raise ValueError(f"limits.{name} is {value}, more than {bound}")


def _check_device_target(where: str, entry: TrtEntry) -> None:
    """What its engine looks up by name."""
    _check_one_of(f"{where}.form", entry.form, ATTENTION_FORMS)
    _check_one_of(f"{where}.weight_sharing", entry.weight_sharing, WEIGHT_SHARINGS)
    _check_positive(where, entry, "prefill_chunk")
    steps = {kind.value for kind in StepKind}
    for name, found, needed in (
        ("slots", entry.slots, {"kept", "dropped"}),
        ("graphs", entry.graphs, steps),
        ("engine_bytes", entry.engine_bytes, steps),
        ("ep_context", steps if entry.ep_context is None else entry.ep_context, steps),
    ):
        if set(found) != needed:
            raise ValueError(f"{where}.{name} has {', '.join(found) or 'nothing'}, needed are {', '.join(needed)}")
    for name in ("decode", "prefill"):
        if name not in entry.refresh_profiles:
            raise ValueError(f"{where}.refresh_profiles has no {name!r}")


def _check_ort_target(where: str, entry: OrtEntry) -> None:
    """Whether it is one of the two forms."""
    steps = {kind.value for kind in StepKind}
    if (entry.steps is None) != (entry.weights is not None) or (entry.weights is None) != (entry.graphs is None):
        raise ValueError(f"{where} needs either 'steps', or 'graphs' and 'weights'")
    if entry.graphs is not None and set(entry.graphs) != steps:
        raise ValueError(f"{where}.graphs has {', '.join(entry.graphs) or 'nothing'}, needed are {', '.join(steps)}")


def _check_quantization(how: Mapping[str, Any], weight_dtype: str) -> None:
    """What `inspect` and the cost formulas read of it; the rest is a record."""
    if not how and weight_dtype not in QUANTIZED_DTYPES:
        return
    in_rows = weight_dtype in QUANTIZED_DTYPES and weight_dtype not in INTEGER_DTYPES
    size: Any = int | None if in_rows else int
    if not in_rows and how.get("block_size") == CHANNEL:
        size = str
    for name, kind in (("bits", int), ("block_size", size), ("method", str), ("symmetric", bool)):
        typed(kind, how.get(name), f"quantization.{name}")
    if size is int and how["block_size"] < 1:
        raise ValueError("quantization.block_size is 0")
    listed = typed(tuple[Mapping[str, object], ...], how.get("departures", []), "quantization.departures")
    for n, one in enumerate(listed):
        for name, kind in (("weights", str), ("count", int), ("block_size", int | None), ("symmetric", bool | None)):
            typed(kind, one.get(name), f"quantization.departures[{n}].{name}")
    if "forms" in how:
        forms = typed(Mapping[str, object], how["forms"], "quantization.forms")
        rows = typed(tuple[Mapping[str, object], ...], forms.get("measured"), "quantization.forms.measured")
        chosen = typed(int, forms.get("chosen"), "quantization.forms.chosen")
        if chosen >= len(rows):
            raise ValueError(f"quantization.forms.chosen is {chosen}, of {len(rows)} measured")
        typed(float, rows[chosen].get("perplexity"), f"quantization.forms.measured[{chosen}].perplexity")
        for name in ("float", "bound"):
            typed(float, forms.get(name), f"quantization.forms.{name}")
    if "perplexity" in how:
        figures = typed(Mapping[str, float], how["perplexity"], "quantization.perplexity")
        for name in ("tokens", "float", weight_dtype):
            typed(float, figures.get(name), f"quantization.perplexity.{name}")


def _check_result(where: str, data: object) -> None:
    """A target's verification as `inspect` reads it; the rest is a record."""
    result: Mapping[str, Any] = typed(Mapping[str, object], data, where)
    typed(str, result.get("status"), f"{where}.status")
    typed(str | None, result.get("reason"), f"{where}.reason")
    if "steps" in result:
        typed(int, result["steps"], f"{where}.steps")
        typed(float, result.get("max_abs_error"), f"{where}.max_abs_error")
    on_cpu = result.get("graphs_on_cpu")
    if on_cpu is not None:
        _check_result(f"{where}.graphs_on_cpu", on_cpu)
        if "steps" not in on_cpu:
            raise ValueError(f"{where}.graphs_on_cpu has no 'steps'")


def _check_calibration(calibration: Mapping[str, Calibration]) -> None:
    """Whether sessions can run under the schedules with these thresholds."""
    for name, found in calibration.items():
        where = f"calibration.{name}"
        _check_one_of("a key of calibration", name, tuple(ADAPTIVE))
        _check_one_of(f"{where}.policy", found.policy, tuple(POLICIES))
        if not 1 <= found.k <= K.most:
            raise ValueError(f"{where}.k is {found.k}, needed is a number from 1 to {K.most}")
        for share in ("wanted", "agreement", "refresh_share", "held_out_agreement", "held_out_refresh_share"):
            if not 0 <= getattr(found, share) <= 1:
                raise ValueError(f"{where}.{share} is {getattr(found, share):g}, needed is a share from 0 to 1")


def _target(name: str, data: object) -> TargetEntry:
    where = f"targets.{name}"
    if name not in ENTRIES:
        return OtherEntry(typed(Mapping[str, object], data, where))
    entry: TargetEntry = typed(ENTRIES[name], data, where)
    if isinstance(entry, TrtEntry):
        _check_device_target(where, entry)
    if isinstance(entry, OrtEntry):
        _check_ort_target(where, entry)
    return entry


def _plan(data: object, layers: int) -> DropPlan:
    """A plan over the model's layers; a wrong number of them would be counted through before it is refused."""
    said = typed(Mapping[str, object], data, "plan").get("num_layers")
    if typed(int, said, "plan.num_layers") != layers:
        raise ValueError(f"plan.num_layers is {said}, model.num_layers is {layers}")
    plan: DropPlan = typed(DropPlan, data, "plan")
    for name in ("windowed_layers", "kv_sources"):
        if any(layer >= layers for layer in getattr(plan, name)):
            raise ValueError(f"plan.{name} names layer {max(getattr(plan, name))}, there are {layers}")
    return plan


def _manifest(data: Mapping[str, Any]) -> Manifest:
    def section(name: str, annotation: Any) -> Any:
        if name not in data:
            raise ValueError(f"it has no {name!r}")
        return typed(annotation, data[name], name)

    surplus = [name for name in data if name not in Manifest.__dataclass_fields__]
    if surplus:
        raise ValueError(f"it has {surplus[0]!r:.40}, which is unknown")
    targets = section("targets", Mapping[str, object])
    model = section("model", ModelFacts)
    _check_model(model)
    manifest = Manifest(
        model=model,
        plan=_plan(section("plan", object), model.num_layers),
        limits=section("limits", Limits),
        special_tokens=section("special_tokens", SpecialTokens),
        targets={name: _target(name, entry) for name, entry in targets.items()},
        files=section("files", Mapping[str, FileRecord]),
        versions=section("versions", Mapping[str, str]),
        verification=section("verification", Mapping[str, Mapping[str, object]]),
        quantization=section("quantization", Mapping[str, object]),
        calibration=section("calibration", Mapping[str, Calibration]) if "calibration" in data else {},
        lora_steps=section("lora_steps", Mapping[str, float]) if "lora_steps" in data else {},
    )
    _check_calibration(manifest.calibration)
    for name in ("tokens", "agreement") if manifest.lora_steps else ():
        typed(float, manifest.lora_steps.get(name), f"lora_steps.{name}")
    _check_limits(manifest.limits, model.context_length)
    _check_quantization(manifest.quantization, model.weight_dtype)
    for target, result in manifest.verification.items():
        _check_result(f"verification.{target}", result)
    return manifest


def read_manifest(text: str | bytes, path: Path) -> Manifest:
    """A bundle's manifest; `path` is for the message.

    Raises:
        BundleError: it is damaged, or of another format version.
        PlanError: its plan is impossible.
    """
    try:
        data = parse_json(text)
        if not isinstance(data, dict) or "format_version" not in data:
            raise ValueError("it says no format_version")
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    version = data["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            "The bundle has another format version than this runtime reads.",
            note=f"{path} says version {version!s:.40}, this runtime reads version {FORMAT_VERSION}.",
            hint="Export the model again (lora-drop-export --model … --out … --force), or install the version that "
            "wrote it.",
        )
    try:
        return _manifest(data)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
