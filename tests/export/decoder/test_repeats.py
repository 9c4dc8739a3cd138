"""Layers that are alike are traced once: what a trace of every layer gives, and where it cannot be, every layer."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_drop_export.decoder import trace as tracing
from lora_drop_export.decoder.trace import TracedModel, trace
from tests.support.bundles import family, family_trace, traced_model
from tests.support.models import llama


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
    """Two kinds of layers take turns."""
    source = family("gemma2")
    monkeypatch.setattr(tracing, "alike", lambda *_: [])
    every = trace(source.checkpoint, "float32")
    assert seen(source.traced) == seen(every)
    for layer in range(len(every.windows)):
        assert weights_of(source.traced, layer) == weights_of(every, layer)
        assert all(f".{layer}." in weight for weight in weights_of(every, layer))


def test_half_precision():
    kinds = Counter(node.op_type for node in family_trace("qwen3", "bfloat16").graph.graph)
    assert kinds["CacheAttention"] == 8
    assert not kinds["Repeat"]


def test_arithmetic_with_a_layers_own_index(monkeypatch):
    """No attribute and no argument shows it: the last layer's nodes do."""
    forward = LlamaMLP.forward
    model = llama(num_hidden_layers=5)
    scales = {}

    def scaled(self, x):
        index = scales.setdefault(id(self), len(scales))  # in the order of the first calls
        return forward(self, x) * (1.5 + index)

    monkeypatch.setattr(LlamaMLP, "forward", scaled)
    traced = traced_model(model).traced
    constants = {
        float(value.const_value.numpy())
        for node in traced.graph.graph
        if node.op_type == "Mul"
        for value in node.inputs
        if value.is_initializer() and value.const_value.size == 1 and value.name not in traced.parameters
    }
    assert {1.5 + index for index in range(len(traced.windows))} <= constants
