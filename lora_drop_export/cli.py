"""`lora-drop-export`: parses, calls `export`, prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_drop_runtime.command_line import Parser, require_export_packages, run_command
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan import INJECTIONS, SURROGATES, parse_layers

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_export, arguments)


def _export(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    require_export_packages("the runtime alone does not need it")
    from .compiler import ExportOptions, export

    if args.drop_layers is not None and args.drop_list is not None:
        raise InputError(
            "The drop list is given twice.",
            note="--drop-layers and --drop-list exclude each other.",
            hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
        )
    layers = None if args.drop_layers is None else parse_layers(args.drop_layers)
    if args.drop_list is not None:
        layers = read_drop_list(args.drop_list)
    bundle = export(
        args.model,
        args.out,
        ExportOptions(
            drop_ratio=args.drop_ratio,
            drop_layers=layers,
            always_first=args.always_first,
            always_last=args.always_last,
            k=args.k,
            surrogate=args.surrogate,
            injection=args.injection,
            adapters=args.adapters,
            rank=args.rank,
            targets=tuple(args.target or ["ort"]),
            dtype=DTYPES.get(args.dtype, args.dtype),
            max_seq_len=args.max_seq_len,
            max_prompt_len=args.max_prompt_len,
            max_batch=args.max_batch,
            weights=args.weights,
            verify=not args.no_verify,
            force=args.force,
            threads=args.threads,
            trust_remote_code=args.trust_remote_code,
        ),
    )
    plan, limits = bundle.manifest.plan, bundle.manifest.limits
    dropped = ", ".join(map(str, plan.drop_layers)) or "none"
    print(f"dropped layers: {dropped} ({len(plan.drop_layers)} of {plan.num_layers}), k = {plan.k}")
    print(
        f"limits: {limits.max_seq_len} tokens, prompts of {limits.max_prompt_len}, batches of {limits.max_batch}"
        " (--max-seq-len, --max-prompt-len, --max-batch)"
    )
    if bundle.manifest.targets:
        print(f'try: lora-drop generate {args.out} --prompt "The capital of Italy is"')


def read_drop_list(path: Path) -> tuple[int, ...]:
    """Layer numbers from a JSON file: a list, or an object with `drop_layers`."""
    try:
        data = json.loads(path.read_text())
        layers = data["drop_layers"] if isinstance(data, dict) else data
        if not all(type(layer) is int for layer in layers):
            raise TypeError
        return tuple(layers)
    except OSError as error:
        raise InputError(
            "The drop list cannot be read.", note=f"{path}: {error.strerror}.", hint="Check the path."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            "The file holds no drop list.",
            note=f'{path} is neither a JSON list of layers nor an object with "drop_layers".',
            hint="Use a file written by lora-drop profile, or --drop-layers 4,6,9.",
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lora-drop-export",
        description="Compile a Hugging Face causal language model into a bundle that decodes with LoRA-Drop.",
    )
    parser.add_argument("--model", required=True, metavar="DIR|HUB_ID|FILE.gguf", help="the model to export")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the bundle goes")
    plan = parser.add_argument_group("what is dropped")
    plan.add_argument(
        "--drop-ratio", type=float, metavar="ρ", help="fraction of the eligible layers, spread evenly (default 0.5)"
    )
    plan.add_argument("--drop-layers", metavar="4,6,9", help="the layers to drop, counted from 0")
    plan.add_argument("--drop-list", type=Path, metavar="FILE", help="the same from a JSON file")
    plan.add_argument("--always-first", type=int, default=3, metavar="N", help="never drop the first N (default 3)")
    plan.add_argument("--always-last", type=int, default=1, metavar="N", help="never drop the last N (default 1)")
    plan.add_argument(
        "--k",
        type=int,
        default=3,
        help="LoRA steps between two refreshes, 0 for none (default 3; can be changed at run time)",
    )
    plan.add_argument(
        "--surrogate",
        choices=SURROGATES,
        default="residual",
        help="what a dropped layer's output starts from (default residual)",
    )
    plan.add_argument(
        "--injection",
        choices=INJECTIONS,
        default="block",
        help="one surrogate per layer, or one per half (default block)",
    )
    plan.add_argument("--adapters", type=Path, metavar="DIR", help="fitted adapters in PEFT's format")
    plan.add_argument(
        "--rank", type=int, metavar="R", help="leave room for adapters of this rank, to be loaded later (default 0)"
    )
    target = parser.add_argument_group("what is built")
    target.add_argument(
        "--target",
        action="append",
        metavar="|".join(("ort", "none")),
        help="ort: ONNX Runtime (default); none: the neutral graphs only",
    )
    target.add_argument(
        "--dtype",
        metavar="|".join(DTYPES),
        help="of weights and activations; default fp32 on the CPU, the checkpoint's for --target none",
    )
    target.add_argument(
        "--max-seq-len", type=int, metavar="N", help="longest prompt + new tokens (default 2048 or the model's context)"
    )
    target.add_argument("--max-prompt-len", type=int, metavar="N", help="longest prompt (default max-seq-len − 1)")
    target.add_argument("--max-batch", type=int, default=8, metavar="N", help="most prompts at once (default 8)")
    target.add_argument(
        "--weights",
        choices=("copy", "link"),
        default="copy",
        help="copy the checkpoint's files into the bundle (default) or hard-link them",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--no-verify", action="store_true", help="do not compare the bundle with PyTorch")
    how.add_argument("--force", action="store_true", help="replace an existing bundle at --out")
    how.add_argument("--threads", type=int, metavar="N", help="threads of the verification")
    how.add_argument("--trust-remote-code", action="store_true", help="run the code that a checkpoint brings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
