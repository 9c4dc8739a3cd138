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
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle, WeightInput
from lora_drop_runtime.bundle.graph_io import (
    LAST_SLOTS,
    LORA_STEP,
    NEW_TOKENS,
    PACKED_STEP,
    TOTALS,
    beside_inputs,
    steps_name,
)
from lora_drop_runtime.bundle.manifest import OrtEntry, TrtEntry
from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.engines.engine import (
    Array,
    DeviceBuffer,
    Step,
    adapter_weights,
    constant_adapters,
    copy_arrays,
    fitting_slots,
)
from lora_drop_runtime.errors import BundleError, LoraDropError, first_line
from lora_drop_runtime.plan.schedule import StepKind

from .device_memory import DeviceMemory
from .io_check import check_beside, check_io, check_name
from .package import import_onnxruntime, preload_cuda
from .providers import (
    PROVIDERS,
    check_available,
    check_runs,
    check_version,
    no_device,
    not_started,
    rtx_device,
    takes_ragged_rows,
)
from .session_options import packs_weights, session_options


def _trim_heap() -> None:
    """Give back to the system what packing weights left free in the heap; megabytes, with glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _BesideLengths:
    """What stands beside a step's lengths in a graph with both steps; called before each run.

    Args:
        inputs: of the step.
        slots: of each length, how many its caches have.
        ragged: whether rows may have different numbers of new tokens.
    """

    def __init__(self, inputs: Mapping[str, Any], slots: Mapping[str, int], ragged: bool) -> None:
        # Plain Python over memory views: after a step that streamed all weights, numpy's code has left the CPU's caches
        self._batch, self._width = inputs["input_ids"].shape
        totals = {length: np.zeros((), np.int32) for length in TOTALS if length in inputs}
        self.arrays: dict[str, Array] = {TOTALS[length]: total for length, total in totals.items()}
        self._ragged = ragged
        self._index = inputs["logits_index"].data
        self._last_index = inputs["logits_index"].shape[1] - 1
        counts, self._packed = np.zeros(self._batch, np.int32), np.array(False)
        lasts = {length: np.zeros(self._batch, np.int32) for length in totals}
        if ragged:
            self.arrays |= {NEW_TOKENS: counts, PACKED_STEP: self._packed}
            self.arrays |= {LAST_SLOTS[length]: last for length, last in lasts.items()}
        self._counts = counts.data
        self._groups = [(totals[n], lasts[n].data, inputs[n].data, slots[n] - self._width) for n in totals]

    def __call__(self) -> None:
        if not self._ragged:
            for total, _, lengths, _ in self._groups:
                total[()] = max(lengths) + self._width
            return
        tokens = 0
        for row in range(self._batch):
            self._counts[row] = count = self._index[row, self._last_index] + 1
            tokens += count
        for total, lasts, lengths, most in self._groups:
            longest = self._width
            for row, count in enumerate(self._counts):
                # The operator wants a slot, and room for the whole chunk, of a row that stands still as well
                end = lengths[row] + count if count else max(1, min(lengths[row], most))
                lasts[row] = end - 1
                longest = max(longest, end)
            total[()] = longest
        self._packed[()] = self._width > 1 and tokens < self._batch * self._width


class OrtEngine:
    """Both step graphs of a bundle in ONNX Runtime.

    Args:
        bundle: an opened bundle.
        target: whose graphs; `ort`, or a TensorRT target.
        provider: `cpu`, `cuda` or `rtx`; `cpu` when None.
        threads: intra-op threads; None leaves the number of physical cores.
        steps: another graph in the place of the target's, for `ort`.

    Raises:
        InputError: no ONNX Runtime is installed, or it is too old or does not work.
        NoDeviceError: the provider is not in the installed ONNX Runtime, or has no GPU or libraries here.
        BundleError: the provider cannot run the target's graphs.
    """

    warms_up = False
    runs_cycles = False
    block_slots: int | None = None

    def __init__(
        self,
        bundle: Bundle,
        target: str = "ort",
        *,
        provider: str | None = None,
        threads: int | None = None,
        steps: bytes | None = None,
    ) -> None:
        provider = provider or "cpu"
        entry = bundle.target(target)[1]
        check_runs(bundle, target, provider)
        onnxruntime = import_onnxruntime()
        self._joined = isinstance(entry, OrtEntry)
        if self._joined:
            check_version(onnxruntime.__version__, bundle.manifest.model.dtype)
        self._ort = onnxruntime
        self._bundle = bundle
        self._provider = PROVIDERS[provider]
        self._ep_device = rtx_device(onnxruntime) if provider == "rtx" else None
        if self._ep_device is None:
            check_available(provider, onnxruntime)
        if provider == "cuda":
            preload_cuda(onnxruntime)
        self._threads = threads
        self._steps = steps
        assert isinstance(entry, OrtEntry | TrtEntry)  # check_runs
        self.target = target
        self.chooses_tokens = not self._joined
        self._ragged = self._joined and takes_ragged_rows(bundle.manifest.model.dtype)
        # Else GroupQueryAttention (target ort) takes several tokens after others in one row only
        self.batched_chunks = self._ragged or not self._joined
        self.idle_rows = self._ragged
        self.many_requests = provider == "cpu"
        self.prefill_chunk: int | None = None
        self.verified_tokens: int | None = None
        self._capacities: Mapping[str, int] | None = None
        if isinstance(entry, OrtEntry):
            self._files: Mapping[StepKind, str] = dict.fromkeys(StepKind, entry.steps)
        else:
            self.prefill_chunk, self._capacities = entry.prefill_chunk, entry.slots
            files = entry.graphs
            if provider == "rtx":
                assert entry.ep_context is not None  # check_runs
                files = entry.ep_context
                # The provider takes the first profile
                self.prefill_chunk = self.verified_tokens = entry.refresh_profiles["decode"][1]
            self._files = {kind: files[kind.value] for kind in StepKind}
        self._memory: DeviceMemory | None = None
        if provider != "cpu":
            self._memory = DeviceMemory(onnxruntime, self._ep_device)
        self._weights = {name: self._weight(name, w) for name, w in bundle.weight_inputs(target).items()}
        self._sessions: dict[StepKind, Any] = {}
        self._adapters: Mapping[str, Any] = {}  # in the place of those in the graphs
        self._open_all({})

    def _open_all(self, replaced: Mapping[str, Any]) -> None:
        if self._joined:
            self._sessions = dict.fromkeys(StepKind, self._open(self._files[StepKind.REFRESH], replaced))
        else:
            self._sessions = {kind: self._open(file, replaced) for kind, file in self._files.items()}
        if self._joined:
            written = self._bundle.manifest.io(StepKind.LORA).outputs
            file = self._files[StepKind.LORA]
            session = self._sessions[StepKind.LORA]
            check_name(session, steps_name(spec.name for spec in written), file)
            lengths = {spec.name for spec in self._bundle.manifest.io(StepKind.REFRESH).inputs} & TOTALS.keys()
            check_beside(session, beside_inputs(lengths, self._ragged), file)
        for kind, session in self._sessions.items():
            check_io(session, self._bundle.manifest.io(kind, self.target), self._files[kind])
        _trim_heap()

    def _reopen(self, adapters: Mapping[str, Any]) -> None:
        """Open the graphs with other adapters, or where that fails again with those from before.

        The sessions are closed first, since both would hold the weights.
        """
        self._sessions.clear()
        try:
            self._open_all(adapters)
        except BaseException:
            with contextlib.suppress(LoraDropError):  # `prepare` then says that there are no sessions
                self._open_all(self._adapters)
            raise
        self._adapters = adapters

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
        if self._memory is not None:
            options.log_severity_level = 3  # its warnings name shape nodes, which belong on the CPU
        if replaced:
            options.add_external_initializers(list(replaced), list(replaced.values()))
        path = self._bundle.root / file
        graph = self._steps or self._bundle.graph(file)
        try:
            if self._ep_device is not None:  # from its path: the engine is found beside it
                options.add_provider_for_devices([self._ep_device], {})
                session = self._ort.InferenceSession(path, options, enable_fallback=0)
            else:
                session = self._ort.InferenceSession(graph, options, providers=[self._provider], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            if self._memory is not None:
                raise no_device(self._provider, error) from error
            raise BundleError(
                "ONNX Runtime cannot load a graph of the bundle.",
                note=f"{path}: {first_line(error)}",
                hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
            ) from error
        if session.get_providers()[0] != self._provider:  # a provider that cannot start is left out
            raise not_started(self._provider, session.get_providers()[0], self._ort)
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

    def copy(self, source: Array | DeviceBuffer, target: Array | DeviceBuffer, slots: int | None) -> None:
        if isinstance(source, np.ndarray) and isinstance(target, np.ndarray):
            copy_arrays(source, target, slots)
            return
        assert self._memory is not None
        assert isinstance(source, DeviceBuffer)
        assert isinstance(target, DeviceBuffer)
        self._memory.copy(source, target, slots)

    def prepare(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Step:
        if kind not in self._sessions:
            raise BundleError(
                "The session has no graphs.",
                note="It was closed while a request ran; or ONNX Runtime could load them neither with new adapters nor "
                "again with those from before.",
                hint="Open it again with Session.open; free memory where that was the reason.",
            )
        session = self._sessions[kind]
        if self._weights:
            names = {value.name for value in session.get_inputs()}
            inputs = {**inputs, **{name: array for name, array in self._weights.items() if name in names}}
        set_beside: Callable[[], None] = lambda: None  # noqa: E731
        if self._joined:
            set_beside = beside = _BesideLengths(inputs, self._slots_of(inputs), self._ragged)
            inputs = {**inputs, **beside.arrays, LORA_STEP: np.array(kind is StepKind.LORA)}
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
                    element = BY_NAME[buffer.dtype].onnx
                    bind(name, self._memory.device_type, 0, element, buffer.shape, buffer.address)
        kept = (*inputs.values(), *outputs.values())  # keep the bound memory alive

        def step(run: Callable[..., None] = session.run_with_iobinding, _: Any = kept) -> None:
            set_beside()
            try:
                run(binding)
            except Exception as error:
                raise self._cannot_run(kind, error) from error

        def device_step(_: Any = kept) -> None:
            set_beside()
            try:
                for arguments in hosts:
                    binding.bind_input(*arguments)
                binding.synchronize_inputs()
                session.run_with_iobinding(binding)
            except Exception as error:
                raise no_device(self._provider, error) from error

        return step if self._memory is None else device_step

    def _slots_of(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Of each length, how many slots its caches have."""
        dropped = set(self._bundle.manifest.plan.dropped_attentions)
        keys = [name for name in inputs if name.startswith("past_key.")]
        found = {
            "len_dropped" if int(name.rpartition(".")[2]) in dropped else "len_kept": inputs[name].shape[2]
            for name in keys
        }
        return dict.fromkeys(TOTALS, 2**31) | found

    def _cannot_run(self, kind: StepKind, error: Exception) -> BundleError:
        return BundleError(
            "ONNX Runtime cannot run a step of the bundle.",
            note=f"{self._bundle.root / self._files[kind]}: {first_line(error)}",
            hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
        )

    def replace_adapters(self, matrices: Mapping[str, tuple[Array, Array]]) -> None:
        dtype = self._bundle.manifest.model.dtype
        replaced = adapter_weights(matrices, dtype)
        if self._weights and self._memory is not None:
            contents = {name: array.reshape(-1).view(np.uint8) for name, array in replaced.items()}
            for name, address in self._memory.replace(contents).items():
                self._weights[name] = DeviceBuffer(name, address, replaced[name].shape, dtype)
        elif self._weights:
            self._weights |= replaced
        elif not self._joined:
            raise constant_adapters()
        else:
            create = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
            values = {name: create(array, BY_NAME[dtype].onnx) for name, array in replaced.items()}
            self._reopen(values)

    def notes(self) -> list[str]:
        if self._memory is None and self._bundle.manifest.model.dtype != "float32":
            return ["ONNX Runtime has few float16 kernels for the CPU: it computes in float32 and converts, slowly"]
        return []

    def close(self) -> None:
        self._sessions.clear()
        self._weights.clear()
        self._memory = None
