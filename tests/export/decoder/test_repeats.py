"""Layers that are alike are traced once: what a trace of every layer gives, and where it cannot be, every layer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from lora_drop_runtime.errors import ModelError
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_drop_export.decoder import trace as tracing
from lora_drop_export.decoder.parameters import buffer_tensor
from lora_drop_export.decoder.trace import TracedModel, trace
from tests.support.bundles import family_trace, traced_model
from tests.support.models import gemma3, gemma4, llama


def seen(traced: TracedModel) -> tuple:
    """Nodes by operator, attentions in their order, weights and what feeds each layer's products.

    As a file holds them, floats in single precision: the shared trace of a family may come from another worker's file.
    """
    nodes = list(ir.serde.deserialize_model(ir.serde.serialize_model(traced.graph)).graph)
    attentions = [dict(n.attributes) for n in nodes if n.op_type == "CacheAttention"]
    products = [n.inputs[1].name for n in nodes if n.op_type in ("MatMul", "Gemm") and n.inputs[1].is_initializer()]
    return (
        Counter(node.op_type for node in nodes),
        [{name: one.value for name, one in attributes.items()} for attributes in attentions],
        list(traced.parameters.items()),
        products,
        traced.embedding_only,
    )


def weights_of(traced: TracedModel, layer: int) -> set[str]:
    """Weights that nodes between a layer's residual inputs read."""
    named = {value.name: value for node in traced.graph.graph for value in node.outputs}
    start, found, waiting = named[f"hidden_states.{layer}"], set(), [named[f"hidden_states.{layer + 1}"]]
    while waiting:
        value = waiting.pop()
        if value is None or value is start:
            continue
        if value.is_initializer() and value.name in traced.parameters:
            found.add(value.name)
        elif value.producer() is not None:
            waiting.extend(value.producer().inputs)
    return found


def test_equals_a_trace_of_every_layer(monkeypatch):
    """The first of each of two kinds is traced, also behind several of the other, as in Gemma 3.

    The others are one node as long as they follow each other, and their weights are no inputs of the tracer.
    """
    export, exported = tracing._export, []

    def noted(wrapper):
        program = export(wrapper)
        exported.append(
            (
                Counter(node.op_type for node in program.model.graph),
                {
                    name.split(".layers.")[1].split(".")[0]
                    for name in dict(wrapper.named_parameters())
                    if ".layers." in name
                },
            )
        )
        return program

    monkeypatch.setattr(tracing, "_export", noted)
    windowed, full = "sliding_attention", "full_attention"
    source = traced_model(gemma3(num_hidden_layers=4, layer_types=[windowed, windowed, full, windowed]))
    ((nodes, layers),) = exported
    assert nodes["CacheAttention"] == 2
    assert nodes["Repeat"] == 2
    assert layers == {"0", "2"}
    monkeypatch.setattr(tracing, "alike", lambda *_: [])
    every = trace(source.checkpoint, "float32")
    assert exported[1][0]["CacheAttention"] == len(every.windows) == 4
    assert seen(source.traced) == seen(every)
    for layer in range(4):
        assert weights_of(source.traced, layer) == weights_of(every, layer)
        assert all(f".{layer}." in weight for weight in weights_of(every, layer))


def test_layers_with_arguments_of_their_own(monkeypatch):
    """Each node in the place of such a layer takes them; K and V of another layer serve all."""
    own = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 2}
    export, repeats = tracing._export, []

    def noted(wrapper):
        program = export(wrapper)
        repeats.append([len(node.inputs) for node in program.model.graph if node.op_type == "Repeat"])
        return program

    monkeypatch.setattr(tracing, "_export", noted)
    source = traced_model(gemma4(**own))
    monkeypatch.setattr(tracing, "alike", lambda *_: [])
    every = trace(source.checkpoint, "float32")
    assert seen(source.traced) == seen(every)
    for layer in range(3):
        assert weights_of(source.traced, layer) == weights_of(every, layer)
    assert repeats == [[2], []]


def test_half_precision():
    kinds = Counter(node.op_type for node in family_trace("qwen3", "float16").graph.graph)
    assert kinds["CacheAttention"] == 8
    assert not kinds["Repeat"]


def times_number(y, other, _):
    return y * (3.0 if other else 2.0)


def times_tensor(y, other, _):
    return y * torch.tensor(3.0 if other else 2.0)


def times_kept(y, other, kept):
    return y * kept[other]


def times_both(y, other, _):
    return (y * 2.0, y * 3.0)[other]


def one_differs(monkeypatch, differs, times):
    """A Llama of five layers, one of which multiplies by 3, where the others multiply by 2."""
    forward = LlamaMLP.forward
    model = llama(num_hidden_layers=5)
    order, kept = {}, (torch.tensor(2.0), torch.tensor(3.0))

    def scaled(self, x):
        index = order.setdefault(id(self), len(order))  # in the order of the first calls
        return times(forward(self, x), index == differs, kept)

    monkeypatch.setattr(LlamaMLP, "forward", scaled)
    return model


class Known(Exception):
    """The kinds of layers."""


def kinds_of(monkeypatch, model):
    """The layers of each kind of which there are several."""
    alike = tracing.alike

    def known(*arguments):
        raise Known(alike(*arguments))

    monkeypatch.setattr(tracing, "alike", known)
    with pytest.raises(Known) as caught:
        traced_model(model)
    return caught.value.args[0]


@pytest.mark.parametrize("times", [times_number, times_tensor, times_kept, times_both])
@pytest.mark.parametrize("differs", [0, 2, 4])
def test_a_layer_that_computes_something_else(monkeypatch, times, differs):
    """No attribute and no argument tells the layers apart, but what they do."""
    others = [index for index in range(5) if index != differs]
    assert kinds_of(monkeypatch, one_differs(monkeypatch, differs, times)) == [others]


def test_arithmetic_with_a_layers_own_index(monkeypatch):
    """Each layer is of a kind of its own."""
    forward, model, scales = LlamaMLP.forward, llama(num_hidden_layers=3), {}

    def scaled(self, x):
        index = scales.setdefault(id(self), len(scales))  # in the order of the first calls
        return forward(self, x) * (1.5 + index)

    monkeypatch.setattr(LlamaMLP, "forward", scaled)
    assert kinds_of(monkeypatch, model) == []


def test_a_buffer_that_nothing_gives_is_refused(monkeypatch):
    """Neither the checkpoint nor transformers: the bundle would compute with whatever lay there."""
    init = LlamaMLP.__init__

    def with_buffer(self, config):
        init(self, config)
        self.register_buffer("factor", torch.ones(64), persistent=False)

    monkeypatch.setattr(LlamaMLP, "__init__", with_buffer)
    buffers, unknown = tracing.buffer_values(llama(num_hidden_layers=1)), "model.layers.0.mlp.factor"
    assert buffers.keys() > {unknown}
    for name in buffers.keys() - {unknown}:
        assert np.array_equal(buffer_tensor(buffers, name, ir.DataType.FLOAT).numpy(), buffers[name].numpy())
    with pytest.raises(ModelError, match="buffer whose values are unknown") as caught:
        buffer_tensor(buffers, unknown, ir.DataType.FLOAT)
    assert caught.value.note.startswith(f"{unknown} is in no checkpoint")


def test_what_a_layer_computes_is_in_the_graph(monkeypatch):
    """One differs by what it does, one by the values of its buffers alone.

    A graph has one initializer for buffers that are equal, and one for the other.
    """
    model = one_differs(monkeypatch, 1, times_number)
    init, forward, values_of = LlamaMLP.__init__, LlamaMLP.forward, tracing.buffer_values

    def with_buffer(self, config):
        init(self, config)
        self.register_buffer("factor", torch.ones(64), persistent=False)

    def filled(model):
        other = "model.layers.3.mlp.factor"
        factors = {name: torch.full((64,), 3.0 if name == other else 2.0) for name in values_of(model) if "mlp" in name}
        return values_of(model) | factors

    monkeypatch.setattr(LlamaMLP, "__init__", with_buffer)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * (self.factor + 1))
    monkeypatch.setattr(tracing, "buffer_values", filled)
    graph = traced_model(model).traced.graph.graph
    stream = {value.name: value for node in graph for value in node.outputs}
    factors = []
    for layer in range(5):
        halves = [value.producer() for value in stream[f"hidden_states.{layer + 1}"].producer().inputs]
        (by_buffer,) = [node for node in halves if node.op_type == "Mul"]
        (by_number,) = [value.producer() for value in by_buffer.inputs if not value.is_initializer()]
        numbers = [
            set(value.const_value.numpy().flatten().tolist())
            for node in (by_number, by_buffer)
            for value in node.inputs
            if value.is_initializer()
        ]
        factors.append(numbers)
    assert factors == [[{2.0}, {3.0}], [{3.0}, {3.0}], [{2.0}, {3.0}], [{2.0}, {4.0}], [{2.0}, {3.0}]]
