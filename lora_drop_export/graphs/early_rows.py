"""The rows with logits are chosen before the last layer's MLP, so that a prefill spares it for all other tokens."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from .match import is_row_wise
from .nodes import rank


def _is_product(node: ir.Node) -> bool:
    """Whether a node multiplies rows [B, S, in] by one matrix [in, out]."""
    x, matrix = node.inputs if node.op_type == "MatMul" else (None, None)
    return x is not None and matrix is not None and (rank(x), rank(matrix)) == (3, 2)


def with_rows_chosen_early(refresh: onnx.ModelProto) -> onnx.ModelProto:
    """The refresh graph where what follows the last attention computes only the rows whose logits are asked for.

    `f(x)[rows] = f(x[rows])` for every operator that treats rows alike, so the choice moves up through them: a prefill
    spares the last layer's output projection and MLP for all tokens but one. Tensors that others read whole stay whole
    (a state's source may be among them); the argument is left as it was.
    """
    model = ir.serde.deserialize_model(refresh)
    graph = model.graph
    (index,) = (value for value in graph.inputs if value.name == "logits_index")
    choices = {use.node for unsqueeze, _ in index.uses() for use in unsqueeze.outputs[0].uses()}
    choices = {node for node in choices if node.op_type == "GatherND" and rank(node.outputs[0]) == 3}

    def rows_of(value: ir.Value) -> ir.Shape:
        assert index.shape is not None
        assert value.shape is not None
        return ir.Shape([*index.shape, value.shape[2]])

    moved: dict[ir.Node, None] = {}
    for node in reversed(list(graph)):
        readers = {use.node for value in node.outputs for use in value.uses()}
        leaves = any(value.is_graph_output() for value in node.outputs)
        if readers and not leaves and readers <= choices | moved.keys() and (is_row_wise(node) or _is_product(node)):
            moved[node] = None
    made = {node.outputs[0] for node in choices} | {value for node in moved for value in node.outputs}
    chosen: dict[ir.Value, ir.Value] = {}
    for node in reversed(moved):
        for place, value in enumerate(node.inputs):
            if value is None or rank(value) != 3 or value in made:
                continue
            if value not in chosen:
                like = next(iter(choices))
                gather = ir.node("GatherND", [value, like.inputs[1]], {"batch_dims": 1})
                chosen[value] = gather.outputs[0]
                gather.outputs[0].type = value.type
                gather.outputs[0].shape = rows_of(value)
                graph.insert_before(node, gather)
            node.replace_input_with(place, chosen[value])
        for value in node.outputs:
            value.shape = rows_of(value)
    for node in choices:
        source = node.inputs[0]
        if source in made:
            node.outputs[0].replace_all_uses_with(source)
    graph.sort()  # the index is made late
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    return ir.serde.serialize_model(model)
