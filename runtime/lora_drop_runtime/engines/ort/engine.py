"""ONNX Runtime as the engine of a session.

Enters: a bundle and the name of a step graph's buffers. Leaves: a callable that runs one step on them.
Knows no model, no schedule and no token: it binds names to memory and runs.

    target          provider    graphs                                           caches, states, logits
    ort             cpu         float32 activations; both steps in one graph,    numpy
                                so that one session holds the weights once
    ort             cuda        float16, bfloat16 activations; a graph a step,   the GPU's memory
                                whose weights are inputs: once on the GPU
    tensorrt-rtx    rtx         the engines, as EPContext nodes                  the GPU's memory
    tensorrt[-rtx]  cpu         what the engines were built from, where that is  numpy
                                plain ONNX (native form): it shows what is wrong
                                with the graphs, and nothing of the engines

What lies in the GPU's memory is bound by address. What the session writes (ids, lengths) is host memory: a step on a
GPU copies it into one block there. With `cuda` a decode step is captured as a CUDA graph and replayed where its buffers
are the same; prompts and other steps of several tokens are not.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import LORA_STEP, TOTALS, beside_inputs, steps_name
from lora_drop_runtime.bundle.manifest import OrtEntry, TrtEntry
from lora_drop_runtime.dtypes import BY_NAME, in_dtype
from lora_drop_runtime.engines.engine import (
    Array,
    DeviceBuffer,
    Step,
    constant_adapters,
    copy_arrays,
    fitting_slots,
)
from lora_drop_runtime.engines.forked import hold_in_forks
from lora_drop_runtime.engines.huge_pages import HugePages
from lora_drop_runtime.engines.libc import trim_heap
from lora_drop_runtime.errors import BundleError, LoraDropError, engine_hint, first_line
from lora_drop_runtime.plan.schedule import StepKind

from .beside import BesideLengths
from .device_memory import DeviceMemory
from .device_steps import CudaGraphs, HostInputs
from .io_check import check_beside, check_io, check_name
from .package import import_onnxruntime, preload_cuda
from .placement import RECORD, check_placement
from .providers import (
    PROVIDERS,
    check_available,
    check_form,
    check_runs,
    check_version,
    no_device,
    not_started,
    rtx_device,
)
from .session_options import packs_weights, session_options

SLOT_STEP = 256  # of which caches on a GPU have a multiple


class OrtEngine:
    """Both step graphs of a bundle in ONNX Runtime.

    Args:
        bundle: an opened bundle.
        target: whose graphs; `ort`, or a TensorRT target.
        provider: `cpu`, `cuda` or `rtx`; `cpu` when None.
        threads: of a step; one for each physical core that the process may use when None.
        graphs: others in the place of the target's, by the names of their files.

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
        graphs: Mapping[str, bytes] | None = None,
    ) -> None:
        provider = provider or "cpu"
        entry, dtype = bundle.target(target)[1], bundle.manifest.model.dtype
        check_runs(bundle, target, provider)
        onnxruntime = import_onnxruntime()
        self._is_own = isinstance(entry, OrtEntry)  # else a TensorRT target's
        self._joined = isinstance(entry, OrtEntry) and entry.steps is not None
        if isinstance(entry, OrtEntry):
            check_version(onnxruntime.__version__, dtype)
            check_form(entry, dtype)
        self._ort = onnxruntime
        self._bundle = bundle
        self._provider = PROVIDERS[provider]
        self._ep_device = rtx_device(onnxruntime, dtype) if provider == "rtx" else None
        if self._ep_device is None:
            check_available(provider, onnxruntime, dtype)
        if provider == "cuda":
            preload_cuda(onnxruntime)
        self._threads = threads
        self._changed = graphs or {}
        assert isinstance(entry, OrtEntry | TrtEntry)  # check_runs
        self.target = target
        self.chooses_tokens = not self._is_own
        # Else GroupQueryAttention (target ort) takes several tokens after others in one row only
        self.batched_chunks = self._joined or not self._is_own
        self.idle_rows = self._joined
        self.many_requests = provider == "cpu"
        self.prefill_chunk: int | None = None
        self.verified_tokens: int | None = None
        self._profiles: list[str] = []  # of the refresh engine, in their order (rtx)
        self._capacities: Mapping[str, int] | None = None
        if isinstance(entry, OrtEntry):
            one = dict.fromkeys((kind.value for kind in StepKind), entry.steps or "")
            files: Mapping[str, str] = entry.graphs or one
        else:
            self.prefill_chunk, self._capacities = entry.prefill_chunk, entry.slots
            files = entry.graphs
            if provider == "rtx":
                assert entry.ep_context is not None  # check_runs
                files = entry.ep_context
                self._profiles = list(entry.refresh_profiles)
                self.verified_tokens = entry.refresh_profiles["decode"][1]
        self._files = {kind: files[kind.value] for kind in StepKind}
        self._memory: DeviceMemory | None = None
        if provider != "cpu":
            self._memory = DeviceMemory(onnxruntime, self._ep_device)
        self._graphs = CudaGraphs() if provider == "cuda" else None
        self._blocks: dict[Any, Any] = {}  # of the inputs of steps that are captured
        self._sessions: dict[StepKind, Any] = {}
        self._sharing: weakref.WeakSet[OrtEngine] = weakref.WeakSet([self])  # the sessions and weights
        self._adapters: Mapping[str, Any] = {}  # in the place of those in the graphs
        self._open_all({})
        self._mapped: list[Array] = []  # what holds the weights that are inputs, on the CPU
        self._weights = self._load_weights()  # now: a provider that cannot start has said so

    def _open_all(self, replaced: Mapping[str, Any]) -> None:
        self._pages = HugePages(self._bundle.manifest.model.weight_bytes if self._memory is None else 0)
        if self._joined:
            self._sessions = dict.fromkeys(StepKind, self._open(self._files[StepKind.REFRESH], replaced))
            written = self._bundle.manifest.io(StepKind.LORA).outputs
            session, file = self._sessions[StepKind.LORA], self._files[StepKind.LORA]
            check_name(session, steps_name(spec.name for spec in written), file)
        else:
            self._sessions = {kind: self._open(file, replaced) for kind, file in self._files.items()}
        for kind, session in self._sessions.items():
            io = self._bundle.manifest.io(kind, self.target)
            if self._is_own:
                lengths = [spec.name for spec in io.inputs if spec.name in TOTALS]
                check_beside(session, beside_inputs(lengths, self._joined), self._files[kind])
            check_io(session, io, self._files[kind])
        trim_heap()  # packing weights left megabytes

    def _reopen(self, adapters: Mapping[str, Any]) -> None:
        """Open the graphs with other adapters, or where that fails again with those from before.

        The sessions are closed first, since both would hold the weights.
        """
        self._bundle.check_in_place()
        self._sessions.clear()
        try:
            self._open_all(adapters)
        except BaseException:
            with contextlib.suppress(LoraDropError):  # `prepare` then says that there are no sessions
                self._open_all(self._adapters)
            raise
        self._adapters = adapters

    def _load_weights(self) -> dict[str, Array | DeviceBuffer]:
        """Weights that are inputs: mapped, or put together from their parts; copied to where the steps run.

        Inputs over the same bytes, as a table that is the head as well, are views of one buffer.
        """
        loaded: dict[str, Array | DeviceBuffer] = {}
        buffers: dict[tuple[tuple[str, int, int], ...], DeviceBuffer] = {}
        for name, weight in self._bundle.weight_inputs(self.target).items():
            if weight.parts in buffers:
                loaded[name] = replace(buffers[weight.parts], shape=weight.shape, dtype=weight.dtype)
                continue
            parts = list(self._bundle.mapped_parts(weight))
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if self._memory is None:  # bound by address as well: numpy has neither bfloat16 nor uint4
                self._mapped.append(whole)
                loaded[name] = DeviceBuffer(name, whole.ctypes.data, weight.shape, weight.dtype)
            else:
                buffers[weight.parts] = loaded[name] = self._memory.hold(name, whole, weight.shape, weight.dtype)
        return loaded

    def _open(self, file: str, replaced: Mapping[str, Any], capture: bool = True) -> Any:
        options = session_options(self._ort, self._bundle.root, self._threads)
        model = self._bundle.manifest.model
        if not packs_weights(model):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if model.weight_dtype == "int4":  # on ARM that gives all activations of a row one scale (docs/int4-quality.md)
            options.add_session_config_entry("mlas.disable_kleidiai", "1")
        if self._memory is not None:
            options.log_severity_level = 3  # its warnings name shape nodes, which belong on the CPU
            options.add_session_config_entry(RECORD, "1")
        if replaced:
            options.add_external_initializers(list(replaced), list(replaced.values()))
        path = self._bundle.root / file
        graph = self._changed.get(file) or self._bundle.graph(file)
        try:
            if self._ep_device is not None:  # from its path: the engine is found beside it
                options.add_provider_for_devices([self._ep_device], {"nv_multi_profile_enable": "1"})
                session = self._ort.InferenceSession(path, options, enable_fallback=0)
            else:
                # Of steps with several tokens nothing is captured, whatever this says
                captures = self._graphs is not None and capture
                chosen = (self._provider, {"enable_cuda_graph": "1"}) if captures else self._provider
                session = self._ort.InferenceSession(graph, options, providers=[chosen], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            if self._graphs is not None and capture:  # it says that some nodes lie elsewhere, and not which
                self._open(file, replaced, capture=False)
            if self._memory is not None:
                raise no_device(self._provider, error) from error
            raise BundleError(
                "ONNX Runtime cannot load a graph of the bundle.",
                note=f"{path}: {first_line(error)}",
                hint=engine_hint(error),
            ) from error
        hold_in_forks(session)
        if session.get_providers()[0] != self._provider:  # a provider that cannot start is left out
            raise not_started(self._provider, session.get_providers()[0], self._ort)
        if self._graphs is not None:
            check_placement(session, self._provider, file)
        return session

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        if self._capacities is not None:
            return fitting_slots(self._capacities, needed)
        if self._graphs is None:
            return needed
        # Requests of like lengths then share CUDA graphs, which hold the caches' shapes
        return {name: -(-count // SLOT_STEP) * SLOT_STEP for name, count in needed.items()}

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> Array | DeviceBuffer:
        if self._memory is None:
            return np.zeros(shape, dtype)
        return self._memory.room(name, shape, dtype)

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

    def zero(self, buffer: Array | DeviceBuffer) -> None:
        if isinstance(buffer, np.ndarray):
            buffer[...] = 0
            return
        assert self._memory is not None
        self._memory.zero(buffer)

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
        captured = self._graphs is not None and inputs["input_ids"].shape[1] == 1
        totals: Mapping[str, Array] = {}
        if self._is_own:
            set_beside = beside = BesideLengths(inputs, self._slots_of(inputs), self._joined, captured)
            totals = beside.totals
            inputs = {**inputs, **beside.rows, **totals}
        if self._joined:
            # Where nothing is dropped both steps are one model, and LoRA's form is the lighter one for a token a row
            same = not self._bundle.manifest.plan.sites and inputs["input_ids"].shape[1] == 1
            inputs = {**inputs, LORA_STEP: np.array(same or kind is StepKind.LORA)}
        if self._memory is not None:
            return self._device_step(kind, inputs, outputs, totals, set_beside, captured)
        binding = session.io_binding()
        for name, array in inputs.items():
            self._bind(binding.bind_input, name, array)
        for name, array in outputs.items():
            self._bind(binding.bind_output, name, array)
        kept = (*self._mapped, *inputs.values(), *outputs.values())  # keep the bound memory alive
        has_run = self._pages.has_run

        def step(run: Callable[..., None] = session.run_with_iobinding, _: Any = kept) -> None:
            set_beside()
            try:
                run(binding)
            except Exception as error:
                raise self._cannot_run(kind, error) from error
            has_run()

        return step

    def _device_step(
        self,
        kind: StepKind,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        totals: Mapping[str, Array],
        set_beside: Callable[[], None],
        captured: bool,
    ) -> Step:
        """A step on a GPU. The totals stay on the host, where attention reads them."""
        assert self._memory is not None
        session, memory = self._sessions[kind], self._memory
        arrays = {n: array for n, array in inputs.items() if isinstance(array, np.ndarray) and n not in totals}
        place = (kind, *((name, array.shape) for name, array in arrays.items()))
        hosts = HostInputs(memory, arrays, self._blocks.get(place) if captured else None)
        bound = {**inputs, **hosts.buffers}
        options = self._ort.RunOptions()
        if self._ep_device is not None:  # each run has to name one
            options.add_run_config_entry("nv_profile_index", str(self._profile(kind, inputs["input_ids"].shape[1])))
        if self._graphs is not None:
            number = -1
            if captured:
                self._blocks[place] = hosts.value
                buffers = {**bound, **{f"{name} out": buffer for name, buffer in outputs.items()}}
                key = tuple((n, b.address, b.shape) for n, b in buffers.items() if isinstance(b, DeviceBuffer))
                number = self._graphs.number((kind, key))
            options.add_run_config_entry("gpu_graph_id", str(number))
        binding = session.io_binding()
        for name, buffer in bound.items():
            self._bind(binding.bind_input, name, buffer)
        for name, buffer in outputs.items():
            self._bind(binding.bind_output, name, buffer)
        kept = (memory, *bound.values(), *outputs.values())  # keep the bound memory alive

        def step(_: Any = kept) -> None:
            set_beside()
            try:
                hosts()
                session.run_with_iobinding(binding, options)
            except Exception as error:
                raise no_device(self._provider, error) from error

        return step

    def _profile(self, kind: StepKind, tokens: int) -> int:
        """The number of the optimization profile for steps of so many tokens a row; LoRA engines have one."""
        assert self.verified_tokens is not None
        if kind is StepKind.LORA:
            return 0
        return self._profiles.index("decode" if tokens <= self.verified_tokens else "prefill")

    def _bind(self, bind: Callable[..., None], name: str, buffer: Array | DeviceBuffer) -> None:
        if isinstance(buffer, np.ndarray):
            bind(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        else:
            device = "cpu" if self._memory is None else self._memory.device_type
            bind(name, device, 0, BY_NAME[buffer.dtype].onnx, buffer.shape, buffer.address)

    def _slots_of(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Of each length, how many slots its caches have."""
        dropped = set(self._bundle.manifest.plan.dropped_attentions)
        keys = [name for name in inputs if name.startswith("past_key.")]
        found = {
            "len_dropped" if int(name.rpartition(".")[2]) in dropped else "len_kept": inputs[name].shape[2]
            for name in keys
        }
        return dict.fromkeys(TOTALS, 2**31 - 1) | found  # of no cache: what an int32 holds

    def _cannot_run(self, kind: StepKind, error: Exception) -> BundleError:
        return BundleError(
            "ONNX Runtime cannot run a step of the bundle.",
            note=f"{self._bundle.root / self._files[kind]}: {first_line(error)}",
            hint=engine_hint(error),
        )

    def replace_adapters(self, weights: Mapping[str, Array]) -> None:
        dtype = self._bundle.manifest.model.dtype
        replaced = {name: in_dtype(array, dtype) for name, array in weights.items()}
        if self._weights and self._memory is not None:
            for name, array in replaced.items():
                self._memory.replace(name, array.reshape(-1).view(np.uint8))
        elif self._weights:
            self._weights |= replaced
        elif not self._joined:
            raise constant_adapters()
        else:
            create = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
            values = {name: create(array, BY_NAME[dtype].onnx) for name, array in replaced.items()}
            self._reopen(values)

    def beside(self) -> Self:
        if self._memory is None:
            return self
        other = copy.copy(self)
        other._memory, other._blocks = self._memory.beside(), {}
        self._sharing.add(other)
        return other

    def notes(self) -> list[str]:
        if self._memory is None and self._bundle.manifest.model.dtype != "float32":
            return ["ONNX Runtime has few float16 kernels for the CPU: it computes in float32 and converts, slowly"]
        return []

    def close(self) -> None:
        self._sharing.discard(self)
        self._blocks.clear()
        if self._sharing:
            if self._memory is not None:
                self._memory.forget()
            self._sessions, self._weights = {}, {}
        self._sessions.clear()
        self._weights.clear()
        self._mapped.clear()
        self._graphs = self._memory = None
