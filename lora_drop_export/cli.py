"""`lora-drop-export`: parses, calls `export`, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_drop_runtime.bundle.adapters import read_adapter_config
from lora_drop_runtime.bundle.manifest import ATTENTION_FORMS, BLOCK_SIZES, QUANTIZATIONS, TARGETS, WEIGHT_SHARINGS
from lora_drop_runtime.command_line import Parser, require_export_packages, run_command
from lora_drop_runtime.dtypes import BY_SHORT, long_name
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import INJECTIONS, parse_layers
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE, SURROGATES

from lora_drop_export.checkpoint.drop_list import read_drop_list, warn_of_base


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lora-drop-export",
        description="Compile a Hugging Face causal language model into a bundle that decodes with LoRA-Drop.",
    )
    parser.add_argument("--model", metavar="DIR|HUB_ID|FILE.gguf", help="the model to export")
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
        help="what a dropped layer's output starts from (default: what the adapters were fitted for, else residual)",
    )
    plan.add_argument(
        "--injection",
        choices=INJECTIONS,
        help="one surrogate per layer, or one per half (default: what the adapters were fitted for, else block)",
    )
    plan.add_argument(
        "--policy",
        choices=POLICIES,
        help="of refreshes, the bundle's default (default: what the adapters were fitted for, else skip)",
    )
    plan.add_argument("--adapters", type=Path, metavar="DIR", help="fitted adapters in PEFT's format")
    plan.add_argument(
        "--rank", type=int, metavar="R", help="leave room for adapters of this rank, to be loaded later (default 0)"
    )
    target = parser.add_argument_group("what is built")
    target.add_argument(
        "--target",
        action="append",
        metavar="|".join((*TARGETS, "none")),
        help="ort: ONNX Runtime (default); tensorrt, tensorrt-rtx: engines; none: the neutral graphs only. "
        "May be given several times",
    )
    target.add_argument(
        "--add-target",
        action="append",
        metavar="|".join(TARGETS),
        help="build another target from the graphs of the bundle at --out; --model is not needed",
    )
    target.add_argument(
        "--dtype",
        metavar="|".join(BY_SHORT),
        help="of weights and activations; default fp32 on the CPU, else the checkpoint's. int4, int8: of the linear "
        "layers' weights and the embedding, for ort on the CPU",
    )
    target.add_argument(
        "--quantization",
        metavar="|".join(QUANTIZATIONS),
        help="how int4 and int8 are found: the scale of the least error, or of the range (default search for int4)",
    )
    target.add_argument(
        "--block-size",
        type=int,
        metavar="|".join(map(str, BLOCK_SIZES)),
        help=f"weights that share a scale (default {BLOCK_SIZES[0]})",
    )
    target.add_argument(
        "--kv-dtype", metavar="int8", help="of K/V caches, for ort on the CPU; default as the activations"
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
    target.add_argument(
        "--weight-sharing",
        choices=WEIGHT_SHARINGS,
        help="of TensorRT targets: weights as inputs of both engines, one copy on the device (default), "
        "or as constants inside each",
    )
    target.add_argument(
        "--attention",
        choices=ATTENTION_FORMS,
        help="of TensorRT targets: native layers, or the SkipWriteKVAttention plugin (default with tensorrt)",
    )
    builder = parser.add_argument_group("how TensorRT builds")
    builder.add_argument("--workspace-mib", type=int, metavar="MIB", help="most scratch memory of a layer")
    builder.add_argument("--optimization-level", type=int, metavar="0…5", help="of the builder (default 3)")
    builder.add_argument(
        "--hardware-compatible", action="store_true", help="engines for Ampere GPUs and later (tensorrt)"
    )
    builder.add_argument("--version-compatible", action="store_true", help="engines for later versions of the library")
    builder.add_argument(
        "--no-alias", action="store_true", help="do not tell TensorRT that the plugin updates its caches in place"
    )
    builder.add_argument(
        "--compute-capability",
        action="append",
        metavar="X.Y",
        help="GPU generation that tensorrt-rtx builds for; may be given several times (default 8.6, 8.9 and 12.0)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--no-verify", action="store_true", help="do not compare the bundle with PyTorch")
    how.add_argument("--force", action="store_true", help="replace an existing bundle at --out")
    how.add_argument("--threads", type=int, metavar="N", help="threads of the verification")
    how.add_argument("--trust-remote-code", action="store_true", help="run the code that a checkpoint brings")
    return parser


_FIXED_BY_BUNDLE = (
    *("model", "drop_ratio", "drop_layers", "drop_list", "always_first", "always_last", "k", "surrogate", "injection"),
    *("policy", "adapters", "rank", "target", "dtype", "quantization", "block_size", "kv_dtype"),
    *("max_seq_len", "max_prompt_len", "max_batch", "weights"),
)


def _refuse_what_the_bundle_fixes(args: argparse.Namespace) -> None:
    for name in _FIXED_BY_BUNDLE:
        value = getattr(args, name)
        if value != _parser().get_default(name):
            raise InputError(
                "An existing bundle fixes that option.",
                note=f"--{name.replace('_', '-')} {value} was given with --add-target.",
                hint="Leave it out, or export the model again.",
            )


def _export(arguments: Sequence[str]) -> None:
    args = _parser().parse_args(arguments)
    require_export_packages("the runtime alone does not need it")
    from lora_drop_export.compiler.add_target import add_target
    from lora_drop_export.compiler.export import export
    from lora_drop_export.compiler.options import ExportOptions
    from lora_drop_export.targets.trt.options import COMPUTE_CAPABILITIES, BuilderOptions

    if args.add_target:
        _refuse_what_the_bundle_fixes(args)
    elif args.model is None:
        raise InputError(
            "There is no model to export.",
            note="--model was not given, nor --add-target for an existing bundle.",
            hint="Use --model DIR|HUB_ID|FILE.gguf.",
        )
    if args.drop_layers is not None and args.drop_list is not None:
        raise InputError(
            "The drop list is given twice.",
            note="--drop-layers and --drop-list exclude each other.",
            hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
        )
    layers = None if args.drop_layers is None else parse_layers(args.drop_layers)
    drop_list = None if args.drop_list is None else read_drop_list(args.drop_list)
    if drop_list is not None:
        layers = drop_list.layers
        fitted_for = None if args.adapters is None else read_adapter_config(args.adapters).surrogate
        warn_of_base(drop_list, args.surrogate or fitted_for or DEFAULT_SURROGATE)
    options = ExportOptions(
        drop_ratio=args.drop_ratio,
        drop_layers=layers,
        drop_list_fingerprint=None if drop_list is None else drop_list.fingerprint,
        always_first=args.always_first,
        always_last=args.always_last,
        k=args.k,
        surrogate=args.surrogate,
        injection=args.injection,
        policy=args.policy,
        adapters=args.adapters,
        rank=args.rank,
        targets=tuple(args.target or args.add_target or ["ort"]),
        dtype=long_name(args.dtype),
        quantization=args.quantization,
        block_size=args.block_size,
        kv_dtype=args.kv_dtype,
        max_seq_len=args.max_seq_len,
        max_prompt_len=args.max_prompt_len,
        max_batch=args.max_batch,
        weights=args.weights,
        weight_sharing=args.weight_sharing,
        attention=args.attention,
        builder=BuilderOptions(
            workspace_mib=args.workspace_mib,
            optimization_level=args.optimization_level,
            hardware_compatible=args.hardware_compatible,
            version_compatible=args.version_compatible,
            compute_capabilities=tuple(args.compute_capability or COMPUTE_CAPABILITIES),
            alias=not args.no_alias,
        ),
        verify=not args.no_verify,
        force=args.force,
        threads=args.threads,
        trust_remote_code=args.trust_remote_code,
    )
    if args.add_target:
        bundle = add_target(args.out, args.add_target, options)
        print(f"targets: {', '.join(bundle.manifest.targets)}")
        return
    bundle = export(args.model, args.out, options)
    plan, limits = bundle.manifest.plan, bundle.manifest.limits
    dropped = ", ".join(map(str, plan.drop_layers)) or "none"
    print(f"dropped layers: {dropped} ({len(plan.drop_layers)} of {plan.num_layers}), k = {plan.k}")
    print(
        f"limits: {limits.max_seq_len} tokens, prompts of {limits.max_prompt_len}, batches of {limits.max_batch}"
        " (--max-seq-len, --max-prompt-len, --max-batch)"
    )
    if bundle.manifest.targets:
        first, dtype = next(iter(bundle.manifest.targets)), bundle.manifest.model.dtype
        provider = " --provider cuda" if first == "ort" and dtype != "float32" else ""
        print(f'try: lora-drop generate {args.out}{provider} --prompt "The capital of Italy is"')


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_export, arguments)


if __name__ == "__main__":
    sys.exit(main())
