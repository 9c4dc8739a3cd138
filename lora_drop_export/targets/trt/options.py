"""Options of the engine build, and what a library does not build for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.engines.trt.library import library
from lora_drop_runtime.engines.trt.plugin import plugin_path
from lora_drop_runtime.errors import InputError

COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")  # GeForce and RTX of the Ampere, Ada and Blackwell generations


@dataclass(frozen=True)
class BuilderOptions:
    """Options of the engine build; None leaves the library's default.

    Args:
        workspace_mib: most scratch memory that a layer may use, in MiB.
        optimization_level: 0 (fast build) to 5.
        hardware_compatible: engines that also run on newer GPU generations (tensorrt; Ampere and later).
        version_compatible: engines that newer versions of the library run.
        compute_capabilities: GPU generations that a tensorrt-rtx engine is built for.
        alias: whether the plugin tells TensorRT that it updates its caches in place. If not, the builder cannot plan
            a copy of them around it; past and present are bound to one address in either case.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    compute_capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES
    alias: bool = True

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise InputError(
                "Unknown optimization level.", note=f"It is {level}, known are 0 to 5.", hint="Leave it out for 3."
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(
                "The workspace must be positive.", note=f"It is {self.workspace_mib} MiB.", hint="Leave it out."
            )
        if not self.compute_capabilities or len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            raise InputError(
                "The compute capabilities must be named once each.",
                note=f"Given are {', '.join(self.compute_capabilities) or 'none'}.",
                hint=f"Use --compute-capability {COMPUTE_CAPABILITIES[0]}.",
            )


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


def check_buildable(target: str, options: BuilderOptions, form: str | None = None) -> Any:
    """The Python module of a target; refuses early what would end an export late.

    Raises:
        InputError: it does not build for a compute capability, or has not got an option.
        BundleError: it is not installed; the plugin form, and no plugin.
    """
    trt = library(target)
    if target == "tensorrt-rtx":
        for capability in options.compute_capabilities:
            compute_capability(trt, capability)
        if options.hardware_compatible:
            raise InputError(
                "The target has no such option.",
                note="--hardware-compatible is of tensorrt; tensorrt-rtx builds for the capabilities that it is given.",
                hint="Name them with --compute-capability.",
            )
    elif form == "plugin":
        plugin_path()
    return trt
