"""Options of the TensorRT targets, and what a library does not build for."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.bundle.manifest import ATTENTION_FORMS, WEIGHT_SHARINGS
from lora_drop_runtime.command_line import check_known, check_options, option
from lora_drop_runtime.engines.trt.library import library
from lora_drop_runtime.engines.trt.plugin import plugin_path
from lora_drop_runtime.errors import InputError

from lora_drop_export.quantize.formats import FLOAT8

COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")  # GeForce and RTX of the Ampere, Ada and Blackwell generations
FLOAT8_SINCE = 8.9  # compute capability
_GROUP = "how TensorRT builds"
_WORKSPACE, _LEVELS = Bounds(1, 2**20), Bounds(0, 5)


@dataclasses.dataclass(frozen=True)
class BuilderOptions:
    """Options of the engine build; None leaves the library's default.

    `alias` says whether the plugin tells TensorRT that it updates its caches in place. If it does, the builder may plan
    a copy of them around it, or refuse; past and present are bound to one address in either case.
    """

    workspace_mib: int | None = option(
        None, group=_GROUP, metavar="MIB", bounds=_WORKSPACE, help="let no layer use more scratch memory than this"
    )
    optimization_level: int | None = option(
        None,
        group=_GROUP,
        metavar="N",
        bounds=_LEVELS,
        help="how long the builder searches, 0 for the least (default 3)",
    )
    hardware_compatible: bool = option(
        False, group=_GROUP, help="build engines that run on Ampere GPUs and all later ones (tensorrt)"
    )
    version_compatible: bool = option(
        False, group=_GROUP, help="build engines that later versions of the library load, too"
    )
    alias: bool = option(
        False, group=_GROUP, help="tell TensorRT that the plugin updates its caches in place, which may cost a copy"
    )
    compute_capabilities: tuple[str, ...] | None = option(
        None,
        group=_GROUP,
        flag="--compute-capability",
        repeat=True,
        metavar="X.Y",
        help="GPU generation that tensorrt-rtx builds for; may be given several times (default 8.6, 8.9 and 12.0; "
        "with fp8 weights 8.9 and 12.0)",
    )

    def __post_init__(self) -> None:
        check_options(self)
        named = self.compute_capabilities
        if named is not None and (not named or len(set(named)) != len(named)):
            raise InputError(
                "The compute capabilities must be named once each.",
                note=f"Given are {', '.join(named) or 'none'}.",
                hint=f"Use --compute-capability {COMPUTE_CAPABILITIES[0]}.",
            )

    def capabilities(self, weights: str = "float32") -> tuple[str, ...]:
        """What tensorrt-rtx builds for: what was named, else those of the default that have this dtype of weights."""
        if self.compute_capabilities is not None:
            return self.compute_capabilities
        return tuple(each for each in COMPUTE_CAPABILITIES if weights != FLOAT8 or float(each) >= FLOAT8_SINCE)


@dataclasses.dataclass(frozen=True)
class TrtOptions:
    """What `tensorrt` and `tensorrt-rtx` are told; None is the target's own choice."""

    weight_sharing: str | None = option(
        None,
        group="what is built",
        choices=WEIGHT_SHARINGS,
        help="what TensorRT engines do with weights: take them as inputs of both, with one copy on the device "
        "(default; of int4 weights with the plugin alone, of fp8 never), or hold them as constants, each its own",
    )
    attention: str | None = option(
        None,
        group="what is built",
        choices=ATTENTION_FORMS,
        help="what TensorRT computes attention with: its native layers, or the SkipWriteKVAttention plugin "
        "(default with tensorrt), beside which int4 weights may be inputs",
    )
    builder: BuilderOptions = dataclasses.field(default_factory=BuilderOptions)

    def __post_init__(self) -> None:
        check_options(self)
        check_known("weight sharing", self.weight_sharing, WEIGHT_SHARINGS)
        check_known("form of attention", self.attention, ATTENTION_FORMS)


def compute_capability(trt: Any, capability: str) -> Any:
    name = f"SM{capability.replace('.', '')}"
    known = [f"{key[2:-1]}.{key[-1]}" for key in vars(trt.ComputeCapability) if re.fullmatch(r"SM\d+", key)]
    if capability not in known:
        raise InputError(
            "The library does not build for that compute capability.",
            note=f"{capability!r} was asked for, tensorrt-rtx {trt.__version__} knows {', '.join(known)}.",
            hint="Name known ones with --compute-capability.",
        )
    return getattr(trt.ComputeCapability, name)


def built_for(target: str, options: BuilderOptions, weights: str = "float32") -> tuple[str, ...]:
    """The compute capabilities of the GPUs that run engines with these weights; for tensorrt that of this machine's.

    Raises:
        NoDeviceError: tensorrt, and there is no GPU.
    """
    if target == "tensorrt-rtx":
        return options.capabilities(weights)
    from lora_drop_runtime.engines.trt.cuda_device import device_compute_capability

    return (device_compute_capability(),)


def check_buildable(target: str, options: BuilderOptions, form: str | None = None) -> Any:
    """The Python module of a target; refuses early what would end an export late.

    Raises:
        InputError: it does not build for a compute capability, or has not got an option.
        BundleError: it is not installed; the plugin form, and no plugin.
        NoDeviceError: tensorrt, which builds for the GPU of this machine, and there is none.
    """
    trt = library(target)
    if target == "tensorrt-rtx":
        for capability in built_for(target, options):
            compute_capability(trt, capability)
        if options.hardware_compatible:
            raise InputError(
                "The target has no such option.",
                note="--hardware-compatible applies only to tensorrt; tensorrt-rtx builds for the capabilities that it "
                "is given.",
                hint="Name them with --compute-capability.",
            )
        return trt
    if form == "plugin":
        plugin_path()
    built_for(target, options)
    return trt
