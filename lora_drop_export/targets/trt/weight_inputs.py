"""Weights as inputs of both engines, fused where that spares a product; one copy on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from lora_drop_runtime.bundle.bundle import WeightInput

from lora_drop_export.graphs.match import Linear, joined_name, linear_groups, match_linear
from lora_drop_export.graphs.nodes import Ops
from lora_drop_export.graphs.weight_inputs import stored_input, stored_weights_as_inputs


@dataclass(frozen=True)
class Fusion:
    """Linear layers that read one tensor and become one. `members` are (weight, bias, output width), in order."""

    weight: str
    bias: str | None
    members: tuple[tuple[str, str | None, int], ...]


def linear_layers(graph: ir.Graph) -> dict[str, Linear]:
    """All linear layers by the name of their weight."""
    found = (match_linear(node) for node in graph if node.op_type == "MatMul")
    return {str(linear.weight.name): linear for linear in found if linear is not None}


def planned_fusions(graph: ir.Graph) -> tuple[Fusion, ...]:
    # Case 3
    made = []
    for group in linear_groups(graph):
        weights = [str(linear.weight.name) for linear in group]
        biases = [None if linear.bias is None else str(linear.bias.name) for linear in group]
        named = [bias for bias in biases if bias is not None]
        members = zip(weights, biases, (linear.shape[0] for linear in group), strict=True)
        made.append(Fusion(joined_name(weights), joined_name(named) if named else None, tuple(members)))
    return tuple(made)


def fused_weights(graph: ir.Graph, fusions: Iterable[Fusion]) -> dict[str, WeightInput]:
    table = {}
    for fusion in fusions:
        for name, members in (
            (fusion.weight, [weight for weight, _, _ in fusion.members]),
            (fusion.bias, [bias for _, bias, _ in fusion.members if bias is not None]),
        ):
            if name is not None:
                table[name] = stored_input([graph.initializers[member] for member in members])
    return table


def fuse(graph: ir.Graph, fusion: Fusion, linears: Mapping[str, Linear], table: Mapping[str, WeightInput]) -> None:
    """One MatMul and a Split for the members that the graph has.

    The LoRA step lacks some where a layer's attention is dead; it computes them all the same, since half of a fused
    weight would be another input, and another copy.
    """
    present = {weight: linears[weight] for weight, _, _ in fusion.members if weight in linears}
    if not present:
        return
    first = next(iter(present.values()))

    def weight_input(name: str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(table[name].shape), type=first.weight.type)
        graph.inputs.append(value)
        return value

    ops = Ops()
    product = ops("MatMul", first.x, ops("Transpose", weight_input(fusion.weight), perm=[1, 0]))  # [B, S, sum of out]
    if fusion.bias is not None:
        product = ops("Add", product, weight_input(fusion.bias))
    widths = [width for _, _, width in fusion.members]
    split = ir.node("Split", [product, ops.ints(widths)], {"axis": -1}, num_outputs=len(widths))
    graph.insert_before(next(use.node for use in first.x.uses() if use.node.op_type == "MatMul"), [*ops.nodes, split])
    for (weight, _, width), new in zip(fusion.members, split.outputs, strict=True):
        new.type = first.weight.type
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
            assert union.setdefault(name, weight) == weight, name
    places = [(location, offset) for weight in union.values() for location, offset, _ in weight.parts]
    assert len(set(places)) == len(places)
    return union
