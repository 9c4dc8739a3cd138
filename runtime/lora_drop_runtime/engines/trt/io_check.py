"""An engine's inputs and outputs against the table of its step graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.bundle.bundle import WeightInput
from lora_drop_runtime.bundle.graph_io import GraphIO
from lora_drop_runtime.dtypes import BY_TENSORRT

Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # input → its smallest and its largest shape


@dataclass(frozen=True)
class EngineTensor:
    """An input or output as the engine has it; -1 is a size that each run sets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool
    on_device: bool = True


def _fixed(wanted: tuple[int, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    if len(wanted) != len(found):
        return wanted
    return tuple(has if want == -1 else want for want, has in zip(wanted, found, strict=True))


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


def _dtype_name(dtype: Any) -> str:
    """Of a tensorrt.DataType."""
    return BY_TENSORRT[dtype.name].name if dtype.name in BY_TENSORRT else "unknown"


def engine_tensors(engine: Any, trt: Any) -> list[EngineTensor]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [
        EngineTensor(
            name,
            _dtype_name(engine.get_tensor_dtype(name)),
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
