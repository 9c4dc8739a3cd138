"""`lora-drop compare`: the export's verification again, on a bundle as it lies."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_drop_runtime.bounds import K
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.command_line import check_options, option, refuse_unused, require_export_packages

from lora_drop_tools.shared.bundles import check_session
from lora_drop_tools.shared.options import (
    json_option,
    policy_option,
    provider_option,
    target_option,
    threads_option,
    trust_remote_code_option,
)
from lora_drop_tools.shared.results import check_results, then_shown, write_json

if TYPE_CHECKING:
    from lora_drop_export.check.figures import Verification

_KEYS = ("target", "k", "prompt_lengths", "tolerance", "steps")  # of what --json writes


@dataclass(frozen=True)
class CompareSettings:
    """What is compared. What is None is the bundle's; `target`, `provider` and `threads` as for `Session.open`."""

    k: int | None = option(None, bounds=K, help="compare under this window (default: the bundle's)")
    policy: str | None = policy_option()
    trust_remote_code: bool = trust_remote_code_option()
    json_file: Path | None = json_option("write every step's figures")
    target: str | None = target_option()
    provider: str | None = provider_option()
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        check_options(self)
        if self.k == 0:
            refuse_unused(self, ("policy",), "with --k 0 every step is a refresh", "use a larger --k")


def _as_json(result: Verification) -> str:
    """What --json writes. JSON has no NaN and no infinity: a figure that is one of them is null."""
    data = json.loads(json.dumps(dataclasses.asdict(result)), parse_constant=lambda _: None)
    return json.dumps(data, indent=1) + "\n"


def compare(bundle: str | Path, settings: CompareSettings) -> Verification:
    """Compare every step of a teacher-forced run with eager PyTorch and print a table.

    Raises:
        VerificationError: a step disagrees.
        InputError: the exporter's packages are not installed, or the figures cannot be written.
    """
    require_export_packages("comparing needs PyTorch as the reference")
    from lora_drop_export.check.figures import failure, print_table
    from lora_drop_export.check.verify import compare as compare_bundle
    from lora_drop_export.console import Console

    check_results(settings.json_file, _KEYS)
    console = Console()
    opened = Bundle.open(bundle)
    check_session(opened, settings.target, settings.provider, settings.threads, [settings.policy])
    result = compare_bundle(
        opened,
        target=settings.target,
        k=settings.k,
        provider=settings.provider,
        threads=settings.threads,
        console=console,
        trust_remote_code=settings.trust_remote_code,
        policy=settings.policy,
    )
    with then_shown(lambda: print_table(result, console)):
        if settings.json_file is not None:
            write_json(settings.json_file, _as_json(result), _KEYS)
    if not result.passed:
        raise failure(result)
    return result
