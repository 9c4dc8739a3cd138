"""Targets added to an existing bundle, from the graphs and weights that it has."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, QUANTIZED_DTYPES, VERIFY_NAME
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.console import Console
from lora_drop_export.staging import staged_directory
from lora_drop_export.targets.target import build_target

from .files import tool_versions
from .options import ExportOptions


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.name == VERIFY_NAME:  # will be written to
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
            versions=manifest.versions | tool_versions(),
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
