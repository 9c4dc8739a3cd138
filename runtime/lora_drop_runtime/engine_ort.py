"""ONNX Runtime as the engine of a session.

Enters: a bundle and the name of a step graph's buffers. Leaves: a callable that runs one step on them.
Knows no model, no schedule and no token: it binds names to memory and runs. Both sessions map the same weight files, so
the process holds one copy of them.

It also runs the graphs that a TensorRT target's engines were built from, where they are plain ONNX (native form): that
shows what is wrong with the graphs, and nothing of the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import Bundle, WeightInput
from .engine import Array, Step, fitting_slots
from .errors import BundleError, first_line
from .graph_io import DEVICE_TARGETS
from .plan import StepKind

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtEngine:
    """Both step graphs of a bundle in ONNX Runtime.

    Args:
        bundle: an opened bundle.
        target: whose graphs; `ort`, or a TensorRT target in the native form.
        provider: `cpu`.
        threads: intra-op threads; None leaves the number of physical cores.

    Raises:
        BundleError: the provider is not known, or not in the installed ONNX Runtime, which cannot load the graphs.
    """

    def __init__(
        self, bundle: Bundle, target: str = "ort", *, provider: str | None = None, threads: int | None = None
    ) -> None:
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
        entry = bundle.target(target)[1]
        on_device = target in DEVICE_TARGETS
        self.target = target
        self.chooses_tokens = on_device
        # GroupQueryAttention (target ort) takes several tokens after others in one row only
        self.batched_chunks = on_device
        self.prefill_chunk: int | None = entry.get("prefill_chunk")
        self._capacities: Mapping[str, int] | None = entry.get("slots")
        self._files = entry["graphs"] if on_device else entry
        self._weights = {name: _mapped(bundle, weight) for name, weight in bundle.weight_inputs(target).items()}
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

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        return needed if self._capacities is None else fitting_slots(self._capacities, needed)

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def read(self, buffer: Array) -> npt.NDArray[np.float32]:
        return buffer

    def prepare(self, kind: StepKind, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Step:
        session = self._sessions[kind]
        if self._weights:
            names = {value.name for value in session.get_inputs()}
            inputs = {**inputs, **{name: array for name, array in self._weights.items() if name in names}}
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
        if self._weights:
            self._weights |= replaced
        else:
            self._sessions[StepKind.LORA] = self._open(StepKind.LORA, replaced)

    def close(self) -> None:
        self._sessions.clear()


def _mapped(bundle: Bundle, weight: WeightInput) -> Array:
    """A weight of a target's table: mapped where it lies in one piece, else put together in memory."""
    if weight.dtype not in ("float32", "float16"):
        raise BundleError(
            "ONNX Runtime cannot run the graphs of this target.",
            note=f"Their weights are {weight.dtype}, its CPU provider computes in float32.",
            hint="Export with --dtype fp32.",
        )
    parts: list[Array] = [
        np.memmap(bundle.root / file, np.uint8, "r", offset, (size,)) for file, offset, size in weight.parts
    ]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return whole.view(weight.dtype).reshape(weight.shape)
