"""refresh.onnx → lora.onnx: dropped sites give way to surrogates.

Enters: the neutral refresh graph, the plan, the places of the adapters. Leaves: the LoRA step's graph, which names the
same tensors in the same files. The residual stream's names tell where a layer begins and ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from lora_drop_runtime.bundle.adapters import gate_name, weight_names
from lora_drop_runtime.bundle.graph_io import CacheShape, graph_io
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_runtime.plan.surrogate import GATE_EPSILON
from onnx.helper import np_dtype_to_tensor_dtype
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from .recurrences import TOKENS
from .values import IR_VERSION, external, stream_names

G_LOGGER.severity = G_LOGGER.ERROR  # it warns of bfloat16, which it keeps as it is, and of colours that it has not got


@dataclass
class _SurrogateBuilder:
    """Puts in `y = base + feature Aᵀ (sB)ᵀ`: Reshape, [Concat,] one or two Gemm, Add, Reshape (docs/algorithm.md).

    Gated: `h = feature Aᵀ` becomes `h + h · silu(n Gᵀ)`, n the RMSNormalization of x.
    """

    graph: gs.Graph
    plan: DropPlan
    cache: CacheShape
    hidden_size: int
    weights: Mapping[str, TensorPlace]
    states_in: dict[str, gs.Variable] = field(default_factory=dict)
    states_out: dict[str, gs.Variable] = field(default_factory=dict)
    constants: dict[str, gs.Constant] = field(default_factory=dict)

    def surrogate(self, site: str, x: gs.Variable) -> gs.Variable:
        """Nodes of one surrogate; `x` [B, 1, d] → y [B, 1, d]."""
        dtype = x.dtype
        names, gate, form = weight_names(site, self.weights), gate_name(site, self.weights), self.plan.form
        if not names and not form.base_is_state:
            return x  # plain layer skipping: the base alone is no node at all
        rows: list[int | str] = ["batch", self.hidden_size]

        def variable(name: str, shape: list[int | str]) -> gs.Variable:
            return gs.Variable(f"surrogate.{site}.{name}", dtype, shape)

        def add(op: str, inputs: list[gs.Tensor], output: gs.Variable, **attrs: object) -> gs.Variable:
            name = f"surrogate.{site}.{output.name.rsplit('.', 1)[1]}"
            self.graph.nodes.append(gs.Node(op, name=name, attrs=attrs, inputs=inputs, outputs=[output]))
            return output

        def gated(h: gs.Variable, x_rows: gs.Variable, gate: str) -> gs.Variable:
            n = add(
                "RMSNormalization", [x_rows, self._ones(dtype)], variable("normed", rows), axis=-1, epsilon=GATE_EPSILON
            )
            to_gate = add("Gemm", [n, self._weight(gate)], variable("by_G", list(h.shape)), transB=1)
            opened = add("Sigmoid", [to_gate], variable("sigmoid", list(h.shape)))
            silu = add("Mul", [to_gate, opened], variable("silu", list(h.shape)))
            more = add("Mul", [h, silu], variable("more", list(h.shape)))
            return add("Add", [h, more], variable("gated", list(h.shape)))

        state: gs.Variable | None = None
        if site in self.plan.states:
            state = gs.Variable(f"past_state.{site}", dtype, rows)
            self.states_in[state.name] = state
        result = state
        if names:
            to_rows = gs.Constant(f"surrogate.{site}.rows_shape", np.array([-1, self.hidden_size], np.int64))
            x_rows = add("Reshape", [x, to_rows], variable("x", rows))  # [B, d]
            value = x_rows
            if form.with_change:
                width = form.feature_size(self.hidden_size)
                value = add("Concat", [x_rows, state], variable("feature", ["batch", width]), axis=1)
            for name in names:
                product = variable(f"by_{name.rpartition('_')[2]}", ["batch", self.weights[name].shape[0]])
                value = add("Gemm", [value, self._weight(name)], product, transB=1)
                if gate is not None and name == names[0]:
                    value = gated(value, x_rows, gate)
            result = add("Add", [value, state if form.base_is_state else x_rows], variable("sum", rows))
            if site in self.plan.updated_states:
                result.name = f"present_state.{site}"
                self.states_out[result.name] = result
        assert result is not None
        to_tokens = gs.Constant(f"surrogate.{site}.tokens_shape", np.array([-1, 1, self.hidden_size], np.int64))
        return add("Reshape", [result, to_tokens], variable("y", list(x.shape)))  # by the names that x has for them

    def _ones(self, dtype: Any) -> gs.Constant:
        """The weights of a norm that has none, all surrogates' together."""
        name, as_onnx = "surrogate.ones", dtype if isinstance(dtype, int) else np_dtype_to_tensor_dtype(np.dtype(dtype))
        if name not in self.constants:
            values = np.ones(self.hidden_size, ir.DataType(as_onnx).numpy())
            self.constants[name] = gs.Constant(
                name, LazyValues(ir.serde.serialize_tensor(ir.tensor(values, name=name)))
            )
        return self.constants[name]

    def _weight(self, name: str) -> gs.Constant:
        proto = ir.serde.serialize_tensor(external(name, self.weights[name]))
        return gs.Constant(name, LazyValues(proto))


def _replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def _ancestors(tensor: gs.Tensor, depth: int = 4) -> set[str]:
    """Names of the tensors a tensor is made from, a few nodes back."""
    names = {tensor.name}
    if depth:
        for producer in tensor.inputs:
            for source in producer.inputs:
                names |= _ancestors(source, depth - 1)
    return names


def lora_step_from_refresh(
    refresh: onnx.ModelProto,
    plan: DropPlan,
    cache: CacheShape,
    weights: Mapping[str, TensorPlace],
) -> onnx.ModelProto:
    """The LoRA step: the refresh graph with its dropped sites cut out and their surrogates put in.

    Args:
        refresh: the refresh graph; its external weights are neither read nor needed.
        weights: of the surrogates, by name (adapters.weight_shapes); a site without any leaves only the base.

    Ensures: no node, weight, cache input or output of a dropped site remains, but under `fill` what makes K and V of a
        dropped attention and writes them; S = 1; logits [B, 1, V].
    """
    graph = gs.import_onnx(refresh)
    tensors = graph.tensors()
    hidden_size = tensors["hidden_states.0"].shape[2]
    vocab_size = tensors["logits"].shape[2]
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    for name in [name for name in outputs if name.startswith(("present_state.", "present_recurrence."))]:
        outputs.pop(name).name = f"{name}.refresh"  # the surrogate makes its own, a recurrent state stays as it was
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    builder = _SurrogateBuilder(graph, plan, cache, hidden_size, weights)
    for site in plan.sites:
        x, y = stream_names(site)
        new = builder.surrogate(site, tensors[x])
        _replace_uses(tensors[y], new)
        tensors[y] = new
    # Case 2: one token per row, so the gather of the rows that want logits is the identity
    for node in [n for n in graph.nodes if n.op == "GatherND" and "logits_index" in _ancestors(n.inputs[1])]:
        _replace_uses(node.outputs[0], node.inputs[0])
    io = graph_io(StepKind.LORA, plan, cache, hidden_size, vocab_size)
    if TOKENS in tensors:
        _replace_uses(tensors[TOKENS], gs.Constant(TOKENS, np.ones(1, np.int64)))
    outputs |= builder.states_out
    inputs |= builder.states_in
    inputs["input_ids"].shape = ["batch", 1]
    graph.inputs = [inputs[spec.name] for spec in io.inputs]
    graph.outputs = [outputs[spec.name] for spec in io.outputs]
    outputs["logits"].shape = ["batch", 1, vocab_size]
    graph.name = "lora"
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    proto = gs.export_onnx(graph)
    proto.ir_version = IR_VERSION
    return proto
