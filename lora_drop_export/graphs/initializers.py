"""Initializers over bytes that lie in files already: joined, or seen as another type."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import onnx_ir as ir

from lora_drop_export.graphs.match import Linear, joined_name

TABLE = ".table"  # the second name of a weight that is looked up row by row


def lie_back_to_back(values: list[ir.Value]) -> bool:
    tensors = [value.const_value for value in values]
    ends = []
    for tensor in tensors:
        if not isinstance(tensor, ir.ExternalTensor):
            return False
        ends.append((tensor.location, int(tensor.offset or 0), int(tensor.offset or 0) + int(tensor.length or 0)))
    return all(a[0] == b[0] and a[2] == b[1] for a, b in itertools.pairwise(ends))


def _initializer(graph: ir.Graph, name: str, like: Any, length: int, dtype: Any, shape: list[Any]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.ExternalTensor(like.location, like.offset, length, dtype, shape=ir.Shape(shape), name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor
        )
    return graph.initializers[name]


def join(graph: ir.Graph, values: list[ir.Value]) -> ir.Value | None:
    """One initializer over the bytes of several, along the first axis."""
    if not values:
        return None
    length = rows = 0
    for value in values:
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.shape is not None
        length += int(value.const_value.length or 0)
        rows += int(value.shape[0])  # type: ignore[arg-type]
    name = joined_name([str(value.name) for value in values])
    first = values[0]
    return _initializer(graph, name, first.const_value, length, first.dtype, [rows, *first.shape[1:]])  # type: ignore[index]


def seen_as(graph: ir.Graph, value: ir.Value, suffix: str, dtype: Any, shape: list[Any]) -> ir.Value:
    """The bytes of an initializer under a second name, seen as another type."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return _initializer(graph, f"{value.name}{suffix}", tensor, int(tensor.length or 0), dtype, shape)


def in_file_order(group: list[Linear]) -> list[Linear]:
    """Linear layers as their weights lie in one file; as they were where they lie in none, or in several."""
    tensors = [linear.weight.const_value for linear in group]
    places = [(one.location, int(one.offset or 0)) for one in tensors if isinstance(one, ir.ExternalTensor)]
    if len(places) < len(group) or len({location for location, _ in places}) > 1:
        return group
    return [linear for _, linear in sorted(zip(places, group, strict=True), key=lambda pair: pair[0])]


def joined_linear(graph: ir.Graph, group: list[Linear]) -> Linear | None:
    """One linear layer over the bytes of several that read one tensor; None where the weights do not allow it."""
    blocks = [linear.blocks for linear in group if linear.blocks is not None]
    if len(blocks) not in (0, len(group)) or len({(b.bits, b.block_size, b.symmetric) for b in blocks}) > 1:
        return None
    parts: list[list[ir.Value | None]] = [[linear.weight for linear in group], [linear.bias for linear in group]]
    parts += [[b.scales for b in blocks], [b.zero_points for b in blocks if not b.symmetric]]
    named = [[value for value in part if value is not None] for part in parts]
    if not all(lie_back_to_back(part) for part in named):
        return None
    weight, bias, scales, zero_points = (join(graph, part) for part in named)
    assert weight is not None
    shape = (sum(linear.shape[0] for linear in group), group[0].shape[1])
    whole = dataclasses.replace(group[0], weight=weight, bias=bias, shape=shape)
    if scales is None:
        return whole
    new = dataclasses.replace(blocks[0], scales=scales, zero_points=zero_points or blocks[0].zero_points)
    return dataclasses.replace(whole, blocks=new)
