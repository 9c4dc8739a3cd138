"""RotaryEmbedding → into the attention, or over [B, S, H·D]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from lora_drop_runtime.engines.ort.package import import_onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_drop_export.graphs.nodes import Ops

from .rows import tokens_first

ROTARY_MULTIPLE = 16  # of which GroupQueryAttention turns heads
ROTARY_BYTES = 32 << 20  # of tables that are worth a node or two a layer


class Rotations:
    """RoPE inside GroupQueryAttention: tables over all positions, as the traced graph computes them."""

    def __init__(self, proto: onnx.ModelProto, graph: ir.Graph, max_positions: int) -> None:
        self.proto, self.graph, self.max_positions = proto, graph, max_positions
        self.made: dict[tuple[ir.Value | None, ...], list[ir.Value]] = {}

    def joined(
        self, query: ir.Value, key: ir.Value | None, value: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value] | None:
        """The one product that q, k and v are split from, and the two tables; None where they are not."""
        assert key is not None
        if int(query.shape[3]) % ROTARY_MULTIPLE:  # type: ignore[index, arg-type]
            return None
        if 4 * self.max_positions * int(query.shape[3]) > ROTARY_BYTES:  # type: ignore[index, arg-type]
            return None
        turned, tables = [query.producer(), key.producer()], []
        for node in turned:
            if node is None or node.op_type != "RotaryEmbedding" or "rotary_embedding_dim" in node.attributes:
                return None
            if "interleaved" in node.attributes and node.attributes["interleaved"].as_int():
                return None
            tables.append(tuple(node.inputs[1:3]))
        q, k = (node.inputs[0] for node in turned if node is not None)
        parts = [tokens_first(Ops(), t) for t in (q, k, value)]
        split = parts[0].producer()
        if tables[0] != tables[1] or split is None or split.op_type != "Split" or list(split.outputs) != parts:
            return None
        whole = split.inputs[0]
        assert whole is not None
        cos, sin = self._tables(tables[0])
        return whole, cos, sin

    def _tables(self, values: tuple[ir.Value | None, ...]) -> list[ir.Value]:
        """[max_positions, D/2] each: what the graph computes as [B, S, D/2], once for all positions."""
        if values not in self.made:
            model = ir.serde.deserialize_model(self.proto)
            graph = model.graph
            found = {v.name: v for node in graph for v in node.outputs}
            graph.outputs[:] = [found[value.name] for value in values if value is not None]
            RemoveUnusedNodesPass()(model)
            needed = {use for node in graph for use in node.inputs}
            graph.inputs[:] = [v for v in graph.inputs if v in needed]
            for v in graph.inputs:  # the LoRA step's holds one token a row
                if v.name == "input_ids":
                    v.shape = ir.Shape(["batch", "sequence"])
            feeds = {"input_ids": np.zeros((1, self.max_positions), np.int64), "len_kept": np.zeros(1, np.int64)}
            session = import_onnxruntime().InferenceSession(
                ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
            )
            tables = session.run(None, {v.name: feeds[v.name] for v in session.get_inputs()})
            self.made[values] = [self._initializer(np.ascontiguousarray(table[0])) for table in tables]
        return self.made[values]

    def _initializer(self, table: npt.NDArray[np.float32]) -> ir.Value:
        name = f"rotary.{sum(name.startswith('rotary.') for name in self.graph.initializers)}"
        tensor = ir.tensor(table, name=name)
        made = ir.Value(name=name, shape=ir.Shape(table.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.initializers[name] = made
        return made
