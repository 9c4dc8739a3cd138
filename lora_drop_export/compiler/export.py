"""The export: from a model's name to a verified bundle.

    checkpoint.py     what the user named → config and places of tensors
    plan              ρ or a list → DropPlan                                (lora_drop_runtime.plan)
    trace.py          config → one graph, shapes only
    weights.py        checkpoint → weights/, once                           (quantize.py: int4, int8)
    surgery.py        graph + plan → refresh.onnx, lora.onnx (neutral)
    lower_ort.py      neutral → ort/steps.onnx, both in one graph
    lower_trt.py      neutral → <target>/refresh.onnx, lora.onnx and weights.json
    build_trt.py      → <target>/refresh.engine, lora.engine
    verify.py         every step against eager PyTorch
    bundle            manifest, atomic move to --out

Everything is written to a temporary sibling of `out` and moved into place at the end. `add_target` begins at the
lowering, with the graphs of a bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.bundle.adapters import Matrices, read_adapter_config, read_adapters
from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.graph_io import DEVICE_TARGETS
from lora_drop_runtime.bundle.manifest import (
    ATTENTION_FORMS,
    BLOCK_SIZES,
    DTYPE_BYTES,
    MANIFEST_NAME,
    QUANTIZATIONS,
    QUANTIZED_DTYPES,
    TARGETS,
    VERIFY_NAME,
    WEIGHT_SHARINGS,
    FileRecord,
    Limits,
    Manifest,
    ModelFacts,
    SpecialTokens,
)
from lora_drop_runtime.decoding.request import PREFILL_CHUNK
from lora_drop_runtime.engines.ort.providers import PROVIDERS
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import INJECTIONS, POLICIES, SURROGATES, DropPlan, eligible_layers, spread_layers
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

from lora_drop_export.checkpoint.gguf import GgufTensor
from lora_drop_export.checkpoint.open import TORCH_DTYPES, Checkpoint, TensorSource, check_drop_list, open_checkpoint
from lora_drop_export.console import Console
from lora_drop_export.decoder.trace import TracedModel, trace
from lora_drop_export.graphs.match import fusable_groups
from lora_drop_export.graphs.refresh import (
    StoredTensor,
    lora_step_from_refresh,
    refresh_from_trace,
    with_rows_chosen_early,
)
from lora_drop_export.quantize.formats import BlockFormat, Quantization, block_formats, quantizable
from lora_drop_export.staging import staged_directory
from lora_drop_export.targets.trt.build import (
    COMPUTE_CAPABILITIES,
    BuilderOptions,
    EngineBuilder,
    check_buildable,
    lora_profiles,
    refresh_profiles,
)
from lora_drop_export.targets.trt.lower import check_one_copy, ep_context_model, trt_from_neutral
from lora_drop_export.weights.store import (
    ADAPTERS_NAME,
    KV_SCALES_NAME,
    bytes_read,
    is_taken_as_it_lies,
    resolve_tensors,
    store_adapters,
    store_arrays,
    store_weights,
    weights_bytes,
)

_VERSIONED = (
    "lora-drop-export",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnx-graphsurgeon",
    "onnxruntime",
    "polygraphy",
    "numpy",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
)
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_ENGINE_CODE_BYTES = 32 << 20  # kernels of an engine; more than that is weights
_SLACK_BYTES = 64 << 20  # graphs, tokenizer, manifest


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of `lora-drop-export`; the README explains them. None is the default that the command prints."""

    drop_ratio: float | None = None
    drop_layers: Sequence[int] | None = None
    drop_list_fingerprint: str | None = None  # of the model whose profile chose the layers
    always_first: int = 3
    always_last: int = 1
    k: int = 3
    surrogate: str | None = None
    injection: str | None = None
    policy: str | None = None
    adapters: Path | None = None
    rank: int | None = None
    targets: tuple[str, ...] = ("ort",)
    dtype: str | None = None
    quantization: str | None = None
    block_size: int | None = None
    kv_dtype: str | None = None
    max_seq_len: int | None = None
    max_prompt_len: int | None = None
    max_batch: int = 8
    weights: str = "copy"
    weight_sharing: str | None = None
    attention: str | None = None
    builder: BuilderOptions = dataclasses.field(default_factory=BuilderOptions)
    verify: bool = True
    force: bool = False
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.drop_ratio is not None and self.drop_layers is not None:
            raise InputError(
                "The drop list is given twice.",
                note=f"--drop-ratio {self.drop_ratio} and the layers {', '.join(map(str, self.drop_layers))}.",
                hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
            )
        if self.drop_ratio is not None:
            spread_layers((), self.drop_ratio)  # the range checks need no model
        PeriodicSchedule(self.k)
        for target in self.targets:
            if target not in (*TARGETS, "none"):
                raise InputError(
                    "Unknown target.",
                    note=f"{target!r} was given, known are {', '.join((*TARGETS, 'none'))}.",
                    hint="Use --target ort.",
                )
            if target in DEVICE_TARGETS:
                check_buildable(target, self.builder, self.form(target))
        if len(set(self.targets)) != len(self.targets) or ("none" in self.targets and len(self.targets) > 1):
            raise InputError(
                "The targets exclude each other.",
                note=f"Given are {', '.join(self.targets)}.",
                hint="Name each target once; 'none' stands alone.",
            )
        if self.dtype not in (None, *DTYPE_BYTES, *QUANTIZED_DTYPES):
            raise InputError(
                "Unknown dtype.",
                note=f"{self.dtype!r} was given, known are {', '.join((*DTYPE_BYTES, *QUANTIZED_DTYPES))}.",
                hint="Use --dtype fp32.",
            )
        self._check_quantization()
        for what, chosen, known in (
            ("way to store weights", self.weights, ("copy", "link")),
            ("weight sharing", self.weight_sharing, (None, *WEIGHT_SHARINGS)),
            ("form of attention", self.attention, (None, *ATTENTION_FORMS)),
        ):
            if chosen not in known:
                names = [name for name in known if name]
                raise InputError(
                    f"Unknown {what}.",
                    note=f"{chosen!r} was given, known are {' and '.join(names)}.",
                    hint=f"Use {names[0]}.",
                )
        if self.builder.compute_capabilities != COMPUTE_CAPABILITIES and "tensorrt-rtx" not in self.targets:
            given = ", ".join(self.builder.compute_capabilities)
            raise InputError(
                "The compute capabilities are those of tensorrt-rtx.",
                note=f"Given are {given}; the targets are {', '.join(self.targets)}.",
                hint="Leave them out: tensorrt builds for the GPU of this machine.",
            )
        if not self.builder.alias and all(self.form(target) != "plugin" for target in self.targets):
            raise InputError(
                "--no-alias is of the attention plugin.",
                note=f"None of the targets {', '.join(self.targets)} has it.",
                hint="Leave it out, or use --target tensorrt.",
            )
        if self.attention == "plugin" and "tensorrt-rtx" in self.targets:
            raise InputError(
                "The target cannot run plugins.",
                note="'tensorrt-rtx' has its native layers alone, --attention plugin was asked for.",
                hint="Leave --attention out: it is native there, and plugin with --target tensorrt.",
            )
        for option, value in (
            ("--max-batch", self.max_batch),
            ("--max-seq-len", self.max_seq_len),
            ("--max-prompt-len", self.max_prompt_len),
            ("--threads", self.threads),
        ):
            if value is not None and value < 1:
                raise InputError(f"{option} must be positive.", note=f"It is {value}.", hint="Use 1 or more.")

    def _check_quantization(self) -> None:
        others = [target for target in self.targets if target not in ("ort", "none")]
        if self.dtype in QUANTIZED_DTYPES and others:
            raise InputError(
                "The target cannot take quantized weights.",
                note=f"--dtype {self.dtype} is of ort; {', '.join(others)} takes {', '.join(DTYPE_BYTES)}.",
                hint="Use --target ort, or another --dtype.",
            )
        if self.kv_dtype not in (None, "int8"):
            raise InputError(
                "Unknown --kv-dtype.", note=f"{self.kv_dtype!r} was given, known is 'int8'.", hint="Use int8."
            )
        if self.kv_dtype and (others or self.dtype not in (None, "float32", *QUANTIZED_DTYPES)):
            raise InputError(
                "int8 caches are of target ort on the CPU.",
                note=f"Targets are {', '.join(self.targets)}, --dtype is {self.dtype or 'not given'}.",
                hint="Leave --kv-dtype out, or use --target ort with --dtype fp32, int8 or int4.",
            )
        for option, value, known in (
            ("--quantization", self.quantization, QUANTIZATIONS),
            ("--block-size", self.block_size, BLOCK_SIZES),
        ):
            if value is None:
                continue
            if self.dtype not in QUANTIZED_DTYPES:
                raise InputError(
                    f"{option} is of quantized weights.",
                    note=f"It is {value}; --dtype is {self.dtype or 'not given'}.",
                    hint=f"Leave it out, or add --dtype {' or '.join(QUANTIZED_DTYPES)}.",
                )
            if value not in known:
                raise InputError(
                    f"Unknown {option}.",
                    note=f"{value!r} was given, known are {' and '.join(map(str, known))}.",
                    hint=f"Use {known[0]}.",
                )

    @property
    def weights_format(self) -> Quantization | None:
        """How weights are quantized, None where they are not."""
        if self.dtype not in QUANTIZED_DTYPES:
            return None
        return Quantization.of(self.dtype, self.block_size, self.quantization)

    def form(self, target: str) -> str:
        """Of a TensorRT target's attention."""
        return self.attention or ("plugin" if target == "tensorrt" else "native")


def export(model: str, out: str | Path, options: ExportOptions | None = None) -> Bundle:
    """Export a model to a bundle at `out`.

    Args:
        model: a Hugging Face directory, a hub id, or a GGUF file.
        out: the bundle's directory; must not exist unless `options.force`.

    Raises:
        InputError, PlanError, ModelError, BundleError: nothing was changed on disk.
        VerificationError: the bundle disagrees with PyTorch; nothing is left at `out` but what was there.
    """
    options = options or ExportOptions()
    console = Console()
    out = Path(out)
    with staged_directory(out.resolve(), options.force) as root:
        checkpoint = open_checkpoint(
            model, root / "scratch", trust_remote_code=options.trust_remote_code, log=console.say
        )
        dtype = "float32" if options.weights_format else options.dtype or _default_dtype(checkpoint, options)
        with console.phase("tracing the model"):
            traced = trace(checkpoint, dtype)
        bundle = write_bundle(root, checkpoint, traced, dtype, options, console)
        if options.weights_format and options.verify:
            from lora_drop_export.check.verify import report_perplexity

            bundle = report_perplexity(bundle, checkpoint, console=console)
        shutil.rmtree(root / "scratch", ignore_errors=True)
        if options.verify and bundle.manifest.targets:
            from lora_drop_export.check.verify import verify

            bundle = verify(
                bundle,
                console=console,
                threads=options.threads,
                trust_remote_code=options.trust_remote_code,
            )
        elif not bundle.manifest.targets:
            console.say("graphs only: nothing was executed, so nothing was verified")
        else:
            console.say("not verified (--no-verify)")
    console.say(f"done: {out}")
    return Bundle.open(out)


def add_target(out: str | Path, targets: Sequence[str], options: ExportOptions | None = None) -> Bundle:
    """Add targets to a bundle, from the graphs and weights that it has.

    Args:
        out: an existing bundle.
        targets: one that the bundle has already is built again with `options.force`.
        options: of the build and the verification; plan, dtype and limits are the bundle's.

    Raises:
        InputError, ModelError, BundleError, VerificationError: the bundle is as it was.
    """
    import onnx

    options = dataclasses.replace(options or ExportOptions(), targets=tuple(targets))
    bundle = Bundle.open(out)
    root, manifest = bundle.root, bundle.manifest
    present = [target for target in targets if target in manifest.targets]
    if present and not options.force:
        raise InputError(
            "The bundle has that target already.",
            note=f"{root} has {', '.join(manifest.targets)}; {', '.join(present)} was asked for.",
            hint="Build it again with --force.",
        )
    if "none" in targets:
        raise InputError("'none' is no target to add.", note="A bundle has its graphs already.", hint="Name another.")
    if manifest.model.weight_dtype in QUANTIZED_DTYPES and set(targets) != {"ort"}:
        raise InputError(
            "The target cannot take quantized weights.",
            note=f"{root} has {manifest.model.weight_dtype} weights; {', '.join(targets)} was asked for.",
            hint="Export the model again, without --dtype int4 or int8.",
        )
    console = Console()
    graphs = {
        kind: onnx.load(root / f"{kind.value}.onnx", load_external_data=False)
        for kind in (StepKind.REFRESH, StepKind.LORA)
    }
    # A whole bundle is staged, whose files are hard links of this one's where the file system has them
    with staged_directory(root.resolve(), force=True) as staged:
        for name in manifest.files:
            if not any(name.startswith(f"{target}/") for target in targets):
                _link_or_copy(root / name, staged / name)
        kept = {name: record for name, record in manifest.files.items() if (staged / name).exists()}
        entries = {name: entry for name, entry in manifest.targets.items() if name not in targets}
        for target in targets:
            cache = manifest.targets.get(target, {}).get("timing_cache")
            timing_cache = b"" if cache is None else (root / cache).read_bytes()
            entries[target] = build_target(staged, manifest, graphs, target, options, console, timing_cache)
        fresh = {
            file.relative_to(staged).as_posix(): record_file(file)
            for target in targets
            for file in sorted((staged / target).iterdir())
        }
        results = {name: result for name, result in manifest.verification.items() if name not in targets}
        manifest = dataclasses.replace(
            manifest,
            targets=entries,
            files=kept | fresh,
            versions=manifest.versions | _versions(),
            verification=results,
        )
        (staged / MANIFEST_NAME).write_text(manifest.to_json())
        if options.verify:
            from lora_drop_export.check.verify import verify

            verify(
                Bundle(staged, manifest),
                targets=targets,
                console=console,
                threads=options.threads,
                trust_remote_code=options.trust_remote_code,
            )
    console.say(f"done: {out}")
    return Bundle.open(out)


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.name == VERIFY_NAME:  # will be written to
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_bundle(
    root: Path,
    checkpoint: Checkpoint,
    traced: TracedModel,
    dtype: str,
    options: ExportOptions,
    console: Console,
) -> Bundle:
    """Everything of an export after the trace and before the verification, into `root`."""
    limits = make_limits(checkpoint.config, options)
    plan = make_plan(traced, options)
    fingerprint = checkpoint.fingerprint()
    check_drop_list(options.drop_list_fingerprint, checkpoint.name, fingerprint)
    matrices = _adapter_matrices(plan, traced, fingerprint, options)
    refs = resolve_tensors(checkpoint, traced.parameters, traced.tied)
    groups = fusable_groups(traced.graph)
    formats = _block_formats(refs, traced, groups, options.weights_format)
    as_it_lay = is_taken_as_it_lies(refs.values(), dtype, owned=checkpoint.owned, formats=formats)
    needed = weights_bytes(refs, dtype, options.weights, owned=checkpoint.owned, formats=formats)
    _check_disk(root, needed)
    with console.progress("weights") as progress:
        stored = store_weights(
            refs,
            dtype,
            root,
            options.weights,
            owned=checkpoint.owned,
            groups=groups,
            formats=formats,
            method=options.weights_format.method if options.weights_format else "rtn",
            progress=progress,
        )
    _make_model_directory(checkpoint, root / "weights")
    adapters = store_adapters(matrices, dtype, root)
    _copy_tokenizer(checkpoint, root / "tokenizer")
    facts = _model_facts(checkpoint, traced, dtype, fingerprint, stored)
    if options.weights_format:
        facts = dataclasses.replace(facts, weight_dtype=f"int{options.weights_format.bits}")
    kv_scales: dict[str, StoredTensor] = {}
    if options.kv_dtype:
        from lora_drop_export.check.verify import calibrate_kv

        scales = calibrate_kv(checkpoint, root, traced.vocab_size, facts.context_length, console)
        kv_scales = store_arrays(scales, KV_SCALES_NAME, "float32", root)
        facts = dataclasses.replace(facts, kv_dtype=options.kv_dtype)
    manifest = Manifest(
        model=facts,
        plan=plan,
        limits=limits,
        special_tokens=_special_tokens(checkpoint),
        versions=_versions(),
        quantization=dataclasses.asdict(options.weights_format) if options.weights_format else {},
    )
    with console.phase("refresh.onnx and lora.onnx"):
        refresh = refresh_from_trace(traced, plan, dtype, stored, kv_scales)
        lora = lora_step_from_refresh(refresh, plan, facts.cache, adapters)
        graphs = {StepKind.REFRESH: with_rows_chosen_early(refresh), StepKind.LORA: lora}
        for kind, proto in graphs.items():
            (root / f"{kind.value}.onnx").write_bytes(proto.SerializeToString())
    targets = {
        target: build_target(root, manifest, graphs, target, options, console)
        for target in options.targets
        if target != "none"
    }
    manifest = dataclasses.replace(manifest, targets=targets, files=_records(root, as_it_lay))
    (root / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle(root, manifest)


def _block_formats(
    refs: Mapping[str, TensorSource],
    traced: TracedModel,
    groups: Sequence[tuple[str, ...]],
    quantization: Quantization | None,
) -> dict[str, BlockFormat]:
    """The block format of each quantized weight; of a tied one under all of its names."""
    if quantization is None:
        return {}
    weights = quantizable(traced.graph.graph)
    others = {ref.name for name, ref in refs.items() if name not in weights}
    chosen = {name: ref for name, ref in refs.items() if ref.name not in others}
    native = {name: ref.native for name, ref in chosen.items() if isinstance(ref, GgufTensor) and ref.native}
    return block_formats({name: ref.shape for name, ref in chosen.items()}, native, groups, quantization)


def make_plan(traced: TracedModel, options: ExportOptions) -> DropPlan:
    """The drop plan that the options ask for, on this model."""
    windowed = tuple(i for i, window in enumerate(traced.windows) if window)
    eligible = eligible_layers(len(traced.windows), options.always_first, options.always_last, windowed)
    ratio = 0.5 if options.drop_ratio is None else options.drop_ratio
    layers = spread_layers(eligible, ratio) if options.drop_layers is None else tuple(options.drop_layers)
    rank, policy = options.rank or 0, options.policy
    surrogate, injection = options.surrogate, options.injection
    if options.adapters is not None:
        config = read_adapter_config(options.adapters)
        policy = policy or config.policy
        surrogate, injection = surrogate or config.surrogate, injection or config.injection
        if options.rank not in (None, config.rank):
            raise PlanError(
                "The adapters have another rank.",
                note=f"--rank is {options.rank}, {options.adapters} has rank {config.rank}.",
                hint="Leave --rank out when --adapters is given.",
            )
        rank = config.rank
        if options.drop_layers is None and options.drop_ratio is None and config.drop_layers is not None:
            layers = config.drop_layers
    return DropPlan(
        num_layers=len(traced.windows),
        drop_layers=layers,
        k=options.k,
        surrogate=surrogate or SURROGATES[0],
        injection=injection or INJECTIONS[0],
        rank=rank if layers else 0,
        policy=policy or POLICIES[0],
        always_first=options.always_first,
        always_last=options.always_last,
        windowed_layers=windowed,
    )


def make_limits(config: Any, options: ExportOptions) -> Limits:
    """Capacities: 2048 tokens unless told otherwise, never more than the model's context."""
    context = _context_length(config)
    max_seq_len = options.max_seq_len or min(2048, context)
    max_prompt_len = options.max_prompt_len or max(1, max_seq_len - 1)
    for option, value, bound, what in (
        ("--max-seq-len", max_seq_len, context, "the model's context"),
        ("--max-prompt-len", max_prompt_len, max_seq_len - 1, "--max-seq-len less one new token"),
    ):
        if value > bound:
            raise InputError(f"{option} is too large.", note=f"It is {value}, {what} is {bound}.", hint="Lower it.")
    return Limits(max_seq_len, max_prompt_len, options.max_batch)


def _context_length(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 2048


def _default_dtype(checkpoint: Checkpoint, options: ExportOptions) -> str:
    """float32 on the CPU, else what most of the checkpoint has; engines of float32 checkpoints are bfloat16."""
    if "ort" in options.targets:
        return "float32"
    size: dict[str, int] = {}
    for ref in checkpoint.tensors.values():
        size[ref.dtype] = size.get(ref.dtype, 0) + ref.size_bytes
    dtype = TORCH_DTYPES.get(max(size, key=lambda name: size[name]), "float32")
    return "bfloat16" if dtype == "float32" and "none" not in options.targets else dtype


def _adapter_matrices(plan: DropPlan, traced: TracedModel, fingerprint: str, options: ExportOptions) -> Matrices:
    """Fitted adapters, or zeros that leave room for some, or none."""
    if options.adapters is not None:
        return read_adapters(options.adapters, plan, traced.hidden_size, fingerprint)
    width = traced.hidden_size
    zeros = np.zeros((plan.rank, width), np.float32), np.zeros((width, plan.rank), np.float32)
    return dict.fromkeys(plan.sites, zeros) if plan.rank else {}


def _model_facts(
    checkpoint: Checkpoint,
    traced: TracedModel,
    dtype: str,
    fingerprint: str,
    stored: Mapping[str, StoredTensor],
) -> ModelFacts:
    prefix = f"{traced.layers_prefix}."
    layer_bytes = [0] * len(traced.windows)
    head_bytes = 0
    for name, tensor in stored.items():
        if name.startswith(prefix):
            layer_bytes[int(name.removeprefix(prefix).partition(".")[0])] += bytes_read(tensor)
        elif name not in traced.embedding_only:
            head_bytes += bytes_read(tensor)
    rows = [t for name, t in stored.items() if not name.startswith(prefix) and t.shape[1:] == (traced.hidden_size,)]
    tables = [bytes_read(t) // t.shape[0] for t in rows if t.shape[0] >= traced.vocab_size]
    embedding_row_bytes = tables[0] if tables else traced.hidden_size * DTYPE_BYTES[dtype]
    return ModelFacts(
        name=checkpoint.name,
        model_type=checkpoint.config.model_type,
        fingerprint=fingerprint,
        num_layers=len(traced.windows),
        hidden_size=traced.hidden_size,
        vocab_size=traced.vocab_size,
        num_heads=traced.num_heads,
        kv_heads=traced.kv_heads,
        head_dim=traced.head_dim,
        context_length=_context_length(checkpoint.config),
        dtype=dtype,
        windows=traced.windows,
        layer_bytes=tuple(layer_bytes),
        head_bytes=head_bytes,
        embedding_row_bytes=embedding_row_bytes,
        weight_dtype=dtype,
    )


def _special_tokens(checkpoint: Checkpoint) -> SpecialTokens:
    """End and padding tokens: the generation config's, else the model config's."""
    from transformers import GenerationConfig

    try:
        generation: Any = GenerationConfig.from_pretrained(checkpoint.directory)
    except OSError:
        generation = checkpoint.config
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(checkpoint.config, "eos_token_id", None)
    pad = getattr(generation, "pad_token_id", None)
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return SpecialTokens(eos=ids, pad=0 if pad is None or pad < 0 else pad)


def build_target(
    root: Path,
    manifest: Manifest,
    graphs: Mapping[StepKind, Any],
    target: str,
    options: ExportOptions,
    console: Console,
    timing_cache: bytes = b"",
) -> dict[str, Any]:
    """Lower the neutral graphs, build what the target runs into `root/target`, and return its manifest entry."""
    (root / target).mkdir()
    if target == "ort":
        with console.phase("lowering to ONNX Runtime"):
            return _lower_to_ort(root, graphs, manifest.limits.max_seq_len)
    return _build_engines(root, manifest, graphs, target, options, console, timing_cache)


def _lower_to_ort(root: Path, graphs: Mapping[StepKind, Any], max_seq_len: int) -> dict[str, Any]:
    from lora_drop_export.targets.ort.lower import ort_from_neutral

    entry = {"steps": "ort/steps.onnx"}
    joined = ort_from_neutral(graphs[StepKind.REFRESH], graphs[StepKind.LORA], max_seq_len)
    (root / entry["steps"]).write_bytes(joined.SerializeToString())
    return entry


def _build_engines(
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


def static_slots(plan: DropPlan, limits: Limits) -> dict[str, int]:
    """Slots that the largest request of a bundle's limits needs in each cache group, at the plan's own k and policy."""
    prompt, steps = limits.max_prompt_len, limits.max_seq_len - limits.max_prompt_len - 1
    written = steps if plan.policy == "backfill" else steps // (plan.k + 1)
    return {"kept": limits.max_seq_len - 1, "dropped": prompt + written}


def _report_engine(kind: StepKind, size_bytes: int, weight_bytes: int, target: str, console: Console) -> None:
    """An engine's size beside the weights that it holds; says so when it holds one more than once."""
    held = f"of which {weight_bytes / 2**20:.1f} MiB are weights" if weight_bytes else "without weights"
    console.say(f"{target}: {kind.value} engine {size_bytes / 2**20:.1f} MiB, {held}")
    if weight_bytes and size_bytes > 1.5 * weight_bytes + _ENGINE_CODE_BYTES:
        console.say(
            f"warning: the {kind.value} engine is {size_bytes / weight_bytes:.1f} times its weights: profiles or "
            "compute capabilities hold copies of their own; --weight-sharing inputs holds none"
        )


def _copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """Tokenizer as transformers sees it, generation config, chat template, licence."""
    from transformers import AutoTokenizer

    directory.mkdir()
    for pattern in ("generation_config.json", *_LICENCE_FILES):
        for file in checkpoint.directory.glob(pattern):
            shutil.copyfile(file, directory / file.name)
    if not any(checkpoint.directory.glob("tokenizer*")):
        return
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    tokenizer.save_pretrained(directory)


def _make_model_directory(checkpoint: Checkpoint, weights: Path) -> None:
    """Config, and code if the model brings some, beside the weights, so that the reference can be built from them."""
    checkpoint.config.save_pretrained(weights)
    if checkpoint.trust_remote_code:
        for file in checkpoint.directory.glob("*.py"):
            shutil.copyfile(file, weights / file.name)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _records(root: Path, as_it_lay: bool) -> dict[str, FileRecord]:
    """Size and hash of every file; of a checkpoint taken as it lay only the headers, since it may be huge."""
    records = {}
    for file in sorted(p for p in root.rglob("*") if p.is_file() and "scratch" not in p.relative_to(root).parts):
        name = file.relative_to(root).as_posix()
        if name != MANIFEST_NAME:
            of_checkpoint = file.match("weights/*.safetensors") and file.name not in (ADAPTERS_NAME, KV_SCALES_NAME)
            records[name] = record_file(file, header_only=of_checkpoint and as_it_lay)
    return records


def _check_disk(root: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed_bytes + _SLACK_BYTES:
        raise InputError(
            "There is too little free disk space.",
            note=f"The bundle needs {(needed_bytes + _SLACK_BYTES) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free.",
            hint="Free some space, choose another --out, or use --weights link.",
        )
