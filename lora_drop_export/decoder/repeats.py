"""Layers that are alike are traced once, and the others are copies of what was traced.

Enters: a model whose layers ran once on fake tensors, with their arguments and with every call of torch that they made.
Of every kind of layer the first one is traced. The others are modules without parameters, and as many of them as follow
each other are a single `lora_drop::Repeat` node, which `expand` replaces by copies of the first one's nodes over their
own parameters. Alike are layers of equal modules, attributes, buffers and arguments which made the same calls. So code
that reckons with a layer's own index is seen in each of them. An argument may be a tensor of each layer's own, such as
Gemma 4's embeddings for each layer: a node then stands for one layer, and takes it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import onnx_ir as ir

from .anatomy import first_output
from .attention_interface import DOMAIN

_OWN_INDEX = ("layer_idx", "layer_id", "layer_index")  # of a layer or of a module in it


def _key(value: Any, places: Mapping[int, Hashable]) -> Hashable:
    """Equal for what the traced code cannot tell apart: the same object, or plain values that are equal.

    Args:
        places: id of a tensor of the layer's own → what names it in every layer.
    """
    if isinstance(value, tuple | list):
        return (type(value), *(_key(entry, places) for entry in value))
    if isinstance(value, dict):
        return tuple((_key(name, places), _key(entry, places)) for name, entry in value.items())
    if isinstance(value, slice):
        return slice, _key((value.start, value.stop, value.step), places)
    if isinstance(value, functools.partial):
        return _key((value.func, value.args, value.keywords), places)
    if isinstance(value, MethodType):  # of the module itself
        return id(value.__func__), type(value.__self__)
    import torch

    if isinstance(value, torch.nn.Module) and not (value._parameters or value._buffers or value._modules):
        return _module_key(value)  # such as a function that kernels may replace, of which each attention has its own
    plain = value is None or isinstance(value, bool | int | float | str | torch.device | torch.dtype)
    return (type(value), value) if plain else places.get(id(value), id(value))


def _recorder(layer: Any, arguments: tuple[Any, ...], alive: list[Any]) -> Any:
    """A mode that notes the calls of torch that a layer makes; its tensors are named by where they come from.

    Args:
        arguments: of the layer, its input first.
        alive: takes what the record names by its identity, which is nobody else's as long as it lives.
    """
    import torch

    class Recorder(torch.overrides.TorchFunctionMode):  # type: ignore[misc]  # torch is not type-checked here
        def __init__(self) -> None:
            super().__init__()
            tensors = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
            self.places: dict[int, Hashable] = {id(tensor): name for name, tensor in tensors}
            self.places |= {id(one): ((), n) for n, one in enumerate(arguments) if isinstance(one, torch.Tensor)}
            self.calls: list[Hashable] = []

        def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            # An attention's node says its layer; what else it says, the caller has seen
            symbolic = str(getattr(function, "namespace", "")) == "onnx_symbolic"
            given = [one for one in args if isinstance(one, tuple | list)] if symbolic else [args, kwargs or {}]
            self.calls.append((function, _key(given, self.places)))
            result = function(*args, **(kwargs or {}))
            alive.append((args, kwargs, result))
            for index, one in enumerate(result if isinstance(result, tuple | list) else (result,)):
                if isinstance(one, torch.Tensor):
                    self.places[id(one)] = len(self.calls), index
            return result

    return Recorder()


@dataclass
class LayerCalls:
    """What each layer was called with, the calls of torch that it made, and what it gave, in order."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    computed: list[Hashable] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    _alive: list[Any] = field(default_factory=list)

    @contextlib.contextmanager
    def noted(self, layers: Any) -> Iterator[None]:
        """Note the calls of these layers."""

        def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.arguments.append((args, kwargs))
            self.outputs.append(output)

        def recorded(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                with _recorder(layer, args, self._alive) as seen:
                    output = forward(*args, **kwargs)
                self.computed.append((tuple(seen.calls), _key(first_output(output), seen.places)))
                return output

            return record

        hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
        for layer in layers:
            layer.forward = recorded(layer, layer.forward)
        try:
            yield
        finally:
            for layer, hook in zip(layers, hooks, strict=True):
                del layer.forward
                hook.remove()

    @property
    def is_complex(self) -> bool:
        """Whether a layer was given complex numbers."""
        import torch

        given = [one for args, kwargs in self.arguments for one in (*args, *kwargs.values())]
        return any(isinstance(one, torch.Tensor) and one.is_complex() for one in given)

    def own(self, layer: int) -> tuple[int, ...]:
        """The places of the tensors behind its input that a layer alone was given."""
        import torch

        others = {id(one) for n, (args, _) in enumerate(self.arguments) if n != layer for one in args}
        args = self.arguments[layer][0]
        return tuple(n for n, one in enumerate(args) if n and isinstance(one, torch.Tensor) and id(one) not in others)


def _module_key(module: Any) -> Hashable:
    """Class, tensors and attributes of a module and of all in it, but for a layer's own index."""
    import torch

    def tensors(named: dict[str, Any]) -> Hashable:
        return tuple((name, None if t is None else (tuple(t.shape), t.dtype)) for name, t in named.items())

    own = vars(torch.nn.Module())  # hooks and the like
    attributes = {name: value for name, value in vars(module).items() if name not in own and name not in _OWN_INDEX}
    children = tuple((name, child and _module_key(child)) for name, child in module._modules.items())
    return type(module), tensors(module._parameters), tensors(module._buffers), _key(attributes, {}), children


def alike(
    layers: Any, seen: LayerCalls, attentions: Sequence[Hashable], prefix: str, buffers: Mapping[str, Any]
) -> list[list[int]]:
    """The kinds of layers that have more than one, each as its layers' indices.

    Args:
        seen: the calls of all layers.
        attentions: what tells the layers' attentions apart, an entry per layer.
        prefix: name of the list of layers, e.g. `model.layers`.
        buffers: name → values of what a checkpoint does not give.
    """
    kinds: dict[Hashable, list[int]] = {}
    for index, (layer, (args, kwargs), output) in enumerate(zip(layers, seen.arguments, seen.outputs, strict=True)):
        rest = output[1:] if isinstance(output, tuple) else None
        places = {id(args[n]): (n, tuple(args[n].shape), args[n].dtype) for n in seen.own(index)}
        given = _key((args[1:], kwargs, rest), places)
        own = (buffers.get(f"{prefix}.{index}.{name}") for name, _ in layer.named_buffers())
        values = tuple(None if buffer is None else buffer.float().numpy().tobytes() for buffer in own)
        key = _module_key(layer), given, attentions[index], seen.computed[index], values
        kinds.setdefault(key, []).append(index)
    return [kind for kind in kinds.values() if len(kind) > 1]


@contextlib.contextmanager
def stand_ins(layers: Any, kinds: list[list[int]], seen: LayerCalls) -> Iterator[frozenset[int]]:
    """All layers of a kind but its first are no layers: as many as follow each other are one node.

    Gives:
        The layers that pass on what they are given, because the node of one before them stands for them, too.
    """
    import torch

    class StandIn(torch.nn.Module):  # type: ignore[misc]  # torch is not type-checked here
        def __init__(self, index: int, count: int) -> None:
            super().__init__()
            self.index, self.count = index, count
            self.__dict__["layer"] = layers[index]  # not a child, whose parameters would be traced

        def __getattr__(self, name: str) -> Any:  # what a model asks its layers, such as which mask they want
            return getattr(self.layer, name)

        def forward(self, *args: Any, **_: Any) -> Any:
            hidden = args[0]
            if self.count:
                attributes = {"first": self.index, "count": self.count}
                given = hidden, *(args[n] for n in seen.own(self.index))
                hidden = torch.onnx.ops.symbolic(
                    f"{DOMAIN}::Repeat", given, attributes, dtype=hidden.dtype, shape=hidden.shape, version=1
                )
            output = seen.outputs[self.index]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    repeats = sorted(index for kind in kinds for index in kind[1:])
    passing = frozenset(index for index in repeats if index - 1 in repeats and not seen.own(index))
    made = {}
    for index in repeats:
        after = next(later for later in range(index + 1, len(layers) + 1) if later not in passing)
        made[index] = StandIn(index, 0 if index in passing else after - index).eval()
    replaced = {index: layers[index] for index in repeats}
    try:
        for index, stand_in in made.items():
            layers[index] = stand_in
        yield passing
    finally:
        for index, layer in replaced.items():
            layers[index] = layer


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == DOMAIN and node.op_type == op_type


def argument_name(layer: int, place: int) -> str:
    """Of a tensor that a layer alone is given, in the graph."""
    return f"argument.{layer}.{place}"


class _Body:
    """The nodes between the residual stream before a layer and after it.

    Args:
        named: values of the graph, by name.
        places: of the tensors that the layer alone is given.
    """

    def __init__(self, named: dict[str, ir.Value], prefix: str, layer: int, places: tuple[int, ...]) -> None:
        self.start, self.end = named[f"hidden_states.{layer}"], named[f"hidden_states.{layer + 1}"]
        self.given = [named[argument_name(layer, place)] for place in places]
        self.prefix = f"{prefix}.{layer}."  # of the names of its parameters
        begins = dict.fromkeys([self.start, *self.given], True)
        streams = {value: False for name, value in named.items() if name.startswith("hidden_states.")}
        del streams[self.end]
        self._own: dict[ir.Value, bool] = streams | begins
        self.own(self.end)
        made = [value for value, own in self._own.items() if own and value not in begins]
        self.nodes = list(dict.fromkeys(node for value in made if (node := value.producer()) is not None))

    def own(self, value: ir.Value) -> bool:
        """Whether a value depends on what the layer is given or on its parameters; others serve all layers."""
        if value not in self._own:
            producer = value.producer()
            if producer is None:
                self._own[value] = value.is_initializer() and (value.name or "").startswith(self.prefix)
            else:
                owned = [self.own(one) for one in producer.inputs if one is not None]  # each, so that all are noted
                self._own[value] = any(owned)
        return self._own[value]


def _counterpart(graph: ir.Graph, value: ir.Value, name: str, stored: Collection[str]) -> ir.Value:
    """A layer's own parameter in the place of another layer's; what no checkpoint gives is equal in both."""
    if name not in stored:
        return value
    made = ir.Value(name=name, shape=value.shape, type=value.type)
    graph.initializers.add(made)
    return made


def _copy(
    body: _Body,
    place: ir.Node,
    layer: int,
    given: Sequence[ir.Value | None],
    counterpart: Callable[[ir.Value], ir.Value],
) -> ir.Value:
    """Put a copy of a layer's nodes before a Repeat node; returns its output.

    Args:
        layer: which one the copy is.
        given: its input, and the tensors of its own.
        counterpart: another layer's initializer → this layer's.
    """
    twin: dict[ir.Value | None, ir.Value | None] = {None: None}
    twin |= zip([body.start, *body.given], given, strict=True)
    copies = []
    for node in body.nodes:
        for value in node.inputs:
            if value not in twin:
                twin[value] = counterpart(value) if value is not None and body.own(value) else value
        attributes = dict(node.attributes)
        if any(_is(node, name) for name in ("CacheAttention", "CacheConvolution", "CacheRecurrence")):
            attributes["layer"] = ir.AttrInt64("layer", layer)
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
    graph, end = place.graph, twin[body.end]
    assert isinstance(graph, ir.Graph)
    assert end is not None
    graph.insert_before(place, copies)
    end.name = f"hidden_states.{layer + 1}"
    return end


def expand(model: ir.Model, kinds: list[list[int]], seen: LayerCalls, prefix: str, stored: Collection[str]) -> None:
    """Replace Repeat nodes by copies of the layers that they repeat, in place.

    Args:
        kinds: from `alike`; the graph has the nodes of the first layer of each.
        seen: the calls of all layers.
        prefix: name of the list of layers, e.g. `model.layers`.
        stored: names of what a checkpoint gives, in the model's order.
    """
    graph = model.graph
    stream = {str(value.name): value for node in graph for value in node.outputs}
    bodies = [_Body(stream, prefix, kind[0], seen.own(kind[0])) for kind in kinds]
    body_of = {layer: body for kind, body in zip(kinds, bodies, strict=True) for layer in kind}
    for place in [node for node in graph if _is(node, "Repeat")]:
        (hidden, *own), first = place.inputs, place.attributes["first"].as_int()
        for layer in range(first, first + place.attributes["count"].as_int()):

            def counterpart(value: ir.Value, body: _Body = body_of[layer], layer: int = layer) -> ir.Value:
                name = f"{prefix}.{layer}.{str(value.name).removeprefix(body.prefix)}"
                return _counterpart(graph, value, name, stored)

            hidden = _copy(body_of[layer], place, layer, [hidden, *own], counterpart)
        assert hidden is not None
        for body in bodies:
            if body.start is place.outputs[0]:  # the first layer of its kind comes behind this node
                body.start = hidden
        place.outputs[0].replace_all_uses_with(hidden)
        graph.remove(place, safe=True)
    position = {name: index for index, name in enumerate(stored)}
    ordered = sorted(graph.initializers.values(), key=lambda value: position.get(str(value.name), len(position)))
    graph.initializers.clear()
    graph.initializers.update({str(value.name): value for value in ordered})
