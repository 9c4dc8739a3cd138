"""The verification of a bundle's targets, and its record in verify.json and the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import VERIFY_NAME

from lora_drop_export.check.lora_steps import report_lora_steps
from lora_drop_export.check.verify import verify_target
from lora_drop_export.console import Console
from lora_drop_export.targets.target import TARGETS

from .files import verification_details, write_manifest, write_verification


def verify(
    bundle: Bundle,
    *,
    console: Console,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Bundle:
    """Verify targets of a bundle that is being written, all when None; writes verify.json and the manifest.

    A target that this machine cannot execute is recorded as `not run`, with the reason; see `verify_target`. How near
    LoRA steps come to all layers is said and recorded, too.

    Raises:
        VerificationError: a step disagrees.
    """
    manifest = bundle.manifest
    checked = list(manifest.targets if targets is None else targets)
    entries: dict[str, dict[str, Any]] = dict(manifest.verification)
    details = verification_details(bundle.root, checked)
    for name in checked:
        target, dtype = TARGETS[name], manifest.model.dtype
        entries[name], result = verify_target(
            bundle,
            name,
            provider=target.provider(dtype),
            runs_on_cpu=target.runs_on_cpu(manifest.targets[name], dtype),
            console=console,
            threads=threads,
            trust_remote_code=trust_remote_code,
        )
        if result is not None:
            details.append(dataclasses.asdict(result))
    # Of the plan, not of a target: one that is added changes nothing
    cost = manifest.lora_steps or report_lora_steps(bundle, console, trust_remote_code=trust_remote_code)
    files = manifest.files | {VERIFY_NAME: write_verification(bundle.root, details)}
    return write_manifest(
        bundle.root, dataclasses.replace(manifest, verification=entries, files=files, lora_steps=cost)
    )
