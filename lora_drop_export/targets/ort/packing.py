"""Rows with different numbers of new tokens: what treats tokens alike runs over those that there are, and no padding.

A refresh takes `input_ids` [B, S]. Where rows have fewer than S new tokens (`packed_step`), products, norms and the
head run over one packed sequence [1, T] of the real tokens; attention alone takes chunks [B, S], padded on the right.
Else all run over [B, S]. A small If makes the tokens, and where each lies on either side of the attentions: two
GatherNDs in each layer, which cost no more than an If that leaves them out. No weight may lie in an If within an If:
ONNX Runtime would not pack it for its kernels.

In both steps a row may stand still: no cache and no state of it changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import PACKED_STEP

from lora_drop_export.graphs.convolutions import convolutions
from lora_drop_export.graphs.nodes import Ops, replace_node
from lora_drop_export.graphs.recurrences import reads_rows, recurrences

LEAD = ("lead", "tokens")  # 1, T in a packed step; else B, S


def _use_instead(before: ir.Value, after: ir.Value, kept: set[ir.Node]) -> None:
    """Let all nodes but those in `kept` read `after`."""
    for node, place in list(before.uses()):
        if node not in kept:
            node.replace_input_with(place, after)


def choice(
    condition: ir.Value, then: tuple[Ops, Sequence[ir.Value]], other: tuple[Ops, Sequence[ir.Value]], name: str
) -> ir.Node:
    """An If: the nodes of each side, and what it gives."""
    graphs = {}
    for side, (ops, results) in (("then_branch", then), ("else_branch", other)):
        for number, value in enumerate(value for node in ops.nodes for value in node.outputs):
            if value.name != "":
                value.name = f"{name}.{side}.{number}"  # one given later could be one of the graph around it
        graphs[side] = ir.Graph([], list(results), nodes=ops.nodes, name=f"{name}.{side}")
    return ir.node("If", [condition], graphs, num_outputs=len(then[1]))


class Packing:
    """Packs the tokens of a refresh graph where they are ragged.

    Args:
        graph: the neutral refresh graph.
        new_tokens: int32 [B], tokens of each row; 0 for a row that stands still, whose `logits_index` is −1.

    Attributes:
        ids, index: what reads `input_ids` and `logits_index` reads these instead: [1, T] and [1, B·R], or as they were.
    """

    def __init__(self, graph: ir.Graph, new_tokens: ir.Value) -> None:
        inputs = {str(value.name): value for value in graph.inputs}
        ids, index, kept = (inputs[name] for name in ("input_ids", "logits_index", "len_kept"))
        self.condition = ir.val(PACKED_STEP, ir.DataType.BOOL, [])
        graph.inputs.append(self.condition)
        plain = Ops()
        zero, one = (plain.constant(np.array(n, np.int64)) for n in (0, 1))
        width = plain("Squeeze", plain("Shape", ids, start=1, end=2))  # S
        columns = plain("Range", zero, width, one)  # [S]
        positions = plain("Add", plain("Unsqueeze", kept, plain.ints([1])), columns)  # [B, S]
        then, other = Ops(), Ops()
        counts = then("Cast", new_tokens, to=int(ir.DataType.INT64))  # [B]
        is_token = then("Less", columns, then("Unsqueeze", counts, then.ints([1])))  # [B, S]
        places = then("Unsqueeze", then("Transpose", then("NonZero", is_token), perm=[1, 0]), then.ints([0]))
        last = then("Sub", then("ReduceSum", counts, keepdims=0), one)
        begins = then("Unsqueeze", then("CumSum", counts, zero, exclusive=1), then.ints([1]))  # [B, 1]
        chunks = then("Min", then("Add", begins, columns), last)  # [B, S]: where each place lies in [T]
        rows = then("Min", then("Add", begins, then("Max", index, zero)), last)  # [B, R]: the same of what has logits
        packed = [
            then("GatherND", ids, places),
            then("Reshape", rows, then.ints([1, -1])),
            then("GatherND", positions, places),
            places,
            then("Pad", then("Unsqueeze", chunks, then.ints([2])), then.ints([0, 0, 1, 0, 0, 0])),
        ]
        whole = [other("Identity", value) for value in (ids, index, positions)]
        size = other("Shape", ids)
        each = other("NonZero", other("ConstantOfShape", size, value=ir.tensor(np.ones(1, np.int64))))
        pairs = other("Concat", size, other.ints([2]), axis=0)
        whole.append(other("Reshape", other("Transpose", each, perm=[1, 0]), pairs))  # [B, S, 2]: (row, column)
        whole.append(other("Identity", whole[-1]))
        made = choice(self.condition, (then, packed), (other, whole), "packing")
        self.ids, self.index, self.positions, self._places, self._chunks = made.outputs
        for value, shape in (
            (self.ids, LEAD),
            (self.index, ("lead", "chosen")),
            (self.positions, LEAD),
            (self._places, (*LEAD, 2)),
            (self._chunks, ("chunk_rows", "chunk_width", 2)),
        ):
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(shape)
        for results in (packed, whole):
            for value, outer in zip(results, made.outputs, strict=True):
                value.type, value.shape = outer.type, outer.shape
        own = {*plain.nodes, *then.nodes, *other.nodes, *filter(reads_rows, graph)}
        graph.insert_before(graph[0], [*plain.nodes, made])
        self._gather_states(graph, index, own)
        _use_instead(index, self.index, own)
        self._replace_positions(graph, kept, own)
        _use_instead(ids, self.ids, own)
        self._whole_index = index

    def _gather_states(self, graph: ir.Graph, index: ir.Value, own: set[ir.Node]) -> None:
        """States [B, d] are those of each row's last token: [lead·chosen] at every R-th of the packed index."""
        lasts = [node for node, _ in index.uses() if node.op_type == "Gather" and node not in own]
        if not lasts:
            return
        ops = Ops()
        split = ops("Reshape", self.index, ops("Shape", index))  # [B, R]: places in [T] or in [S]
        last = ops("Gather", split, ops.constant(np.array(-1, np.int64)), axis=1)  # [B]
        lead, tokens = (ops("Squeeze", ops("Shape", self.ids, start=n, end=n + 1)) for n in (0, 1))
        batch = ops("Squeeze", ops("Shape", index, start=0, end=1))
        zero, one = (ops.constant(np.array(n, np.int64)) for n in (0, 1))
        line = ops("Min", ops("Range", zero, batch, one), ops("Sub", lead, one))  # [B]: 0 … B−1, or all 0
        wrapped = ops("Mod", last, tokens)  # −1 of a row that stands still is some token of its own
        places = ops("Add", ops("Mul", line, tokens), wrapped)  # [B], in [lead·tokens]
        own |= set(ops.nodes)
        graph.insert_after(self.ids.producer(), ops.nodes)  # type: ignore[arg-type]
        for node in [use.node for last in lasts for use in last.outputs[0].uses()]:
            source = node.inputs[0]
            assert source is not None
            assert source.shape is not None
            ops = Ops()
            flat = ops("Reshape", source, ops.ints([-1, int(source.shape[2])]))  # type: ignore[arg-type]
            replace_node(graph, node, ops, ops("Gather", flat, places, axis=0))

    def _replace_positions(self, graph: ir.Graph, kept: ir.Value, own: set[ir.Node]) -> None:
        """`len_kept` + a range is the tokens' positions, and its size the batch, which is 1 where tokens are packed."""
        for node in {node: None for node, _ in kept.uses() if node not in own}:
            if node.op_type == "Unsqueeze":
                for add in {use.node: None for use in node.outputs[0].uses()}:
                    if add.op_type == "Sub":  # graphs/convolutions.py makes slots so
                        continue
                    assert add.op_type == "Add"  # graphs/ and decoder/trace.py make positions so, and masks of them
                    add.outputs[0].replace_all_uses_with(self.positions)
            elif node.op_type == "Shape":
                ops = Ops()
                replace_node(graph, node, ops, ops("Shape", self.ids, start=0, end=1))
            else:
                assert node.op_type == "TensorScatter"

    def chunks(self, ops: Ops, tokens: ir.Value | None) -> ir.Value | None:
        """[lead, tokens, width] as [B, S, width]."""
        return None if tokens is None else ops("GatherND", tokens, self._chunks)

    def tokens(self, ops: Ops, chunks: ir.Value) -> ir.Value:
        """[B, S, width] as [lead, tokens, width]."""
        return ops("GatherND", chunks, self._places)

    def unpack_logits(self, graph: ir.Graph) -> None:
        """[lead, chosen, V] as [B, R, V]."""
        logits = graph.outputs[0]
        assert logits.shape is not None
        ops = Ops()
        vocabulary = ops.ints([int(logits.shape[2])])  # type: ignore[arg-type]
        whole = ops("Reshape", logits, ops("Concat", ops("Shape", self._whole_index), vocabulary, axis=0))
        whole.type, whole.shape, whole.name = logits.type, logits.shape, logits.name
        logits.name, logits.shape = f"{logits.name}.packed", None
        graph.extend(ops.nodes)
        graph.outputs[0] = whole

    def _as_tokens(self, graph: ir.Graph, node: ir.Node) -> None:
        """What a node gives of chunks, for all that reads it."""
        whole, ops = node.outputs[0], Ops()
        tokens = self.tokens(ops, whole)
        tokens.type, tokens.shape = whole.type, whole.shape
        _use_instead(whole, tokens, {*ops.nodes})
        graph.insert_after(node, ops.nodes)

    def recur(self, graph: ir.Graph) -> None:
        """Recurrent states over chunks, as attention is."""
        for one in recurrences(graph):
            entries, ops = one.entries.outputs[0], Ops()
            chunks = self.chunks(ops, entries)
            assert chunks is not None
            _use_instead(entries, chunks, {*ops.nodes})
            graph.insert_after(one.entries, ops.nodes)
            self._as_tokens(graph, one.mixed)

    def convolve(self, graph: ir.Graph) -> None:
        """Convolutions [B, S, d] over chunks, as attention is; the tokens that there are join their caches."""
        for one in convolutions(graph):
            new, ops = one.join.inputs[1], Ops()
            chunks = self.chunks(ops, new)
            graph.insert_before(one.join, ops.nodes)
            one.join.replace_input_with(1, chunks)
            self._as_tokens(graph, one.sum)
        for write in [node for node in graph if node.op_type == "TensorScatter"]:
            past, entries, length = write.inputs
            ops = Ops()
            rows, columns = (ops("Slice", self._places, *(ops.ints([n]) for n in (k, k + 1, 2))) for k in (0, 1))
            slots = ops("Add", ops("Gather", length, rows), columns)  # [lead, tokens, 1]
            places = ops("Concat", rows, ops("Sub", rows, rows), slots, axis=2)
            written = ops("ScatterND", past, places, ops("Squeeze", entries, ops.ints([1])))
            replace_node(graph, write, ops, written)
            graph.remove(write, safe=True)


def keep_idle_states(graph: ir.Graph, new_tokens: ir.Value) -> None:
    """A row that stands still keeps its state: `present_state` [B, d] is `past_state` there."""
    inputs = {str(value.name): value for value in graph.inputs}
    for place, state in enumerate(graph.outputs):
        name = str(state.name)
        if not name.startswith("present_state."):
            continue
        before = name.replace("present_", "past_")
        if before not in inputs:
            inputs[before] = ir.val(before, state.dtype, state.shape)
            graph.inputs.append(inputs[before])
        ops = Ops()
        moves = ops("Greater", ops("Unsqueeze", new_tokens, ops.ints([1])), ops.constant(np.array(0, np.int32)))
        state.name = f"{name}.of_all"
        kept = ops("Where", moves, state, inputs[before])
        kept.type, kept.shape, kept.name = state.type, state.shape, name
        graph.extend(ops.nodes)
        graph.outputs[place] = kept


def keep_idle_caches(graph: ir.Graph, new_tokens: ir.Value) -> None:
    """A LoRA step's TensorScatters without an attention write rows that have a token, and no others."""
    moving: ir.Value | None = None  # [m], the rows
    places: dict[tuple[ir.Value, int], ir.Value] = {}  # by length and heads: where the rows' entries go, [m, H, 1, 3]
    for write in [node for node in graph if node.op_type == "TensorScatter"]:
        past, entries, length = write.inputs
        assert past is not None
        assert length is not None
        assert past.shape is not None
        ops = Ops()
        if moving is None:
            has_token = ops("Greater", new_tokens, ops.constant(np.array(0, np.int32)))
            moving = ops("Squeeze", ops("NonZero", has_token), ops.ints([0]))
        heads = int(past.shape[1])  # type: ignore[arg-type]
        if (length, heads) not in places:
            shape = ops("Concat", ops("Shape", moving), ops.ints([heads, 1, 1]), axis=0)
            each_head = ops.constant(np.arange(heads, dtype=np.int64).reshape(1, heads, 1, 1))
            row, slot = (ops("Reshape", v, ops.ints([-1, 1, 1, 1])) for v in (moving, ops("Gather", length, moving)))
            each = (ops("Expand", v, shape) for v in (row, each_head, slot))
            places[length, heads] = ops("Concat", *each, axis=3)
        written = ops("ScatterND", past, places[length, heads], ops("Gather", entries, moving, axis=0))
        replace_node(graph, write, ops, written)
        graph.remove(write, safe=True)
