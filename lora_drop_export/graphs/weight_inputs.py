"""Weights that are inputs of a graph, and where their bytes lie."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from lora_drop_runtime.bundle.bundle import WeightInput


def stored_input(members: Sequence[ir.Value]) -> WeightInput:
    """Initializers with their bytes in files, along the first axis, as one input."""
    tensors = [member.const_value for member in members]
    places = []
    for tensor in tensors:
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.offset is not None
        assert tensor.length is not None
        places.append((str(tensor.location), int(tensor.offset), int(tensor.length)))
    first = tensors[0]
    assert first is not None
    shape = tuple(int(dim) for dim in first.shape)  # type: ignore[arg-type]
    if shape:  # one number has no axis, and nothing is joined with it
        shape = (sum(int(tensor.shape[0]) for tensor in tensors), *shape[1:])  # type: ignore[union-attr, arg-type, misc]
    return WeightInput(first.dtype.numpy().name, shape, tuple(places))


def stored_weights_as_inputs(graph: ir.Graph, but: tuple[str, ...] = ()) -> dict[str, WeightInput]:
    """Make inputs of all initializers with their bytes in files; one of each that have the same bytes, type and shape.

    Args:
        but: those stay whose names begin so.

    Returns: where their bytes lie, by name.
    """
    table: dict[str, WeightInput] = {}
    same: dict[WeightInput, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if not isinstance(value.const_value, ir.ExternalTensor) or name.startswith(but):
            continue
        del graph.initializers[name]
        if not value.uses():
            continue
        weight = stored_input([value])
        if weight in same:
            value.replace_all_uses_with(same[weight])
            continue
        same[weight] = value
        table[name] = weight
        value.const_value = None
        graph.inputs.append(value)
    return table


def write_table(path: Path, table: Mapping[str, WeightInput]) -> None:
    """As `Bundle.weight_inputs` reads it."""
    path.write_text(
        json.dumps({name: dataclasses.asdict(weight) for name, weight in table.items()}) + "\n", encoding="utf-8"
    )
