"""[batch, sequence] → one sequence [1, T] of the new tokens of all rows."""

from __future__ import annotations

import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import POSITIONS

from lora_drop_export.graphs.nodes import Ops, replace_node, viewed

TOKENS = (1, "tokens")


def _sizes(reshape: ir.Node) -> list[int]:
    """What a Reshape asks for; [0], a copied size, where that is not known here."""
    shape = ir.convenience.get_const_tensor(reshape.inputs[1]) if reshape.inputs[1] is not None else None
    return [0] if shape is None else shape.numpy().tolist()


def _with_constant_shape(graph: ir.Graph, node: ir.Node) -> None:
    """A Reshape to [batch, sequence, …], or [batch, 1, sequence, …], needs no shape that is computed: the sequence is
    what is left."""
    sizes = [size if isinstance(size, int) else None for size in node.outputs[0].shape or ()]
    if len(sizes) < 3 or sizes[0] is not None or sizes[1:].count(None) != 1:
        return
    ops = Ops()
    shape = ops.ints([1, *(-1 if size is None else size for size in sizes[1:])])
    graph.insert_before(node, ops.nodes)
    node.replace_input_with(1, shape)
    node.attributes.pop("allowzero", None)


def _join_reshapes(graph: ir.Graph) -> None:
    """A Reshape of what a Reshape made reads its input: each node costs a step a microsecond, and several where the
    number of tokens changes."""
    for node in graph:
        if node.op_type == "Reshape" and node.inputs[0] is not None and 0 not in _sizes(node):
            node.replace_input_with(0, viewed(node.inputs[0]))


def _replace_positions(graph: ir.Graph, kept: ir.Value, positions: ir.Value) -> None:
    """`len_kept` + a range is the tokens' positions, and its size the batch."""
    for node in {node: None for node, _ in kept.uses()}:
        if node.op_type == "Unsqueeze":
            for add in {use.node: None for use in node.outputs[0].uses()}:
                assert add.op_type == "Add"  # decoder/trace.py makes positions so
                add.outputs[0].replace_all_uses_with(positions)
        else:
            assert node.op_type == "Shape", node.op_type
            ops = Ops()
            replace_node(graph, node, ops, ops.ints([1]))


def _replace_choices(graph: ir.Graph, index: ir.Value) -> None:
    """GatherND(x, index) takes rows of each row's own; of one sequence a Gather does."""
    for unsqueeze in {node: None for node, _ in index.uses()}:
        assert unsqueeze.op_type == "Unsqueeze", unsqueeze.op_type
        for node in {use.node: None for use in unsqueeze.outputs[0].uses()}:
            assert node.op_type == "GatherND", node.op_type
            ops = Ops()
            replace_node(graph, node, ops, ops("Gather", node.inputs[0], index, axis=1))


def pack_tokens(graph: ir.Graph) -> None:
    """Change the graph's inputs; attention is PagedAttention already."""
    inputs = {str(value.name): value for value in graph.inputs}
    ids, index, kept = (inputs[name] for name in ("input_ids", "logits_index", "len_kept"))
    positions = ir.val(POSITIONS, ir.DataType.INT64, list(TOKENS))
    _replace_positions(graph, kept, positions)
    _replace_choices(graph, index)
    for node in list(graph):
        if node.op_type == "Reshape":
            _with_constant_shape(graph, node)
    _join_reshapes(graph)
    ids.shape, index.shape = ir.Shape(TOKENS), ir.Shape(["rows"])
    others = [value for name, value in inputs.items() if "." in name and not name.startswith("past_")]
    graph.inputs[:] = [ids, positions, index, *others]
