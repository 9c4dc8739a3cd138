"""What dropped sites compute, behind Ifs on `lora_step`.

    a layer or its attention    If(K, V, q of it | nothing) → PagedAttention → If(the rest | surrogate)
    one with a recurrent state  If(Directions of it | nothing) → its rule → If(the rest | surrogate)
    an MLP                      If(the MLP | surrogate)

Under `fill` both steps make K and V of dropped attentions, and entries of recurrent states, outside the Ifs; a LoRA
step's queries are zeros there, and nobody reads what they attend to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.adapters import gate_name, weight_names
from lora_drop_runtime.bundle.paged_io import (
    DOMAIN,
    LAST_TOKENS,
    LORA_STEP,
    PAST_STATES,
    PRESENT_STATES,
    recurrence_names,
)
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.sites import MLP, half_of, layer_of
from lora_drop_runtime.plan.surrogate import GATE_EPSILON

from lora_drop_export.graphs.nodes import Ops, viewed
from lora_drop_export.graphs.values import stream_names

from .recurrence import RULE


class _Branch:
    """A side of an If: copies of nodes of the graph around it, with the weights that they read as its own.

    Args:
        name: begins the names of all that it makes.
    """

    def __init__(self, name: str) -> None:
        self.name, self.ops = name, Ops()
        self.initializers: dict[str, ir.Value] = {}

    def weight(self, value: ir.Value) -> ir.Value:
        """An initializer of another graph as one of its own."""
        name = f"{self.name}/{value.name}"
        if name not in self.initializers:
            tensor = value.const_value
            if tensor is not None and not isinstance(tensor, ir.ExternalTensor):
                tensor = ir.tensor(tensor.numpy(), name=name)  # it has a name as well
            own = ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)
            self.initializers[name] = own
        return self.initializers[name]

    def copy(self, nodes: Iterable[ir.Node]) -> dict[ir.Value, ir.Value]:
        """Copies of nodes, in order; returns what stands for what they make."""
        made: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            inputs: list[ir.Value | None] = []
            for value in node.inputs:
                if value is not None and value.is_initializer():
                    inputs.append(self.weight(value))
                else:
                    inputs.append(None if value is None else made.get(value, value))
            attributes = list(node.attributes.values())
            new = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=node.name)
            for before, after in zip(node.outputs, new.outputs, strict=True):
                after.type, after.shape = before.type, before.shape
                made[before] = after
            self.ops.nodes.append(new)
        return made

    def graph(self, results: Sequence[ir.Value]) -> ir.Graph:
        for number, value in enumerate(value for node in self.ops.nodes for value in node.outputs):
            value.name = f"{self.name}/{number}"
        return ir.Graph(
            [], list(results), nodes=self.ops.nodes, initializers=list(self.initializers.values()), name=self.name
        )


def _needed(
    nodes: list[ir.Node], ends: set[ir.Value], depends: Mapping[ir.Value, bool], outer: Mapping[ir.Value, bool]
) -> list[ir.Node]:
    """Of nodes in order those that lead to the ends through others of them."""
    wanted, kept = set(ends), []
    for node in reversed(nodes):
        if wanted.isdisjoint(node.outputs):
            continue
        if not any(depends[value] for value in node.outputs) and any(outer.get(value) for value in node.outputs):
            continue
        kept.append(node)
        wanted.update(value for value in node.inputs if value is not None)
    return kept[::-1]


def _between(ends: Iterable[ir.Value], begins: set[ir.Value]) -> list[ir.Node]:
    """The nodes that make `ends` of `begins`, in order, with the constants that they read; what else depends on the
    graph's inputs is taken as it is."""
    depends: dict[ir.Value, bool] = dict.fromkeys(begins, True)
    from_inputs: dict[ir.Value, bool] = {}
    order: dict[ir.Node, None] = {}

    def visit(value: ir.Value) -> None:
        stack = [(value, False)]
        while stack:
            current, ready = stack.pop()
            node = current.producer()
            if current in depends and not ready:
                continue
            if node is None:
                depends[current], from_inputs[current] = False, not current.is_initializer()
                continue
            inputs = [one for one in node.inputs if one is not None]
            if ready:
                found = any(depends[one] for one in inputs)
                outer = any(from_inputs.get(one, False) for one in inputs if not depends[one])
                for made in node.outputs:
                    depends[made], from_inputs[made] = found, outer
                if found or not outer:
                    order[node] = None
            else:
                stack.append((current, True))
                stack += [(one, False) for one in inputs if one not in depends]

    for end in ends:
        visit(end)
    return _needed(list(order), set(ends), depends, from_inputs)


def _reads(chosen: ir.Node, value: ir.Value) -> bool:
    """Whether a side of an If reads a value of the graph around it."""
    sides = (attribute.as_graph() for attribute in chosen.attributes.values())
    return any(value in node.inputs for side in sides for node in side)


class _Sites:
    """Args:
    lora: the neutral LoRA step, which has the adapters.
    """

    def __init__(self, graph: ir.Graph, lora: ir.Graph, plan: DropPlan) -> None:
        self.graph, self.plan, self.lora = graph, plan, lora
        self.step = ir.val(LORA_STEP, ir.DataType.BOOL, [])
        graph.inputs.insert(3, self.step)
        self.values = {str(value.name): value for node in graph for value in node.outputs}
        self.states: ir.Value | None = None
        self.last: ir.Value | None = None
        self.present: list[ir.Value] = []
        self.ifs: list[ir.Node] = []  # in the order in which they run
        self.ends: list[ir.Node] = []  # of them, those that end a site
        self.begun: dict[str, ir.Value] = {}  # what the sites with a state were given
        self.replaced: dict[ir.Value, ir.Value] = {}  # what leaves an If in the place of what it has made
        self.owners = plan.states_behind
        if plan.has_state:
            hidden = self.values["hidden_states.0"]
            width = hidden.shape[2]  # type: ignore[index]
            self.last = ir.val(LAST_TOKENS, ir.DataType.INT64, ["states"])
            self.states = ir.val(PAST_STATES, hidden.dtype, [len(plan.states), "states", int(width)])  # type: ignore[arg-type]
            graph.inputs.extend([self.last, self.states])

    def put(self, site: str) -> None:
        """Put one site behind Ifs."""
        half = half_of(site)
        begin, end = stream_names(site)
        x, y = self.values[begin], self.values[end]
        if site in self.plan.states:
            self.begun[site] = x
        begins = {x} if half == MLP else self._put_before(site, x, y)
        full, surrogate = _Branch(f"site.{site}/full"), _Branch(f"site.{site}/lora")
        nodes = _between([y], begins)
        results = [full.copy(nodes)[y]]
        instead = [self._surrogate(surrogate, site, x)]
        if site in self.owners:
            ops, first = full.ops, self.owners[site]
            state = ops("Gather", results[0], self.last, axis=1)  # [1, b, d]
            if self.plan.form.with_change:
                state.type = y.type
                state = ops("Sub", state, ops("Gather", self.begun[first], self.last, axis=1))
            results.append(state)
            instead.append(instead[0] if site in self.plan.updated_states else self._state(surrogate, first))
        if instead[0] is x:
            instead[0] = surrogate.ops("Identity", x)
        for values in (results, instead):
            for value in values:
                value.type, value.shape = y.type, y.shape if value is values[0] else None
        if len({id(value) for value in instead}) < len(instead):
            instead[1] = surrogate.ops("Identity", instead[1])
            instead[1].type = y.type
        sides = {"then_branch": surrogate.graph(instead), "else_branch": full.graph(results)}
        chosen = ir.node("If", [self.step], sides, num_outputs=len(results), name=f"site.{site}")
        new = chosen.outputs[0]
        new.type, new.shape = y.type, y.shape
        y.replace_all_uses_with(new)
        y.name, new.name = f"{end}.full", end
        self.values[end] = new
        self.graph.append(chosen)
        self.ifs.append(chosen)
        self.ends.append(chosen)
        if site in self.owners:
            chosen.outputs[1].type = y.type
            self.present.append(chosen.outputs[1])

    def _put_before(self, site: str, x: ir.Value, y: ir.Value) -> set[ir.Value]:
        """Put what goes into a layer's attention, and into the rule of its recurrent state, behind an If; returns what
        the rest of the layer begins with. A product of which both entries and the rest are made leaves the If, too."""
        attended, recurred = (self.values.get(f"{what}{layer_of(site)}") for what in ("attended.", RULE))
        fills, begins = self.plan.refresh_policy.fills, {x}
        attention = None if attended is None else attended.producer()
        rows: list[ir.Value] = []  # [T, H·D]
        if attention is not None:  # under `fill` the queries alone
            rows = [value for value in attention.inputs[: 1 if fills else 3] if value is not None]
        # What is a view of another tensor must not leave an If: OpenVINO gives its memory to others
        ends = [viewed(value) for value in rows]
        others: list[ir.Value] = []
        entries = None
        if recurred is not None:
            directed = recurred.producer().inputs[0].producer()  # type: ignore[union-attr]
            assert directed is not None
            others, entries = list(directed.outputs), directed.inputs[0]
            if not fills:
                others.append(self.values[recurrence_names(layer_of(site))[2]])
        paged = {value for value in (attended, recurred, *rows, *others) if value is not None}
        if entries is not None:
            rest = {*_between([y], {x, *paged})}
            made = _between([entries], {x})
            shared = [node.outputs[0] for node in made if node.op_type == "Linear" and node in rest]
            if fills:
                begins |= {entries, *shared}
            else:
                others += shared
        if ends or others:
            self._put_ends(site, x, rows, ends, others, begins)
        if attention is not None:
            paged |= {value for value in attention.inputs[:3] if value is not None}
        return {x, *begins, *(self.replaced.get(value, value) for value in (*paged, *others))}

    def _put_ends(
        self,
        site: str,
        x: ir.Value,
        rows: list[ir.Value],
        ends: list[ir.Value],
        others: list[ir.Value],
        begins: set[ir.Value],
    ) -> None:
        """Put what makes values of a site's stream x behind an If. In a LoRA step they are without tokens, but for an
        attention's under `fill`. None may have more than another that has as many in a refresh: OpenVINO takes their
        numbers for the same, and would write past its memory (2026.4).

        Args:
            rows, ends: of an attention, and what these are views of.
            others: not of an attention.
            begins: what there is before.
        """
        full, nothing = _Branch(f"site.{site}/projected"), _Branch(f"site.{site}/nothing")
        made = full.copy(_between([*ends, *others], begins))
        results = []
        for value in (*ends, *others):
            if value not in made:  # K or V of another layer, which are there on all steps
                made[value] = full.ops("Identity", value)
                made[value].type, made[value].shape = value.type, value.shape
            results.append(made[value])
        instead = []
        for value in (*ends, *others):  # [1, T, …], or [1, 1, T, …] of a single head; [N, …]
            ops, sizes = nothing.ops, [size if isinstance(size, int) else -1 for size in list(value.shape)]  # type: ignore[arg-type]
            if sizes.count(-1) > 1:
                sizes[0] = 1
            # A Constant without elements would be read as a scalar
            fills = value in ends and self.plan.refresh_policy.fills
            tokens = ops("Shape", x, start=1, end=2) if fills else ops.ints([0])
            place = sizes.index(-1)
            head, tail = ([ops.ints(part)] if part else [] for part in (sizes[:place], sizes[place + 1 :]))
            shape = ops("Concat", *head, tokens, *tail, axis=0)
            zero = ops("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32)))
            zero.type = ir.TensorType(ir.DataType.FLOAT)
            instead.append(zero)
        sides = {"then_branch": nothing.graph(instead), "else_branch": full.graph(results)}
        chosen = ir.node("If", [self.step], sides, num_outputs=len(results), name=f"site.{site}.before")
        self.graph.append(chosen)
        self.ifs.append(chosen)
        for value, new in zip((*ends, *others), chosen.outputs, strict=True):
            new.type, new.shape = value.type, value.shape
        for row, new in zip(rows, chosen.outputs, strict=False):
            ops = Ops()
            packed = ops("Reshape", new, ops.ints([-1, int(row.shape[1])]))  # type: ignore[index, arg-type]
            packed.type, packed.shape = row.type, row.shape
            self.graph.extend(ops.nodes)
            row.replace_all_uses_with(packed)
        for value, new in zip(others, chosen.outputs[len(ends) :], strict=True):
            self.replaced[value] = new
            if value.is_graph_output():
                new.name, value.name = value.name, f"{value.name}.full"
                self.graph.outputs[:] = [new if output is value else output for output in self.graph.outputs]
            value.replace_all_uses_with(new)

    def _state(self, branch: _Branch, site: str) -> ir.Value:
        """The state before the step, [1, b, d]."""
        ops = branch.ops
        assert self.states is not None
        row = ops("Gather", self.states, ops.ints([list(self.plan.states).index(site)]), axis=0)
        row.type = self.states.type
        return row

    def _surrogate(self, branch: _Branch, site: str, x: ir.Value) -> ir.Value:
        """y = base + feature Aᵀ (sB)ᵀ [1, T, d], gated or not; x itself where nothing is added to it."""
        ops, stored, form = branch.ops, self.lora.initializers, self.plan.form
        base = self._state(branch, site) if form.base_is_state else x
        names, gate, value = weight_names(site, stored), gate_name(site, stored), x
        if not names:
            return base

        def of_input(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
            made = ops(op, *inputs, **attributes)
            made.type = x.type
            return made

        def product(value: ir.Value, name: str) -> ir.Value:
            return of_input("Linear", value, branch.weight(stored[name]), domain=DOMAIN, quantized=0, bias=0, gated=0)

        if form.with_change:
            value = of_input("Concat", x, self._state(branch, site), axis=-1)
        for name in names:
            value = product(value, name)
            if gate is not None and name == names[0]:
                ones = branch.weight(stored["surrogate.ones"])
                normed = of_input("RMSNorm", x, ones, domain=DOMAIN, epsilon=GATE_EPSILON)
                opened = product(normed, gate)
                silu = of_input("Mul", opened, of_input("Sigmoid", opened))
                value = of_input("Add", value, of_input("Mul", value, silu))
        return of_input("Add", value, base)

    def _may_be_lost(self) -> list[ir.Value]:
        """What sites end with that the next If does not read; and all that the last If makes.

        OpenVINO's CPU plugin gives tensors of shapes that it does not know in advance memory in common, and makes that
        larger for all that comes behind an If up to the next one, before it runs that: what the If has made, and nodes
        before the next If read for the last time, may be lost then (2026.4).
        """
        following = dict(itertools.pairwise(self.ifs))
        unread = [node for node in self.ends if node in following and not _reads(following[node], node.outputs[0])]
        return [node.outputs[0] for node in unread] + [value for node in self.ifs[-1:] for value in node.outputs]

    def finish(self) -> None:
        """Outputs of the graph: the states; and what may be lost, since an output has memory of its own."""
        self.graph.outputs.extend(self._may_be_lost())
        if self.states is None:
            return
        ops = Ops()
        present = ops("Concat", *self.present, axis=0)
        present.name, present.type = PRESENT_STATES, self.states.type
        present.shape = self.states.shape
        self.graph.extend(ops.nodes)
        self.graph.outputs.append(present)


def put_behind_ifs(graph: ir.Graph, lora: ir.Graph, plan: DropPlan) -> None:
    """All sites of a plan, in the order in which a token goes through them."""
    sites = _Sites(graph, lora, plan)
    for site in plan.sites:
        sites.put(site)
    sites.finish()
