"""Recurrent states over a table of them: Directions and Rule in the place of LinearAttention and of what reads entries.

What is computed of entries is a node of its own, and lies in an If where the layer is dropped; the rule, which writes
the states, stands at top level, for an If would copy them.
"""

from __future__ import annotations

import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import GATED_DELTA, Recurrence
from lora_drop_runtime.bundle.paged_io import (
    DOMAIN,
    DROPPED_TABLE,
    RECURRENCE_TABLES,
    recurrence_names,
    recurrence_tables,
)
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.graphs.nodes import Ops, replace_node
from lora_drop_export.graphs.recurrences import ExpandedRecurrence, recurrences

RULE = "recurred."  # begins the name of what a layer's rule gives
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


def _multiple(one: ExpandedRecurrence) -> ir.Value:
    """A [H] of Mamba 2, of which the decays are the multiple β."""
    _, decay, beta = one.entries.inputs
    node = decay.producer() if decay is not None else None
    factors = [] if node is None or node.op_type != "Mul" else [value for value in node.inputs if value is not beta]
    if len(factors) != 1 or factors[0] is None:
        raise ModelError(
            "Target openvino does not know how the model's states decay.",
            note=f"In layer {one.layer} the decays are no multiple of the steps.",
            hint="Use --target ort.",
        )
    return factors[0]


def _lower_one(
    graph: ir.Graph, one: ExpandedRecurrence, form: Recurrence, tables: dict[str, ir.Value], dropped: bool
) -> list[ir.Value]:
    """Returns the new tokens' entries, and what the rule gives of states."""
    ops, entries = Ops(), one.entries.outputs[0]
    recent, state, present_recent, present_state = recurrence_names(one.layer)
    is_delta = form.rule == GATED_DELTA
    sizes = (form.key_dim, form.value_dim) if is_delta else (form.value_dim, form.key_dim)
    ring = ir.val(recent, ir.DataType.FLOAT, ["recent", form.entry])
    states = ir.val(state, ir.DataType.FLOAT, ["states", form.heads, *sizes])
    graph.inputs.extend([ring, states])
    entries.shape = ir.Shape([1, "tokens", form.entry])
    before = ops("Gather", ring, tables["before"], axis=0)
    before.type, before.shape = _FLOAT, ir.Shape(["before", form.entry])
    names = ("rule", "heads", "key_heads", "key_dim", "value_dim")
    attributes = {name: getattr(form, name) for name in names}
    given = [entries, before, tables["mixed"], one.taps, *(() if one.bias is None else (one.bias,))]
    directed = ir.node("Directions", given, attributes, domain=DOMAIN, num_outputs=5)
    ops.nodes.append(directed)
    of_heads = [form.key_heads, form.key_dim], [form.key_heads, form.key_dim], [form.heads, form.value_dim]
    for value, shape in zip(directed.outputs, (*of_heads, [form.heads * form.decays], [form.heads]), strict=True):
        value.type, value.shape = _FLOAT, ir.Shape(["run", *shape])

    prefix = DROPPED_TABLE if dropped else ""

    def read(*names: str) -> list[ir.Value]:
        return [tables[prefix + name if prefix + name in tables else name] for name in names]

    if is_delta:
        given = [*directed.outputs, states, *read("grid")]
        rule = ir.node("DeltaRule", given, domain=DOMAIN, num_outputs=2)
        left = rule.outputs[1]
        left.name, left.type, left.shape = present_state, _FLOAT, ir.Shape(["rows", *states.shape[1:]])  # type: ignore[index]
    else:
        given = [*directed.outputs, states, *read("begins", "states", "places", "past", "interval"), _multiple(one)]
        rule = ir.node("SelectiveRule", given, domain=DOMAIN)
    ops.nodes.append(rule)
    result = rule.outputs[0]
    result.name = f"{RULE}{one.layer}"
    result.type, result.shape = _FLOAT, ir.Shape(["run", form.heads, form.value_dim])
    out = ops("Gather", result, tables["new"], axis=0)
    if one.skip is not None:
        value = ops("Gather", directed.outputs[2], tables["new"], axis=0)
        out = ops("Add", out, ops("Mul", value, ops("Unsqueeze", one.skip, ops.ints([1]))))
    replace_node(graph, one.mixed, ops, ops("Reshape", out, ops.ints([1, -1, form.heads * form.value_dim])))
    held = Ops()
    wanted = held("Gather", entries, tables["held"], axis=1)
    wanted.name, wanted.type, wanted.shape = present_recent, _FLOAT, ir.Shape([1, "held", form.entry])
    graph.insert_after(one.entries, held.nodes)
    return [wanted, *rule.outputs[1:]]


def lower_recurrences(graph: ir.Graph, plan: DropPlan, form: Recurrence | None) -> None:
    """All of a graph in [batch, sequence], and the inputs and outputs that they need."""
    if form is None:
        return
    found = recurrences(graph)
    dropped = {one.layer for one in found} & set(plan.dropped_attentions)
    shapes: dict[str, list[int | str | None]] = {"mixed": [form.taps, "run"]}
    shapes |= {"grid": [2], f"{DROPPED_TABLE}grid": [2]}
    ports = recurrence_tables(form.rule, len(dropped) < len(found), bool(dropped))
    tables = {
        name: ir.val(port, ir.DataType[RECURRENCE_TABLES[form.rule][name][0].upper()], shapes.get(name, [port]))
        for name, port in ports.items()
    }
    graph.inputs.extend(tables.values())
    for one in found:
        graph.outputs.extend(_lower_one(graph, one, form, tables, one.layer in dropped))
