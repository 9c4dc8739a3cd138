"""The engines of both steps as TensorRT has them: loaded, checked against the manifest, and the contexts that run them.

Enters: a bundle, its device target and a GPU. Leaves: contexts for a profile, what an engine's inputs may measure.
Knows no buffer of a request and no CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle, WeightInput
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.command_line import held_signals
from lora_drop_runtime.errors import BundleError, NoDeviceError, first_line
from lora_drop_runtime.plan.schedule import StepKind

from .cuda_device import ALIGNMENT, CudaDevice
from .io_check import EngineTensor, Ranges, engine_profiles, engine_tensors, io_problems
from .kernel_cache import KernelCache
from .library import error_logger
from .plugin import load_plugin


class Plans:
    """Both deserialized engines of a target, after `load`.

    Args:
        bundle: an opened bundle.
        target: `tensorrt` or `tensorrt-rtx`.
        trt: the target's Python module.
        device: where the engines run; the scratch memory is taken from it and freed with it.

    Attributes:
        weight_names: the weights that each engine takes as inputs.
        scratch, scratch_bytes: the block that all contexts share; they run one after the other on one stream.
    """

    def __init__(self, bundle: Bundle, target: str, trt: Any, device: CudaDevice) -> None:
        self._bundle = bundle
        self.target = target
        entry = bundle.target(target)[1]
        assert isinstance(entry, TrtEntry)
        self._entry = entry
        self._trt = trt
        self._device = device
        self._logger = error_logger(trt)
        self._runtime: Any = None
        self._engines: dict[StepKind, Any] = {}
        self._profiles: dict[StepKind, list[Ranges]] = {}
        self._configs: dict[tuple[StepKind, bool], Any] = {}  # the second: for contexts that are captured
        self._caches: list[KernelCache] = []
        self._contexts: dict[tuple[StepKind, int], Any] = {}
        self.weight_names: dict[StepKind, list[str]] = {}
        self.scratch, self.scratch_bytes = 0, 0

    def load(self, weights: Mapping[str, WeightInput]) -> None:
        """Deserialize and check both engines. After an error `close` frees what there is.

        Raises:
            NoDeviceError: another GPU than the engines were built for, or too little memory.
            BundleError: no plugin library, engines of another version, or that do not fit manifest and weights.
        """
        self._check_gpu()
        self._runtime = self._trt.Runtime(self._logger)
        if self._entry.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such an engine brings the runtime of its own version
        if self._entry.form == "plugin":
            load_plugin(self._trt)
        self._engines = {kind: self._deserialize(kind) for kind in StepKind}
        for kind, engine in self._engines.items():
            tensors = engine_tensors(engine, self._trt)
            self._check_io(kind, tensors, weights)
            self.weight_names[kind] = [tensor.name for tensor in tensors if tensor.name in weights]
            self._profiles[kind] = engine_profiles(engine, tensors)
            cache = self._runtime_cache(kind, engine)
            for captured in (False, True):
                self._configs[kind, captured] = self._context_config(engine, cache, captured)
        self.scratch_bytes = max(ALIGNMENT, *(engine.device_memory_size_v2 for engine in self._engines.values()))
        self.scratch = self._device.malloc(self.scratch_bytes, "The engines' scratch memory")

    def close(self) -> None:
        """Contexts before the engines they came from, engines before their runtime; safe to call again."""
        for cache in self._caches:
            cache.save()
        self._contexts.clear()
        self._configs.clear()
        self._caches.clear()
        self._engines.clear()
        self._runtime = None

    @property
    def size_bytes(self) -> int:
        """Of both plans; on the device they take about as much."""
        return sum((self._bundle.root / self._entry.engine(kind)).stat().st_size for kind in StepKind)

    # ── opening ────────────────────────────────────────────────────────────────────────────────────────────

    def _check_gpu(self) -> None:
        built_for = self._entry.compute_capabilities
        capability = self._device.compute_capability
        newer = self._entry.hardware_compatible and int(capability.partition(".")[0]) >= 8
        if capability not in built_for and not newer:
            raise NoDeviceError(
                "The engines were built for other GPUs than the one here.",
                note=f"This GPU has compute capability {capability}, the engines {', '.join(built_for)}.",
                hint="Export on this machine, or with --compute-capability for a GPU like this.",
            )

    def _deserialize(self, kind: StepKind) -> Any:
        path = self._bundle.root / self._entry.engine(kind)
        self._logger.clear()
        plan = path.read_bytes()
        with held_signals():  # the logger is called, in which what a handler raises would be lost
            engine = self._runtime.deserialize_cuda_engine(plan)
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

    def _runtime_cache(self, kind: StepKind, engine: Any) -> Any:
        """Of TensorRT-RTX: the kernels that it compiles for a GPU and a shape, for all contexts of an engine."""
        if not hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            return None
        record = self._bundle.manifest.files[self._entry.engine(kind)]
        key = f"{record.sha256[:32]}-{self._trt.__version__}-{self._device.compute_capability}"
        self._caches.append(KernelCache(engine.create_runtime_config().create_runtime_cache(), key))
        return self._caches[-1].cache

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

    # ── running ────────────────────────────────────────────────────────────────────────────────────────────

    def most_values(self, name: str) -> int:
        """The largest that an input of a dynamic shape may become, over all profiles of both engines; 1 for others."""
        profiles = (ranges for kind in StepKind for ranges in self._profiles[kind])
        return max((math.prod(ranges[name][1]) for ranges in profiles if name in ranges), default=1)

    def profile(self, kind: StepKind, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile that takes these input shapes. Raises BundleError where none does."""
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

    def context(self, kind: StepKind, profile: int, *, shared: bool) -> Any:
        """The context that all uncaptured steps of a profile share, or a new one that is to be captured."""
        if shared and (kind, profile) in self._contexts:
            return self._contexts[kind, profile]
        with held_signals():
            context = self._engines[kind].create_execution_context(self._configs[kind, not shared])
        if context is None:
            raise self.failure("TensorRT cannot create an execution context.", kind)
        context.set_device_memory(self.scratch, self.scratch_bytes)
        try:
            taken = context.set_optimization_profile_async(profile, self._device.stream)
        except Exception as error:  # the bindings raise where TensorRT itself says false
            self._logger.lines.append(first_line(error))
            taken = False
        if not taken:
            del context
            raise self.failure("TensorRT refuses an optimization profile.", kind)
        if shared:
            self._contexts[kind, profile] = context
        return context

    def bind(
        self, context: Any, kind: StepKind, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
    ) -> None:
        """Tell a context its inputs' shapes and where its tensors lie."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self.failure(f"TensorRT refuses the shape {list(shape)} of {name}.", kind)
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self.failure(f"TensorRT refuses the address of {name}.", kind)

    def may_be_captured(self, context: Any) -> bool:
        """What TensorRT-RTX says of a context that has run; TensorRT says nothing."""
        capturable = getattr(context, "is_stream_capturable", None)
        return capturable is None or bool(capturable(self._device.stream))

    def failure(self, fact: str, kind: StepKind) -> BundleError:
        """An error with TensorRT's own last words."""
        return BundleError(
            fact,
            note=f"{self._entry.engine(kind)}: {self._logger.last_words()}",
            hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
        )
