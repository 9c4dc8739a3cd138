"""A bundle's steps as one compiled model: weights once in a process, whatever the number of sessions.

Enters: a bundle, and how it shall compute. Leaves: a `Compiled`, shared by all who ask for the same; it is freed with
the last of them. Knows no row and no token.
"""

from __future__ import annotations

import functools
import io
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import QUANTIZED_DTYPES, OpenVinoEntry
from lora_drop_runtime.bundle.paged_io import BLOCK
from lora_drop_runtime.engines.forked import hold_in_forks
from lora_drop_runtime.engines.huge_pages import HugePages
from lora_drop_runtime.engines.libc import forget_pages, trim_heap
from lora_drop_runtime.errors import BundleError, InputError, LoraDropError, engine_hint, first_line

from .io_check import check_io
from .package import import_openvino

Array = npt.NDArray[Any]
_CACHE_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "u8"}
_KERNELS = 500  # kept for numbers of tokens that come again: five each in int4, which take a megabyte
_TYPES_OF_MEMORY = {"f32": np.float32, "bf16": np.uint16, "u8": np.uint8}


@dataclass(frozen=True)
class Settings:
    """In what a step computes, and on how many threads; every property of OpenVINO's is set, for its defaults round.

    Attributes:
        threads: of a step.
        exact: products of quantized weights in float32, without rounding activations to 8 bits; nor caches. Of a
            mixture of experts all is computed in float32.
        wide: a model of its own, with its own copy of the weights, for calls of several tokens of a row.
    """

    threads: int
    exact: bool = False
    wide: bool = False


@dataclass
class Compiled:
    """A compiled model.

    Attributes:
        model: OpenVINO's.
        inputs, outputs: name → place.
        cache_shapes: of each cache, of a block [H, 32, entry].
        cache_type, memory_type: what caches hold, for OpenVINO and for numpy.
        held, mapped: what constants lie in; those of it that are mapped files.
        pages: for what is allocated for the weights.
        notes: what a user who measures should know.
    """

    model: Any
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    cache_shapes: Mapping[str, tuple[int, ...]]
    cache_type: Any
    memory_type: type
    held: list[Array] = field(default_factory=list)
    mapped: list[Array] = field(default_factory=list)
    pages: HugePages = field(default_factory=lambda: HugePages(0))
    notes: list[str] = field(default_factory=list)

    def has_run(self) -> None:
        """Called after a step: the first one has packed the weights."""
        if self.mapped:
            forget_pages(self.mapped)  # the kernels have copies of their own
            self.mapped = []
            trim_heap()
        self.pages.has_run()


_lock = threading.Lock()
_open: weakref.WeakValueDictionary[tuple[Any, ...], Compiled] = weakref.WeakValueDictionary()
_processes: set[int] = set()  # that have compiled: this one, and those that it is a fork of


def properties(bundle: Bundle, settings: Settings, group: int) -> dict[str, Any]:
    """What OpenVINO is told; `group` is how many activations share a scale in products of quantized weights, 0 where
    they are not rounded."""
    model = bundle.manifest.model
    dtype = "float32" if settings.exact and model.expert_bytes else model.dtype  # in halves routers choose otherwise
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        "KV_CACHE_PRECISION": _CACHE_TYPES[dtype if settings.exact else model.kv_dtype or model.dtype],
        "KEY_CACHE_QUANT_MODE": "BY_TOKEN",  # a scale for each channel would be spoiled by a roll-back
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        "INFERENCE_NUM_THREADS": settings.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "CPU_RUNTIME_CACHE_CAPACITY": _KERNELS,
    }


class _Weights:
    """Gives a graph's weights, mapped where they lie.

    Args:
        replaced: name → adapter matrix in the place of the bundle's.
    """

    def __init__(self, bundle: Bundle, replaced: Mapping[str, Array]) -> None:
        self.bundle, self.replaced = bundle, replaced
        self.mapped: dict[str, npt.NDArray[np.uint8]] = {}  # by file
        self.held: list[Array] = []
        self.error: LoraDropError | None = None  # OpenVINO makes exceptions of its own out of ours

    def get(self, reader: str, name: str, location: str, offset: int, size: int) -> Array:
        if name in self.replaced:
            return self.replaced[name]
        try:
            return self.bundle.mapped_part(self.mapped, reader, location, offset, size)
        except LoraDropError as error:
            self.error = error
            raise


@functools.cache
def _processor(ov: Any) -> Any:
    """The core that compiles, kept until the process ends: a core that has loaded the plugin for processors gives the
    thread that did so a stack for signals, and takes it back when it goes. Not rightly where two cores go in the order
    in which they came, or one in another thread: Ctrl-C then ended the process with a fault."""
    core = ov.Core()
    hold_in_forks(core)
    return core


def _error(ov: Any, model: Any, vector: Array, wanted: Array, told: Mapping[str, Any]) -> float:
    """How far from what is wanted a small model is, to the largest of it: some kernels give an empty product."""
    try:
        found = _processor(ov).compile_model(model, "CPU", dict(told))([vector])[0]
    except RuntimeError:
        return np.inf
    return float(np.abs(found - wanted).max() / np.abs(wanted).max()) if found.shape == wanted.shape else np.inf


def _rounds_rightly(ov: Any, group: int, told: Mapping[str, Any]) -> bool:
    """Whether this processor has a kernel for rounded activations that works: one that does not round is none."""
    from openvino import opset13 as op

    rng = np.random.default_rng(0)
    rows, columns = 32, 2 * group
    packed = rng.integers(0, 256, (rows, columns // group, group // 2), np.uint8)
    weight = ov.op.Constant(ov.Tensor(packed, ov.Shape([rows, columns // group, group]), ov.Type.u4))
    scales = op.constant(np.full((rows, columns // group, 1), 0.01, np.float32))
    zero = op.convert(op.constant(np.array(8, np.uint8), dtype=ov.Type.u4), "f32")
    values = op.multiply(op.subtract(op.convert(weight, "f32"), zero), scales)
    matrix = op.reshape(values, op.constant(np.array([rows, columns], np.int64)), False)
    x = op.parameter([-1, columns], np.float32)
    model = ov.Model([op.result(op.matmul(x, matrix, False, True))], [x], "probe")
    vector = rng.standard_normal((1, columns)).astype(np.float32)
    integers = np.stack([packed & 15, packed >> 4], -1).reshape(rows, columns).astype(np.float32)
    wanted = vector @ ((integers - 8) * np.float32(0.01)).T
    return 1e-5 < _error(ov, model, vector, wanted, told) < 0.05


def _computes_halves(ov: Any, told: Mapping[str, Any]) -> bool:
    """Whether this processor multiplies in bfloat16."""
    from openvino import opset13 as op

    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 64)).astype(np.float32)
    x = op.parameter([-1, 64], np.float32)
    model = ov.Model([op.result(op.matmul(x, op.constant(matrix), False, True))], [x], "probe")
    vector = rng.standard_normal((1, 64)).astype(np.float32)
    if "BF16" not in _processor(ov).get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    return _error(ov, model, vector, vector @ matrix.T, told) < 0.05


def said(error: Exception) -> str:
    """The line of an error of OpenVINO's that says what is wrong: those before it name its source files."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    of_a_node = [line for line in reasons if line.startswith("While validating")]  # what its conversion raised
    return (of_a_node or reasons or lines or [first_line(error)])[0][:300]


def _refuse_fork() -> None:
    """OpenVINO compiles with threads that a fork has none of, and would wait for them for ever."""
    if _processes - {os.getpid()}:
        raise InputError(
            "OpenVINO compiles no bundle in a process that was forked from one where it had.",
            note=f"Process {os.getpid()} was forked from {max(_processes - {os.getpid()})}.",
            hint="Start processes by multiprocessing's spawn, fork before the first session is opened, or go on with "
            "one that was open when the process was forked.",
        )
    _processes.add(os.getpid())


def _no_halves() -> BundleError:
    return BundleError(
        "This processor cannot compute in bfloat16.",
        note="OpenVINO does not offer it here, or its product of a small matrix is wrong.",
        hint="Export with --dtype fp32, or run the bundle on a processor with AVX-512 BF16 or AMX.",
    )


def _not_loaded(path: Path, error: Exception) -> BundleError:
    """What OpenVINO's plugin lacks on this processor is no fault of the bundle."""
    reason = said(error)
    if "AttentionExecutor creation fails" in reason:
        return BundleError(
            "OpenVINO has no paged attention for this processor.",
            note=f"It has one on x86-64 and on ARM with SVE; here it says: {reason}",
            hint="Use --target ort; to a bundle without it, add it with: lora-drop-export --add-target ort.",
        )
    return BundleError(
        "OpenVINO cannot load a graph of the bundle.",
        note=f"{path}: {reason}",
        hint=engine_hint(error),
    )


def _leave_cache_types_open(ov: Any, model: Any) -> None:
    """The plugin chooses the layout of its caches by what they are to hold."""
    for parameter in model.get_parameters():
        if "_cache." in parameter.get_friendly_name():
            parameter.set_element_type(ov.Type.dynamic)
            parameter.set_partial_shape(ov.PartialShape([-1] * 4))
    model.validate_nodes_and_infer_types()


def _described(ov: Any, compiled: Any, notes: list[str]) -> Compiled:
    inputs = {name: place for place, one in enumerate(compiled.inputs) for name in one.names}
    outputs = {name: place for place, one in enumerate(compiled.outputs) for name in one.names}
    shapes: dict[str, tuple[int, ...]] = {}
    cache_type = ov.Type.f32
    for name, place in inputs.items():
        if "_cache." not in name:
            continue
        port = compiled.inputs[place]
        shapes[name] = tuple(size.get_length() for size in list(port.partial_shape)[1:])
        assert shapes[name][1] == BLOCK, shapes[name]
        cache_type = port.element_type
    memory_type = _TYPES_OF_MEMORY[cache_type.to_string()]
    return Compiled(compiled, inputs, outputs, shapes, cache_type, memory_type, notes=notes)


def _compile(bundle: Bundle, target: str, settings: Settings, replaced: Mapping[str, Array]) -> Compiled:
    ov = import_openvino()
    _refuse_fork()
    from .conversion import Conversions

    entry = bundle.target(target)[1]
    assert isinstance(entry, OpenVinoEntry)
    pages = HugePages(bundle.manifest.model.weight_bytes, scattered=True)
    weights = _Weights(bundle, replaced)
    path = bundle.root / entry.steps
    conversions = Conversions(lambda *part: weights.get(entry.steps, *part), weights.held, settings.threads)
    graph = bundle.graph(entry.steps)
    reader, notes = ov.Core(), []  # of its own, for the conversions are this bundle's
    for extension in conversions.extensions():
        reader.add_extension(extension)
    model_facts = bundle.manifest.model
    try:
        model = reader.read_model(io.BytesIO(graph))
        check_io(model, conversions.dtypes, bundle.manifest, entry.steps)
        _leave_cache_types_open(ov, model)
        group = 0 if settings.exact else conversions.group or 0
        told = properties(bundle, settings, group)
        if model_facts.dtype == "bfloat16" and not _computes_halves(ov, told):
            raise _no_halves()
        if group and model_facts.weight_dtype in QUANTIZED_DTYPES and not _rounds_rightly(ov, group, told):
            notes.append("This processor has no kernels that round activations to 8 bits: products are slower")
            told["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        compiled = _processor(ov).compile_model(model, "CPU", told)
    except LoraDropError:
        raise
    except Exception as error:  # OpenVINO's are RuntimeErrors, and what a conversion raises becomes one
        if weights.error is not None:
            raise weights.error from None
        raise _not_loaded(path, error) from error
    found = _described(ov, compiled, notes)
    found.held, found.mapped, found.pages = weights.held, list(weights.mapped.values()), pages
    return found


def compiled_model(
    bundle: Bundle, target: str, settings: Settings, replaced: Mapping[str, Array] | None = None
) -> Compiled:
    """The compiled steps of a bundle; with `replaced` adapters one of its own.

    Raises:
        InputError: no OpenVINO is installed, or another version; the process is a fork of one that has compiled.
        BundleError: OpenVINO cannot load the graph, or this processor cannot compute it.
    """
    if replaced:
        return _compile(bundle, target, settings, replaced)
    entry = bundle.target(target)[1]
    assert isinstance(entry, OpenVinoEntry)
    weights = {name: one.sha256 for name, one in bundle.manifest.files.items() if name.startswith("weights/")}
    read = tuple((name, sha256, bundle.written(name)) for name, sha256 in weights.items())
    graph = bundle.manifest.files[entry.steps].sha256
    key = (str(bundle.root.resolve()), graph, read, bundle.manifest.model, settings)
    with _lock:
        found = _open.get(key)
        if found is None:
            found = _open[key] = _compile(bundle, target, settings, {})
        return found
