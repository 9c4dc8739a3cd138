"""Layers that are alike are traced once, and the others are copies of what was traced.

Enters: a model whose layers ran once on fake tensors, with their arguments. Of every kind of layer the first two and
the last are traced; each one between them is a single `lora_drop::Repeat` node, which `expand` replaces by a copy of
the first one's nodes over its own parameters. Alike are layers of equal modules, attributes and arguments. What that
cannot show, such as arithmetic with a layer's own index, shows in the nodes of the second and the last: where they
differ from the first one's, `expand` says so, and the caller traces every layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import onnx_ir as ir

from .attention_interface import DOMAIN
from .parameters import buffer_tensor

_TRACED = (0, 1, -1)  # of the layers of a kind
_OWN_INDEX = ("layer_idx", "layer_id", "layer_index")  # of a layer or of a module in it


@dataclass
class LayerCalls:
    """What each layer was called with and gave, in order."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    @contextlib.contextmanager
    def noted(self, layers: Any) -> Iterator[None]:
        """Note the calls of these layers."""

        def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.arguments.append((args, kwargs))
            self.outputs.append(output)

        hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _key(value: Any) -> Hashable:
    """Equal for what the traced code cannot tell apart: the same object, or plain values that are equal."""
    if isinstance(value, tuple | list):
        return (type(value), *map(_key, value))
    if isinstance(value, dict):
        return tuple((_key(name), _key(entry)) for name, entry in value.items())
    if isinstance(value, functools.partial):
        return _key((value.func, value.args, value.keywords))
    if isinstance(value, MethodType):  # of the module itself
        return id(value.__func__), type(value.__self__)
    plain = value is None or isinstance(value, bool | int | float | str)
    return (type(value), value) if plain else id(value)


def _module_key(module: Any) -> Hashable:
    """Class, tensors and attributes of a module and of all in it, but for a layer's own index."""
    import torch

    def tensors(named: dict[str, Any]) -> Hashable:
        return tuple((name, None if t is None else (tuple(t.shape), t.dtype)) for name, t in named.items())

    own = vars(torch.nn.Module())  # hooks and the like
    attributes = {name: value for name, value in vars(module).items() if name not in own and name not in _OWN_INDEX}
    children = tuple((name, child and _module_key(child)) for name, child in module._modules.items())
    return type(module), tensors(module._parameters), tensors(module._buffers), _key(attributes), children


def alike(layers: Any, seen: LayerCalls, attentions: Sequence[Hashable]) -> list[list[int]]:
    """The kinds of layers that have more than three, each as its layers' indices.

    Args:
        seen: the calls of all layers.
        attentions: what tells the layers' attentions apart, an entry per layer.
    """
    kinds: dict[Hashable, list[int]] = {}
    for index, (layer, (args, kwargs), output) in enumerate(zip(layers, seen.arguments, seen.outputs, strict=True)):
        rest = output[1:] if isinstance(output, tuple) else None
        key = _module_key(layer), _key(args[1:]), _key(kwargs), attentions[index], _key(rest)
        kinds.setdefault(key, []).append(index)
    return [kind for kind in kinds.values() if len(kind) > len(_TRACED)]


@contextlib.contextmanager
def stand_ins(layers: Any, kinds: list[list[int]], seen: LayerCalls) -> Iterator[None]:
    """All layers of a kind but those that are traced as one node each."""
    import torch

    def stand_in(index: int) -> Any:
        def forward(hidden: Any, *_: Any, **__: Any) -> Any:
            made = torch.onnx.ops.symbolic(
                f"{DOMAIN}::Repeat", (hidden,), {"layer": index}, dtype=hidden.dtype, shape=hidden.shape, version=1
            )
            output = seen.outputs[index]
            return (made, *output[1:]) if isinstance(output, tuple) else made

        return forward

    repeats = [index for kind in kinds for index in set(kind) - {kind[place] for place in _TRACED}]
    for index in repeats:
        layers[index].forward = stand_in(index)
    try:
        yield
    finally:
        for index in repeats:
            del layers[index].forward


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == DOMAIN and node.op_type == op_type


class _Body:
    """The nodes between the residual stream before a layer and after it."""

    def __init__(self, stream: dict[str, ir.Value], prefix: str, layer: int) -> None:
        self.start, self.end = stream[f"hidden_states.{layer}"], stream[f"hidden_states.{layer + 1}"]
        self.prefix = f"{prefix}.{layer}."  # of the names of its parameters
        self._own: dict[ir.Value, bool] = {self.start: True}
        self.own(self.end)
        made = [value for value, own in self._own.items() if own and value is not self.start]
        self.nodes = list(dict.fromkeys(node for value in made if (node := value.producer()) is not None))

    def own(self, value: ir.Value) -> bool:
        """Whether a value depends on the layer's input or on its parameters; others serve all layers."""
        if value not in self._own:
            producer = value.producer()
            if producer is None:
                self._own[value] = value.is_initializer() and (value.name or "").startswith(self.prefix)
            else:
                owned = [self.own(one) for one in producer.inputs if one is not None]  # each, so that all are noted
                self._own[value] = any(owned)
        return self._own[value]


def _same_attributes(a: ir.Node, b: ir.Node) -> bool:
    """Whether two nodes are the same operator; an attention's layer is its own."""

    def seen(node: ir.Node) -> dict[str, Any]:
        attention = _is(node, "CacheAttention")
        found = {name: one.value for name, one in node.attributes.items() if not (attention and name == "layer")}
        return {name: one.tobytes() if isinstance(one, ir.TensorProtocol) else one for name, one in found.items()}

    same = (a.domain, a.op_type, len(a.inputs)) == (b.domain, b.op_type, len(b.inputs))
    return same and seen(a) == seen(b)


def _same(a: _Body, b: _Body) -> bool:
    """Whether two layers compute the same from their inputs and parameters."""
    found: dict[tuple[ir.Value | None, ir.Value | None], bool] = {(a.start, b.start): True}

    def leaf(x: ir.Value, y: ir.Value) -> bool:
        if not (x.is_initializer() and y.is_initializer()) or (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        if x.name == f"{a.prefix}{(y.name or '').removeprefix(b.prefix)}":  # the same place in two layers
            return True
        one, other = x.const_value, y.const_value
        return one is not None and other is not None and one.tobytes() == other.tobytes()

    def compare(x: ir.Value | None, y: ir.Value | None) -> bool:
        if x is None or y is None or x is y:
            return x is y
        if (x, y) not in found:
            one, other = x.producer(), y.producer()
            if one is None or other is None:
                found[x, y] = one is other and leaf(x, y)
            else:
                found[x, y] = (
                    x.index() == y.index()
                    and _same_attributes(one, other)
                    and all(compare(*pair) for pair in zip(one.inputs, other.inputs, strict=True))
                )
        return found[x, y]

    return compare(a.end, b.end)


def _counterpart(
    graph: ir.Graph, value: ir.Value, name: str, stored: Collection[str], buffers: dict[str, Any]
) -> ir.Value:
    """A layer's own initializer in the place of another layer's; a module that layers share has one for all."""
    if name in graph.initializers:
        return graph.initializers[name]
    if name not in stored and name not in buffers:
        return value
    made = ir.Value(name=name, shape=value.shape, type=value.type)
    if value.const_value is not None:
        made.const_value = buffer_tensor(buffers, name, value.const_value.dtype)
        if made.const_value.tobytes() == value.const_value.tobytes():
            return value
    graph.initializers.add(made)
    return made


def _copy(body: _Body, place: ir.Node, counterpart: Callable[[ir.Value], ir.Value]) -> None:
    """Put a copy of a layer's nodes in the place of a Repeat node.

    Args:
        counterpart: another layer's initializer → this layer's.
    """
    twin: dict[ir.Value | None, ir.Value | None] = {None: None, body.start: place.inputs[0]}
    copies = []
    for node in body.nodes:
        for value in node.inputs:
            if value not in twin:
                twin[value] = counterpart(value) if value is not None and body.own(value) else value
        attributes = dict(node.attributes)
        if _is(node, "CacheAttention"):
            attributes["layer"] = place.attributes["layer"]
        copy = ir.Node(
            node.domain,
            node.op_type,
            [twin[value] for value in node.inputs],
            list(attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            twin[old] = new
        copies.append(copy)
    graph, end, old_end = place.graph, twin[body.end], place.outputs[0]
    assert isinstance(graph, ir.Graph)
    assert end is not None
    graph.insert_before(place, copies)
    old_end.replace_all_uses_with(end)
    graph.remove(place, safe=True)
    end.name = old_end.name


def expand(
    model: ir.Model, kinds: list[list[int]], prefix: str, stored: Collection[str], buffers: dict[str, Any]
) -> bool:
    """Replace Repeat nodes by copies of the layers that they repeat, in place.

    Args:
        kinds: from `alike`; the graph has the nodes of three layers of each.
        prefix: name of the list of layers, e.g. `model.layers`.
        stored: names of what a checkpoint gives, in the model's order.
        buffers: name → values of what it does not give.

    Returns:
        Whether the traced layers of each kind compute the same. Where not, the graph is left as it was.
    """
    graph = model.graph
    stream = {str(value.name): value for node in graph for value in node.outputs}
    bodies = [[_Body(stream, prefix, kind[place]) for place in _TRACED] for kind in kinds]
    if not all(_same(first, other) for first, *others in bodies for other in others):
        return False
    body_of = {layer: first for kind, (first, *_) in zip(kinds, bodies, strict=True) for layer in kind}
    for place in [node for node in graph if _is(node, "Repeat")]:
        layer = place.attributes["layer"].as_int()
        body = body_of[layer]

        def counterpart(value: ir.Value, body: _Body = body, layer: int = layer) -> ir.Value:
            name = f"{prefix}.{layer}.{str(value.name).removeprefix(body.prefix)}"
            return _counterpart(graph, value, name, stored, buffers)

        _copy(body, place, counterpart)
    position = {name: index for index, name in enumerate(stored)}
    ordered = sorted(graph.initializers.values(), key=lambda value: position.get(str(value.name), len(position)))
    graph.initializers.clear()
    graph.initializers.update({str(value.name): value for value in ordered})
    return True
