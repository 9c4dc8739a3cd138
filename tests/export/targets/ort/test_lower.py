"""What the lowered steps are made of: node types of a layer, places of fused weights, both steps in one graph."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors

from tests.support.bundles import family, make_bundle, rewritten

SHARED_NORMS = "layers.{}.input_layernorm.weight"


def steps_graph(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(bundle.root / "ort" / "steps.onnx", load_external_data=False).graph


def branches(graph: onnx.GraphProto) -> dict[str, onnx.GraphProto]:
    (choice,) = graph.node
    assert (choice.op_type, list(choice.input)) == ("If", ["lora_step"])
    found = {attribute.name: attribute.g for attribute in choice.attribute}
    return {"lora": found["then_branch"], "refresh": found["else_branch"]}


def layer_nodes(step: onnx.GraphProto, layer: int) -> Counter[str]:
    """Node types from the norm that begins a layer to the next layer's; constants take no time."""
    begin, end = (
        next(i for i, n in enumerate(step.node) if any(SHARED_NORMS.format(number) in name for name in n.input))
        for number in (layer, layer + 1)
    )
    return Counter(node.op_type for node in step.node[begin:end] if node.op_type != "Constant")


def everywhere(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from everywhere(attribute.g)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle of a family, whose weights the exporter may have written in its own order; each is made once."""

    @functools.cache
    def make(name: str, *, own_order: bool = False, **options: Any) -> Bundle:
        options = {"max_seq_len": 64, "drop_layers": (4,)} | options
        return make_bundle(rewritten(name) if own_order else name, tmp_path_factory.mktemp("lower") / "b", **options)

    return make


@pytest.mark.parametrize("dtype", ["float32", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_layer_is_ten_nodes(made, name, dtype):
    """Two norms with their additions, four products, attention with its rotation, a split, and the gate's two."""
    bundle = made(name, own_order=True, dtype=dtype)
    product = "Gemm" if dtype == "float32" else "MatMulNBits"
    expected = {
        "SkipSimplifiedLayerNormalization": 2,
        product: 4,
        "Split": 1,
        "GroupQueryAttention": 1,
        "QuickGelu": 1,
        "Mul": 1,
    }
    if dtype == "float32":
        expected["Reshape"] = 2  # around attention, which wants [B, S, H·D]
    steps = branches(steps_graph(bundle))
    assert layer_nodes(steps["lora"], 2) == expected
    expected["GatherND"] = 2  # around attention, which wants padded rows
    assert layer_nodes(steps["refresh"], 2) == expected


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_a_layer_between_surrogates_is_ten_nodes(made, dtype):
    """Rows [B, d] that a surrogate reads do not make rows of all that leads there, and its sum is fused like any."""
    bundle = made("llama", own_order=True, drop_layers=(1, 2, 5), rank=4, always_first=1, dtype=dtype)
    step = branches(steps_graph(bundle))["lora"]
    kinds = Counter(node.op_type for node in step.node)
    assert kinds["SkipSimplifiedLayerNormalization"] == 5 * 2 + 1 - 3  # not the first norm, and those behind surrogates
    if dtype == "int4":
        assert kinds["Reshape"] == 2 * 2  # before and behind each run of surrogates


def test_checkpoint_as_it_lies_is_fused_where_it_can_be(made):
    """In the alphabetical order of safetensors gate and up are neighbours, q, k and v are not."""
    bundle = made("llama")
    graph = steps_graph(bundle)
    nodes = layer_nodes(branches(graph)["refresh"], 2)
    assert nodes["Gemm"] == 6
    assert nodes["Split"] == 1
    fused = next(t for t in graph.initializer if t.name == "model.layers.2.mlp.gate_proj+up_proj.weight")
    entry = {e.key: e.value for e in fused.external_data}
    tensors = read_tensors(bundle.root / entry["location"])
    whole = np.fromfile(
        bundle.root / entry["location"], np.float32, int(entry["length"]) // 4, offset=int(entry["offset"])
    )
    parts = [tensors[f"model.layers.2.mlp.{part}_proj.weight"].read().reshape(-1) for part in ("gate", "up")]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("least", [1, 4])
def test_attention_is_folded_where_groups_are_large(tmp_path, monkeypatch, least):
    monkeypatch.setattr("lora_drop_export.targets.ort.attention.MIN_FOLD", least)
    graph = steps_graph(make_bundle("llama", tmp_path / "b", drop_layers=(4,)))  # two query heads share K and V
    layers = {name: layer_nodes(step, 2) for name, step in branches(graph).items()}
    assert {nodes["If"] for nodes in layers.values()} == {1 if least == 1 else 0}
    folded = [n for n in everywhere(graph) if any(a.name == "causal" for a in n.attribute)]
    assert len(folded) == (family("llama").checkpoint.config.num_hidden_layers * 2 - 1 if least == 1 else 0)


@pytest.mark.parametrize(
    ("name", "options"), [("llama", {}), ("llama_mqa", {}), ("llama", {"dtype": "int4"}), ("llama", {"policy": "fill"})]
)
def test_no_weight_is_read_in_an_if_within_an_if(made, name, options):
    """ONNX Runtime packs weights for its kernels in the branches of one If, and in none of deeper ones."""
    graph = steps_graph(made(name, **options))
    weights = {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    deeper = [
        node
        for step in branches(graph).values()
        for choice in step.node
        for attribute in choice.attribute
        if attribute.HasField("g")
        for node in everywhere(attribute.g)
    ]
    assert {node.op_type for node in deeper} >= {"GatherND", "NonZero"}
    assert not weights & {name for node in deeper for name in node.input}


def test_rotary_tables_are_the_models(made):
    """The tables that attention gets are cos and sin of transformers, for every position that a row can have."""
    import torch

    source = family("llama")
    graph = steps_graph(made("llama", own_order=True, dtype="float32"))
    tables = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.startswith("rotary.")]
    positions = torch.arange(64)[None]
    cos, sin = source.model.model.rotary_emb(torch.zeros(1, 1, dtype=torch.float32), positions)
    assert len(tables) == 2
    for ours, theirs in zip(tables, (cos, sin), strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, : ours.shape[1]].numpy(), atol=1e-6)


def test_scales_of_int8_caches_broadcast_to_them(made):
    """As the operator's schema wants it: a cache is [B, Hkv, slots, D]."""
    graph = steps_graph(made("llama", kv_dtype="int8"))
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    scales = {name for node in everywhere(graph) if node.op_type == "GroupQueryAttention" for name in node.input[12:14]}
    config = family("llama").checkpoint.config
    assert len(scales) == 2 * config.num_hidden_layers
    assert {tuple(shapes[name]) for name in scales} == {(1, config.num_key_value_heads, 1, 16)}


def test_no_weight_twice(made):
    """Both steps name the same initializers of the outer graph, and none holds data of its own."""
    graph = steps_graph(made("llama"))
    names = [tensor.name for tensor in graph.initializer]
    assert len(set(names)) == len(names)
    weights = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    inline = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert all(t.name.startswith("rotary.") or len(t.raw_data) < 100 for t in inline)  # shapes, RoPE's frequencies
    assert len(weights) > 50
    assert all(not branch.initializer for branch in branches(graph).values())
    tensors = {name for node in branches(graph)["lora"].node for name in node.input} & set(names)
    assert not any(".layers.4." in name for name in tensors)
