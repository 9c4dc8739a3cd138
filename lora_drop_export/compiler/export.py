"""The export: from a model's name to a verified bundle.

    checkpoint/       what the user named → config and places of tensors
    decoder/          config → one graph, shapes only
    early             what is refused before any of the following begins
    facts             ρ or a list → DropPlan; limits, formats
    forms             which form of int4 or int8 is the fastest that loses little (--block-size auto)
    rounded           sample text → integers of weights, where they are calibrated (check/gptq)
    weights/          checkpoint → weights/, once                           (quantize/: int4, int8)
    check/calibrate   sample text → scales of 8-bit caches, which the graphs refer to
    graphs/           graph + plan → refresh.onnx, lora.onnx (neutral)
    targets/          neutral → what each target runs
    verify            every step against eager PyTorch
    files             manifest; then an atomic move to --out

Everything is written to a temporary sibling of `out` and moved into place at the end. `add_target` begins at the
lowering, with the graphs of a bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import ADAPTERS_NAME, INTEGER_DTYPES, KV_SCALES_NAME, Manifest
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.check.calibrate import calibrate_kv
from lora_drop_export.check.calibration_text import calibration_windows, held_back_windows
from lora_drop_export.check.perplexity import report_perplexity
from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.drop_list import check_drop_list
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.console import Console
from lora_drop_export.decoder.context import context_length
from lora_drop_export.decoder.experts import activations_of_experts
from lora_drop_export.decoder.trace import TracedModel, trace
from lora_drop_export.graphs.early_rows import with_rows_chosen_early
from lora_drop_export.graphs.lora import lora_step_from_refresh
from lora_drop_export.graphs.match import fusable_groups
from lora_drop_export.graphs.refresh import check_halves, refresh_from_trace
from lora_drop_export.quantize.choice import CALIBRATED
from lora_drop_export.staging.directory import staged_directory
from lora_drop_export.targets.target import TARGETS, build_target
from lora_drop_export.weights.arrays import store_arrays
from lora_drop_export.weights.resolve import resolve_tensors
from lora_drop_export.weights.store import store_weights, weights_bytes

from .early import check_before_trace, check_bundle, check_kept, check_names, warn_of_layers, warn_of_tensors
from .facts import (
    activations_dtype,
    chosen_formats,
    expert_formats,
    kept_quantization,
    make_limits,
    make_plan,
    model_facts,
    quantization_facts,
    quantization_of,
    special_tokens,
    surrogate_weights,
    with_small_floats,
)
from .files import BUNDLE, check_disk, copy_tokenizer, make_model_directory, tool_versions, write_manifest
from .forms import MOST_LOSS, fastest_form
from .options import AUTO, NO_TARGET, ExportOptions, with_files_read
from .records import HashedMeanwhile, file_records
from .rounded import calibrated
from .verify import verify


def write_bundle(
    root: Path,
    checkpoint: Checkpoint,
    traced: TracedModel,
    dtype: str,
    options: ExportOptions,
    console: Console,
    *,
    stand_in: bool = False,
) -> Bundle:
    """Everything of an export after the trace and before the verification, into `root`.

    The tokenizer is there already (`copy_tokenizer`): what is wrong with it is said before the trace.

    Args:
        stand_in: weights are rounded to the nearest, whatever was asked for: for what is timed and not kept.
    """
    limits = make_limits(checkpoint.config, options)
    plan = make_plan(traced.windows, traced.hidden_size, options, traced.kv_sources)
    check_halves(traced, plan)  # before weights are read, rounded and written
    fingerprint = checkpoint.fingerprint()
    check_drop_list(options.drop_list_fingerprint, checkpoint.name, fingerprint)
    surrogates = surrogate_weights(plan, traced.hidden_size, fingerprint, options)
    refs = resolve_tensors(checkpoint, traced.parameters, traced.tied)
    warn_of_layers(checkpoint, len(traced.windows), console)
    warn_of_tensors(checkpoint, refs, len(traced.windows), console)
    groups = fusable_groups(traced.graph)
    formats = chosen_formats(refs, traced, groups, options)
    if mixtures := expert_formats(refs, formats):
        activations = activations_of_experts(traced.graph.graph)
        for target in set(options.targets) & set(TARGETS):
            TARGETS[target].check_experts(dtype, mixtures, activations)
    quantization = quantization_of(refs, options)
    needed = weights_bytes(refs, dtype, options.weights, owned=checkpoint.owned, formats=formats)
    rounds = options.calibrated and not stand_in
    check_disk(root, needed * (2 if rounds else 1))
    context = context_length(checkpoint.config)
    with contextlib.ExitStack() as stack:
        sources = refs
        if rounds:
            sources = stack.enter_context(
                calibrated(refs, formats, checkpoint, traced, root, context, options.calibration, console)
            )
        stored = store_weights(
            sources,
            dtype,
            root,
            options.weights,
            owned=checkpoint.owned,
            groups=groups,
            formats=formats,
            method=options.weights_format.rounding if options.weights_format and not stand_in else "rtn",
            progress=stack.enter_context(console.progress("weights")),
        )
    hashed = HashedMeanwhile(root / "weights")
    make_model_directory(checkpoint, root / "weights")
    adapters = store_arrays(surrogates, ADAPTERS_NAME, dtype, root)
    facts = model_facts(checkpoint, traced, dtype, fingerprint, stored)
    if quantization:
        facts = dataclasses.replace(facts, weight_dtype=quantization.dtype)
    kv_scales: dict[str, TensorPlace] = {}
    if options.kv_dtype:
        per_head = any(TARGETS[name].scales_per_head for name in options.targets if name in TARGETS)
        scales = calibrate_kv(
            checkpoint, root, traced.vocab_size, facts.context_length, options.kv_dtype, per_head, console
        )
        kv_scales = store_arrays(scales, KV_SCALES_NAME, "float32", root)
        facts = dataclasses.replace(facts, kv_dtype=options.kv_dtype)
    manifest = Manifest(
        model=facts,
        plan=plan,
        limits=limits,
        special_tokens=special_tokens(checkpoint),
        versions=tool_versions(),
        quantization=quantization_facts(refs, formats, quantization, checkpoint.quantization, console),
    )
    with console.phase("refresh.onnx and lora.onnx"):
        refresh = refresh_from_trace(traced, plan, dtype, stored, facts.kv_dtype, kv_scales)
        lora = lora_step_from_refresh(refresh, plan, facts.cache, adapters)
        graphs = {StepKind.REFRESH: with_rows_chosen_early(refresh), StepKind.LORA: lora}
        for kind, proto in graphs.items():
            (root / f"{kind.value}.onnx").write_bytes(proto.SerializeToString())
    targets = {
        target: build_target(target, root, manifest, graphs, options, console)
        for target in options.targets
        if target != NO_TARGET
    }
    files = file_records(root, hashed.records())
    return write_manifest(root, dataclasses.replace(manifest, targets=targets, files=files))


def _with_perplexity(bundle: Bundle, checkpoint: Checkpoint, options: ExportOptions, console: Console) -> Bundle:
    """Measure what quantization costs, on the first target, and say it in the manifest; and what would cost less."""
    name, _ = bundle.target(None)
    provider = TARGETS[name].provider(bundle.manifest.model.dtype)
    perplexity = report_perplexity(
        bundle, checkpoint, name, provider=provider, console=console, threads=options.threads
    )
    if perplexity is None:
        return bundle
    by_range = options.dtype in INTEGER_DTYPES and not options.calibrated and options.block_size != AUTO
    costly = perplexity[bundle.manifest.model.weight_dtype] > (1 + MOST_LOSS) * perplexity["float"]
    if costly and by_range and kept_quantization(checkpoint.tensors) is None:
        console.say(
            f"over {100 * MOST_LOSS:.0f} %: --quantization {CALIBRATED} takes minutes, and as a rule costs less"
        )
    said = bundle.manifest.quantization | {"perplexity": perplexity}
    return write_manifest(bundle.root, dataclasses.replace(bundle.manifest, quantization=said))


def export(model: str, out: str | Path, options: ExportOptions | None = None) -> Bundle:
    """Export a model to a bundle at `out`.

    Args:
        model: a Hugging Face directory, a hub id, a GGUF file, or a bundle, whose weights are taken as they are.
        out: the bundle's directory; must not exist unless `options.force`.

    Raises:
        InputError, PlanError, ModelError, BundleError: nothing was changed on disk.
        VerificationError: the bundle disagrees with PyTorch; nothing is left at `out` but what was there.
    """
    console = Console()
    options = with_files_read(options or ExportOptions(), console.say)
    out = Path(out)
    check_names(model, out)
    with staged_directory(out, options.force, BUNDLE) as root, contextlib.ExitStack() as stack:
        checkpoint = open_checkpoint(
            model, root.with_name("scratch"), trust_remote_code=options.trust_remote_code, log=console.say
        )
        stack.enter_context(checkpoint.unchanged())
        if checkpoint.bundle is not None:
            check_bundle(checkpoint.bundle, console)
        checkpoint = with_small_floats(checkpoint, options, console)
        check_kept(checkpoint, options)
        quantized = quantization_of(checkpoint.tensors, options)
        dtype = activations_dtype(checkpoint, options, quantized=quantized is not None)
        check_before_trace(checkpoint, dtype, options, root, console)
        copy_tokenizer(checkpoint, root / "tokenizer")
        if not (root / "tokenizer" / "tokenizer.json").is_file():
            console.say("the model brings no tokenizer that can be read here: prompts have to be token ids")
        special_tokens(checkpoint)  # refuses what would be refused after the trace
        text = root, checkpoint.config.vocab_size, context_length(checkpoint.config), options.calibration
        if options.block_size == AUTO:  # and so does this
            windows = held_back_windows(*text)
        elif options.calibrated:  # and this
            calibration_windows(*text)
        with console.phase("tracing the model"):
            traced = trace(checkpoint, dtype)
        if options.block_size == AUTO:

            def write(place: Path, form: ExportOptions, stand_in: bool) -> Bundle:
                return write_bundle(place, checkpoint, traced, dtype, form, console, stand_in=stand_in)

            bundle = fastest_form(root, checkpoint, windows, options, write, console)
        else:
            bundle = write_bundle(root, checkpoint, traced, dtype, options, console)
        # Of a bundle's weights that was measured beside those that they were rounded from, and is said already
        if bundle.manifest.targets and quantized and options.verify and not checkpoint.quantization:
            bundle = _with_perplexity(bundle, checkpoint, options, console)
        if not bundle.manifest.targets:
            console.say("graphs only: nothing was executed, so nothing was verified")
        elif options.verify:
            verify(bundle, console=console, threads=options.threads, trust_remote_code=options.trust_remote_code)
        else:
            console.say("not verified (--no-verify)")
    console.say(f"done: {out}")
    return Bundle.open(out)
