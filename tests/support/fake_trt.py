"""TensorRT on ONNX Runtime: an «engine» is the ONNX graph that the real builder gets, run at the bound addresses.

What it stands for: the Python interface that engines/trt uses; names, dtypes, shapes and profiles of a real engine;
shapes are checked against the profile, addresses for their alignment and against live device memory, an in-place output
against its input; the scratch block is overwritten by every run; a run reads and writes device memory when the stream
gets to it. What it enforces of TensorRT's rules for CUDA graphs: a context runs once with its shapes before it is
captured, and a graph is launched only while its context is as it was.

What it cannot show: TensorRT's own kernels and their aliasing, whether a driver captures them, dtypes other than
float32, time and memory.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, TrtEntry
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.dtypes import BY_TENSORRT
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.engines.trt.engine import TrtEngine
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind
from numpy.typing import NDArray

from lora_drop_export.targets.trt.lower import trt_from_neutral
from lora_drop_export.targets.trt.profiles import lora_profiles, refresh_profiles
from lora_drop_export.targets.trt.target import static_slots
from lora_drop_export.targets.trt.weight_inputs import check_one_copy
from tests.support.bundles import Family, make_bundle
from tests.support.fake_cuda import FakeCuda
from tests.support.kernel_build import chooser_on_host

VERSION = "1.7.1.116"
CAPABILITIES = ("8.6", "8.9", "12.0")
SCRATCH = {StepKind.REFRESH: 5000, StepKind.LORA: 3000}
TARGET = "tensorrt-rtx"
PLUGIN_LIBRARY = b"a plugin library"  # a file that the registry loads


def make_device_bundle(
    made_from: str | Family,
    root: Path,
    *,
    chunk: int = 4,
    sharing: str = "inputs",
    form: str = "native",
    **options: Any,
) -> Bundle:
    """A bundle with the targets ort and tensorrt-rtx, the engines of which only FakeTrt can load."""
    bundle = make_bundle(made_from, root, **{"max_seq_len": 64, "max_prompt_len": 40, "max_batch": 4} | options)
    plan, limits = bundle.manifest.plan, bundle.manifest.limits
    slots = static_slots(plan, limits)
    profiles = {
        StepKind.REFRESH: refresh_profiles(plan.k + 1, limits.max_batch, chunk),
        StepKind.LORA: lora_profiles(limits.max_batch),
    }
    (root / TARGET).mkdir()
    tables = []
    refresh = None
    graphs, engines = ({kind.value: f"{TARGET}/{kind.value}.{end}" for kind in StepKind} for end in ("onnx", "engine"))
    for kind in (StepKind.REFRESH, StepKind.LORA):
        neutral = onnx.load(root / f"{kind.value}.onnx", load_external_data=False)
        lowered = trt_from_neutral(neutral, slots, weight_sharing=sharing, refresh=refresh)
        refresh = refresh or lowered
        tables.append(lowered.weights)
        (root / graphs[kind.value]).write_bytes(lowered.proto.SerializeToString())
        plan_text = {
            "version": VERSION,
            "root": str(root),
            "graph": graphs[kind.value],
            "profiles": list(profiles[kind].values()),
            "scratch": SCRATCH[kind],
        }
        (root / engines[kind.value]).write_text(json.dumps(plan_text))
    if sharing == "inputs":
        table = {name: dataclasses.asdict(weight) for name, weight in check_one_copy(tables).items()}
        (root / TARGET / "weights.json").write_text(json.dumps(table))
    entry = TrtEntry(
        form="native",
        weight_sharing=sharing,
        slots=slots,
        prefill_chunk=chunk,
        refresh_profiles={n: (p["sequence"][0], p["sequence"][2]) for n, p in profiles[StepKind.REFRESH].items()},
        graphs=graphs,
        engine_bytes={kind: (root / file).stat().st_size for kind, file in engines.items()},
        version=VERSION,
        compute_capabilities=CAPABILITIES,
        hardware_compatible=False,
        version_compatible=False,
        **engines,
        weights=f"{TARGET}/weights.json" if sharing == "inputs" else None,
        weight_bytes=0,
    )
    return change_manifest(bundle, entry)


def change_manifest(bundle: Bundle, entry: TrtEntry) -> Bundle:
    """The bundle with this entry for tensorrt-rtx."""
    files = {f.relative_to(bundle.root).as_posix(): record_file(f) for f in (bundle.root / TARGET).iterdir()}
    manifest = dataclasses.replace(
        bundle.manifest,
        targets={**bundle.manifest.targets, TARGET: entry},
        files={**bundle.manifest.files, **files},
    )
    (bundle.root / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle(bundle.root, manifest)


def open_device_session(
    bundle: Bundle,
    k: int | None = None,
    *,
    policy: str | None = None,
    cuda: FakeCuda | None = None,
    trt: FakeTrt | None = None,
    cycles: bool = False,
) -> tuple[Session, TrtEngine, FakeCuda]:
    """With `cycles` on a machine that has NVRTC: tokens are chosen on the device."""
    cuda = cuda or FakeCuda(kernel=chooser_on_host() if cycles else None)
    engine = TrtEngine(bundle, TARGET, trt=trt or FakeTrt(cuda), device=CudaDevice(cuda))
    schedule = PeriodicSchedule(bundle.manifest.plan.k if k is None else k)
    return Session(bundle, engine, schedule, policy), engine, cuda


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT32, INT8, FP8 = range(7)


DATA_TYPES = {BY_TENSORRT[each.name].onnx: each for each in DataType}  # by ONNX's number


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError


class FakeTrt:
    """The module.

    Args:
        cuda: whose memory engines work on.
        version: of this TensorRT; it loads engines of its own version only.
        rtx: TensorRT-RTX, which has a runtime configuration, or TensorRT.
        capturable: what contexts say of themselves.
        refuses_profiles: whether contexts take no optimization profile.
    """

    DataType = DataType
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger

    @property
    def engine_class(self) -> Any:
        return FakeCudaEngine

    def __init__(self, cuda: FakeCuda, *, version: str = VERSION, rtx: bool = True, capturable: bool = True) -> None:
        self.cuda, self.__version__, self.capturable = cuda, version, capturable
        self.contexts_made = 0
        self.refuses_profiles = False
        self.runs: list[StepKind] = []
        self.libraries: list[str] = []
        self.logger: ILogger | None = None
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def Runtime(self, logger: ILogger) -> FakeRuntime:
        self.logger = self.logger or logger  # the first stays
        return FakeRuntime(self, logger)

    def get_plugin_registry(self) -> FakePluginRegistry:
        """Of the process; loading a library a second time gives None, as the real one does."""
        return FakePluginRegistry(self)


class FakeRuntime:
    engine_host_code_allowed = False

    def __init__(self, trt: FakeTrt, logger: ILogger) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeCudaEngine | None:
        plan = json.loads(serialized_engine)
        if plan["version"] != self._trt.__version__:
            text = f"The engine plan file is not compatible: expecting {self._trt.__version__} got {plan['version']}"
            self._logger.log(ILogger.Severity.ERROR, text)
            return None
        if plan.get("host_code") and not self.engine_host_code_allowed:
            self._logger.log(ILogger.Severity.ERROR, "The engine contains host code, which is not allowed")
            return None
        return self._trt.engine_class(self._trt, self._logger, plan)


class FakePluginRegistry:
    def __init__(self, trt: FakeTrt) -> None:
        self._trt = trt

    def load_library(self, plugin_path: str) -> str | None:
        if Path(plugin_path).read_bytes() != PLUGIN_LIBRARY:
            assert self._trt.logger is not None
            self._trt.logger.log(ILogger.Severity.ERROR, "Unable to load library: invalid ELF header")
            return None
        if plugin_path in self._trt.libraries:
            return None
        self._trt.libraries.append(plugin_path)
        return plugin_path


@dataclasses.dataclass
class FakeTensor:
    dtype: DataType
    shape: tuple[int | str, ...]
    mode: TensorIOMode

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype({DataType.FLOAT: "float32", DataType.INT64: "int64"}[self.dtype])


class FakeRuntimeCache:
    """Holds one kernel for each context that was made with it."""

    def __init__(self) -> None:
        self.kernels = b""

    def serialize(self) -> bytes:
        return b"compiled:" + self.kernels

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"compiled:"):
            return False
        self.kernels = blob.removeprefix(b"compiled:")
        return True


class FakeRuntimeConfig:
    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


@functools.lru_cache(32)
def _ort_session(graph: bytes, root: str) -> Any:
    """Stateless, so engines of the same graph share it."""
    import onnxruntime  # here: torch_trt.py has engines of its own, and runs where ONNX Runtime is not installed

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # each TensorScatter would warn that it copies
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", root)
    return onnxruntime.InferenceSession(graph, options)


class FakeCudaEngine:
    """Made from the ONNX graph whose path the plan holds."""

    def __init__(self, trt: FakeTrt, logger: ILogger, plan: Mapping[str, Any]) -> None:
        self.trt, self.logger = trt, logger
        self.kind = StepKind(Path(plan["graph"]).stem)
        self.profiles: list[dict[str, list[int]]] = plan["profiles"]
        self.num_optimization_profiles = len(self.profiles)
        self.device_memory_size_v2 = plan["scratch"]
        serialized = Path(plan["root"], plan["graph"]).read_bytes()
        graph = onnx.load_model_from_string(serialized).graph
        self.tensors = {
            value.name: FakeTensor(
                DATA_TYPES[value.type.tensor_type.elem_type],
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
                mode,
            )
            for values, mode in ((graph.input, TensorIOMode.INPUT), (graph.output, TensorIOMode.OUTPUT))
            for value in values
        }
        self.session = self.make_session(serialized, plan["root"])

    def make_session(self, serialized: bytes, root: str) -> Any:
        return _ort_session(serialized, root)

    def make_context(self) -> Any:
        return FakeExecutionContext(self)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.tensors[name].shape)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name].mode

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        ranges = self.profiles[profile_index]
        shape = self.tensors[name].shape
        return [tuple(ranges[d][which] if isinstance(d, str) else d for d in shape) for which in range(3)]

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(
        self, config: FakeRuntimeConfig | ExecutionContextAllocationStrategy
    ) -> FakeExecutionContext:
        rtx = hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")
        assert isinstance(config, FakeRuntimeConfig) == rtx
        if isinstance(config, FakeRuntimeConfig):
            assert config.cache is not None
        strategy = config.strategy if isinstance(config, FakeRuntimeConfig) else config
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.trt.contexts_made += 1
        context = self.make_context()
        if isinstance(config, FakeRuntimeConfig):
            config.cache.kernels = config.cache.kernels or b"k"
            context.compiles_first = config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        return context


class FakeExecutionContext:
    checks_aliases = True
    compiles_first = True

    def __init__(self, engine: FakeCudaEngine) -> None:
        self.engine, self.trt, self.cuda = engine, engine.trt, engine.trt.cuda
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.changes = 0  # how often anything was set
        self.ran_after: int | None = None  # with which count of changes the last plain run was
        self.cuda.users.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self.memory = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in self.cuda.streams
        self.profile = profile_index
        self.changes += 1
        if self.trt.refuses_profiles or profile_index >= self.engine.num_optimization_profiles:
            raise RuntimeError("the profile cannot be set")  # as the bindings do
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        tensor = self.engine.tensors[name]
        assert tensor.mode is TensorIOMode.INPUT
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"{name}: {shape} is outside {low} to {high}")
        self.shapes[name] = tuple(shape)
        self.changes += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors or memory % 256:
            return self._refuse(f"{name} at {memory:#x}")
        self.addresses[name] = memory
        self.changes += 1
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle in self.cuda.streams
        assert self.memory is not None
        missing = [name for name in self.engine.tensors if name not in self.addresses]
        if missing:
            return self._refuse(f"no address for {missing[0]}")
        for name in self.engine.tensors:
            past = name.replace("present_", "past_")
            in_place = name.startswith(("present_key.", "present_value."))
            if self.checks_aliases and in_place and self.addresses[name] != self.addresses[past]:
                return self._refuse(f"{name} must be bound to the address of {past}")
        changes = self.changes
        if self.cuda.captured is None:
            self.ran_after = changes
        elif not self.compiles_first:
            return self._refuse("kernels may still be compiled in the background")
        elif self.ran_after != changes:
            return self._refuse("the context has deferred updates and cannot be captured")

        def run(shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
            assert self.changes == changes, "the context was changed between capture (or enqueue) and run"
            self.trt.runs.append(self.engine.kind)
            self._run(shapes, addresses)

        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.cuda.enqueue(lambda: run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        assert self.memory is not None
        self.cuda.view(*self.memory)[...] = 0xA5  # whoever else uses it at the same time finds this
        sizes: dict[str, int] = {}
        feeds = {}
        for name, tensor in self.engine.tensors.items():
            if tensor.mode is TensorIOMode.INPUT:
                static = tuple(dim for dim in tensor.shape if isinstance(dim, int))
                shape = shapes.get(name, static)
                for dim, size in zip(tensor.shape, shape, strict=True):
                    assert sizes.setdefault(dim, size) == size if isinstance(dim, str) else dim == size, name
                feeds[name] = self._array(addresses[name], shape, tensor)
        outputs = [name for name, tensor in self.engine.tensors.items() if tensor.mode is TensorIOMode.OUTPUT]
        for name, values in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
            self._array(addresses[name], values.shape, self.engine.tensors[name])[...] = values

    def _array(self, address: int, shape: tuple[int, ...], tensor: FakeTensor) -> NDArray[Any]:
        size = math.prod(shape) * tensor.numpy.itemsize
        return self.cuda.view(address, size).view(tensor.numpy).reshape(shape)

    def _refuse(self, text: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, text)
        return False
