"""The TensorRT targets: what the parser gets, what tensorrt-rtx builds from it, and which weights the engines hold.

tensorrt-rtx builds without a GPU, so these are real engines. Their numbers are those of the graphs: the same ONNX runs
on ONNX Runtime's CPU provider (tests/export/test_against_oracle.py, every family). Running an engine needs a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lora_drop_runtime import BundleError, InputError, ModelError, Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.engines.engine import STANDING_SLOTS
from lora_drop_runtime.errors import NoDeviceError
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_drop_export.cli import _print_exported, main
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.targets.openvino.lower import openvino_from_neutral
from lora_drop_export.targets.ort.lower import lower_step
from lora_drop_export.targets.trt.build import EngineBuilder
from lora_drop_export.targets.trt.lower import trt_from_neutral
from lora_drop_export.targets.trt.options import COMPUTE_CAPABILITIES, BuilderOptions, check_buildable
from lora_drop_export.targets.trt.profiles import lora_profiles, refresh_profiles
from lora_drop_export.targets.trt.target import _report_engine, static_slots
from lora_drop_export.targets.trt.weight_inputs import check_one_copy
from tests.export.targets.trt.test_against_oracle import parse_refresh_alone
from tests.support.bundles import family, family_trace, make_bundle, more_family, rewritten, traced_family
from tests.support.fake_cuda import FakeCuda, cudaError_t
from tests.support.models import gemma3
from tests.support.trt_graphs import ADA, LAYERS, RTX, of_family

PLAN = {"surrogate": "recurrent", "rank": 4, "always_first": 1}
PROFILES = lora_profiles(8)
DTYPES = {1: "float32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


def neutral(bundle: Bundle, kind: StepKind) -> onnx.ModelProto:
    return onnx.load(bundle.root / f"{kind.value}.onnx", load_external_data=False)


def graph_of(bundle: Bundle, kind: StepKind) -> onnx.ModelProto:
    return onnx.load(bundle.root / bundle.target(RTX)[1].graphs[kind.value], load_external_data=False)


def snapshot(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """Both kinds of target in one bundle, with state and adapters."""
    root = tmp_path_factory.mktemp("trt") / "b"
    return make_bundle(of_family("llama"), root, targets=("ort", RTX), max_prompt_len=40, **PLAN)


@pytest.mark.parametrize("kind", StepKind)
def test_the_parsed_network_has_the_inputs_and_outputs_of_the_table(kind, bundle):
    """Name, dtype and shape of all, and beside them only the weights of weights.json."""
    builder = EngineBuilder(RTX, bundle.root, BuilderOptions(), Console())
    network = builder.parse(graph_of(bundle, kind))[1]
    trt = builder.trt
    dtypes = {trt.float32: "float32", trt.int64: "int64"}
    io, slots = bundle.manifest.io(kind, RTX), bundle.target(RTX)[1].slots
    sizes = {"batch": -1, "sequence": -1, "rows": -1} | {f"slots_{group}": size for group, size in slots.items()}
    inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
    outputs = {t.name: t for t in (network.get_output(i) for i in range(network.num_outputs))}
    for specs, tensors in ((io.inputs, inputs), (io.outputs, outputs)):
        for spec in specs:
            tensor = tensors[spec.name]
            assert (dtypes[tensor.dtype], tuple(tensor.shape)) == (spec.dtype, spec.sized(sizes)), spec.name
    assert list(outputs) == [spec.name for spec in io.outputs]
    types = [network.get_layer(i).type for i in range(network.num_layers)]
    plan = bundle.manifest.plan
    layers = plan.num_layers if kind is StepKind.REFRESH else len(plan.kept_attentions)
    natives = {"KV_CACHE_UPDATE": 2, "ROTARY_EMBEDDING": 2, "ATTENTION_INPUT": 1, "ATTENTION_OUTPUT": 1}
    for name, each in natives.items():  # TensorRT's own layers, not arithmetic
        assert types.count(getattr(trt.LayerType, name)) == each * layers, name
    weights = bundle.weight_inputs(RTX)
    extra = set(inputs) - {spec.name for spec in io.inputs}
    assert extra <= set(weights)
    assert all(tuple(inputs[name].shape) == weights[name].shape for name in extra)


def test_every_weight_is_an_input_once(bundle):
    """The table covers all weights of the checkpoint and the adapters, each byte once; both steps share names."""
    table = bundle.weight_inputs(RTX)
    places = sorted(place for weight in table.values() for place in weight.parts)
    assert len({(location, offset) for location, offset, _ in places}) == len(places)
    files = {location for location, _, _ in places}
    tensors = {(f, t.offset_bytes): t for f in files for t in read_tensors(bundle.root / f).values()}
    assert {(f, offset): size for f, offset, size in places} == {key: t.size_bytes for key, t in tensors.items()}
    named = {kind: {i.name for i in graph_of(bundle, kind).graph.input} & set(table) for kind in StepKind}
    assert named[StepKind.REFRESH] | named[StepKind.LORA] == set(table)
    kept = [n for n in named[StepKind.REFRESH] if not any(f".{i}." in n for i in bundle.manifest.plan.dropped_layers)]
    assert set(kept) < named[StepKind.LORA]
    assert not any(t.external_data for kind in StepKind for t in graph_of(bundle, kind).graph.initializer)


def test_single_numbers_of_a_checkpoint_are_inputs(tmp_path):
    """Of no axis, as the constants of Apertus' activation, which its checkpoints hold."""
    made = make_bundle(
        more_family("apertus"), tmp_path / "b", targets=("none",), drop_layers=(1,), always_first=0, always_last=0
    )
    for kind in StepKind:
        lowered = trt_from_neutral(neutral(made, kind), static_slots(made.manifest.plan, made.manifest.limits))
        numbers = {name: weight for name, weight in lowered.weights.items() if not weight.shape}
        assert {name.rpartition(".")[2] for name in numbers} == {"beta", "eps"}
        assert all(weight.size_bytes == 4 for weight in numbers.values())
        inputs = {value.name: value.type.tensor_type.shape.dim for value in lowered.proto.graph.input}
        assert all(not inputs[name] for name in numbers)


def test_a_fused_weight_is_its_parts_one_after_the_other(bundle):
    table = bundle.weight_inputs(RTX)
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"
    tensors = read_tensors(bundle.root / "weights" / "model.safetensors")
    parts = [tensors[f"model.layers.0.self_attn.{p}_proj.weight"].read() for p in "qkv"]
    data = b"".join((bundle.root / f).read_bytes()[offset : offset + size] for f, offset, size in table[name].parts)
    np.testing.assert_array_equal(np.frombuffer(data, np.float32).reshape(table[name].shape), np.concatenate(parts))


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_biases_are_fused_with_their_weights(name, tmp_path):
    made = make_bundle(name, tmp_path / "b", targets=("none",))
    lowered = trt_from_neutral(neutral(made, StepKind.REFRESH), {"kept": 9, "dropped": 9})
    fused = {n.rpartition("layers.0.")[2] for n in lowered.weights if "layers.0." in n and "+" in n}
    expected = {
        "qwen2": {f"self_attn.q_proj+k_proj+v_proj.{p}" for p in ("weight", "bias")} | {"mlp.gate_proj+up_proj.weight"},
        "phi3": set(),  # its checkpoint has them fused
    }
    assert fused == expected[name]


def holds(engine: bytes, values: np.ndarray) -> bool:
    """Whether an engine holds a tensor: some 64 bytes of it, in either orientation."""
    rows = [values, values.T] if values.ndim == 2 else [values]
    return any(np.ascontiguousarray(v).tobytes()[:64] in engine for v in rows)


@pytest.fixture(scope="module")
def constants(tmp_path_factory) -> Bundle:
    """The weights inside of the engines."""
    root = tmp_path_factory.mktemp("constants") / "b"
    return make_bundle(of_family("llama"), root, targets=(RTX,), weight_sharing="constants", **PLAN)


def test_inputs_leave_no_weight_in_the_engines(bundle, constants):
    """With `inputs` no layer weight is in either engine; with `constants` all are, so that the search is one."""
    tensors = read_tensors(bundle.root / "weights" / "model.safetensors")
    matrices = {name: t.read() for name, t in tensors.items() if len(t.shape) == 2 and ".layers." in name}
    assert len(matrices) == 7 * LAYERS
    for made, expected in ((bundle, False), (constants, True)):
        engines = {kind: (made.root / made.target(RTX)[1].engine(kind)).read_bytes() for kind in StepKind}
        dropped = made.manifest.plan.dropped_layers
        for name, values in matrices.items():
            is_dropped = int(name.split(".layers.")[1].partition(".")[0]) in dropped
            assert holds(engines[StepKind.REFRESH], values) is expected, name
            assert holds(engines[StepKind.LORA], values) is (expected and not is_dropped), name
    assert constants.target(RTX)[1].weight_sharing == "constants"
    assert constants.target(RTX)[1].weights is None


@pytest.mark.parametrize("name", ["len_kept", "valid"])
def test_an_input_that_the_parser_ignores_is_an_error(name, bundle):
    """`nonpad_kv_seqlen` instead of the mask: TensorRT would attend to every slot of the capacity, without a word.

    `valid` is an input that nothing else reads.
    """
    model = graph_of(bundle, StepKind.REFRESH)
    if name == "valid":
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch"]))
    for node in model.graph.node:
        if node.op_type == "Attention":
            del node.input[3:]
            node.input.extend(["", "", "", name])
    builder = EngineBuilder(RTX, bundle.root, BuilderOptions(), Console())
    with pytest.raises(ModelError, match=f"would ignore inputs of a step graph[\\s\\S]*{name}"):
        builder.parse(model)


def attentions(trt, network):
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def made_by(network, tensor):
    """The layer that makes a tensor of a network."""
    layers = map(network.get_layer, range(network.num_layers))
    return next(
        layer for layer in layers if tensor.name in {layer.get_output(i).name for i in range(layer.num_outputs)}
    )


@pytest.mark.parametrize("kind", StepKind)
def test_attention_reads_valid_slots_alone(kind, bundle):
    """In the network: no mask, LOWER_RIGHT, and as int32 lengths of keys the layer's own + the tokens of the chunk."""
    builder = EngineBuilder(RTX, bundle.root, BuilderOptions(), Console())
    trt, network = builder.trt, builder.parse(graph_of(bundle, kind))[1]
    dropped = bundle.manifest.plan.dropped_attentions
    found = {}
    for attention in attentions(trt, network):
        assert attention.mask is None
        assert attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
        cast = made_by(network, attention.key_value_lengths)
        assert attention.key_value_lengths.dtype == trt.int32
        total = made_by(network, cast.get_input(0))
        total.__class__ = trt.IElementWiseLayer
        assert total.op == trt.ElementWiseOperation.SUM
        tokens = made_by(network, total.get_input(1))
        tokens.__class__ = trt.ISliceLayer
        assert (tuple(tokens.start), tuple(tokens.shape)) == ((1,), (1,))
        assert made_by(network, tokens.get_input(0)).get_input(0).name == "input_ids"
        found[attention.get_input(2).name] = total.get_input(0).name
    layers = range(bundle.manifest.plan.num_layers)
    expected = {f"present_value.{i}": "len_dropped" if i in dropped else "len_kept" for i in layers}
    lora = {f"present_value.{i}" for i in bundle.manifest.plan.kept_attentions}
    assert found == {name: v for name, v in expected.items() if kind is StepKind.REFRESH or name in lora}


def test_a_window_keeps_its_mask_beside_the_lengths(tmp_path):
    """And the library builds that, too."""
    source = traced_family("gemma3", gemma3(), "float32")
    options = {"drop_layers": ("1",), "always_first": 0, "always_last": 0}
    made = make_bundle(source, tmp_path / "b", targets=("none",), **options)
    proto = trt_from_neutral(neutral(made, StepKind.LORA), {"kept": 9, "dropped": 9}).proto
    builder = EngineBuilder(RTX, made.root, BuilderOptions(compute_capabilities=("8.9",)), Console())
    (attention,) = attentions(builder.trt, builder.parse(proto)[1])  # of layer 0, which is the windowed one
    assert attention.mask is not None
    assert attention.causal_kind == builder.trt.CausalMaskKind.NONE
    assert attention.key_value_lengths.name == "valid.len_kept"
    assert builder.build(proto, PROFILES)


def test_a_mask_is_lower_right_for_lengths_with_the_new_tokens(bundle):
    """What the CPU computes with is what the network is told: c <= s + (length + S) - S, whatever the row."""
    model = ir.serde.deserialize_model(graph_of(bundle, StepKind.REFRESH))
    masks = {node.inputs[3] for node in model.graph if node.op_type == "Attention"}
    model.graph.outputs[:] = sorted(masks, key=lambda mask: mask.name)
    RemoveUnusedNodesPass()(model)
    read = {value for node in model.graph for value in node.inputs}
    model.graph.inputs[:] = [value for value in model.graph.inputs if value in read]
    tokens, lengths = 4, {"len_kept": np.array([0, 9, 3]), "len_dropped": np.array([0, 5, 2])}
    feed = {"input_ids": np.zeros((3, tokens), np.int64)} | lengths
    for value in model.graph.inputs:
        if value.name not in feed:  # a cache, whose capacity is asked for
            feed[value.name] = np.zeros((3, *map(int, list(value.shape)[1:])), np.float32)
    found = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, feed)
    slots = bundle.target(RTX)[1].slots
    expected = []
    for name, length in lengths.items():
        query, key = np.arange(tokens)[:, None], np.arange(slots[name.removeprefix("len_")])
        expected.append(key <= query + (length + tokens)[:, None, None] - tokens)
    assert len(found) == 2
    for mask in found:
        assert any(mask[:, 0].shape == e.shape and np.array_equal(mask[:, 0], e) for e in expected)


def test_a_graph_that_cannot_be_parsed_is_an_error(bundle):
    model = graph_of(bundle, StepKind.LORA)
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match=r"cannot parse a step graph[\s\S]*NoSuchOperator"):
        EngineBuilder(RTX, bundle.root, BuilderOptions(), Console()).parse(model)


def test_a_hint_names_what_the_user_has_set(bundle, monkeypatch):
    """A limit of scratch memory under which no kernel fits; and not --attention, of which there is one form."""
    for limit in (None, 1):
        builder = EngineBuilder(RTX, bundle.root, dataclasses.replace(ADA, workspace_mib=limit), Console())
        monkeypatch.setattr(builder.trt.Builder, "build_serialized_network", lambda *_: None)
        with pytest.raises(ModelError, match="cannot build an engine") as caught:
            builder.build(graph_of(bundle, StepKind.LORA), lora_profiles(8))
        assert ("--workspace-mib 1" in caught.value.hint) == (limit is not None)
        assert "--attention" not in caught.value.hint


@pytest.mark.parametrize("surrogate", ["recurrent", "anchor"])
def test_one_copy_where_attention_is_dead(surrogate, tmp_path):
    """Rank 0: the attention before a dropped layer is dead on LoRA steps, but its keys and values are written."""
    made = make_bundle("qwen2", tmp_path / "b", targets=("none",), surrogate=surrogate)
    slots = static_slots(made.manifest.plan, made.manifest.limits)
    refresh = trt_from_neutral(neutral(made, StepKind.REFRESH), slots)
    lora = trt_from_neutral(neutral(made, StepKind.LORA), slots, refresh=refresh)
    table = check_one_copy([refresh.weights, lora.weights])
    before = min(made.manifest.plan.dropped_layers) - 1
    fused = f"model.layers.{before}.self_attn.q_proj+k_proj+v_proj.weight"
    assert fused in lora.weights
    assert set(table) == set(refresh.weights)
    assert f"model.layers.{before}.self_attn.o_proj.weight" not in lora.weights


@pytest.mark.parametrize(("name", "dtype"), [("qwen3", "float16"), ("gemma2", "bfloat16")])
def test_half_precision_engines(name, dtype, tmp_path, monkeypatch):
    """Strongly typed: caches, states and weights in the dtype, logits in float32; native and plugin graphs alike.

    Of Gemma's the LoRA step's engine is built, whose layers are of both kinds: the other takes five times as long.
    """
    if name == "gemma2":
        monkeypatch.setattr(EngineBuilder, "build", parse_refresh_alone)
    source, options = of_family(name, dtype), PLAN | {"surrogate": "anchor", "max_seq_len": 64}
    made = make_bundle(source, tmp_path / "b", targets=(RTX,), builder=ADA, **options)
    assert set(made.target(RTX)[1].engine_bytes) == {"refresh", "lora"}
    for form in ("native", "plugin"):
        for kind in StepKind:
            lowered = trt_from_neutral(
                neutral(made, kind), static_slots(made.manifest.plan, made.manifest.limits), form=form
            )
            graph = lowered.proto.graph
            values = {v.name: DTYPES[v.type.tensor_type.elem_type] for v in (*graph.input, *graph.output)}
            io = made.manifest.io(kind, RTX)
            assert {s.name: s.dtype for s in (*io.inputs, *io.outputs)}.items() <= values.items()
            assert all(values[name] == dtype for name in lowered.weights)
            halves = {
                v.name for v in (*graph.value_info, *graph.input) if DTYPES[v.type.tensor_type.elem_type] == dtype
            }
            for node in graph.node:  # ONNX Runtime loads no norm of halves with weights in float32
                if node.op_type == "RMSNormalization":
                    assert (node.input[0] in halves) == (node.input[1] in halves)


def test_plugin_form(bundle):
    """One node per attention, with RoPE in it; no cache write, attention, mask or rotary node is left."""
    plan = bundle.manifest.plan
    for kind, layers in ((StepKind.REFRESH, range(plan.num_layers)), (StepKind.LORA, plan.kept_attentions)):
        graph = trt_from_neutral(neutral(bundle, kind), {"kept": 127, "dropped": 60}, form="plugin").proto.graph
        nodes = [node for node in graph.node if node.op_type == "SkipWriteKVAttention"]
        assert [node.output[1] for node in nodes] == [f"present_key.{i}" for i in layers]
        assert not {"TensorScatter", "Attention", "RotaryEmbedding", "LessOrEqual"} & {n.op_type for n in graph.node}
        for node, layer in zip(nodes, layers, strict=True):
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["heads"] == 4
            assert attributes["kv_heads"] == 2
            assert attributes["head_dim"] == attributes["rotary_dim"] == 16
            assert attributes["has_count"] == (kind is StepKind.REFRESH)
            assert node.input[5] == ("len_dropped" if layer in plan.dropped_layers else "len_kept")
            assert len(node.input) == 8 + attributes["has_count"]


@pytest.mark.parametrize("form", ["native", "plugin"])
def test_no_index_counts_from_the_end(form, bundle):
    """Of an axis whose length is not fixed TensorRT leaves undefined what a negative index means (NvInfer.h)."""
    graph = trt_from_neutral(neutral(bundle, StepKind.REFRESH), {"kept": 127, "dropped": 60}, form=form).proto.graph
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    numbers |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    fixed = [numbers[node.input[1]] for node in graph.node if node.op_type == "Gather" and node.input[1] in numbers]
    assert not [tensor.name for tensor in fixed if (onnx.numpy_helper.to_array(tensor) < 0).any()]


def plugin_attributes(proto: onnx.ModelProto) -> list[dict[str, object]]:
    nodes = [node for node in proto.graph.node if node.op_type == "SkipWriteKVAttention"]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]


@pytest.mark.parametrize(("name", "norm", "softcap", "windows"), [("qwen3", 1, 0.0, 1), ("gemma2", 0, 5.0, 2)])
def test_plugin_form_takes_norm_softcap_and_window(name, norm, softcap, windows, tmp_path):
    made = make_bundle(name, tmp_path / "b", targets=("none",))
    proto = trt_from_neutral(neutral(made, StepKind.REFRESH), {"kept": 9, "dropped": 9}, form="plugin").proto
    attributes = plugin_attributes(proto)
    assert {a["has_norm"] for a in attributes} == {norm}
    assert {round(a["softcap"], 3) for a in attributes} == {softcap}
    assert tuple(a["window"] for a in attributes) == made.manifest.model.windows
    assert len({a["window"] for a in attributes}) == windows


def nodes_per_layer(proto: onnx.ModelProto, layers: int) -> int:
    """Of layers that are all alike; there are fewer nodes of a kind beside them than layers, but for constants."""
    counts = Counter(node.op_type for node in proto.graph.node if node.op_type != "Constant")
    return sum(count // layers for count in counts.values())


@pytest.mark.parametrize(("dtype", "ort", "openvino"), [("float32", 12, 18), ("float16", 17, 18), ("bfloat16", 17, 20)])
def test_half_precision_is_fused_as_float32_is(dtype, ort, openvino, tmp_path):
    """Tables of cos and sin are shared by all layers in half precision: RoPE was left as arithmetic there.

    With ONNX Runtime attention rotates, and norms take the sum before them, in float32 alone. With OpenVINO two
    weights of norms a layer are cast from bfloat16.
    """
    traced = family_trace("llama", dtype)
    source = dataclasses.replace(rewritten("llama"), traced=traced, dtype=dtype)
    made = make_bundle(source, tmp_path / "b", targets=("none",))
    steps = [neutral(made, StepKind.REFRESH), neutral(made, StepKind.LORA)]
    slots = static_slots(made.manifest.plan, made.manifest.limits)
    plugin = trt_from_neutral(steps[0], slots, form="plugin").proto
    assert {a["rotary_dim"] for a in plugin_attributes(plugin)} == {16}
    built = {
        "neutral": steps[0],
        "native": trt_from_neutral(steps[0], slots).proto,
        "plugin": plugin,
        "ort": lower_step(steps[0], 128),
        "openvino": openvino_from_neutral(*steps, made.manifest.plan),
    }
    counts = {name: nodes_per_layer(proto, 8) for name, proto in built.items()}
    assert counts == {"neutral": 34, "native": 30, "plugin": 18} | {"ort": ort, "openvino": openvino}


@pytest.mark.parametrize(("name", "dtype", "norm"), [("qwen3", "float16", 1), ("gemma2", "bfloat16", 0)])
def test_rope_and_norms_of_heads_are_inside_the_plugin(name, dtype, norm, tmp_path):
    """Gemma's norms have float32 weights in half precision, which the plugin does not take."""
    source = dataclasses.replace(family(name), traced=family_trace(name, dtype), dtype=dtype)
    made = make_bundle(source, tmp_path / "b", targets=("none",))
    proto = trt_from_neutral(neutral(made, StepKind.REFRESH), {"kept": 9, "dropped": 9}, form="plugin").proto
    found = [(a["rotary_dim"], a["has_norm"]) for a in plugin_attributes(proto)]
    assert found == [(made.manifest.model.head_dim, norm)] * 8


def test_static_slots_are_what_the_largest_request_needs(bundle):
    """Every prompt and number of new tokens within the limits fits, and one of them needs all but the spare ones."""
    plan, limits = bundle.manifest.plan, bundle.manifest.limits
    slots = static_slots(plan, limits)
    needs = [
        (prompt + new - 1, prompt + (new - 1) // (plan.k + 1))
        for prompt in range(1, limits.max_prompt_len + 1)
        for new in range(1, limits.max_seq_len - prompt + 1)
    ]
    most = (max(count) for count in zip(*needs, strict=True))
    assert slots == dict(zip(("kept", "dropped"), (count + STANDING_SLOTS for count in most), strict=True))


def test_the_smallest_capacities(tmp_path):
    """A window that is longer than the caches: the decode profile ends with them."""
    sizes = {"max_seq_len": 3, "max_prompt_len": 1, "max_batch": 1}
    source = of_family("llama")
    made = make_bundle(source, tmp_path / "b", targets=(RTX,), **sizes, k=5, builder=ADA, always_first=1)
    entry = made.target(RTX)[1]
    assert entry.slots == {"kept": 2 + STANDING_SLOTS, "dropped": 1 + STANDING_SLOTS}
    assert entry.refresh_profiles == {"decode": (1, 1), "prefill": (1, 1)}


def test_profiles():
    profiles = refresh_profiles(4, 8, 512)
    assert list(profiles) == ["decode", "prefill"]
    assert profiles["decode"]["sequence"] == profiles["decode"]["rows"] == (1, 1, 4)
    assert profiles["prefill"]["sequence"] == (1, 512, 512)
    assert lora_profiles(8) == {"decode": {"batch": (1, 1, 8)}}


def test_one_copy_is_asserted(bundle):
    table = bundle.weight_inputs(RTX)
    name = next(iter(table))
    with pytest.raises(AssertionError):
        check_one_copy([table, {"another name": table[name]}])


# ── adding a target to a bundle ────────────────────────────────────────────────────────────────────────────────


def test_add_target(tmp_path, monkeypatch):
    """The same engines' graphs as an export makes; the rest of the bundle stays as it was."""
    source = of_family("llama")
    made = make_bundle(source, tmp_path / "b", always_first=1)
    before = snapshot(made.root)
    added = add_target(made.root, [RTX], ExportOptions(targets=(RTX,), builder=ADA, verify=False))
    assert list(added.manifest.targets) == ["ort", RTX]
    after = snapshot(made.root)
    assert {n: d for n, d in before.items() if n != MANIFEST_NAME}.items() <= after.items()
    assert added.check_hashes() == []
    monkeypatch.setattr(EngineBuilder, "build", lambda *_: b"an engine")  # their graphs are compared
    whole = make_bundle(source, tmp_path / "whole", targets=("ort", RTX), builder=ADA, always_first=1)
    for kind in StepKind:
        assert graph_of(added, kind) == graph_of(whole, kind)
    sizes = {"engine_bytes": {}}  # engines are not built alike twice
    assert dataclasses.replace(whole.target(RTX)[1], **sizes) == dataclasses.replace(added.target(RTX)[1], **sizes)


def test_add_target_verifies_what_can_run_here(tmp_path, capsys):
    made = make_bundle(of_family("llama"), tmp_path / "b", targets=("none",), always_first=1)
    added = add_target(made.root, ["ort", RTX], ExportOptions(targets=("ort", RTX), builder=ADA))
    assert added.manifest.verification["ort"]["status"] == "passed"
    result = added.manifest.verification[RTX]
    if result["status"] == "not run":  # no GPU here
        assert result["reason"]
        assert result["graphs_on_cpu"]["status"] == "passed"
    else:
        assert result["status"] == "passed"
    assert {entry["target"] for entry in json.loads((made.root / "verify.json").read_text())} == {"ort", RTX}
    (made.root / "tokenizer").mkdir(exist_ok=True)
    (made.root / "tokenizer" / "tokenizer.json").touch()
    first = {RTX: added.manifest.targets[RTX]} | added.manifest.targets
    rtx_first = dataclasses.replace(added, manifest=dataclasses.replace(added.manifest, targets=first))
    for shown, here in ((added, True), (rtx_first, result["status"] != "not run")):
        _print_exported(shown, Path("a folder"))
        said = capsys.readouterr().out
        assert "lora-drop generate 'a folder' " in said  # as a shell takes it
        assert ("\ntry: lora-drop generate" in said, "try, on a machine with its device: lora-drop" in said) == (
            here,
            not here,
        )


class RecordingBuilder:
    """Stands for an EngineBuilder of enterprise TensorRT, which cannot be installed without a GPU."""

    made: list[RecordingBuilder]
    version, compute_capabilities = "11.1", ("9.0",)
    reads_valid_slots = True

    def __init__(self, target, root, options, console, timing_cache=b""):
        self.target, self.given_cache = target, timing_cache
        self.timing_cache = timing_cache + b"measured"
        self.graphs = []
        self.made.append(self)

    def build(self, proto, profiles):
        self.graphs.append(proto)
        return b"an engine"


def test_target_tensorrt(tmp_path, monkeypatch):
    """The plugin form, a timing cache that the next build starts from; what cannot run here is said to be not run."""
    monkeypatch.setattr(RecordingBuilder, "made", [], raising=False)
    monkeypatch.setattr("lora_drop_export.targets.trt.build.EngineBuilder", RecordingBuilder)
    monkeypatch.setattr("lora_drop_export.targets.trt.target.check_buildable", lambda *_: None)
    made = make_bundle("llama", tmp_path / "b")
    added = add_target(made.root, ["tensorrt"], ExportOptions(verify=False))
    entry = added.target("tensorrt")[1]
    assert (entry.form, entry.weight_sharing, entry.compute_capabilities) == ("plugin", "inputs", ("9.0",))
    assert entry.ep_context is None
    for proto in RecordingBuilder.made[0].graphs:
        assert "SkipWriteKVAttention" in {node.op_type for node in proto.graph.node}
    assert (made.root / entry.timing_cache).read_bytes() == b"measured"
    options = ExportOptions(
        targets=("tensorrt",),
        force=True,
        verify=False,
        attention="native",
        builder=BuilderOptions(version_compatible=True),
    )
    again = add_target(made.root, ["tensorrt"], options)
    entry = again.target("tensorrt")[1]
    assert RecordingBuilder.made[1].given_cache == b"measured"
    assert (made.root / entry.timing_cache).read_bytes() == b"measuredmeasured"
    assert (entry.form, entry.version_compatible, entry.hardware_compatible) == ("native", True, False)
    assert again.check_hashes() == []
    with pytest.raises(BundleError):
        Session.open(made.root, target="tensorrt")


class TimedBuilder:
    """Stands for a builder of enterprise TensorRT and its configuration: only a timing cache of this GPU is taken, and
    a build that has one adds what it measures."""

    def __init__(self) -> None:
        self.cache = None

    def create_builder_config(self):
        config = MagicMock()
        config.create_timing_cache = lambda data: SimpleNamespace(data=data, serialize=lambda: cache_of(self, data))
        config.set_timing_cache = self.set_timing_cache
        return config

    def set_timing_cache(self, cache, ignore_mismatch):
        taken = ignore_mismatch or not cache.data.startswith(b"another GPU")
        self.cache = cache if taken else self.cache
        return taken

    def build_serialized_network(self, network, config):
        return b"an engine"


def cache_of(builder, data):
    return data + b"measured" if builder.cache is not None and builder.cache.data == data else data


def test_a_timing_cache_of_another_gpu_gives_way_to_what_is_measured_here(tmp_path, monkeypatch):
    """Else it would be stored again, and no later build would start from what this one measured."""
    tensorrt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("lora_drop_export.targets.trt.build.check_buildable", lambda *_: tensorrt)
    monkeypatch.setattr(EngineBuilder, "parse", lambda self, proto: (TimedBuilder(), None))
    console = RecordingConsole()
    builder = EngineBuilder("tensorrt", tmp_path, BuilderOptions(), console, b"another GPU's")
    for measured in (b"measured", b"measuredmeasured"):  # by one engine after the other
        builder.build(onnx.ModelProto(), {})
        assert builder.timing_cache == measured
    assert len(console.said) == 1
    assert "so it is not used" in console.said[0]


def test_an_input_that_the_build_ignores_is_an_error(tmp_path, monkeypatch):
    """The library says so in a warning, of a network whose parse was right."""
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("lora_drop_export.targets.trt.build.check_buildable", lambda *_: trt)
    builder = EngineBuilder("tensorrt", tmp_path, BuilderOptions(), Console())

    class Warns(TimedBuilder):
        def build_serialized_network(self, network, config):
            builder._logger.log(trt.ILogger.Severity.WARNING, "Unused Input: len_kept")
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(EngineBuilder, "parse", lambda self, proto: (Warns(), None))
    with pytest.raises(ModelError, match=r"ignored an input of a step graph[\s\S]*Unused Input: len_kept"):
        builder.build(onnx.ModelProto(), {})


class RecordingConsole(Console):
    """Keeps what a build says, and may interrupt it as Ctrl-C does."""

    def __init__(self, interrupt_at: int = 10**9) -> None:
        super().__init__()
        self.steps, self.said, self.interrupt_at = [], [], interrupt_at

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextlib.contextmanager
    def progress(self, what):
        def update(description, done, total):
            self.steps.append((description, done, total))
            if len(self.steps) > self.interrupt_at:
                raise KeyboardInterrupt

        yield update


def test_progress_and_interrupt(bundle):
    """TensorRT's own steps reach the console; an interrupt there ends the build."""
    console = RecordingConsole()
    assert EngineBuilder(RTX, bundle.root, BuilderOptions(), console).build(graph_of(bundle, StepKind.LORA), PROFILES)
    assert console.steps
    assert all(0 < done <= total for _, done, total in console.steps)
    interrupted = RecordingConsole(interrupt_at=0)
    with pytest.raises(KeyboardInterrupt):
        EngineBuilder(RTX, bundle.root, BuilderOptions(), interrupted).build(graph_of(bundle, StepKind.LORA), PROFILES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", ["parse", "build"])
def test_a_signal_in_the_logger_s_callback_is_not_lost(bundle, monkeypatch, call, number):
    """The bindings drop what a callback raises: a stand-in calls the logger and drops it likewise."""
    builder = EngineBuilder(RTX, bundle.root, BuilderOptions(), Console())
    trt, logger, logged = builder.trt, builder._logger, []
    owner, name = (trt.OnnxParser, "parse") if call == "parse" else (trt.Builder, "build_serialized_network")
    real = getattr(owner, name)

    def calls_back(*arguments):
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)  # to this thread, at once
            logger.log(trt.ILogger.Severity.WARNING, "a line")
        logged.extend(logger.warnings)
        if call == "build":
            arguments[2].progress_monitor.phase_start("a phase", None, 1)
            assert not arguments[2].progress_monitor.step_complete("a phase", 0)  # it is told to end
        return real(*arguments)

    monkeypatch.setattr(owner, name, calls_back)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            builder.build(graph_of(bundle, StepKind.LORA), PROFILES)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert logged[-1] == "a line"


@pytest.mark.parametrize(("size_mib", "warned"), [(110, False), (400, True)])
def test_duplicated_weights_are_reported(size_mib, warned):
    console = RecordingConsole()
    _report_engine(StepKind.REFRESH, size_mib << 20, 100 << 20, RTX, console)
    assert f"{size_mib}.0 MiB, of which 100.0 MiB are weights" in console.said[0]
    assert any("--weight-sharing inputs" in line for line in console.said) is warned


def test_constants_are_not_duplicated(constants):
    """Two profiles and three compute capabilities, and each weight is in an engine once."""
    entry = constants.target(RTX)[1]
    assert entry.compute_capabilities == COMPUTE_CAPABILITIES
    assert len(COMPUTE_CAPABILITIES) == 3
    assert len(entry.refresh_profiles) == 2
    tensors = read_tensors(constants.root / "weights" / "model.safetensors")
    tensor = tensors["model.layers.1.mlp.down_proj.weight"].read()
    for kind in StepKind:
        engine = (constants.root / entry.engine(kind)).read_bytes()
        assert sum(engine.count(np.ascontiguousarray(v).tobytes()[:64]) for v in (tensor, tensor.T)) <= 1


def test_float32_is_float32(bundle, monkeypatch):
    """TF32 is on by default in TensorRT; an engine of ours is built without it."""
    builder = EngineBuilder(RTX, bundle.root, ADA, Console())
    trt, seen = builder.trt, []
    build = trt.Builder.build_serialized_network

    def look(self, network, config):
        seen.append(config.get_flag(trt.BuilderFlag.TF32))
        return build(self, network, config)

    assert builder.parse(graph_of(bundle, StepKind.LORA))[0].create_builder_config().get_flag(trt.BuilderFlag.TF32)
    monkeypatch.setattr(trt.Builder, "build_serialized_network", look)
    builder.build(graph_of(bundle, StepKind.LORA), lora_profiles(8))
    assert seen == [False]


def test_add_target_refuses_one_that_is_there(tmp_path):
    made = make_bundle("llama", tmp_path / "b")
    before = snapshot(made.root)
    with pytest.raises(InputError, match="already"):
        add_target(made.root, ["ort"])
    assert snapshot(made.root) == before
    again = add_target(made.root, ["ort"], ExportOptions(force=True, verify=False))
    assert again.check_hashes() == []


def test_a_failed_addition_leaves_the_bundle(tmp_path, monkeypatch):
    made = make_bundle("llama", tmp_path / "b")
    before = snapshot(tmp_path)

    def fail(*_: object) -> bytes:
        raise ModelError("no engine", note="a test", hint="none")

    monkeypatch.setattr(EngineBuilder, "build", fail)
    with pytest.raises(ModelError):
        add_target(made.root, [RTX])
    assert snapshot(tmp_path) == before


# ── what a user does wrong ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", RTX, "--compute-capability", "9.0"], "does not build for that compute capability"),
        (["--target", RTX, "--compute-capability", "8.6", "--compute-capability", "8.6"], "names a value twice"),
        (["--target", RTX, "--attention", "plugin"], "cannot run plugins"),
        (["--target", RTX, "--hardware-compatible"], "has no such option"),
        (["--target", RTX, "--alias"], "--alias applies only to the attention plugin"),
        (["--target", "ort", "--compute-capability", "8.6"], "--compute-capability applies only to tensorrt-rtx"),
        # Before the library, which need not be here, and the plugin, which is built for nothing then
        (["--target", "tensorrt", "--compute-capability", "8.6"], "--compute-capability applies only to tensorrt-rtx"),
        (["--target", "tensorrt", "--attention", "native", "--alias"], "--alias applies only to the attention plugin"),
        (["--target", RTX, "--optimization-level", "9"], "--optimization-level is too large"),
        (["--target", RTX, "--workspace-mib", "0"], "--workspace-mib is too small"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    out = tmp_path / "b"
    code = main(["--model", str(family("llama").directory), "--out", str(out), *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Note:" in error
    assert "Hint:" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "5"], "existing bundle fixes that option"),
        (["--model", "somewhere"], "existing bundle fixes that option"),
        (["--drop-ratio", "0.25"], "existing bundle fixes that option"),
    ],
)
def test_add_target_refuses_what_the_bundle_fixes(arguments, message, tmp_path, capsys):
    make_bundle("llama", tmp_path / "b")
    before = snapshot(tmp_path)
    assert main(["--out", str(tmp_path / "b"), "--add-target", RTX, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_build_that_needs_a_gpu_is_refused_at_once(monkeypatch):
    """tensorrt builds for the GPU of this machine; without one the export would end after the trace."""
    cuda = FakeCuda()
    cuda.cudaGetDeviceCount = lambda: (cudaError_t.cudaSuccess, 0)
    monkeypatch.setattr("lora_drop_export.targets.trt.options.library", lambda _: SimpleNamespace())
    monkeypatch.setattr("lora_drop_runtime.engines.trt.cuda_device._bindings", lambda _: cuda)
    with pytest.raises(NoDeviceError, match="no GPU"):
        check_buildable("tensorrt", BuilderOptions(), "native")


def test_a_missing_library_is_named(tmp_path):
    """Without the library: exit code 2 at once, what to install, nothing written."""
    blocked = "import sys; sys.modules['tensorrt_rtx'] = None\nfrom lora_drop_export.cli import main\n"
    command = [sys.executable, "-c", f"{blocked}sys.exit(main(sys.argv[1:]))"]
    arguments = ["--model", "x", "--out", str(tmp_path / "b"), "--target", RTX]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'lora-drop-export[tensorrt-rtx]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
