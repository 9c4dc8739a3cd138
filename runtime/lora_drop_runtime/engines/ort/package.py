"""The ONNX Runtime that is installed: this package requires none, since the one for the CPU and the one for CUDA write
into one folder and exclude each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import os
from pathlib import Path
from typing import Any

from lora_drop_runtime.errors import InputError, first_line

EXTRAS = {"onnxruntime": "cpu", "onnxruntime-gpu": "cuda"}  # package → the extra of ours that brings it
LEAST_VERSION = (1, 25)  # the first with TensorScatter for the CPU
TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"  # read when the library is loaded; 1.29 is the first that tells


def installed_packages() -> list[str]:
    """Those that provide the module `onnxruntime` here, by their names."""
    found = []
    for package in EXTRAS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(package)
            found.append(package)
    return found


def both_installed() -> str:
    """A sentence where two packages lie over each other, else nothing."""
    packages = installed_packages()
    return f"{' and '.join(packages)} are both installed and write into one folder." if len(packages) > 1 else ""


def install_command(extra: str) -> str:
    """What brings ONNX Runtime with an extra of ours; the other package goes first, else both lie in one folder."""
    others = [package for package in installed_packages() if EXTRAS[package] != extra]
    install = f"pip install 'lora-drop-export[{extra}]'"
    return f"pip uninstall -y {' '.join(installed_packages())} && {install}" if others else install


def upgrade_command() -> str:
    """What brings a newer version of the package that is installed."""
    return f"pip install --upgrade {' '.join(installed_packages()) or 'onnxruntime'}"


def import_onnxruntime() -> Any:
    """The module `onnxruntime`, which tells nobody that it is used unless the variable `ORT_DISABLE_TELEMETRY` is 0.

    Raises:
        InputError: it is not installed, too old, or does not work.
    """
    os.environ.setdefault(TELEMETRY_OFF, "1")
    try:
        import onnxruntime

        version = str(onnxruntime.__version__)
        onnxruntime.InferenceSession  # noqa: B018  # a folder that an uninstalled package left imports, and is empty
    except Exception as error:  # beside ImportError whatever a library that does not load makes of itself
        packages = installed_packages()
        if not packages:
            raise InputError(
                "ONNX Runtime is not installed.",
                note=f"It runs bundles of target ort, the default: {first_line(error)}.",
                hint=f"{install_command('cpu')}; on a machine with an NVIDIA GPU {install_command('cuda')}; or use "
                "--target openvino.",
            ) from None
        found = both_installed() or f"{packages[0]} is installed."
        extra = " or ".join(f"'lora-drop-export[{EXTRAS[package]}]'" for package in packages)
        raise InputError(
            "The installed ONNX Runtime does not work.",
            note=f"{first_line(error)}. {found}",
            hint=f"pip uninstall -y {' '.join(packages)}; then pip install {extra}.",
        ) from None
    if tuple(map(int, version.split(".")[:2])) < LEAST_VERSION:
        raise InputError(
            "The installed ONNX Runtime is too old.",
            note=f"It is {version}; {'.'.join(map(str, LEAST_VERSION))} or newer is needed.",
            hint=upgrade_command(),
        )
    return onnxruntime


def preload_cuda(ort: Any) -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels, where they are installed: the system's loader does not look there."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing; `loader_error` says it if need be
        ort.preload_dlls()


def loader_error(ort: Any) -> str | None:
    """What the system's loader says of the CUDA provider's library: which library it misses. None where it loads."""
    folder = Path(ort.__file__).parent / "capi"
    try:
        for part in ("shared", "cuda"):  # the first has symbols of the second
            for library in folder.glob(f"*onnxruntime_providers_{part}.*"):
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        return first_line(error)
    return None
