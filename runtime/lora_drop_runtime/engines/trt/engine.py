"""TensorRT or TensorRT-RTX as the engine of a session; one module serves both, whose Python interfaces are the same.

Enters: a bundle and one of its device targets. Leaves: steps that run on the GPU. Knows no schedule and no token.

    weights     network inputs of both engines, bound to one device block that is filled once (`inputs`), or inside
                each engine (`constants`)
    buffers     one device block per name, kept over requests and only ever replaced by a larger one: a step's
                addresses stay what they were, and so do the CUDA graphs that hold them
    host        arrays that the session reads and writes are page-locked; a step copies them in and out
    scratch     one block for the contexts of both engines, which run one after the other on one stream
    contexts    one for each step that is captured, one per engine and profile for all that are not: a graph is only
                good while the context it was captured from stays as it was
    CUDA graph  per step kind and bindings (batch, and side of the state): the copies in, the engine, the copies out.
                The first run of a step is a plain one, which lets TensorRT finish what it defers to it; the second is
                captured. A step over arrays that are not page-locked, as a prompt's ids, is never captured.

Caches need not be emptied for a new request, since lengths hide what an old one left. But what they hide is multiplied
by a probability of 0, and 0 · NaN is NaN: new memory is zeroed once, and steps write finite values only.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle, WeightInput
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.engines.engine import Array, DeviceBuffer, Step, constant_adapters, fitting_slots, in_dtype
from lora_drop_runtime.errors import BundleError, NoDeviceError
from lora_drop_runtime.plan.schedule import StepKind

from .cuda_device import CudaDevice
from .io_check import EngineTensor, Ranges, engine_profiles, engine_tensors, io_problems
from .library import error_logger, library
from .plugin import load_plugin

ALIGNMENT = 256  # of every address that TensorRT takes


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def float32_from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class TrtEngine:
    """Both engines of a bundle on one GPU.

    Args:
        bundle: an opened bundle.
        target: `tensorrt` or `tensorrt-rtx`.
        trt: the target's Python module, imported when None.
        device: which this engine then owns and closes; the first visible GPU when None.

    Attributes:
        capture_note: why steps run without CUDA graphs; empty while they are captured.
        captures: CUDA graphs captured so far.

    Raises:
        NoDeviceError: no driver, no GPU, or another GPU than the engines were built for.
        BundleError: a missing Python module or plugin library, engines of another TensorRT version, engines that do
            not fit the manifest, too little memory.
    """

    chooses_tokens = True
    batched_chunks = True

    def __init__(self, bundle: Bundle, target: str, *, trt: Any = None, device: CudaDevice | None = None) -> None:
        self.target = target
        self._bundle = bundle
        entry = bundle.target(target)[1]
        assert isinstance(entry, TrtEntry)
        self._entry = entry
        self.prefill_chunk: int | None = entry.prefill_chunk
        self.capture_note = ""
        self.captures = 0
        self._engines: dict[StepKind, Any] = {}
        self._weight_names: dict[StepKind, list[str]] = {}
        self._profiles: dict[StepKind, list[Ranges]] = {}
        self._configs: dict[tuple[StepKind, bool], Any] = {}  # the second: for contexts that are captured
        self._caches: list[Any] = []
        self._contexts: dict[tuple[StepKind, int], Any] = {}
        self._steps: dict[Any, _Step] = {}
        self._made: weakref.WeakSet[_Step] = weakref.WeakSet()
        self._weights: dict[str, DeviceBuffer] = {}
        self._blocks: dict[str, tuple[int, int]] = {}  # name → address, bytes
        self._pinned: dict[str, Array] = {}
        self._trt = library(target) if trt is None else trt
        self._runtime: Any = None
        self._device = CudaDevice() if device is None else device
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        built_for = self._entry.compute_capabilities
        capability = self._device.compute_capability
        newer = self._entry.hardware_compatible and int(capability.partition(".")[0]) >= 8
        if capability not in built_for and not newer:
            raise NoDeviceError(
                "The engines were built for other GPUs than the one here.",
                note=f"This GPU has compute capability {capability}, the engines {', '.join(built_for)}.",
                hint="Export on this machine, or with --compute-capability for a GPU like this.",
            )
        self._logger = error_logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        if self._entry.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such an engine brings the runtime of its own version
        if self._entry.form == "plugin":
            load_plugin(self._trt)
        weights = self._bundle.weight_inputs(self.target)
        self._engines = {kind: self._deserialize(kind) for kind in StepKind}
        for kind, engine in self._engines.items():
            tensors = engine_tensors(engine, self._trt)
            self._check_io(kind, tensors, weights)
            self._weight_names[kind] = [tensor.name for tensor in tensors if tensor.name in weights]
            self._profiles[kind] = engine_profiles(engine, tensors)
            cache = self._runtime_cache(engine)
            for captured in (False, True):
                self._configs[kind, captured] = self._context_config(engine, cache, captured)
        self._scratch_bytes = max(ALIGNMENT, *(engine.device_memory_size_v2 for engine in self._engines.values()))
        self._scratch = self._device.malloc(self._scratch_bytes, "The engines' scratch memory")
        self._upload(weights)

    def _deserialize(self, kind: StepKind) -> Any:
        path = self._bundle.root / self._entry.engine(kind)
        self._logger.clear()
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BundleError(
                "TensorRT cannot load an engine of the bundle.",
                note=f"{path.name} was built by {self.target} {self._entry.version}, installed is "
                f"{self._trt.__version__}; it says: {self._logger.last_words()}",
                hint=f"Install {self.target}=={self._entry.version}, or export the model again here.",
            )
        return engine

    def _check_io(self, kind: StepKind, tensors: list[EngineTensor], weights: Mapping[str, WeightInput]) -> None:
        slots = {f"slots_{group}": size for group, size in self._entry.slots.items()}
        problems = io_problems(tensors, self._bundle.manifest.io(kind, self.target), weights, slots)
        if problems:
            raise BundleError(
                "An engine does not fit the bundle's manifest.",
                note=f"{self._entry.engine(kind)}: {'; '.join(problems[:3])}.",
                hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
            )

    def _runtime_cache(self, engine: Any) -> Any:
        """Of TensorRT-RTX: the kernels that it compiles for a GPU and a shape, for all contexts of an engine."""
        if not hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            return None
        cache = engine.create_runtime_config().create_runtime_cache()
        self._caches.append(cache)
        return cache

    def _context_config(self, engine: Any, cache: Any, captured: bool) -> Any:
        """What contexts are created with: all their device memory is ours."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if cache is None:
            return strategy
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Compiling in the background would leave a captured graph with the slow kernels. A prompt of a new length
        # does not wait for it
        kinds = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if captured else kinds.LAZY
        config.set_runtime_cache(cache)
        return config

    def _upload(self, weights: Mapping[str, WeightInput]) -> None:
        """All weights that are inputs into one device block, straight from the mapped files."""
        address = 0
        if weights:
            total = sum(_aligned(weight.size_bytes) for weight in weights.values())
            address = self._device.malloc(total, "The weights")
        for name, weight in weights.items():
            buffer = DeviceBuffer(name, address, weight.shape, weight.dtype)
            if buffer.nbytes != weight.size_bytes:
                raise BundleError(
                    "The table of weights is damaged.",
                    note=f"{name} is {weight.dtype} {list(weight.shape)} in {weight.size_bytes} bytes.",
                    hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
                )
            self._weights[name] = buffer
            for part in self._bundle.mapped_parts(weight):
                self._device.upload(address, part)
                address += part.nbytes
            address += _aligned(weight.size_bytes) - weight.size_bytes

    # ── the protocol ───────────────────────────────────────────────────────────────────────────────────────

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        return fitting_slots(self._entry.slots, needed)

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        array = self._pinned_array(name, shape, dtype)
        array[...] = 0
        return array

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """As the protocol has it. A larger buffer of the same name takes the place of the smaller one."""
        buffer = DeviceBuffer(name, 0, shape, dtype)
        address, size = self._blocks.get(name, (0, 0))
        if buffer.nbytes > size:
            if address:
                self._drop_steps()
                del self._blocks[name]
                self._device.free(address)
            size = _aligned(buffer.nbytes)
            try:
                address = self._device.malloc(size, f"The buffer {name}")
            except BundleError:
                self._free_buffers()  # the request is over: what it has got so far must not be in a smaller one's way
                raise
            self._blocks[name] = address, size
            self._device.zero(address, size)
        return replace(buffer, address=address)

    def read(self, buffer: DeviceBuffer) -> npt.NDArray[np.float32]:
        dtype = "uint16" if buffer.dtype == "bfloat16" else buffer.dtype
        array = self._pinned_array(f"read {buffer.name}", buffer.shape, dtype)
        self._device.copy_out(array.ctypes.data, buffer.address, buffer.nbytes)
        self._device.synchronize()
        if buffer.dtype == "bfloat16":
            return float32_from_bfloat16(array)
        return array.astype(np.float32, copy=False)

    def prepare(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Step:
        copies_in, copies_out = [], []
        shapes: dict[str, tuple[int, ...]] = {}
        addresses = {}
        hosts = []
        for name, value in (*inputs.items(), *outputs.items()):
            buffer = value
            if isinstance(value, np.ndarray):
                assert value.flags["C_CONTIGUOUS"]
                buffer = self._staging(kind, name, value)
                if name in inputs:
                    copies_in.append((buffer.address, value.ctypes.data, value.nbytes))
                else:
                    copies_out.append((value.ctypes.data, buffer.address, value.nbytes))
                hosts.append(value)
            assert buffer.address % ALIGNMENT == 0, f"{name} begins at {buffer.address}"
            addresses[name] = buffer.address
            shapes[name] = buffer.shape
        key = (
            kind,
            tuple((name, shapes[name], address) for name, address in addresses.items()),
            (*copies_in, *copies_out),
        )
        if key in self._steps:
            return self._steps[key]
        input_shapes = {name: shapes[name] for name in inputs}
        step = _Step(self, kind, input_shapes, addresses, copies_in, copies_out, hosts)
        self._made.add(step)
        if step.keeps_context:
            self._steps[key] = step
        return step

    def replace_adapters(self, matrices: Mapping[str, tuple[Array, Array]]) -> None:
        """As the protocol has it, into the same device memory: prepared steps and CUDA graphs stay good."""
        if not self._weights:
            raise constant_adapters()
        for site, pair in matrices.items():
            for part, matrix in zip("AB", pair, strict=True):
                buffer = self._weights[f"surrogate.{site}.lora_{part}"]
                assert matrix.shape == buffer.shape
                self._device.upload(buffer.address, in_dtype(matrix, buffer.dtype))

    def notes(self) -> list[str]:
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in self.resident_bytes.items())
        slow = f"steps run without CUDA graphs: {self.capture_note}"
        return [f"GPU memory: {sizes}", *([slow] if self.capture_note else [])]

    def close(self) -> None:
        """Free everything; safe to call again, and after a constructor that failed half way."""
        try:
            self._drop_steps()
            for step in self._made:  # held by someone still, as by the traceback of an error
                step.drop()
            self._contexts.clear()  # contexts before the engines they came from, engines before their runtime
            self._configs.clear()
            self._caches.clear()
            self._engines.clear()
            self._runtime = None
            self._weights.clear()
            self._blocks.clear()
            self._pinned.clear()
        finally:
            self._device.close()

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device: weights that both engines share, the plans of both, scratch, buffers of requests."""
        return {
            "weights": sum(_aligned(buffer.nbytes) for buffer in self._weights.values()),
            "plans": sum((self._bundle.root / self._entry.engine(kind)).stat().st_size for kind in StepKind),
            "scratch": self._scratch_bytes,
            "buffers": sum(size for _, size in self._blocks.values()),
        }

    # ── memory and contexts ────────────────────────────────────────────────────────────────────────────────

    def _pinned_array(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._pinned.get(name)
        if block is None or block.nbytes < size:
            if block is not None:
                self._drop_steps()
                del self._pinned[name]
                self._device.unpin(block)
            block = self._pinned[name] = self._device.pin(max(size, 1))
        return block[:size].view(dtype).reshape(shape)

    def _staging(self, kind: StepKind, name: str, array: Array) -> DeviceBuffer:
        """The device's copy of a host array, at once as large as it may become, so that its address stays."""
        largest = max((math.prod(ranges[name][1]) for ranges in self._profiles[kind] if name in ranges), default=1)
        buffer = self.allocate_resident(f"copy of {name}", (max(largest, array.size),), array.dtype.name)
        return replace(buffer, shape=array.shape)

    def _profile(self, kind: StepKind, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that takes these input shapes."""
        for index, ranges in enumerate(self._profiles[kind]):
            if all(
                low <= size <= high
                for name, bounds in ranges.items()
                for size, low, high in zip(shapes[name], *bounds, strict=True)
            ):
                return index
        taken = " or ".join("{} to {}".format(*ranges["input_ids"]) for ranges in self._profiles[kind])
        raise BundleError(
            "The engine was not built for a step of this size.",
            note=f"The {kind.value} step has input_ids {shapes['input_ids']}, its profiles take {taken}.",
            hint="Export the model again with the limits that you need.",
        )

    def _context(self, kind: StepKind, profile: int, *, shared: bool) -> Any:
        if shared and (kind, profile) in self._contexts:
            return self._contexts[kind, profile]
        context = self._engines[kind].create_execution_context(self._configs[kind, not shared])
        if context is None:
            raise self._failure("TensorRT cannot create an execution context.", kind)
        context.set_device_memory(self._scratch, self._scratch_bytes)
        if not context.set_optimization_profile_async(profile, self._device.stream):
            del context
            raise self._failure("TensorRT refuses an optimization profile.", kind)
        if shared:
            self._contexts[kind, profile] = context
        return context

    def _free_buffers(self) -> None:
        self._drop_steps()
        while self._blocks:
            _, (address, _) = self._blocks.popitem()
            self._device.free(address)

    def _drop_steps(self) -> None:
        """Forget captured graphs and their contexts, before memory that they use is freed."""
        for step in self._steps.values():
            step.drop()
        self._steps.clear()

    def _failure(self, fact: str, kind: StepKind) -> BundleError:
        return BundleError(
            fact,
            note=f"{self._entry.engine(kind)}: {self._logger.last_words()}",
            hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
        )


class _Step:
    """One step over its buffers; runs it and waits, also when interrupted, so that the host may write its arrays."""

    def __init__(
        self,
        engine: TrtEngine,
        kind: StepKind,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        copies_in: Sequence[tuple[int, int, int]],
        copies_out: Sequence[tuple[int, int, int]],
        hosts: Sequence[Array],
    ) -> None:
        self._engine, self._kind = engine, kind
        self._device = engine._device
        self._copies_in, self._copies_out = copies_in, copies_out
        self._hosts = hosts  # keeps their memory
        self._profile = engine._profile(kind, shapes)
        self._shapes = shapes
        self._addresses = {**addresses, **{name: engine._weights[name].address for name in engine._weight_names[kind]}}
        self.keeps_context = all(engine._device.is_pinned(array) for array in hosts)
        self._context: Any = None
        self._ran = False
        self._graph: Any = None

    def __call__(self) -> None:
        try:
            if self._graph is None and self._ran and not self._engine.capture_note:
                self._capture()
            if self._graph is None:
                self._bind()
                self._enqueue()
                self._ran = self.keeps_context
            else:
                self._device.launch(self._graph)
        finally:
            self._device.synchronize()

    def drop(self) -> None:
        if self._graph is not None:
            self._device.destroy(self._graph)
        self._graph = self._context = None
        self._ran = False

    def _bind(self) -> None:
        engine = self._engine
        if self._context is None:
            self._context = engine._context(self._kind, self._profile, shared=not self.keeps_context)
        for name, shape in self._shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise engine._failure(f"TensorRT refuses the shape {list(shape)} of {name}.", self._kind)
        for name, address in self._addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise engine._failure(f"TensorRT refuses the address of {name}.", self._kind)

    def _enqueue(self) -> None:
        for address, host, size in self._copies_in:
            self._device.copy_in(address, host, size)
        if not self._context.execute_async_v3(self._device.stream):
            raise self._engine._failure("TensorRT cannot run a step.", self._kind)
        for host, address, size in self._copies_out:
            self._device.copy_out(host, address, size)

    def _capture(self) -> None:
        """Without a graph steps run all the same, only slower: the reason is kept for those who measure."""
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX has it
        if capturable is not None and not capturable(self._device.stream):
            self._engine.capture_note = (
                f"{self._engine.target} says that the {self._kind.value} step cannot be captured"
            )
            return
        try:
            self._graph = self._device.capture(self._enqueue)
        except BundleError as error:
            self._engine.capture_note = f"{error.fact} {error.note}"
        else:
            self._engine.captures += 1
