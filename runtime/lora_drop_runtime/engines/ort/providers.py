"""ONNX Runtime's execution providers: which runs what, and what is said where one cannot."""

from __future__ import annotations

from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import OrtEntry, TrtEntry
from lora_drop_runtime.errors import BundleError, InputError, NoDeviceError, first_line

from .package import both_installed, install_command, loader_error

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
ON_CPU = ("float32", "float16")  # dtypes that its kernels have
RAGGED_ROWS_SINCE = (1, 32)  # GroupQueryAttention's query_seqlens; no onnxruntime-gpu has it yet
RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"


def check_runs(bundle: Bundle, target: str, provider: str) -> None:
    """Refuse a provider that is not known, or has no kernels for the target's graphs.

    GroupQueryAttention has no float32 kernel for CUDA, and nothing computes in bfloat16 on the CPU.
    """
    entry, dtype = bundle.target(target)[1], bundle.manifest.model.dtype
    runs: dict[str, tuple[str, ...]] = {}
    if isinstance(entry, OrtEntry):
        runs = {"cpu": ON_CPU, "cuda": ("float16", "bfloat16")}
    if isinstance(entry, TrtEntry) and entry.form == "native":
        runs["cpu"] = ON_CPU
    if isinstance(entry, TrtEntry) and entry.ep_context is not None:
        runs["rtx"] = ("float32", "float16", "bfloat16")
    if provider not in PROVIDERS or dtype not in runs.get(provider, ()):
        able = ", ".join(name for name, dtypes in runs.items() if dtype in dtypes) or "none of ONNX Runtime's"
        error = BundleError if provider not in PROVIDERS else NoDeviceError
        raise error(
            "The execution provider cannot run the bundle.",
            note=f"{provider!r} was asked for; target {target!r} in {dtype} runs on {able}.",
            hint=f"Use --provider {able}." if able in PROVIDERS else "Export with another --dtype or --target.",
        )


def takes_ragged_rows(dtype: str) -> bool:
    """Whether the graphs of target ort are lowered for rows with different numbers of new tokens: those for the CPU.

    Others are for the CUDA provider, whose newest release does not know the operator's input.

    Args:
        dtype: of activations.
    """
    return dtype == "float32"


def check_version(version: str, dtype: str) -> None:
    """Refuse an ONNX Runtime that cannot run graphs of target ort.

    Args:
        version: of the installed one.
        dtype: of activations.

    Raises:
        InputError: its attention does not take their rows.
    """
    if takes_ragged_rows(dtype) and tuple(map(int, version.split(".")[:2])) < RAGGED_ROWS_SINCE:
        raise InputError(
            "The installed ONNX Runtime is too old for graphs in float32.",
            note=f"It is {version}; {'.'.join(map(str, RAGGED_ROWS_SINCE))} or newer is needed.",
            hint=f"{install_command('cpu')}; or for a GPU export with --dtype fp16 or bf16.",
        )


def check_form(entry: OrtEntry, dtype: str) -> None:
    """Refuse graphs of target ort that have the other form than those in this dtype.

    Raises:
        BundleError: an earlier version wrote them.
    """
    if (entry.steps is not None) != takes_ragged_rows(dtype):
        needed = "one graph for both steps" if takes_ragged_rows(dtype) else "a graph for each step"
        raise BundleError(
            "A graph of the bundle is not of the form that this version runs.",
            note=f"In {dtype} it runs {needed}; the bundle has the other form.",
            hint="Export the model again.",
        )


def check_available(provider: str, ort: Any, dtype: str) -> None:
    """Refuse a provider that the installed package was not built with.

    Args:
        dtype: of activations.
    """
    available = ort.get_available_providers()
    if PROVIDERS[provider] in available:
        return
    names = [short for short, long in PROVIDERS.items() if long in available]
    note = f"{provider!r} was asked for, the installed ONNX Runtime has {', '.join(names)}. {both_installed()}"
    raise NoDeviceError(
        "The execution provider is not available.",
        note=note.strip(),
        hint=f"For an NVIDIA GPU: {install_command('cuda')}."
        + (" On the CPU it runs with --provider cpu." if dtype in ON_CPU else ""),
    )


def no_device(provider: str, error: Exception) -> NoDeviceError:
    """For what a provider on a GPU says when it cannot start, allocate or run."""
    return NoDeviceError(
        "The execution provider cannot run the bundle here.",
        note=f"{provider}: {first_line(error)}.",
        hint="Check driver, CUDA and cuDNN and the GPU's free memory; or use another --provider.",
    )


def not_started(provider: str, chosen: str, ort: Any) -> NoDeviceError:
    """For a provider in whose place ONNX Runtime chose another, without an error of its own."""
    missing = loader_error(ort) if provider == PROVIDERS["cuda"] else None
    if missing is None:
        return no_device(provider, RuntimeError(f"ONNX Runtime chose {chosen} instead"))
    return NoDeviceError(
        "The execution provider cannot run the bundle here.",
        note=f"{provider}: {missing}.",
        hint="pip install 'lora-drop-export[cuda]' brings CUDA and cuDNN, NVIDIA's driver has libcuda; "
        "or use another --provider.",
    )


def rtx_device(ort: Any, dtype: str) -> Any:
    """The device of NVIDIA's provider for RTX GPUs, a library of its own.

    Args:
        dtype: of activations.

    Raises:
        NoDeviceError: it is not installed, or finds no GPU.
    """
    import importlib

    hint = f"pip install {RTX_PACKAGE.replace('_', '-')}, on a machine with an RTX GPU"
    hint += "; or use --provider cpu." if dtype in ON_CPU else "."
    try:
        library = importlib.import_module(RTX_PACKAGE)
        if PROVIDERS["rtx"] not in {device.ep_name for device in ort.get_ep_devices()}:
            ort.register_execution_provider_library(PROVIDERS["rtx"], library.get_library_path())
    except Exception as error:  # an import error, or what ONNX Runtime raises for a library that does not load
        raise NoDeviceError(
            "The execution provider is not available.", note=f"{PROVIDERS['rtx']}: {first_line(error)}.", hint=hint
        ) from None
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDERS["rtx"]]
    if not devices:
        raise NoDeviceError(
            "There is no GPU that the execution provider can use.",
            note=f"{PROVIDERS['rtx']} is loaded and finds no device.",
            hint=hint,
        )
    return devices[0]
