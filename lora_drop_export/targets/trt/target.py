"""TensorRT and TensorRT-RTX as targets: lower, build both engines, write what the manifest says of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import QUANTIZED_DTYPES, Limits, Manifest, TargetEntry, TrtEntry
from lora_drop_runtime.command_line import refuse_unused
from lora_drop_runtime.decoding.request import PREFILL_CHUNK
from lora_drop_runtime.dtypes import CACHE_DTYPES, MODEL_DTYPES, short_name
from lora_drop_runtime.engines.engine import STANDING_SLOTS
from lora_drop_runtime.engines.ort.providers import PROVIDERS
from lora_drop_runtime.engines.trt.library import MODULES
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

from lora_drop_export.console import Console
from lora_drop_export.quantize.formats import FLOAT8, BlockFormat

from .options import FLOAT8_SINCE, BuilderOptions, TrtOptions, built_for, check_buildable

if TYPE_CHECKING:  # what brings onnx is imported when a target is built
    from .build import EngineBuilder
    from .lower import TrtGraph
    from .profiles import Profile

# Options that both targets read; a row has words of its own for those that it reads alone
_OWN = (
    "weight_sharing",
    "attention",
    "workspace_mib",
    "optimization_level",
    "hardware_compatible",
    "version_compatible",
)
_QUANTIZED_HEAD = 16  # of which a head has a multiple in caches of 8 bits (plugins/kernels)
_ENGINE_CODE_BYTES = 32 << 20  # kernels of an engine; more than that is weights


def static_slots(plan: DropPlan, limits: Limits) -> dict[str, int]:
    """Slots that the largest request of a bundle's limits needs in each cache group, at the plan's own k and policy,
    and those of a row that stands beside others."""
    prompt, steps = limits.max_prompt_len, limits.max_seq_len - limits.max_prompt_len - 1
    dropped = plan.refresh_policy.dropped_slots(prompt, steps, PeriodicSchedule(plan.k))
    return {"kept": limits.max_seq_len - 1 + STANDING_SLOTS, "dropped": dropped + STANDING_SLOTS}


def _report_engine(kind: StepKind, size_bytes: int, weight_bytes: int, target: str, console: Console) -> None:
    """An engine's size beside the weights that it holds; says so when it holds one more than once."""
    held = f"of which {weight_bytes / 2**20:.1f} MiB are weights" if weight_bytes else "without weights"
    console.say(f"{target}: {kind.value} engine {size_bytes / 2**20:.1f} MiB, {held}")
    if weight_bytes and size_bytes > 1.5 * weight_bytes + _ENGINE_CODE_BYTES:
        console.say(
            f"warning: the {kind.value} engine is {size_bytes / weight_bytes:.1f} times its weights: profiles or "
            "compute capabilities hold copies of their own; --weight-sharing inputs, where weights can be, holds none"
        )


_BFLOAT16_SINCE = 8.0  # compute capability


def _weights(root: Path, folder: str, graphs: Mapping[StepKind, TrtGraph], sharing: str) -> tuple[str | None, int]:
    """(the table of weights that are inputs, written into the folder; bytes of all weights)."""
    from lora_drop_export.graphs.weight_inputs import write_table

    from .weight_inputs import check_one_copy

    if sharing != "inputs":
        return None, sum(graph.constant_bytes for graph in graphs.values())
    weights = check_one_copy([graph.weights for graph in graphs.values()])
    file = f"{folder}/weights.json"
    write_table(root / file, weights)
    return file, sum(weight.size_bytes for weight in weights.values())


def _check_scales(neutral: Any, target: str) -> None:
    """Refuse 8-bit caches whose scales are those of channels, as ONNX Runtime has them."""
    for tensor in neutral.graph.initializer:
        if tensor.name.startswith("kv_scales.") and tensor.dims[-1] != 1:
            raise InputError(
                "The bundle's caches have a scale for each channel.",
                note=f"{tensor.name} has {tensor.dims[-1]} channels a head; {target} takes one scale a head.",
                hint=f"Export the model again with --target {target} among its targets.",
            )


def _check_named(options: TrtOptions, targets: Sequence[str]) -> None:
    """Refuse options that none of the targets has."""
    if options.builder.alias and not ("tensorrt" in targets and options.attention in (None, "plugin")):
        raise InputError(
            "--alias applies only to the attention plugin.",
            note=f"None of the targets {', '.join(targets)} has it.",
            hint="Leave it out, or use --target tensorrt.",
        )
    if "tensorrt-rtx" not in targets and options.builder.compute_capabilities is not None:
        raise InputError(
            "--compute-capability applies only to tensorrt-rtx.",
            note=f"Given are {', '.join(options.builder.compute_capabilities)}; the targets are {', '.join(targets)}.",
            hint="Leave it out: tensorrt builds for the GPU of this machine.",
        )
    if "tensorrt-rtx" in targets and options.attention == "plugin":
        raise InputError(
            "The target cannot run plugins.",
            note="'tensorrt-rtx' has only its native layers, --attention plugin was asked for.",
            hint="Leave --attention out: it is native there, and plugin with --target tensorrt.",
        )


class TrtTarget:
    """What both rows of the table share; see `Target` there."""

    name: str
    what: str
    default_form: str  # of attention
    without_float8: str  # what to do where the GPU has none
    quantized_weights: tuple[str, ...] = ("int4", FLOAT8)
    quantized_dtypes: tuple[str, ...] = MODEL_DTYPES
    symmetric_weights = True
    channel_weights = False
    cache_dtypes: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    scales_per_head = True
    recurs = False

    def form(self, options: TrtOptions) -> str:
        return options.attention or self.default_form

    def _why_constants(self, options: TrtOptions, weights: str, dtype: str, neutral: Any) -> str:
        """Why quantized weights cannot be inputs of the engines; empty where the plugin Int4Gemm takes them.

        Args:
            weights: their dtype.
            dtype: of activations.
            neutral: the refresh step, an onnx.ModelProto; None before there is one.
        """
        if weights == FLOAT8:
            return "TensorRT's own layers dequantize constants alone, and no plugin takes fp8"
        if self.form(options) != "plugin":
            able = "--attention plugin" if self.default_form == "plugin" else "--target tensorrt"
            return f"TensorRT's own layers dequantize constants alone, and the plugin that takes inputs needs {able}"
        if dtype == "float32":
            return "the plugin Int4Gemm computes in half precision, and activations are float32"
        if neutral is None:
            return ""
        from .packed_weights import unfit_weight

        return unfit_weight(neutral)

    def sharing(
        self, options: TrtOptions, weights: str, dtype: str, neutral: Any = None, console: Console | None = None
    ) -> str:
        """What becomes of weights: as asked for, else inputs where the engines can have them.

        Args:
            weights: their dtype.
            console: is told why quantized ones are constants where that was not asked for.

        Raises:
            InputError: quantized ones were to be inputs, and cannot be.
        """
        why = self._why_constants(options, weights, dtype, neutral) if weights in QUANTIZED_DTYPES else ""
        short = short_name(weights)
        if why and options.weight_sharing == "inputs":
            raise InputError(
                "The quantized weights cannot be inputs of the engines.",
                note=f"{self.name} was asked for {short} weights with --weight-sharing inputs: {why}.",
                hint="Leave it out: each engine then holds the weights that it uses.",
            )
        if why and options.weight_sharing is None and console is not None:
            console.say(f"{self.name}: {short} weights are constants, each engine holds its own: {why}")
        return options.weight_sharing or ("constants" if why else "inputs")

    def check(self, options: TrtOptions, targets: Sequence[str]) -> None:
        if not MODULES.keys() & set(targets):
            because = f"the targets are {', '.join(targets)}"
            for part in (options, options.builder):
                refuse_unused(part, _OWN, because, f"use --target {' or '.join(MODULES)}")
        _check_named(options, targets)  # first: what no library would mend
        if self.name in targets:
            check_buildable(self.name, options.builder, self.form(options))

    def builder_options(self, options: TrtOptions, weights: str, console: Console) -> BuilderOptions:
        """Those of the build of engines with this dtype of weights."""
        return options.builder

    def check_dtype(self, dtype: str, weights: str, options: TrtOptions) -> None:
        """Engines take any; fp8 weights on GPUs that have it alone."""
        self.sharing(options, weights, dtype)
        if weights != FLOAT8:
            return
        old = [each for each in built_for(self.name, options.builder, weights) if float(each) < FLOAT8_SINCE]
        if old:
            raise InputError(
                f"Compute capability {', '.join(old)} has no fp8.",
                note=f"{self.name} was asked for fp8 weights, which need {FLOAT8_SINCE} or newer.",
                hint=self.without_float8,
            )
        if options.builder.hardware_compatible:
            raise InputError(
                "--hardware-compatible does not go with fp8 weights.",
                note=f"Its engines run from compute capability 8.0 on, fp8 needs {FLOAT8_SINCE} or newer.",
                hint="Leave it out, or use --dtype int4 with the model's float checkpoint.",
            )

    def check_caches(self, caches: Any, options: TrtOptions) -> None:
        """The plugin takes them; TensorRT's own cache layer has no entries of 8 bits."""
        short = short_name(caches.dtype)
        if self.form(options) != "plugin":
            raise InputError(
                f"The native attention cannot take {short} caches.",
                note=f"{self.name} was asked for --kv-dtype {short} with --attention native; TensorRT's cache layer "
                "takes float32, float16 and bfloat16.",
                hint="Use --attention plugin, or leave --kv-dtype out.",
            )
        if caches.fills or caches.convolves:
            what, hint = (
                ("--policy fill", "Use another --policy, or leave") if caches.fills else ("A convolution", "Leave")
            )
            raise InputError(
                f"{what} cannot write {short} caches on {self.name}.",
                note="There TensorRT's own cache layer writes, which takes no entries of 8 bits.",
                hint=f"{hint} --kv-dtype out.",
            )
        odd = [head_dim for head_dim in sorted(caches.head_dims) if head_dim % _QUANTIZED_HEAD]
        if odd:
            raise InputError(
                f"The attention plugin cannot take {short} caches of this model.",
                note=f"A head has {odd[0]} values; it takes multiples of {_QUANTIZED_HEAD}.",
                hint="Leave --kv-dtype out.",
            )

    def takes_kept(self, form: BlockFormat) -> bool:
        return form.bits == 4 or form.symmetric

    def check_experts(self, dtype: str, formats: object, activations: object) -> None:
        """Plain ONNX of them runs on any."""

    def dtype(self, of_checkpoint: str) -> str:
        return "bfloat16" if of_checkpoint == "float32" else of_checkpoint

    def provider(self, dtype: str) -> str | None:
        return None

    def runs_on_cpu(self, entry: TargetEntry, dtype: str) -> bool:
        assert isinstance(entry, TrtEntry)
        return entry.form == "native" and dtype != "bfloat16"

    def write_ep_context(self, root: Path, kind: StepKind, graph: TrtGraph, version: str) -> str | None:
        """Write a step's engine as an EPContext node where the target has them, and name the file."""
        return None

    def build(
        self,
        root: Path,
        manifest: Manifest,
        graphs: Mapping[StepKind, Any],
        options: TrtOptions,
        console: Console,
        earlier: Bundle | None,
    ) -> TrtEntry:
        from .build import EngineBuilder
        from .lower import trt_from_neutral
        from .profiles import LEAST_VERIFIED, lora_profiles, refresh_profiles

        _check_scales(graphs[StepKind.REFRESH], self.name)
        if manifest.model.expert_bytes:
            console.say(f"{self.name}: each step computes all experts of a layer, and not the chosen ones alone")
        plan, limits = manifest.plan, manifest.limits
        model, form = manifest.model, self.form(options)
        sharing = self.sharing(options, model.weight_dtype, model.dtype, graphs[StepKind.REFRESH], console)
        slots = static_slots(plan, limits)
        chunk = min(PREFILL_CHUNK, limits.max_prompt_len)
        verified = min(max(plan.k + 1, LEAST_VERIFIED), min(slots.values()) - STANDING_SLOTS)
        profiles: dict[StepKind, dict[str, Profile]] = {
            StepKind.REFRESH: refresh_profiles(verified, limits.max_batch, chunk),
            StepKind.LORA: lora_profiles(limits.max_batch),
        }
        builder_options = self.builder_options(options, model.weight_dtype, console)
        builder = EngineBuilder(self.name, root, builder_options, console, self._timing_cache(earlier))
        if form == "native" and not builder.reads_valid_slots:
            console.say(
                f"warning: {self.name} {builder.version} cannot limit attention to valid slots: it reads the whole "
                "capacity of its caches at every step"
            )
        lower = functools.partial(
            trt_from_neutral, slots=slots, weight_sharing=sharing, form=form, alias=options.builder.alias
        )
        refresh = lower(graphs[StepKind.REFRESH])
        lowered = {StepKind.REFRESH: refresh, StepKind.LORA: lower(graphs[StepKind.LORA], refresh=refresh)}
        contexts, sizes = {}, {}
        for kind, graph in lowered.items():
            sizes[kind.value] = self._build_engine(root, kind, graph, profiles[kind], builder, console)
            contexts[kind.value] = self.write_ep_context(root, kind, graph, builder.version)
        table, weight_bytes = _weights(root, self.name, lowered, sharing)
        timing_cache = f"{self.name}/timing.cache" if builder.timing_cache else None
        if timing_cache is not None:
            (root / timing_cache).write_bytes(builder.timing_cache)
        return TrtEntry(
            form=form,
            weight_sharing=sharing,
            slots=slots,
            prefill_chunk=chunk,
            refresh_profiles={
                name: (ranges["sequence"][0], ranges["sequence"][2])
                for name, ranges in profiles[StepKind.REFRESH].items()
            },
            graphs={kind.value: self._graph(kind) for kind in lowered},
            engine_bytes=sizes,
            version=builder.version,
            compute_capabilities=builder.compute_capabilities,
            hardware_compatible=options.builder.hardware_compatible,
            version_compatible=options.builder.version_compatible,
            refresh=self._engine(StepKind.REFRESH),
            ep_context={kind: file for kind, file in contexts.items() if file is not None} or None,
            lora=self._engine(StepKind.LORA),
            weights=table,
            weight_bytes=weight_bytes,
            timing_cache=timing_cache,
        )

    def _graph(self, kind: StepKind) -> str:
        return f"{self.name}/{kind.value}.onnx"

    def _engine(self, kind: StepKind) -> str:
        return f"{self.name}/{kind.value}.engine"

    def _timing_cache(self, earlier: Bundle | None) -> bytes:
        """What an earlier build measured; empty without one."""
        entry = None if earlier is None else earlier.manifest.targets.get(self.name)
        if earlier is None or not isinstance(entry, TrtEntry) or entry.timing_cache is None:
            return b""
        return (earlier.root / entry.timing_cache).read_bytes()

    def _build_engine(
        self,
        root: Path,
        kind: StepKind,
        graph: TrtGraph,
        profiles: Mapping[str, Profile],
        builder: EngineBuilder,
        console: Console,
    ) -> int:
        """Write a step's graph and its engine; returns the engine's size in bytes."""
        (root / self._graph(kind)).write_bytes(graph.proto.SerializeToString())
        engine = builder.build(graph.proto, profiles)
        (root / self._engine(kind)).write_bytes(engine)
        _report_engine(kind, len(engine), graph.constant_bytes, self.name, console)
        return len(engine)


class TensorRt(TrtTarget):
    """TensorRT, which builds for the GPU of this machine and takes plugins."""

    name = "tensorrt"
    cache_dtypes: Mapping[str, tuple[str, ...]] = MappingProxyType(dict.fromkeys(CACHE_DTYPES, MODEL_DTYPES))
    what = "engines for the GPU of this machine"
    default_form = "plugin"
    without_float8 = "Use --dtype int4, fp16 or bf16, with the model's float checkpoint."


class TensorRtRtx(TrtTarget):
    """TensorRT-RTX, which builds without a GPU for the generations that are named."""

    name = "tensorrt-rtx"
    what = "engines for RTX GPUs"
    default_form = "native"
    without_float8 = "Name newer ones with --compute-capability, or use --dtype int4 with the model's float checkpoint."

    def builder_options(self, options: TrtOptions, weights: str, console: Console) -> BuilderOptions:
        chosen, usual = (built_for(self.name, options.builder, dtype) for dtype in (weights, "float32"))
        left_out = [each for each in usual if each not in chosen]
        if left_out:
            console.say(f"{self.name}: not built for compute capability {', '.join(left_out)}, which has no fp8")
        return dataclasses.replace(options.builder, compute_capabilities=chosen)

    def check_dtype(self, dtype: str, weights: str, options: TrtOptions) -> None:
        super().check_dtype(dtype, weights, options)
        old = [each for each in built_for(self.name, options.builder, weights) if float(each) < _BFLOAT16_SINCE]
        if dtype == "bfloat16" and old:
            raise InputError(
                f"Compute capability {', '.join(old)} has no bfloat16.",
                note=f"Activations would be bfloat16, which needs {_BFLOAT16_SINCE} or newer.",
                hint="Use --dtype fp16, or with quantized weights --activation-dtype fp16.",
            )

    def write_ep_context(self, root: Path, kind: StepKind, graph: TrtGraph, version: str) -> str | None:
        from .ep_context import ep_context_model

        file = f"{self.name}/{kind.value}_context.onnx"
        context = ep_context_model(graph.proto, f"{kind.value}.engine", PROVIDERS["rtx"], version)
        (root / file).write_bytes(context.SerializeToString())
        return file
