"""The options of `lora-drop-export`, checked before anything long begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.bundle.adapters import AdapterConfig, read_adapter_config
from lora_drop_runtime.bundle.manifest import CHANNEL, INTEGER_DTYPES, QUANTIZED_DTYPES
from lora_drop_runtime.command_line import check_known, check_options, option, refuse_unused
from lora_drop_runtime.dtypes import CACHE_DTYPES, MODEL_DTYPES, WEIGHT_SHORTS, long_name, short_name
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.sites import INJECTIONS, parse_sites, sorted_sites
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE, SURROGATES

from lora_drop_export.check.calibration_text import WINDOW, WINDOWS, read_calibration_text
from lora_drop_export.checkpoint.drop_list import DropList, read_drop_list, warn_of_base
from lora_drop_export.quantize.choice import BLOCK_SIZES, CALIBRATED, Quantization
from lora_drop_export.quantize.rounding import ROUNDINGS
from lora_drop_export.targets.target import TARGETS, TargetOptions

NO_TARGET = "none"  # graphs only
HEAD_DTYPES = ("int4", "int8")
AUTO: Final = "auto"  # a block size that is measured (compiler/forms.py)
_BLOCKS = (*BLOCK_SIZES, CHANNEL, AUTO)
WEIGHTS = ("copy", "link")
_PLAN, _BUILD, _RUN = "what is dropped", "what is built", "how"


def quantized_shorts() -> str:
    """The dtypes of quantized weights as the command line has them, in words."""
    return " or ".join(str(short_name(name)) for name in QUANTIZED_DTYPES)


def takers_of(weights: str | None, targets: Sequence[str]) -> tuple[str, str]:
    """In words: the targets that take such quantized weights, and those of `targets` that do not."""
    able = [name for name, target in TARGETS.items() if weights in target.quantized_weights]
    return " or ".join(able), ", ".join(name for name in targets if name in TARGETS and name not in able)


def _check_caches(
    targets: Sequence[str], kv_dtype: str, dtype: str | None, activations: str | None, bundle: str | Path | None
) -> None:
    """Refuse 8-bit caches that a target does not take, or not beside such activations; see `check_formats`."""
    beside = activations or (None if dtype in QUANTIZED_DTYPES else dtype)  # None: what the target wants
    takers = {
        name: target.cache_dtypes[kv_dtype] for name, target in TARGETS.items() if kv_dtype in target.cache_dtypes
    }
    others = [name for name in targets if name in TARGETS and name not in takers]
    others += [name for name in targets if name in takers and beside not in (None, *takers[name])]
    if not others:
        return
    short = short_name(kv_dtype)
    anywhere = [name for name, dtypes in takers.items() if dtypes == MODEL_DTYPES]
    some = [f"{name} in {short_name(dtypes[0])}" for name, dtypes in takers.items() if dtypes != MODEL_DTYPES]
    able = ", or ".join(filter(None, [", ".join(anywhere), *some]))
    raise InputError(
        f"{short} caches work only with target {able}.",
        note=f"Targets are {', '.join(targets)}, of which {', '.join(others)} cannot; "
        f"--dtype is {short_name(dtype) or 'not given'}, --activation-dtype is {activations or 'not given'}."
        if bundle is None
        else f"{bundle} has {short} caches and {activations} activations; {', '.join(others)} was asked for.",
        hint="Leave --kv-dtype out, or use one of these targets."
        if bundle is None
        else "Export the model again, without --kv-dtype.",
    )


def check_formats(
    targets: Sequence[str],
    dtype: str | None,
    kv_dtype: str | None,
    activations: str | None,
    bundle: str | Path | None = None,
    *,
    by_channel: bool = False,
) -> None:
    """Refuse quantized weights and caches that a target does not take.

    Args:
        targets: known ones.
        dtype: of weights; None is not given.
        kv_dtype: of caches where it is not that of activations.
        activations: their dtype where weights are quantized; None is not given.
        bundle: which has weights and caches already; else they are asked for.
        by_channel: integers have one scale for a whole row.

    Raises:
        InputError: a target takes something else.
    """
    chosen = [TARGETS[name] for name in targets if name in TARGETS]
    able, others = takers_of(dtype, targets)
    if dtype in QUANTIZED_DTYPES and others:
        raise InputError(
            f"The target cannot take {short_name(dtype)} weights.",
            note=f"--dtype {short_name(dtype)} works only with {able}; {others} was asked for."
            if bundle is None
            else f"{bundle} has {short_name(dtype)} weights; {others} was asked for.",
            hint=f"Use --target {able}, or another --dtype."
            if bundle is None
            else "Export the model again, with another --dtype.",
        )
    others = ", ".join(target.name for target in chosen if by_channel and not target.channel_weights)
    if others:
        able = " or ".join(name for name, target in TARGETS.items() if target.channel_weights)
        raise InputError(
            "The target cannot take a scale for each channel.",
            note=f"--block-size {CHANNEL} works only with {able}; {others} was asked for."
            if bundle is None
            else f"{bundle} has {short_name(dtype)} weights in that form; {others} was asked for.",
            hint=f"Use --target {able}, or --block-size {BLOCK_SIZES[-1]}."
            if bundle is None
            else f"Export the model again, with --block-size {BLOCK_SIZES[-1]}.",
        )
    others = ", ".join(target.name for target in chosen if activations not in (None, *target.quantized_dtypes))
    if dtype in (None, *QUANTIZED_DTYPES) and others:
        able = " or ".join(name for name, target in TARGETS.items() if activations in target.quantized_dtypes)
        raise InputError(
            f"The target cannot compute in {short_name(activations)} with quantized weights.",
            note=f"{others} was asked for; {able} can."
            if bundle is None
            else f"{bundle} has {short_name(dtype)} weights and {activations} activations; {others} was asked for.",
            hint="Leave --activation-dtype out, or use another --target."
            if bundle is None
            else f"Export the model again, for {others} too: beside a target for the CPU activations are float32.",
        )
    if kv_dtype:
        _check_caches(targets, kv_dtype, dtype, activations, bundle)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What LoRA steps leave out, and what they do in its place."""

    drop_ratio: float | None = option(
        None,
        group=_PLAN,
        metavar="ρ",
        bounds=bounds.SHARE,
        help="drop this fraction of the eligible layers, spread evenly (default 0.5)",
    )
    drop_layers: Sequence[int | str] | None = option(
        None,
        group=_PLAN,
        metavar="4,9.attn",
        parse=parse_sites,
        help="drop these layers, counted from 0, or halves of them (9.attn, 9.mlp)",
    )
    drop_list: Path | None = option(None, group=_PLAN, metavar="FILE", help="drop the layers that this JSON file names")
    drop_list_fingerprint: str | None = None  # of the model whose profile chose `drop_layers`
    always_first: int | None = option(
        None,
        group=_PLAN,
        metavar="N",
        bounds=bounds.LAYERS,
        help="never drop the first N (default: as the adapters or the drop list say, or 3)",
    )
    always_last: int | None = option(
        None,
        group=_PLAN,
        metavar="N",
        bounds=bounds.LAYERS,
        help="never drop the last N (default: as the adapters or the drop list say, or 1)",
    )
    k: int = option(
        3,
        group=_PLAN,
        bounds=bounds.K,
        help="LoRA steps between two refreshes, 0 for none (default 3; can be changed at run time)",
    )
    surrogate: str | None = option(
        None,
        group=_PLAN,
        choices=tuple(SURROGATES),
        help="what a dropped layer's output starts from (default: what the adapters were fitted for, else residual)",
    )
    injection: str | None = option(
        None,
        group=_PLAN,
        choices=INJECTIONS,
        help="one surrogate per layer, or one per half (default: what the adapters were fitted for, else block)",
    )
    policy: str | None = option(
        None,
        group=_PLAN,
        choices=tuple(POLICIES),
        help="what a refresh does about the tokens of the LoRA steps before it, unless a session says otherwise "
        "(default: what the adapters were fitted for, else what the drop list was chosen for, else skip)",
    )
    adapters: Path | None = option(None, group=_PLAN, metavar="DIR", help="fitted adapters in PEFT's format")
    rank: int | None = option(
        None,
        group=_PLAN,
        metavar="R",
        bounds=Bounds(0, bounds.RANK.most),
        help="leave room for adapters of this rank, to be loaded later (default 0)",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.drop_layers is not None:
            object.__setattr__(self, "drop_layers", sorted_sites(self.drop_layers))
        ways = [] if self.drop_ratio is None else [f"--drop-ratio {self.drop_ratio}"]
        ways += [] if self.drop_layers is None else [f"the layers {', '.join(map(str, self.drop_layers))}"]
        ways += [] if self.drop_list is None or self.drop_layers is None else [f"--drop-list {self.drop_list}"]
        if len(ways) > 1:
            raise InputError(
                "The drop list is given twice.",
                note=f"{' and '.join(ways)} exclude each other.",
                hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
            )
        for what, value, known in (
            ("surrogate", self.surrogate, SURROGATES),
            ("injection", self.injection, INJECTIONS),
            ("refresh policy", self.policy, POLICIES),
        ):
            check_known(what, value, tuple(known), "--policy" if known is POLICIES else f"--{what}")


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Targets, formats and capacities."""

    targets: tuple[str, ...] = option(
        ("ort",),
        group=_BUILD,
        flag="--target",
        repeat=True,
        metavar="|".join((*TARGETS, NO_TARGET)),
        help="".join(f"{name}: {target.what}; " for name, target in TARGETS.items())
        + f"{NO_TARGET}: the neutral graphs only. May be given several times",
    )
    dtype: str | None = option(
        None,
        group=_BUILD,
        metavar="|".join(WEIGHT_SHORTS),
        help="what weights and activations are stored and computed in (default fp32 on the CPU, else what the "
        "checkpoint has); int4, int8 and fp8 quantize the linear layers' weights and the embedding; fp8 is for "
        "TensorRT, on GPUs of compute capability 8.9 and newer; "
        "of a quantized checkpoint, whose integers stay, it is the rest's",
    )
    quantization: str | None = option(
        None,
        group=_BUILD,
        metavar="|".join((*ROUNDINGS, CALIBRATED)),
        help="how int4 and int8 are found: with the scale of the least error or of the range, or so that the layers' "
        f"outputs over a text change least ({CALIBRATED}; takes minutes; default search for int4, rtn for int8)",
    )
    calibration: Path | None = option(
        None,
        group=_BUILD,
        metavar="FILE",
        help=f"text for --quantization {CALIBRATED} and --block-size {AUTO}: {WINDOWS} windows of {WINDOW} tokens, "
        "spread evenly over it (default: a bundled text)",
    )
    block_size: int | Literal["channel", "auto"] | None = option(
        None,
        group=_BUILD,
        metavar="|".join(map(str, _BLOCKS)),
        choices=_BLOCKS,
        help=f"weights that share a scale (default {BLOCK_SIZES[0]}); {CHANNEL} is a whole row, for openvino; {AUTO} "
        "builds the other forms of the weights, times them and takes the fastest that costs at most 3 %% of perplexity",
    )
    symmetric: bool = option(
        False,
        group=_BUILD,
        help="int4 without zero points: faster, and less accurate (rtn and TensorRT never have any)",
    )
    head_dtype: str | None = option(
        None,
        group=_BUILD,
        metavar="|".join(HEAD_DTYPES),
        help="what the head and the embedding are where the rest is int4 (default int4); int8 is more accurate, and "
        "slower",
    )
    activation_dtype: str | None = option(
        None,
        group=_BUILD,
        metavar="|".join(filter(None, map(short_name, MODEL_DTYPES))),
        help="what activations are computed in where weights are quantized, on a GPU (default fp32 for ort, what the "
        "checkpoint has for TensorRT)",
    )
    kv_dtype: str | None = option(
        None,
        group=_BUILD,
        metavar="|".join(filter(None, map(short_name, CACHE_DTYPES))),
        help="what K/V caches hold: int8 for ort and openvino on the CPU, int8 or fp8 for tensorrt with its plugin "
        "(default: what activations are computed in)",
    )
    max_seq_len: int | None = option(
        None,
        group=_BUILD,
        metavar="N",
        bounds=Bounds(2, bounds.TOKENS.most),
        help="longest prompt + new tokens (default 2048 or the model's context)",
    )
    max_prompt_len: int | None = option(
        None, group=_BUILD, metavar="N", bounds=bounds.TOKENS, help="longest prompt (default max-seq-len − 1)"
    )
    max_batch: int = option(8, group=_BUILD, metavar="N", bounds=bounds.BATCH, help="most prompts at once (default 8)")
    weights: str = option(
        "copy",
        group=_BUILD,
        choices=WEIGHTS,
        help="copy the checkpoint's files into the bundle (default) or hard-link them",
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("dtype", "activation_dtype", "kv_dtype"):  # given as `bf16` as well
            object.__setattr__(self, name, long_name(getattr(self, name)))
        if not self.targets:
            raise InputError("There is no target.", note="None was given.", hint=f"Use --target {next(iter(TARGETS))}.")
        for target in self.targets:
            check_known("target", target, (*TARGETS, NO_TARGET), "--target")
        if NO_TARGET in self.targets and len(self.targets) > 1:
            raise InputError(
                "The targets exclude each other.",
                note=f"Given are {', '.join(self.targets)}.",
                hint=f"'{NO_TARGET}' stands alone.",
            )
        check_known("dtype", short_name(self.dtype), WEIGHT_SHORTS, "--dtype")
        shorts = tuple(str(short_name(name)) for name in CACHE_DTYPES)
        check_known("--kv-dtype", short_name(self.kv_dtype), shorts, "--kv-dtype")
        check_known("--head-dtype", self.head_dtype, HEAD_DTYPES, "--head-dtype")
        check_known("way to store weights", self.weights, WEIGHTS, "--weights")
        shorts = tuple(str(short_name(name)) for name in MODEL_DTYPES)
        check_known("--activation-dtype", short_name(self.activation_dtype), shorts, "--activation-dtype")
        if self.activation_dtype is not None and self.dtype not in (None, *QUANTIZED_DTYPES):
            raise InputError(
                "--activation-dtype applies only to quantized weights.",
                note=f"It is {short_name(self.activation_dtype)}; --dtype is {short_name(self.dtype)}.",
                hint=f"Leave it out, or use --dtype {quantized_shorts()}.",
            )
        by_channel = self.block_size == CHANNEL and self.dtype in INTEGER_DTYPES
        check_formats(self.targets, self.dtype, self.kv_dtype, self.activation_dtype, by_channel=by_channel)
        for flag, value, known in (
            ("--quantization", self.quantization, (*ROUNDINGS, CALIBRATED)),
            ("--block-size", self.block_size, _BLOCKS),
        ):
            if value is not None and self.dtype not in INTEGER_DTYPES:
                raise InputError(
                    f"{flag} applies only to {' and '.join(INTEGER_DTYPES)} weights.",
                    note=f"It is {value}; --dtype is {short_name(self.dtype) or 'not given'}.",
                    hint=f"Leave it out, or add --dtype {' or '.join(INTEGER_DTYPES)}.",
                )
            check_known(flag, value, known, flag)
        for flag, given in (("--head-dtype", self.head_dtype), ("--symmetric", self.symmetric or None)):
            if given is not None and self.dtype != "int4":
                raise InputError(
                    f"{flag} applies only to int4 weights.",
                    note=f"It is {given}; --dtype is {short_name(self.dtype) or 'not given'}.",
                    hint="Leave it out, or add --dtype int4.",
                )
        if self.block_size == AUTO and NO_TARGET in self.targets:
            raise InputError(
                f"--block-size {AUTO} has nothing to measure.",
                note=f"--target is {NO_TARGET}, so nothing is run.",
                hint=f"Use --block-size {BLOCK_SIZES[0]}, or another --target.",
            )
        unable = takers_of(self.head_dtype, self.targets)[1]
        if self.head_dtype is not None and unable:
            raise InputError(
                f"The target cannot take {self.head_dtype} weights.",
                note=f"--head-dtype is {self.head_dtype}; {unable} was asked for.",
                hint="Leave --head-dtype out, or use another --target.",
            )
        if self.calibration is not None:
            if not self.calibrated and self.block_size != AUTO:
                raise InputError(
                    f"--calibration applies only to --quantization {CALIBRATED} and --block-size {AUTO}.",
                    note=f"It is {self.calibration}; --quantization is {self.quantization or 'not given'}.",
                    hint=f"Leave it out, or add --quantization {CALIBRATED} or --block-size {AUTO}.",
                )
            read_calibration_text(self.calibration)

    @property
    def calibrated(self) -> bool:
        """Whether weights are rounded by a text."""
        return self.weights_format is not None and self.weights_format.calibrated

    @property
    def _known_block_size(self) -> int | Literal["channel"] | None:
        """The one that was asked for; None where it is the default or not found yet."""
        return None if self.block_size == AUTO else self.block_size

    @property
    def weights_format(self) -> Quantization | None:
        """How weights are quantized, None where they are not."""
        if self.dtype is None or self.dtype not in QUANTIZED_DTYPES:
            return None
        chosen = Quantization.of(self.dtype, self._known_block_size, self.quantization)
        symmetric = any(TARGETS[name].symmetric_weights for name in self.targets if name in TARGETS)
        return dataclasses.replace(chosen, symmetric=chosen.symmetric or self.symmetric or symmetric)

    @property
    def head_format(self) -> Quantization | None:
        """How the head and the embedding are quantized, None where it is as the rest."""
        if self.head_dtype in (None, self.dtype):
            return None
        return Quantization.of(self.head_dtype, self._known_block_size)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How the command goes about it."""

    verify: bool = option(True, group=_RUN, flag="--no-verify", help="do not compare the bundle with PyTorch")
    force: bool = option(False, group=_RUN, help="replace an existing bundle at --out")
    threads: int | None = option(
        None, group=_RUN, metavar="N", bounds=bounds.THREADS, help="threads of the verification"
    )
    trust_remote_code: bool = option(False, group=_RUN, help="run the code that a checkpoint brings")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ExportOptions(RunOptions, TargetOptions, BuildOptions, PlanOptions):  # fields begin with the last: --help's order
    """The options of `lora-drop-export`; docs/export.md explains them. None is the default that the command prints."""

    def __post_init__(self) -> None:
        for part in (PlanOptions, BuildOptions, TargetOptions, RunOptions):
            part.__post_init__(self)
        if not self.verify or NO_TARGET in self.targets:
            because = "nothing is run, so nothing is verified" if self.verify else "--no-verify was given"
            refuse_unused(self, ("threads",), because, "let the bundle be verified")
        for target in TARGETS.values():
            target.check(self, self.targets)


def always_kept(options: Any, adapters: AdapterConfig | None) -> tuple[int, int]:
    """First and last layers that are never dropped: as asked for, else the adapters', else 3 and 1."""
    first, last = options.always_first, options.always_last
    if adapters is not None:
        first = adapters.always_first if first is None else first
        last = adapters.always_last if last is None else last
    return 3 if first is None else first, 1 if last is None else last


def warn_of_always(options: Any, file: Path, found: AdapterConfig | DropList, say: Callable[[str], None]) -> None:
    """Name what was asked for, `options.always_first` and `always_last`, beside what a file was made with."""
    for flag, asked, own in (
        ("--always-first", options.always_first, found.always_first),
        ("--always-last", options.always_last, found.always_last),
    ):
        if None not in (asked, own) and asked != own:
            say(f"warning: {flag} is {asked}; {file} was made with {own}")


def with_files_read(options: ExportOptions, say: Callable[[str], None] = print) -> ExportOptions:
    """What a drop list says in the place of its path; adapters are looked at, too.

    Args:
        say: prints a warning: of a base that a profile speaks against, of layers that are kept against a file's word.

    Raises:
        InputError, BundleError: a file cannot be read, or holds something else; the layers are given twice.
    """
    adapters = None
    if options.adapters is not None:
        adapters = read_adapter_config(options.adapters)
        warn_of_always(options, options.adapters, adapters, say)
    file = options.drop_list
    if file is None:
        return options
    found = read_drop_list(file)
    warn_of_always(options, file, found, say)
    fitted_for = None if adapters is None else adapters.surrogate
    options = dataclasses.replace(
        options,
        drop_list=None,
        drop_layers=found.sites,
        drop_list_fingerprint=found.fingerprint,
        always_first=found.always_first if options.always_first is None else options.always_first,
        always_last=found.always_last if options.always_last is None else options.always_last,
        policy=options.policy or (None if adapters is None else adapters.policy) or found.policy,
    )
    warn_of_base(found, options.surrogate or fitted_for or DEFAULT_SURROGATE)
    return options
