"""Targets added to an existing bundle, from the graphs and weights that it has."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.graph_io import NO_HEADS
from lora_drop_runtime.bundle.manifest import CHANNEL, VERIFY_NAME, FileRecord
from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.errors import BundleError, InputError, ModelError
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.console import Console
from lora_drop_export.staging.area import refuse_others, resolved
from lora_drop_export.staging.directory import staged_directory
from lora_drop_export.targets.target import TARGETS, Caches, build_target, check_recurrent

from .files import BUNDLE, tool_versions, verification_details, write_manifest, write_verification
from .options import NO_TARGET, ExportOptions, check_formats
from .verify import verify


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.name == VERIFY_NAME:  # will be written to
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _check_addable(bundle: Bundle, targets: Sequence[str], options: ExportOptions) -> None:
    """Refuse targets that a bundle has already, or that cannot be made from what it has."""
    root, manifest = bundle.root, bundle.manifest
    present = [target for target in targets if target in manifest.targets]
    if present and not options.force:
        raise InputError(
            "The bundle has that target already.",
            note=f"{root} has {', '.join(manifest.targets)}; {', '.join(present)} was asked for.",
            hint="Build it again with --force.",
        )
    if NO_TARGET in targets:
        raise InputError("'none' is no target to add.", note="A bundle has its graphs already.", hint="Name another.")
    for target in targets:
        try:
            TARGETS[target].check_dtype(manifest.model.dtype, manifest.model.weight_dtype, options)
            if manifest.model.expert_bytes:
                TARGETS[target].check_experts(manifest.model.dtype, (), ())
        except (InputError, ModelError) as error:
            hint = error.hint.replace("Use --dtype", "Export the model again with --dtype")  # a bundle's is fixed
            raise type(error)(error.fact, note=error.note, hint=hint) from None
    model, by_channel = manifest.model, manifest.quantization.get("block_size") == CHANNEL
    check_formats(targets, model.weight_dtype, model.kv_dtype, model.dtype, root, by_channel=by_channel)
    if model.recurrence is not None:
        check_recurrent(targets, model.dtype, model.kv_dtype)
    if manifest.model.kv_dtype is not None:
        head_dims = frozenset(one.head_dim for one in manifest.model.heads if one != NO_HEADS)
        fills, convolves = manifest.plan.refresh_policy.fills, bool(manifest.model.convolutions)
        caches = Caches(manifest.model.kv_dtype, head_dims, fills, convolves)
        for target in targets:
            TARGETS[target].check_caches(caches, options)


def _stage_the_rest(bundle: Bundle, targets: Sequence[str], staged: Path) -> dict[str, FileRecord]:
    """Link or copy all of a bundle but these targets' files and what verify.json says of them; returns the records."""
    records = {}
    for name, record in bundle.manifest.files.items():
        if not any(name.startswith(f"{target}/") for target in targets):
            _link_or_copy(bundle.root / name, staged / name)
            records[name] = record
    if VERIFY_NAME in records:
        details = verification_details(staged, targets)
        if details:
            records[VERIFY_NAME] = write_verification(staged, details)
        else:
            (staged / VERIFY_NAME).unlink()
            del records[VERIFY_NAME]
    return records


def _damaged_graph(bundle: Bundle, name: str, reason: str) -> BundleError:
    return BundleError(
        "A graph of the bundle is damaged.",
        note=f"{bundle.root / name}: {reason}.",
        hint="Copy the whole bundle again, or export the model again.",
    )


def _neutral_graph(bundle: Bundle, kind: StepKind) -> Any:
    """A step's neutral graph, an onnx.ModelProto, its weights left where they are.

    Raises:
        BundleError: it is none, or its inputs and outputs are not those that the manifest says.
    """
    import onnx
    from google.protobuf.message import DecodeError

    name = f"{kind.value}.onnx"
    try:
        model = onnx.load_model_from_string(bundle.graph(name))
    except DecodeError:
        raise _damaged_graph(bundle, name, "it is no ONNX model") from None
    io = bundle.manifest.io(kind)
    for specs, values in ((io.inputs, model.graph.input), (io.outputs, model.graph.output)):
        found = {value.name: value.type.tensor_type for value in values}
        for spec in specs:
            dims = [dim.dim_param or dim.dim_value for dim in found[spec.name].shape.dim] if spec.name in found else []
            if (
                spec.name not in found
                or found[spec.name].elem_type != BY_NAME[spec.dtype].onnx
                or dims != [*spec.shape]
            ):
                raise _damaged_graph(bundle, name, f"{spec.name} is not {spec.dtype} {list(spec.shape)}")
    return model


def add_target(out: str | Path, targets: Sequence[str], options: ExportOptions | None = None) -> Bundle:
    """Add targets to a bundle, from the graphs and weights that it has.

    Args:
        out: an existing bundle.
        targets: one that the bundle has already is built again with `options.force`.
        options: of the build and the verification, with the same targets where it has any of theirs; plan, dtype and
            limits are the bundle's.

    Raises:
        InputError, ModelError, BundleError, VerificationError: the bundle is as it was.
    """
    options = dataclasses.replace(options or ExportOptions(), targets=tuple(targets))
    refuse_others(resolved(Path(out)))  # first, since a killed one may have left the bundle beside its place
    bundle = Bundle.open(out)
    root, manifest = bundle.root, bundle.manifest
    _check_addable(bundle, targets, options)
    if options.verify:  # which reads all weights anyway, and would compare damaged ones with themselves
        bundle.check_unchanged((VERIFY_NAME, *(f"{target}/" for target in targets)))
    console = Console()
    graphs = {kind: _neutral_graph(bundle, kind) for kind in (StepKind.REFRESH, StepKind.LORA)}
    # A whole bundle is staged, whose files are hard links of this one's where the file system has them
    with staged_directory(root, force=True, kind=BUNDLE) as staged:
        kept = _stage_the_rest(bundle, targets, staged)
        entries = dict(manifest.targets)  # one that is built again stays where it was: the first is what runs
        for target in targets:
            entries[target] = build_target(target, staged, manifest, graphs, options, console, bundle)
        fresh = {
            file.relative_to(staged).as_posix(): record_file(file)
            for target in targets
            for file in sorted((staged / target).iterdir())
        }
        manifest = dataclasses.replace(
            manifest,
            targets=entries,
            files=kept | fresh,
            versions=manifest.versions | tool_versions(),
            verification={name: result for name, result in manifest.verification.items() if name not in targets},
        )
        made = write_manifest(staged, manifest)
        if options.verify:
            verify(
                made,
                targets=targets,
                console=console,
                threads=options.threads,
                trust_remote_code=options.trust_remote_code,
            )
    console.say(f"done: {out}")
    return Bundle.open(out)
