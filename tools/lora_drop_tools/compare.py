"""`lora-drop compare`: the export's verification again, on a bundle as it lies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lora_drop_runtime.bundle import Bundle

from lora_drop_export.console import Console
from lora_drop_export.verify import Verification, failure, print_table
from lora_drop_export.verify import compare as compare_bundle


def compare(
    bundle: str | Path,
    *,
    k: int | None = None,
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    json_file: str | Path | None = None,
) -> Verification:
    """Compare every step of a teacher-forced run with eager PyTorch and print a table.

    Raises:
        VerificationError: a step disagrees.
    """
    console = Console()
    result = compare_bundle(
        Bundle.open(bundle), target=target, k=k, provider=provider, threads=threads, console=console
    )
    print_table(result, console)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    if not result.passed:
        raise failure(result)
    return result
