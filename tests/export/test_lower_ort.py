"""What the lowered steps are made of: node types of a layer, places of fused weights, both steps in one graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from lora_drop_runtime.bundle import Bundle
from lora_drop_runtime.safetensors_file import read_tensors
from lora_drop_runtime.session import Session

from lora_drop_export.compiler import ExportOptions, write_bundle
from lora_drop_export.console import Console
from tests.bundles import PROMPTS, family, make_bundle

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


def written(tmp_path: Path, name: str, **options: object) -> Bundle:
    """A bundle whose weights the exporter wrote in its own order: as from a checkpoint in another dtype."""
    import torch

    from lora_drop_export.checkpoint import open_checkpoint

    source = family(name)
    model = tmp_path / "model"
    source.model.to(torch.bfloat16).save_pretrained(model)
    source.model.to(torch.float32)
    checkpoint = open_checkpoint(str(model), tmp_path / "scratch")
    root = tmp_path / "b"
    root.mkdir()
    return write_bundle(root, checkpoint, source.traced, "float32", ExportOptions(max_seq_len=64, **options), Console())


@pytest.mark.parametrize("dtype", ["float32", "int4"])
@pytest.mark.parametrize("step", ["refresh", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_layer_is_thirteen_nodes(tmp_path, name, step, dtype):
    """Two norms with their additions, four products, two splits, two rotations, attention, and the gate's two."""
    bundle = written(tmp_path, name, drop_layers=(4,), dtype=dtype)
    product = "Gemm" if dtype == "float32" else "MatMulNBits"
    expected = {
        "SkipSimplifiedLayerNormalization": 2,
        product: 4,
        "Split": 2,
        "RotaryEmbedding": 2,
        "GroupQueryAttention": 1,
        "QuickGelu": 1,
        "Mul": 1,
    }
    if dtype == "float32":
        expected["Reshape"] = 2  # around attention, which wants [B, S, H·D]
    assert layer_nodes(branches(steps_graph(bundle))[step], 2) == expected


def test_checkpoint_as_it_lies_is_fused_where_it_can_be(tmp_path):
    """In the alphabetical order of safetensors gate and up are neighbours, q, k and v are not."""
    bundle = make_bundle("llama", tmp_path / "b", drop_layers=(4,))
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


def test_fused_weights_change_nothing(tmp_path):
    """The same tokens as from the unfused checkpoint in bfloat16's values."""
    bundle = written(tmp_path, "llama")
    lies = tmp_path / "values"
    import torch
    from safetensors.torch import load_file, save_file

    from lora_drop_export.checkpoint import open_checkpoint

    tensors = {n: t.to(torch.float32) for n, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    lies.mkdir()
    (lies / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    save_file(tensors, lies / "model.safetensors", {"format": "pt"})
    (tmp_path / "b2").mkdir()
    options = ExportOptions(max_seq_len=64)
    checkpoint = open_checkpoint(str(lies), tmp_path / "scratch2")
    plain = write_bundle(tmp_path / "b2", checkpoint, family("llama").traced, "float32", options, Console())
    results = []
    for made in (bundle, plain):
        with Session.open(made.root, threads=1) as session:
            results.append([row.tolist() for row in session.generate(PROMPTS, 12, stop_token_ids=())])
    assert results[0] == results[1]


@pytest.mark.parametrize("least", [1, 4])
def test_attention_is_folded_where_groups_are_large(tmp_path, monkeypatch, least):
    monkeypatch.setattr("lora_drop_export.lower_ort.MIN_FOLD", least)
    graph = steps_graph(make_bundle("llama", tmp_path / "b", drop_layers=(4,)))  # two query heads share K and V
    layers = {name: layer_nodes(step, 2) for name, step in branches(graph).items()}
    assert all(nodes["If"] == (1 if least == 1 else 0) for nodes in layers.values())
    folded = [n for n in everywhere(graph) if any(a.name == "causal" for a in n.attribute)]
    assert len(folded) == (family("llama").checkpoint.config.num_hidden_layers * 2 - 1 if least == 1 else 0)


def test_no_weight_twice(tmp_path):
    """Both steps name the same initializers of the outer graph, and none holds data of its own."""
    graph = steps_graph(make_bundle("llama", tmp_path / "b", drop_layers=(4,)))
    names = [tensor.name for tensor in graph.initializer]
    assert len(set(names)) == len(names)
    weights = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < 100  # RoPE's frequencies
    assert len(weights) > 50
    assert all(not branch.initializer for branch in branches(graph).values())
    tensors = {name for node in branches(graph)["lora"].node for name in node.input} & set(names)
    assert not any(".layers.4." in name for name in tensors)
