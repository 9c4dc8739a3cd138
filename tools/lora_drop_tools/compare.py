"""`lora-drop compare`: the export's verification again, on a bundle as it lies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.command_line import require_export_packages
from lora_drop_runtime.errors import InputError

if TYPE_CHECKING:
    from lora_drop_export.check.figures import Verification


def compare(
    bundle: str | Path,
    *,
    k: int | None = None,
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    json_file: str | Path | None = None,
    trust_remote_code: bool = False,
    policy: str | None = None,
) -> Verification:
    """Compare every step of a teacher-forced run with eager PyTorch and print a table.

    Raises:
        VerificationError: a step disagrees.
        InputError: the exporter's packages are not installed.
    """
    require_export_packages("comparing needs PyTorch as the reference")
    from lora_drop_export.check.figures import failure, print_table
    from lora_drop_export.check.verify import compare as compare_bundle
    from lora_drop_export.console import Console

    console = Console()
    result = compare_bundle(
        Bundle.open(bundle),
        target=target,
        k=k,
        provider=provider,
        threads=threads,
        console=console,
        trust_remote_code=trust_remote_code,
        policy=policy,
    )
    print_table(result, console)
    if json_file is not None:
        try:
            Path(json_file).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
        except OSError as error:
            raise InputError(
                "The figures cannot be written.", note=f"{json_file}: {error.strerror}.", hint="Give another --json."
            ) from None
    if not result.passed:
        raise failure(result)
    return result
