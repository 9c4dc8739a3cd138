"""The options of `lora-drop-export`, checked before anything long begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lora_drop_runtime.bundle.graph_io import DEVICE_TARGETS
from lora_drop_runtime.bundle.manifest import (
    ATTENTION_FORMS,
    BLOCK_SIZES,
    QUANTIZATIONS,
    QUANTIZED_DTYPES,
    TARGETS,
    WEIGHT_SHARINGS,
)
from lora_drop_runtime.dtypes import MODEL_DTYPES
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import spread_layers
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from lora_drop_export.quantize.formats import Quantization
from lora_drop_export.targets.trt.options import COMPUTE_CAPABILITIES, BuilderOptions, check_buildable


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of `lora-drop-export`; the README explains them. None is the default that the command prints."""

    drop_ratio: float | None = None
    drop_layers: Sequence[int] | None = None
    drop_list_fingerprint: str | None = None  # of the model whose profile chose the layers
    always_first: int = 3
    always_last: int = 1
    k: int = 3
    surrogate: str | None = None
    injection: str | None = None
    policy: str | None = None
    adapters: Path | None = None
    rank: int | None = None
    targets: tuple[str, ...] = ("ort",)
    dtype: str | None = None
    quantization: str | None = None
    block_size: int | None = None
    kv_dtype: str | None = None
    max_seq_len: int | None = None
    max_prompt_len: int | None = None
    max_batch: int = 8
    weights: str = "copy"
    weight_sharing: str | None = None
    attention: str | None = None
    builder: BuilderOptions = dataclasses.field(default_factory=BuilderOptions)
    verify: bool = True
    force: bool = False
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.drop_ratio is not None and self.drop_layers is not None:
            raise InputError(
                "The drop list is given twice.",
                note=f"--drop-ratio {self.drop_ratio} and the layers {', '.join(map(str, self.drop_layers))}.",
                hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
            )
        if self.drop_ratio is not None:
            spread_layers((), self.drop_ratio)  # the range checks need no model
        PeriodicSchedule(self.k)
        for target in self.targets:
            if target not in (*TARGETS, "none"):
                raise InputError(
                    "Unknown target.",
                    note=f"{target!r} was given, known are {', '.join((*TARGETS, 'none'))}.",
                    hint="Use --target ort.",
                )
            if target in DEVICE_TARGETS:
                check_buildable(target, self.builder, self.form(target))
        if len(set(self.targets)) != len(self.targets) or ("none" in self.targets and len(self.targets) > 1):
            raise InputError(
                "The targets exclude each other.",
                note=f"Given are {', '.join(self.targets)}.",
                hint="Name each target once; 'none' stands alone.",
            )
        if self.dtype not in (None, *MODEL_DTYPES, *QUANTIZED_DTYPES):
            raise InputError(
                "Unknown dtype.",
                note=f"{self.dtype!r} was given, known are {', '.join((*MODEL_DTYPES, *QUANTIZED_DTYPES))}.",
                hint="Use --dtype fp32.",
            )
        self._check_quantization()
        for what, chosen, known in (
            ("way to store weights", self.weights, ("copy", "link")),
            ("weight sharing", self.weight_sharing, (None, *WEIGHT_SHARINGS)),
            ("form of attention", self.attention, (None, *ATTENTION_FORMS)),
        ):
            if chosen not in known:
                names = [name for name in known if name]
                raise InputError(
                    f"Unknown {what}.",
                    note=f"{chosen!r} was given, known are {' and '.join(names)}.",
                    hint=f"Use {names[0]}.",
                )
        if self.builder.compute_capabilities != COMPUTE_CAPABILITIES and "tensorrt-rtx" not in self.targets:
            given = ", ".join(self.builder.compute_capabilities)
            raise InputError(
                "The compute capabilities are those of tensorrt-rtx.",
                note=f"Given are {given}; the targets are {', '.join(self.targets)}.",
                hint="Leave them out: tensorrt builds for the GPU of this machine.",
            )
        if not self.builder.alias and all(self.form(target) != "plugin" for target in self.targets):
            raise InputError(
                "--no-alias is of the attention plugin.",
                note=f"None of the targets {', '.join(self.targets)} has it.",
                hint="Leave it out, or use --target tensorrt.",
            )
        if self.attention == "plugin" and "tensorrt-rtx" in self.targets:
            raise InputError(
                "The target cannot run plugins.",
                note="'tensorrt-rtx' has its native layers alone, --attention plugin was asked for.",
                hint="Leave --attention out: it is native there, and plugin with --target tensorrt.",
            )
        for option, value in (
            ("--max-batch", self.max_batch),
            ("--max-seq-len", self.max_seq_len),
            ("--max-prompt-len", self.max_prompt_len),
            ("--threads", self.threads),
        ):
            if value is not None and value < 1:
                raise InputError(f"{option} must be positive.", note=f"It is {value}.", hint="Use 1 or more.")

    def _check_quantization(self) -> None:
        others = [target for target in self.targets if target not in ("ort", "none")]
        if self.dtype in QUANTIZED_DTYPES and others:
            raise InputError(
                "The target cannot take quantized weights.",
                note=f"--dtype {self.dtype} is of ort; {', '.join(others)} takes {', '.join(MODEL_DTYPES)}.",
                hint="Use --target ort, or another --dtype.",
            )
        if self.kv_dtype not in (None, "int8"):
            raise InputError(
                "Unknown --kv-dtype.", note=f"{self.kv_dtype!r} was given, known is 'int8'.", hint="Use int8."
            )
        if self.kv_dtype and (others or self.dtype not in (None, "float32", *QUANTIZED_DTYPES)):
            raise InputError(
                "int8 caches are of target ort on the CPU.",
                note=f"Targets are {', '.join(self.targets)}, --dtype is {self.dtype or 'not given'}.",
                hint="Leave --kv-dtype out, or use --target ort with --dtype fp32, int8 or int4.",
            )
        for option, value, known in (
            ("--quantization", self.quantization, QUANTIZATIONS),
            ("--block-size", self.block_size, BLOCK_SIZES),
        ):
            if value is None:
                continue
            if self.dtype not in QUANTIZED_DTYPES:
                raise InputError(
                    f"{option} is of quantized weights.",
                    note=f"It is {value}; --dtype is {self.dtype or 'not given'}.",
                    hint=f"Leave it out, or add --dtype {' or '.join(QUANTIZED_DTYPES)}.",
                )
            if value not in known:
                raise InputError(
                    f"Unknown {option}.",
                    note=f"{value!r} was given, known are {' and '.join(map(str, known))}.",
                    hint=f"Use {known[0]}.",
                )

    @property
    def weights_format(self) -> Quantization | None:
        """How weights are quantized, None where they are not."""
        if self.dtype not in QUANTIZED_DTYPES:
            return None
        return Quantization.of(self.dtype, self.block_size, self.quantization)

    def form(self, target: str) -> str:
        """Of a TensorRT target's attention."""
        return self.attention or ("plugin" if target == "tensorrt" else "native")
