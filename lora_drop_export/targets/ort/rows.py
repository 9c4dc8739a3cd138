"""The [B·S, width] twins of [B, S, width] tensors, and the shapes that lead back."""

from __future__ import annotations

import onnx_ir as ir

from lora_drop_export.graphs.match import is_row_wise
from lora_drop_export.graphs.nodes import HEADS_FIRST, Ops, rank

from .packing import Packing


class Rows:
    """The [B·S, width] twins of [B, S, width] tensors, made where they are asked for."""

    def __init__(self, graph: ir.Graph, packing: Packing | None = None) -> None:
        self.graph = graph
        inputs = {str(value.name): value for value in graph.inputs}
        # Of the same leading sizes as what is computed of them, so that all layers share one shape
        self.leads = [inputs[name] for name in ("input_ids", "logits_index") if name in inputs]
        self.like = [value.shape for value in self.leads]
        if packing is not None:
            self.leads = [packing.ids, packing.index]
        self.made: dict[ir.Value, ir.Value] = {}
        self.cloned: list[ir.Value] = []

    def tokens_shape(self, ops: Ops, x: ir.Value, width: int) -> ir.Value:
        """The shape [B, S, width] for a tensor with the leading sizes of `x`; a constant where S = 1."""
        if self.like[0][1] == 1:  # type: ignore[index]
            return ops.ints([-1, 1, width])
        lead = x
        for value, shape in zip(self.leads, self.like, strict=True):
            if x.shape is not None and x.shape[:2] == shape[:2]:  # type: ignore[index]
                lead = value
        return ops("Concat", ops("Shape", lead, start=0, end=2), ops.ints([width]), axis=0)

    def settle(self) -> None:
        """What still reads a tensor whose operator has a twin reads the twin, so that one of the two goes."""
        for value in self.cloned:
            ops = Ops()
            assert value.shape is not None
            width = int(value.shape[2])  # type: ignore[arg-type]
            whole = ops("Reshape", self.made[value], self.tokens_shape(ops, value, width))
            whole.type, whole.shape = value.type, value.shape
            value.replace_all_uses_with(whole)
            self.graph.extend(ops.nodes)

    def _is_made_whole(self, value: ir.Value | None) -> bool:
        """Whether it is made of products that give [B, S, width] of their own, which rows would only be Reshapes of."""
        node = None if value is None or value in self.made or rank(value) != 3 else value.producer()
        if node is None or node.op_type == "MatMulNBits":
            return node is not None
        return is_row_wise(node) and any(map(self._is_made_whole, node.inputs))

    def get(self, value: ir.Value) -> ir.Value:
        # Case 3: of a row-wise operator's output the operator on the twins of its inputs, else a Reshape
        if value not in self.made:
            assert value.shape is not None
            node = value.producer()
            ops = Ops()
            if node is not None and is_row_wise(node) and not self._is_made_whole(value):
                inputs = [self.get(i) if i is not None and rank(i) == 3 else i for i in node.inputs]
                attributes = dict(node.attributes)
                if "axis" in attributes:
                    attributes["axis"] = ir.AttrInt64("axis", -1)  # it may be counted from the front
                twin = ir.node(node.op_type, inputs, attributes, num_outputs=len(node.outputs))
                ops.nodes.append(twin)
                for old, new in zip(node.outputs, twin.outputs, strict=True):
                    self.register(old, new)
                    self.cloned.append(old)
            else:
                self.register(value, ops("Reshape", value, ops.ints([-1, int(value.shape[2])])))  # type: ignore[arg-type]
            self.graph.insert_after(node, ops.nodes) if node else self.graph.insert_before(self.graph[0], ops.nodes)
        return self.made[value]

    def take_in(self, reshape: ir.Node) -> None:
        """A Reshape between tokens and rows around a surrogate: what it makes is a twin, or has one."""
        before, after = reshape.inputs[0], reshape.outputs[0]
        assert before is not None
        if rank(before) == 3 and rank(after) == 2:
            after.replace_all_uses_with(self.get(before))
        elif rank(before) == 2 and rank(after) == 3:
            self.register(after, before)

    def register(self, value: ir.Value, twin: ir.Value) -> None:
        assert value.shape is not None
        twin.type, twin.shape = value.type, ir.Shape([None, value.shape[2]])
        self.made[value] = twin


def tokens_first(ops: Ops, value: ir.Value | None) -> ir.Value:
    """[B, H, S, D] as [B, S, H·D], reusing what the heads were split from."""
    assert value is not None
    assert value.shape is not None
    heads, head_dim = int(value.shape[1]), int(value.shape[3])  # type: ignore[arg-type]
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == HEADS_FIRST:
        split = node.inputs[0]
        source = split.producer() if split is not None else None
        if source is not None and source.op_type == "Reshape":
            whole = source.inputs[0]
            if whole is not None and whole.shape is not None and len(whole.shape) == 3:
                return whole
        assert split is not None
        return ops("Reshape", split, ops.ints([0, 0, heads * head_dim]))
    if node is not None and node.op_type == "RotaryEmbedding" and "rotary_embedding_dim" not in node.attributes:
        # Case 9
        x = tokens_first(ops, node.inputs[0])
        return ops("RotaryEmbedding", x, *node.inputs[1:], num_heads=heads, interleaved=0)
    tokens = ops("Transpose", value, perm=list(HEADS_FIRST))
    return ops("Reshape", tokens, ops.ints([0, 0, heads * head_dim]))
