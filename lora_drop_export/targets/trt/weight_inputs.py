"""Weights as inputs of both engines, fused where that spares a product; one copy on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from lora_drop_runtime.bundle.bundle import WeightInput
from lora_drop_runtime.dtypes import BY_NAME

from lora_drop_export.graphs.match import Linear, joined_name, linear_groups, match_linear
from lora_drop_export.graphs.nodes import Ops
from lora_drop_export.graphs.weight_inputs import stored_input, stored_weights_as_inputs

from .packed_weights import product, zero_points_of


@dataclass(frozen=True)
class Fusion:
    """Linear layers that read one tensor and become one.

    Attributes:
        weight: the new one's name.
        bias, scales, zero_points: of the new one, where the layers have some.
        block: weights that share a scale; 0 where weights are not quantized.
        members: (weight, output width), in order.
        parts: new tensor → those that it is made of, in order.
    """

    weight: str
    bias: str | None
    scales: str | None
    zero_points: str | None
    block: int
    members: tuple[tuple[str, int], ...]
    parts: tuple[tuple[str, tuple[str, ...]], ...]


def linear_layers(graph: ir.Graph) -> dict[str, Linear]:
    """All linear layers by the name of their weight."""
    found = (match_linear(node) for node in graph if node.op_type == "MatMul")
    return {str(linear.weight.name): linear for linear in found if linear is not None}


def _fusion(group: Sequence[Linear]) -> Fusion | None:
    """None where some are quantized otherwise than the others."""
    blocks = [linear.blocks for linear in group if linear.blocks is not None]
    if len(blocks) not in (0, len(group)) or len({(b.bits, b.block_size, b.symmetric) for b in blocks}) > 1:
        return None
    weights = [str(linear.weight.name) for linear in group]
    name = joined_name(weights)
    points = [value for value in map(zero_points_of, blocks) if value is not None]
    biases = [str(linear.bias.name) for linear in group if linear.bias is not None]
    parts = {
        name: weights,
        joined_name(biases) if biases else "": biases,
        f"{name}.scales": [str(b.scales.name) for b in blocks],
        f"{name}.zero_points": [str(value.name) for value in points],
    }
    return Fusion(
        name,
        joined_name(biases) if biases else None,
        f"{name}.scales" if blocks else None,
        f"{name}.zero_points" if points else None,
        blocks[0].block_size if blocks else 0,
        tuple(zip(weights, (linear.shape[0] for linear in group), strict=True)),
        tuple((new, tuple(members)) for new, members in parts.items() if members),
    )


def planned_fusions(graph: ir.Graph) -> tuple[Fusion, ...]:
    # Case 3
    made = map(_fusion, linear_groups(graph))
    return tuple(fusion for fusion in made if fusion is not None)


def fused_weights(graph: ir.Graph, fusions: Iterable[Fusion]) -> dict[str, WeightInput]:
    parts = (part for fusion in fusions for part in fusion.parts)
    return {new: stored_input([graph.initializers[member] for member in members]) for new, members in parts}


def fuse(graph: ir.Graph, fusion: Fusion, linears: Mapping[str, Linear], table: Mapping[str, WeightInput]) -> None:
    """One product and a Split for the members that the graph has.

    The LoRA step lacks some where a layer's attention is dead; it computes them all the same, since half of a fused
    weight would be another input, and another copy.
    """
    present = {weight: linears[weight] for weight, _ in fusion.members if weight in linears}
    if not present:
        return
    first = next(iter(present.values()))

    def weight_input(name: str) -> ir.Value:
        dtype = ir.DataType(BY_NAME[table[name].dtype].onnx)
        value = ir.Value(name=name, shape=ir.Shape(table[name].shape), type=ir.TensorType(dtype))
        graph.inputs.append(value)
        return value

    ops = Ops()
    matrix = weight_input(fusion.weight)
    if fusion.scales is None:
        whole = ops("MatMul", first.x, ops("Transpose", matrix, perm=[1, 0]))  # [B, S, sum of out]
    else:
        points = None if fusion.zero_points is None else weight_input(fusion.zero_points)
        whole = product(ops, first.x, matrix, weight_input(fusion.scales), points, fusion.block)
    if fusion.bias is not None:
        whole = ops("Add", whole, weight_input(fusion.bias))
    widths = [width for _, width in fusion.members]
    split = ir.node("Split", [whole, ops.ints(widths)], {"axis": -1}, num_outputs=len(widths))
    graph.insert_before(next(use.node for use in first.x.uses() if use.node.op_type == "MatMul"), [*ops.nodes, split])
    for (weight, width), new in zip(fusion.members, split.outputs, strict=True):
        new.type = first.last.outputs[0].type
        new.shape = ir.Shape([*first.last.outputs[0].shape[:2], width])  # type: ignore[index]
        if weight in present:
            present[weight].last.outputs[0].replace_all_uses_with(new)


def weights_as_inputs(graph: ir.Graph, fused: Mapping[str, WeightInput]) -> dict[str, WeightInput]:
    # Case 4
    weights = {str(value.name): fused[str(value.name)] for value in graph.inputs if value.name in fused}
    return weights | stored_weights_as_inputs(graph)


def check_one_copy(tables: Iterable[dict[str, WeightInput]]) -> dict[str, WeightInput]:
    """The union of the step graphs' tables.

    Requires: they agree. Ensures: no byte of a weight file is in two inputs, so that the device holds one copy.
    """
    union: dict[str, WeightInput] = {}
    for table in tables:
        for name, weight in table.items():
            first = union.setdefault(name, weight)
            assert first == weight, name
    places = [(location, offset) for weight in union.values() for location, offset, _ in weight.parts]
    assert len(set(places)) == len(places)
    return union
