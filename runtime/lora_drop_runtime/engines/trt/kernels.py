"""The kernel that chooses tokens on the device (choose.cu): compiled for the GPU at hand, and launched.

Enters: addresses and sizes. Leaves: a launch on the stream. NVRTC compiles it in under a second, so it is kept nowhere.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from lora_drop_runtime.errors import BundleError, first_line

from .cuda_device import CudaDevice

SOURCE = Path(__file__).with_name("choose.cu")
THREADS, SHARED_BYTES = 1024, 24 * 1024 + 16  # of a block
NVRTC_HINT = "pip install nvidia-cuda-nvrtc"

_OF_A_ROW = ("logits", "next_token", "uniforms", "top_p", "top_k", "temperature", "penalty", "new_tokens")
_MOVED_ON = ("stops", "seen", "ids", "window", "len_kept", "len_dropped", "tokens", "drawn", "over")
_OF_A_STEP = ("place", "kept", "dropped", "back", "next_width")
ADDRESSES = (*_OF_A_ROW, *_MOVED_ON)
NUMBERS = ("rows", "vocab", "window_width", *_OF_A_STEP, "most_kept", "most_dropped")


class Choice(ctypes.Structure):
    """The struct of the source, which says what each member is."""

    _fields_ = tuple([(name, ctypes.c_void_p) for name in ADDRESSES] + [(name, ctypes.c_int32) for name in NUMBERS])


def compiled(nvrtc: Any, source: bytes, compute_capability: str) -> bytes:
    """A CUBIN for one architecture, such as `8.9`.

    Args:
        nvrtc: `cuda.bindings.nvrtc`.

    Raises:
        BundleError: NVRTC is not there, or refuses the source or the architecture.
    """

    def call(function: str, *arguments: Any) -> Any:
        error, *values = getattr(nvrtc, function)(*arguments)
        if error:
            raise BundleError("The GPU's kernel cannot be compiled.", note=f"{function}: {error}.", hint=NVRTC_HINT)
        return values[0] if values else None

    try:
        program = call("nvrtcCreateProgram", source, SOURCE.name.encode(), 0, [], [])
    except Exception as error:  # what the bindings raise without the library differs from version to version
        note = f"NVRTC cannot be loaded: {first_line(error)}."
        raise BundleError("The GPU's kernel cannot be compiled.", note=note, hint=NVRTC_HINT) from None
    try:
        architecture = f"--gpu-architecture=sm_{compute_capability.replace('.', '')}"
        sizes = f"-DLORA_DROP_THREADS={THREADS}", f"-DLORA_DROP_SHARED_BYTES={SHARED_BYTES}"
        options = [option.encode() for option in (architecture, "-std=c++17", *sizes)]
        call("nvrtcCompileProgram", program, len(options), options)
        image = bytearray(call("nvrtcGetCUBINSize", program))
        call("nvrtcGetCUBIN", program, image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(image)


class Chooser:
    """The kernel, loaded.

    Raises:
        BundleError: it cannot be compiled or loaded.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        image = compiled(device.nvrtc, SOURCE.read_bytes(), device.compute_capability)
        self._function = device.load(image, "choose_tokens")

    def launch(self, choice: Choice) -> None:
        """Asynchronous; a block for each row."""
        self._device.launch_kernel(self._function, choice.rows, THREADS, SHARED_BYTES, choice)
