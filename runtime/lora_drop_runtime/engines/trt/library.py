"""TensorRT's Python module, and what an engine says of itself.

Enters: a target's name, the module, an engine. Leaves: the module, its errors in words, tables of tensors and profiles.
Knows no memory, no session and no step.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.bundle import WeightInput
from lora_drop_runtime.bundle.graph_io import GraphIO
from lora_drop_runtime.errors import BundleError, first_line

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PLUGIN_VARIABLE = "LORA_DROP_PLUGIN_LIB"
PLUGIN_HINT = f"Build it (cmake -S plugins -B plugins/build && cmake --build plugins/build) or set {PLUGIN_VARIABLE}."
KEPT_LINES = 50  # of each kind, for messages
_loaded_plugins: set[tuple[Any, Path]] = set()
Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # input → its smallest and its largest shape
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class EngineTensor:
    """An input or output as the engine has it; -1 is a size that each run sets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool
    on_device: bool = True


def io_problems(
    tensors: Sequence[EngineTensor], io: GraphIO, weights: Mapping[str, WeightInput], slots: Mapping[str, int]
) -> list[str]:
    """In what the inputs and outputs of an engine differ from the table of its step graph and from the weights' table.

    Args:
        tensors: of the engine, or of the network that it is built from.
        weights: of both step graphs; an engine has those that its graph uses.
        slots: the sizes `slots_kept` and `slots_dropped` where they are static.
    """
    expected = {
        spec.name: (spec.dtype, tuple(slots.get(d, -1) if isinstance(d, str) else d for d in spec.shape), is_input)
        for specs, is_input in ((io.inputs, True), (io.outputs, False))
        for spec in specs
    }
    table = set(expected)
    expected |= {name: (weight.dtype, weight.shape, True) for name, weight in weights.items()}
    found = {tensor.name: (tensor.dtype, tensor.shape, tensor.is_input) for tensor in tensors}
    problems = [f"{name} is missing" for name in sorted(table - set(found))]
    problems += [f"{name} is in no table" for name in sorted(set(found) - set(expected))]
    problems += [f"{tensor.name} is read on the host" for tensor in tensors if not tensor.on_device]
    for name in sorted(set(found) & set(expected)):
        # A size that all profiles fix may be a number in the engine
        expected[name] = (expected[name][0], _fixed(expected[name][1], found[name][1]), expected[name][2])
        for what, has, wants in zip(("dtype", "shape", "is_input"), found[name], expected[name], strict=True):
            if has != wants:
                problems.append(f"{name} has {what} {has} where {wants} is bound")
    return problems


def _fixed(wanted: tuple[int, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    if len(wanted) != len(found):
        return wanted
    return tuple(has if want == -1 else want for want, has in zip(wanted, found, strict=True))


def library(target: str) -> Any:
    """The Python module of a target. Raises BundleError when it is not installed."""
    name = MODULES[target]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BundleError(
            "The library of the target is not installed.",
            note=f"Target {target!r} needs the Python module {name}: {first_line(error)}.",
            hint=f"pip install {target} cuda-bindings"
            + (", on a machine with an NVIDIA GPU; tensorrt-rtx builds without one." if target == "tensorrt" else "."),
        ) from None


@functools.cache
def error_logger(trt: Any) -> Any:
    """The one logger of a library, which keeps the first that it is given and ignores all later ones."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, for the message of ours that follows them, and apart from them the warnings."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.lines: deque[str] = deque(maxlen=KEPT_LINES)
            self.warnings: deque[str] = deque(maxlen=KEPT_LINES)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                is_error = severity <= trt.ILogger.Severity.ERROR
                (self.lines if is_error else self.warnings).append(" ".join(message.split())[:600])

        def last_words(self) -> str:
            return " | ".join(list(self.lines)[-2:]) or "nothing"

    return Logger()


def engine_tensors(engine: Any, trt: Any) -> list[EngineTensor]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [
        EngineTensor(
            name,
            _DTYPES.get(engine.get_tensor_dtype(name).name, "unknown"),
            tuple(engine.get_tensor_shape(name)),
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            engine.get_tensor_location(name) == trt.TensorLocation.DEVICE,
        )
        for name in names
    ]


def engine_profiles(engine: Any, tensors: list[EngineTensor]) -> list[Ranges]:
    """Of each profile the smallest and the largest shape of every input that has a dynamic one."""
    dynamic = [tensor.name for tensor in tensors if tensor.is_input and -1 in tensor.shape]
    made = []
    for index in range(engine.num_optimization_profiles):
        shapes = {name: engine.get_tensor_profile_shape(name, index) for name in dynamic}
        made.append({name: (tuple(low), tuple(high)) for name, (low, _, high) in shapes.items()})
    return made


def plugin_path() -> Path:
    """Where the attention plugin's library is.

    Raises:
        BundleError: it is not there.
    """
    given = os.environ.get(PLUGIN_VARIABLE)
    built = Path(__file__).resolve().parents[4] / "plugins" / "build" / "liblora_drop_plugin.so"
    path = Path(given) if given else built
    if not path.is_file():
        raise BundleError("The attention plugin is needed.", note=f"{path} is not there.", hint=PLUGIN_HINT)
    return path


def load_plugin(trt: Any) -> None:
    """Load the attention plugin's library into the registry that all builders and runtimes of the process see.

    It stays there: an engine may outlive whoever loaded it, and a library cannot be loaded twice.

    Raises:
        BundleError: it is not there, or cannot be loaded.
    """
    path = plugin_path()
    if (trt, path) in _loaded_plugins:
        return
    logger = error_logger(trt)
    try:
        handle = trt.get_plugin_registry().load_library(str(path))
    except Exception as error:  # what the bindings raise differs from version to version
        logger.lines.append(first_line(error))
        handle = None
    if handle is None:
        raise BundleError(
            "The attention plugin cannot be loaded.", note=f"{path}: {logger.last_words()}", hint=PLUGIN_HINT
        )
    _loaded_plugins.add((trt, path))
