"""The one place that chooses the engine of a target; each is imported when it is opened.

Enters: an opened bundle and what the user asked for. Leaves: an engine. A new target is a row of `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import OpenVinoEntry, OrtEntry, TrtEntry
from lora_drop_runtime.errors import BundleError, InputError

from .engine import Engine
from .ort.providers import check_runs

# Bundle, target, provider and threads, as `open_engine` takes them → the engine
OpenEngine = Callable[[Bundle, str, str | None, int | None], Engine]


def _open_ort(bundle: Bundle, target: str, provider: str | None, threads: int | None) -> Engine:
    from lora_drop_runtime.engines.ort.engine import OrtEngine

    return OrtEngine(bundle, target, provider=provider, threads=threads)


def _open_trt(bundle: Bundle, target: str, provider: str | None, threads: int | None) -> Engine:
    """TensorRT itself, or its graphs in ONNX Runtime where one of its providers is asked for."""
    if provider is not None:
        return _open_ort(bundle, target, provider, threads)
    from lora_drop_runtime.engines.trt.engine import TrtEngine

    return TrtEngine(bundle, target)


def _open_openvino(bundle: Bundle, target: str, provider: str | None, threads: int | None) -> Engine:
    from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine

    return OpenVinoEngine(bundle, target, threads=threads)


ENGINES: dict[str, OpenEngine] = {
    "ort": _open_ort,
    "openvino": _open_openvino,
    "tensorrt": _open_trt,
    "tensorrt-rtx": _open_trt,
}


def check_engine(bundle: Bundle, target: str | None = None, provider: str | None = None) -> str:
    """Refuse what `open_engine` would, as far as that is known before an engine is made. Arguments as there.

    Returns:
        The target's name.
    """
    name, entry = bundle.target(target)
    if name not in ENGINES:
        raise BundleError(
            "This runtime has no engine for the target.",
            note=f"The bundle has {name!r}, engines are there for {', '.join(ENGINES)}.",
            hint="Install the version that wrote the bundle, or choose another target of it.",
        )
    if isinstance(entry, OpenVinoEntry) and provider is not None:
        raise InputError(
            "Target openvino takes no execution provider.",
            note=f"{provider!r} was asked for; providers are ONNX Runtime's, OpenVINO computes on the CPU.",
            hint="Leave --provider out, or use another --target of the bundle.",
        )
    if isinstance(entry, OrtEntry) or (provider is not None and isinstance(entry, TrtEntry)):
        check_runs(bundle, name, "cpu" if provider is None else provider)
    return name


def open_engine(
    bundle: Bundle, target: str | None = None, provider: str | None = None, threads: int | None = None
) -> Engine:
    """The engine that runs a target of a bundle.

    Args:
        bundle: an opened bundle.
        target: the bundle's first when None.
        provider: of ONNX Runtime, `cpu` when None; with one it also runs the graphs of a TensorRT target.
        threads: of a step on the CPU, one per physical core when None.

    Raises:
        BundleError: the bundle has no such target, or cannot run here; NoDeviceError where only the GPU is missing.
    """
    name = check_engine(bundle, target, provider)
    return ENGINES[name](bundle, name, provider, threads)
