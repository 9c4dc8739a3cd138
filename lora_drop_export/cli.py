"""`lora-drop-export`: parses, calls `export` or `add_target`, prints."""

from __future__ import annotations

import argparse
import functools
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.command_line import (
    Parser,
    add_options,
    add_version,
    given_flags,
    given_path,
    require_export_packages,
    run_command,
    settings_of,
)
from lora_drop_runtime.dtypes import short_name
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.files import is_file
from lora_drop_runtime.plan.sites import listed

from lora_drop_export.compiler.options import BuildOptions, ExportOptions, PlanOptions
from lora_drop_export.targets.target import TARGETS


@functools.cache  # nothing that is parsed stays in it
def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lora-drop-export",
        description="Compile a Hugging Face causal language model into a bundle that decodes with LoRA-Drop.",
    )
    what = "the model to export; of a bundle its weights, for another plan"
    parser.add_argument("--model", metavar="DIR|HUB_ID|FILE.gguf|BUNDLE", help=what)
    parser.add_argument("--out", required=True, type=given_path, metavar="DIR", help="where the bundle goes")
    parser.add_argument(
        "--add-target",
        action="append",
        metavar="|".join(TARGETS),
        help="build another target from the graphs of the bundle at --out; --model is not needed",
    )
    add_options(parser, ExportOptions)
    add_version(parser)
    return parser


def _refuse_what_the_bundle_fixes(arguments: argparse.Namespace) -> None:
    given = {} if arguments.model is None else {"--model": arguments.model}
    given |= given_flags(PlanOptions, arguments) | given_flags(BuildOptions, arguments)
    for flag, value in given.items():
        shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else short_name(str(value))
        raise InputError(
            "An existing bundle fixes that option.",
            note=f"{flag} {shown} was given with --add-target.",
            hint="Leave it out, or export the model again.",
        )


def _options_of_added(arguments: argparse.Namespace) -> ExportOptions:
    """The options beside --add-target, whose names are checked as those of --target. Raises InputError."""
    arguments.targets = arguments.add_target
    try:
        return settings_of(ExportOptions, arguments)
    except InputError as error:
        fact, note, hint = (said.replace("--target", "--add-target") for said in (error.fact, error.note, error.hint))
        raise InputError(fact, note=note, hint=hint) from None


def _print_exported(bundle: Bundle, out: Path) -> None:
    manifest = bundle.manifest
    plan, limits = manifest.plan, manifest.limits
    what = f"{len(plan.dropped_layers)} of {plan.num_layers}"
    if plan.halves_alone:
        what += f", and {len(plan.halves_alone)} {'half' if len(plan.halves_alone) == 1 else 'halves'} of others"
    print(f"dropped layers: {listed(plan.sites) or 'none'} ({what}), k = {plan.k}, policy {plan.policy}")
    print(
        f"limits: {limits.max_seq_len} tokens, prompts of {limits.max_prompt_len}, batches of {limits.max_batch}"
        " (--max-seq-len, --max-prompt-len, --max-batch)"
    )
    if manifest.targets and is_file(bundle.root / "tokenizer" / "tokenizer.json"):
        from lora_drop_export.check.lora_steps import LEAST_AGREEMENT

        first = next(iter(manifest.targets))
        chosen = TARGETS[first].provider(manifest.model.dtype)
        provider = f" --provider {chosen}" if chosen else ""
        result = manifest.verification.get(first)  # an engine that was not verified may be for another machine
        absent = isinstance(manifest.targets[first], TrtEntry) if result is None else result["status"] == "not run"
        where = "try, on a machine with its device" if absent else "try"
        is_poor = manifest.lora_steps.get("agreement", 1) < LEAST_AGREEMENT
        full = " --k 0" if is_poor and not plan.refresh_policy.verifies else ""
        named = f"./{out}" if str(out).startswith("-") else str(out)  # which would be an option
        quoted = subprocess.list2cmdline([named]) if sys.platform == "win32" else shlex.quote(named)
        print(f'{where}: lora-drop generate {quoted}{provider}{full} --prompt "The capital of Italy is"')


def _export(command_line: Sequence[str]) -> None:
    arguments = _parser().parse_args(command_line)
    require_export_packages("the runtime alone does not need it")
    from lora_drop_export.compiler.add_target import add_target
    from lora_drop_export.compiler.export import export

    if arguments.add_target:
        _refuse_what_the_bundle_fixes(arguments)
        bundle = add_target(arguments.out, arguments.add_target, _options_of_added(arguments))
        print(f"targets: {', '.join(bundle.manifest.targets)}")
        return
    if arguments.model is None:
        raise InputError(
            "There is no model to export.",
            note="--model was not given, nor --add-target for an existing bundle.",
            hint="Use --model DIR|HUB_ID|FILE.gguf|BUNDLE.",
        )
    _print_exported(export(arguments.model, arguments.out, settings_of(ExportOptions, arguments)), arguments.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_export, arguments)


if __name__ == "__main__":
    sys.exit(main())
