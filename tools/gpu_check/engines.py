"""Stages `trt` and `rtx`: engines of a small model, built, compared with PyTorch, run and timed."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.bundles import agreement, exported, need_exporter, same_tokens, small_checkpoint, timed_windows
from gpu_check.cuda import cuda_runtime
from gpu_check.job import Job, Skip

QUANTIZED = ("int4", "fp8")  # weights


def need_library(job: Job, target: str) -> str:
    """The card's compute capability. Raises Skip with the name of what is not here, or not for this card."""
    from lora_drop_runtime.engines.trt.cuda_device import device_compute_capability
    from lora_drop_runtime.engines.trt.library import MODULES
    from lora_drop_runtime.errors import InputError

    from lora_drop_export.targets.trt.options import compute_capability

    if job.stand_in:
        from tests.support import fake_library

        fake_library.install(target)
    cuda_runtime(job)
    try:
        trt = importlib.import_module(MODULES[target])
    except ImportError as error:
        raise Skip(f"{target} is not installed: {error}") from None
    capability = device_compute_capability()
    if target == "tensorrt-rtx":
        try:
            compute_capability(trt, capability)
        except InputError as error:
            raise Skip(f"{error.fact} {error.note}") from None
    return capability


def forms(job: Job, target: str) -> dict[str, str]:
    """Form of attention → why it cannot be built here; empty where it can."""
    if target == "tensorrt-rtx":
        return {"native": ""}
    from lora_drop_runtime.engines.trt.plugin import plugin_path
    from lora_drop_runtime.errors import BundleError

    if job.stand_in:
        return {"native": "", "plugin": "the stand-in has no plugins"}
    try:
        plugin_path()
    except BundleError:
        return {"native": "", "plugin": "liblora_drop_plugin.so is not built"}
    return {"native": "", "plugin": ""}


def build(job: Job, model: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Export a bundle; what its engines are."""
    from lora_drop_runtime.bundle.bundle import Bundle
    from lora_drop_runtime.bundle.manifest import TrtEntry

    entry = Bundle.open(exported(job, model, name, **options)).target(options["targets"][0])[1]
    assert isinstance(entry, TrtEntry)
    return {"engine_bytes": dict(entry.engine_bytes), "weight_sharing": entry.weight_sharing, "version": entry.version}


def check_bundle(job: Job, name: str, target: str, model: Path, **options: Any) -> None:
    """Build and run one; each part is a number of its own."""
    if job.stand_in:
        from tests.support import fake_library

        fake_library.engines_of(job.work / f"{target}.{name}")
    bundle = f"{target}.{name}"
    built = job.part(f"{name} build", partial(build, job, model, bundle, {"targets": (target,), "rank": 2} | options))
    if not isinstance(built, dict):
        return
    root = job.work / bundle
    job.attempt(f"{name} logits", partial(agreement, root, target, None))
    job.attempt(f"{name} tokens", partial(same_tokens, root, target, None))
    job.attempt(f"{name} times", partial(timed_windows, job, root, target, None))


def options_here(job: Job, target: str) -> dict[str, Any]:
    """How bundles are exported for this card: with the best form of attention that can be built. Raises Skip."""
    from lora_drop_export.targets.trt.options import BuilderOptions

    capability = need_library(job, target)
    builder = BuilderOptions(compute_capabilities=(capability,)) if target == "tensorrt-rtx" else BuilderOptions()
    able = [form for form, missing in forms(job, target).items() if not missing]
    return {"builder": builder, "attention": able[-1]}


def run_target(job: Job, target: str) -> None:
    from lora_drop_runtime.dtypes import CACHE_DTYPES, long_name

    need_exporter()
    options = options_here(job, target)
    model = small_checkpoint(job)
    halves = ("float32",) if job.stand_in else ("bfloat16", "float16")
    for form, missing in reversed(forms(job, target).items()):  # what users get first: time may run out
        for dtype in (*halves, *QUANTIZED):
            name = f"{form} {dtype}"
            if missing:
                job.numbers[f"{name} build"] = f"skip: {missing}"
            else:
                made = options | {"dtype": long_name(dtype), "attention": form}
                if job.stand_in and dtype in QUANTIZED:
                    made["activation_dtype"] = "float32"
                check_bundle(job, name, target, model, **made)
        if form == "plugin" and not missing:
            for kv_dtype in CACHE_DTYPES:
                check_bundle(job, f"{form} {kv_dtype} caches", target, model, **options, kv_dtype=kv_dtype)
