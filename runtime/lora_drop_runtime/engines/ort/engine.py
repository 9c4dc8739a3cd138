"""ONNX Runtime as the engine of a session.

Enters: a bundle and the name of a step graph's buffers. Leaves: a callable that runs one step on them.
Knows no model, no schedule and no token: it binds names to memory and runs.

    target          provider    graphs                                           caches, states, logits
    ort             cpu         float32 activations; both steps in one graph,    numpy
                                so that one session holds the weights once
    ort             cuda        float16, bfloat16                                the GPU's memory
    tensorrt-rtx    rtx         the engines, as EPContext nodes                  the GPU's memory
    tensorrt[-rtx]  cpu         what the engines were built from, where that is  numpy
                                plain ONNX (native form): it shows what is wrong
                                with the graphs, and nothing of the engines

What lies in the GPU's memory is bound by address. What the session reads and writes (ids, lengths) is host memory,
which ONNX Runtime copies to a GPU when it is bound, and only then: a step there binds it anew.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import QUANTIZED_DTYPES, Bundle, ModelFacts, WeightInput
from lora_drop_runtime.bundle.graph_io import DEVICE_TARGETS, JOINED_TARGET, LORA_STEP
from lora_drop_runtime.engines.engine import Array, DeviceBuffer, Step, constant_adapters, fitting_slots, in_dtype
from lora_drop_runtime.errors import BundleError, NoDeviceError, first_line
from lora_drop_runtime.plan.drop_plan import StepKind

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
INT8_CACHES_SINCE = (1, 29)
PACKED_BYTES = 768 << 20  # a second of packing
RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
_ONNX_DTYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}  # onnx.TensorProto.DataType


class OrtEngine:
    """Both step graphs of a bundle in ONNX Runtime.

    Args:
        bundle: an opened bundle.
        target: whose graphs; `ort`, or a TensorRT target.
        provider: `cpu`, `cuda` or `rtx`; `cpu` when None.
        threads: intra-op threads; None leaves the number of physical cores.
        steps: another graph in the place of the target's, for `ort`.

    Raises:
        NoDeviceError: the provider is not in the installed ONNX Runtime, or has no GPU here.
        BundleError: the provider cannot run the target's graphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str = "ort",
        *,
        provider: str | None = None,
        threads: int | None = None,
        steps: bytes | None = None,
    ) -> None:
        import onnxruntime

        provider = provider or "cpu"
        entry = bundle.target(target)[1]
        _check_runs(bundle, target, provider)
        _check_version(onnxruntime.__version__, bundle.manifest.model)
        self._ort = onnxruntime
        self._bundle = bundle
        self._provider = PROVIDERS[provider]
        self._ep_device = _rtx_device(onnxruntime) if provider == "rtx" else None
        if self._ep_device is None and self._provider not in onnxruntime.get_available_providers():
            names = [short for short, long in PROVIDERS.items() if long in onnxruntime.get_available_providers()]
            raise NoDeviceError(
                "The execution provider is not available.",
                note=f"{provider!r} was asked for, the installed ONNX Runtime has {', '.join(names)}.",
                hint="Use --provider cpu, or install the ONNX Runtime package that has it.",
            )
        self._threads = threads
        self._steps = steps
        on_device = target in DEVICE_TARGETS
        self.target = target
        self.chooses_tokens = on_device
        # GroupQueryAttention (target ort) takes several tokens after others in one row only
        self.batched_chunks = on_device
        self.prefill_chunk: int | None = entry.get("prefill_chunk")
        self._capacities: Mapping[str, int] | None = entry.get("slots")
        self._joined = target == JOINED_TARGET
        self._files = entry if self._joined else entry["graphs"]
        if provider == "rtx":
            self._files = entry["ep_context"]
            self.prefill_chunk = entry["refresh_profiles"]["decode"][1]  # the provider takes the first profile
        self._memory: _DeviceMemory | None = None
        if provider != "cpu":
            self._memory = _DeviceMemory(onnxruntime, self._ep_device)
        self._weights = {name: self._weight(name, w) for name, w in bundle.weight_inputs(target).items()}
        self._sessions: dict[StepKind, Any] = {}
        self._open_all({})

    def _open_all(self, replaced: Mapping[str, Any]) -> None:
        if self._joined:
            self._sessions = dict.fromkeys(StepKind, self._open(self._files["steps"], replaced))
        else:
            self._sessions = {kind: self._open(self._files[kind.value], replaced) for kind in StepKind}
        _trim_heap()

    def _weight(self, name: str, weight: WeightInput) -> Array | DeviceBuffer:
        """A weight that is an input: mapped, or put together from its parts; copied to where the steps run."""
        parts = list(self._bundle.mapped_parts(weight))
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._memory is not None:
            return self._memory.hold(name, whole, weight.shape, weight.dtype)
        return whole.view(weight.dtype).reshape(weight.shape)

    def _open(self, file: str, replaced: Mapping[str, Any]) -> Any:
        options = session_options(self._ort, self._bundle.root, self._threads)
        if not packs_weights(self._bundle.manifest.model):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if replaced:
            options.add_external_initializers(list(replaced), list(replaced.values()))
        path = self._bundle.root / file
        try:
            if self._ep_device is not None:  # from its path: the engine is found beside it
                options.add_provider_for_devices([self._ep_device], {})
                session = self._ort.InferenceSession(path, options, enable_fallback=0)
            else:
                session = self._ort.InferenceSession(
                    self._steps or path.read_bytes(), options, providers=[self._provider], enable_fallback=0
                )
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            if self._memory is not None:
                raise _no_device(self._provider, error) from error
            raise BundleError(
                "ONNX Runtime cannot load a graph of the bundle.",
                note=f"{path}: {first_line(error)}",
                hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
            ) from error
        if session.get_providers()[0] != self._provider:  # a provider that cannot start is left out
            raise _no_device(self._provider, RuntimeError(f"it chose {session.get_providers()[0]} instead"))
        return session

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        return needed if self._capacities is None else fitting_slots(self._capacities, needed)

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> Array | DeviceBuffer:
        if self._memory is None:
            return np.zeros(shape, dtype)
        size = DeviceBuffer(name, 0, shape, dtype).nbytes
        return self._memory.hold(name, np.zeros(size, np.uint8), shape, dtype)

    def read(self, buffer: Array | DeviceBuffer) -> npt.NDArray[np.float32]:
        if isinstance(buffer, np.ndarray):
            return buffer
        assert self._memory is not None
        return self._memory.read(buffer).view(np.float32).reshape(buffer.shape)

    def prepare(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Step:
        session = self._sessions[kind]
        if self._weights:
            names = {value.name for value in session.get_inputs()}
            inputs = {**inputs, **{name: array for name, array in self._weights.items() if name in names}}
        if self._joined:
            inputs = {**inputs, LORA_STEP: np.array(kind is StepKind.LORA)}
        binding = session.io_binding()
        hosts = []
        for bind, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                if isinstance(buffer, np.ndarray):
                    arguments = (name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
                    bind(*arguments)
                    if name in inputs:
                        hosts.append(arguments)
                else:
                    assert self._memory is not None
                    element = _ONNX_DTYPES[buffer.dtype]
                    bind(name, self._memory.device_type, 0, element, buffer.shape, buffer.address)
        kept = (*inputs.values(), *outputs.values())  # keep the bound memory alive

        def step(run: Callable[..., None] = session.run_with_iobinding, _: Any = kept) -> None:
            run(binding)

        def device_step(_: Any = kept) -> None:
            try:
                for arguments in hosts:
                    binding.bind_input(*arguments)
                binding.synchronize_inputs()
                session.run_with_iobinding(binding)
            except Exception as error:
                raise _no_device(self._provider, error) from error

        return step if self._memory is None else device_step

    def replace_adapters(self, matrices: Mapping[str, tuple[Array, Array]]) -> None:
        dtype = self._bundle.manifest.model.dtype
        replaced = {
            f"surrogate.{site}.lora_{part}": in_dtype(array, dtype)
            for site, pair in matrices.items()
            for part, array in zip("AB", pair, strict=True)
        }
        if self._weights and self._memory is not None:
            for name, array in replaced.items():
                self._weights[name] = self._memory.hold(name, array.reshape(-1).view(np.uint8), array.shape, dtype)
        elif self._weights:
            self._weights |= replaced
        elif self.target in DEVICE_TARGETS:
            raise constant_adapters()
        else:
            create = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
            values = {name: create(array, _ONNX_DTYPES[dtype]) for name, array in replaced.items()}
            self._sessions.clear()  # both would hold the weights
            self._open_all(values)

    def notes(self) -> list[str]:
        if self._memory is None and self._bundle.manifest.model.dtype != "float32":
            return ["ONNX Runtime has few float16 kernels for the CPU: it computes in float32 and converts, slowly"]
        return []

    def close(self) -> None:
        self._sessions.clear()
        self._weights.clear()
        self._memory = None


def _trim_heap() -> None:
    """Give back to the system what packing weights left free in the heap; megabytes, with glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def packs_weights(model: ModelFacts) -> bool:
    """Whether ONNX Runtime rearranges weights for its kernels when a bundle is opened, or computes on the mapped files.

    Quantized weights have no other kernels worth having. Float weights gain where matrices are small and opening stays
    below a second.
    """
    return model.weight_dtype in QUANTIZED_DTYPES or sum(model.layer_bytes) + model.head_bytes <= PACKED_BYTES


def session_options(ort: Any, root: str | Path, threads: int | None) -> Any:
    """How sessions over a bundle's weights are opened; `threads` as for OrtEngine."""
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(root).resolve()))
    # Threads that spin on after a step take the cores from whoever comes next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class _DeviceMemory:
    """Buffers in a GPU's memory as OrtValues of bytes, one for each name; asking again frees the one before.

    Args:
        ep_device: the device of a provider that was loaded as a library; None for the CUDA provider.
    """

    device_type = "cuda"

    def __init__(self, ort: Any, ep_device: Any) -> None:
        self._ort = ort
        self._info = None if ep_device is None else ep_device.memory_info(ort.OrtDeviceMemoryType.DEFAULT)
        self._values: dict[str, Any] = {}

    def hold(self, name: str, content: Array, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """A buffer with these bytes."""
        self._values.pop(name, None)
        content = np.ascontiguousarray(content)
        create = self._ort.OrtValue
        try:
            if self._info is None:
                value = create.ortvalue_from_numpy(content, self.device_type, 0)
            else:
                value = create.ortvalue_from_shape_and_type(content.shape, np.uint8, memory_info=self._info)
                self._ort.copy_tensors([create.ortvalue_from_numpy(content)], [value])
        except Exception as error:  # as above
            what = f"{name} takes {content.nbytes / 2**20:,.1f} MiB on the GPU: {first_line(error)}"
            raise _no_device("The provider", RuntimeError(what)) from error
        self._values[name] = value
        return DeviceBuffer(name, value.data_ptr(), shape, dtype)

    def read(self, buffer: DeviceBuffer) -> Array:
        """The bytes of a whole buffer."""
        value = self._values[buffer.name]
        assert value.data_ptr() == buffer.address
        if self._info is not None:
            host = self._ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), np.uint8)
            self._ort.copy_tensors([value], [host])
            value = host
        content: Array = value.numpy()
        return content[: buffer.nbytes]


def _check_runs(bundle: Bundle, target: str, provider: str) -> None:
    """Refuse a provider that is not known, or has no kernels for the target's graphs.

    GroupQueryAttention has no float32 kernel for CUDA, and nothing computes in bfloat16 on the CPU.
    """
    entry, dtype = bundle.target(target)[1], bundle.manifest.model.dtype
    runs: dict[str, tuple[str, ...]] = {}
    if target == "ort":
        runs = {"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")}
    if target in DEVICE_TARGETS and entry["form"] == "native":
        runs["cpu"] = ("float32", "float16")
    if "ep_context" in entry:
        runs["rtx"] = ("float32", "float16", "bfloat16")
    if provider not in PROVIDERS or dtype not in runs.get(provider, ()):
        able = ", ".join(name for name, dtypes in runs.items() if dtype in dtypes) or "none of ONNX Runtime's"
        error = BundleError if provider not in PROVIDERS else NoDeviceError
        raise error(
            "The execution provider cannot run the bundle.",
            note=f"{provider!r} was asked for; target {target!r} in {dtype} runs on {able}.",
            hint=f"Use --provider {able}." if able in PROVIDERS else "Export with another --dtype or --target.",
        )


def _check_version(version: str, model: ModelFacts) -> None:
    """Refuse an ONNX Runtime whose attention does not take the bundle's caches."""
    if model.kv_dtype and tuple(map(int, version.split(".")[:2])) < INT8_CACHES_SINCE:
        raise BundleError(
            "The installed ONNX Runtime is too old for the bundle.",
            note=f"It is {version}; int8 caches need {'.'.join(map(str, INT8_CACHES_SINCE))}.",
            hint="pip install --upgrade onnxruntime; or export without --kv-dtype.",
        )


def _no_device(provider: str, error: Exception) -> NoDeviceError:
    """For what a provider on a GPU says when it cannot start, allocate or run."""
    return NoDeviceError(
        "The execution provider cannot run the bundle here.",
        note=f"{provider}: {first_line(error)}.",
        hint="Check driver, CUDA and cuDNN and the GPU's free memory; or use another --provider.",
    )


def _rtx_device(ort: Any) -> Any:
    """The device of NVIDIA's provider for RTX GPUs, a library of its own.

    Raises:
        NoDeviceError: it is not installed, or finds no GPU.
    """
    import importlib

    hint = f"pip install {RTX_PACKAGE.replace('_', '-')}, on a machine with an RTX GPU; or use --provider cpu."
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
