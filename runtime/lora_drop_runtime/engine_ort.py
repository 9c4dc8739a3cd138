"""ONNX Runtime as the engine of a session.

Enters: a bundle and the name of a step graph's buffers. Leaves: a callable that runs one step on them.
Knows no model, no schedule and no token: it binds names to memory and runs. Both sessions map the same weight files, so
the process holds one copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .errors import BundleError, first_line
from .plan import StepKind

Array = npt.NDArray[Any]
Step = Callable[[], None]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Engine(Protocol):
    """What a session needs: memory, and steps over it."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A buffer for a step's inputs or outputs."""
        ...

    def prepare(self, kind: StepKind, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Step:
        """Bind buffers by name; the returned callable runs the step on them, again and again."""
        ...

    def replace_adapters(self, matrices: Mapping[str, tuple[Array, Array]]) -> None:
        """Use other adapter matrices (A, s·B) from now on; prepared LoRA steps are void."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


class OrtEngine:
    """Both step graphs of a bundle in ONNX Runtime.

    Args:
        bundle: an opened bundle with target `ort`.
        provider: `cpu`.
        threads: intra-op threads; None leaves the number of physical cores.

    Raises:
        BundleError: the provider is not known, or not in the installed ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, *, provider: str | None = None, threads: int | None = None) -> None:
        import onnxruntime

        provider = provider or "cpu"
        available = onnxruntime.get_available_providers()
        if PROVIDERS.get(provider) not in available:
            names = ", ".join(short for short, long in PROVIDERS.items() if long in available)
            raise BundleError(
                "The execution provider is not available.",
                note=f"{provider!r} was asked for, the installed ONNX Runtime has {names}.",
                hint="Use --provider cpu, or install the ONNX Runtime package that has it.",
            )
        self._ort = onnxruntime
        self._bundle = bundle
        self._provider = PROVIDERS[provider]
        self._threads = threads
        self._files = bundle.target("ort")[1]
        self._sessions = {kind: self._open(kind, {}) for kind in StepKind}

    def _open(self, kind: StepKind, replaced: Mapping[str, Array]) -> Any:
        options = self._ort.SessionOptions()
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        root = str(self._bundle.root.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", root)
        # Prepacking would give each session a private copy of every weight; without it both map the same file
        options.add_session_config_entry("session.disable_prepacking", "1")
        # Each session has threads of its own; left spinning after a step they would take the cores from the other's
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if replaced:
            values = [self._ort.OrtValue.ortvalue_from_numpy(array) for array in replaced.values()]
            options.add_external_initializers(list(replaced), values)
        path = self._bundle.root / self._files[kind.value]
        try:
            return self._ort.InferenceSession(path.read_bytes(), options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            raise BundleError(
                "ONNX Runtime cannot load a graph of the bundle.",
                note=f"{path}: {first_line(error)}",
                hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
            ) from error

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def prepare(self, kind: StepKind, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Step:
        session = self._sessions[kind]
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        buffers = (*inputs.values(), *outputs.values())  # keep the bound memory alive

        def step(run: Callable[..., None] = session.run_with_iobinding, _: Any = buffers) -> None:
            run(binding)

        return step

    def replace_adapters(self, matrices: Mapping[str, tuple[Array, Array]]) -> None:
        replaced = {
            f"surrogate.{site}.lora_{part}": np.ascontiguousarray(array, np.float32)
            for site, pair in matrices.items()
            for part, array in zip("AB", pair, strict=True)
        }
        self._sessions[StepKind.LORA] = self._open(StepKind.LORA, replaced)

    def close(self) -> None:
        self._sessions.clear()
