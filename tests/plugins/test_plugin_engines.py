"""Bundles of target tensorrt in the plugin form, from the export to logits: int4 weights as inputs, caches of 8 bits.

TensorRT's place is taken by PyTorch over the graph that its builder gets (tests/support/torch_trt.py), in which the
plugins' nodes call the kernels' own source on the host. The runtime is the real one, on a stand-in for CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import pytest
from lora_drop_runtime import Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError
from lora_drop_tools.inspect import describe
from lora_drop_tools.shared import costs
from onnx.reference import ReferenceEvaluator

from lora_drop_export.check.verify import compare
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.targets.trt import build
from lora_drop_export.targets.trt.build import EngineBuilder as RealBuilder
from lora_drop_export.targets.trt.options import BuilderOptions
from plugins.kernels.binding import load_library
from tests.support import fake_library
from tests.support.bundles import Family, first_layers, make_bundle, more_family, traced_once, with_weights_of
from tests.support.fake_gpu import BINDINGS, FakeGpu
from tests.support.fake_trt import PLUGIN_LIBRARY
from tests.support.kernel_build import host_kernels
from tests.support.models import llama, quartered
from tests.support.torch_trt import TorchTrt

TARGET = "tensorrt"
QUANTIZED = Path(__file__).parents[1] / "export" / "checkpoint" / "quantized"
LAYERS = 3
MATRICES = 7 * LAYERS + 1  # those of the layers, and the head
PLAN = {"always_first": 1, "max_seq_len": 64}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchTrt]:
    """TensorRT with the plugins, and CUDA, for the exporter and the runtime."""
    plugin = tmp_path_factory.mktemp("plugin") / "liblora_drop_plugin.so"
    plugin.write_bytes(PLUGIN_LIBRARY)
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeGpu()
        trt = TorchTrt(cuda, load_library(host_kernels()), rtx=False)
        patch.setenv("LORA_DROP_PLUGIN_LIB", str(plugin))
        for name in BINDINGS:
            patch.setitem(sys.modules, name, cuda)
        patch.setitem(sys.modules, "tensorrt", trt)
        patch.setattr(build, "EngineBuilder", fake_library.FakeBuilder)
        yield trt


@functools.cache
def source(dtype: str) -> Family:
    """A Llama whose weights are a quarter of the other tests': theirs are chaotic in half precision."""
    return with_weights_of(first_layers("llama", LAYERS, dtype), quartered(llama(num_hidden_layers=LAYERS)))


@pytest.fixture(scope="module")
def made(library: TorchTrt, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle of target tensorrt, made once for each set of options."""

    @functools.cache
    def make(activations: str, /, **options: Any) -> Bundle:
        root = tmp_path_factory.mktemp("engines") / "bundle"
        fake_library.engines_of(root)
        options = {"targets": (TARGET,), "max_prompt_len": 40, "rank": 2, "k": 2} | options
        return make_bundle(source(activations), root, **PLAN, **options)

    return make


def graph_of(bundle: Bundle, kind: StepKind) -> onnx.GraphProto:
    entry = bundle.target(TARGET)[1]
    assert isinstance(entry, TrtEntry)
    return onnx.load(bundle.root / entry.graphs[kind.value], load_external_data=False).graph


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


INT4 = {"dtype": "int4", "quantization": "rtn"}


def test_int4_weights_are_inputs_of_the_plugin(made: Callable[..., Bundle]) -> None:
    """Nothing is dequantized, joined layers are one product, and both steps read the same inputs."""
    bundle = made("bfloat16", **INT4)
    entry = bundle.target(TARGET)[1]
    assert (entry.form, entry.weight_sharing) == ("plugin", "inputs")
    table = bundle.weight_inputs(TARGET)
    dropped = len(bundle.manifest.plan.dropped_layers)
    for kind, layers in ((StepKind.REFRESH, LAYERS), (StepKind.LORA, LAYERS - dropped)):
        graph = graph_of(bundle, kind)
        counts = Counter(node.op_type for node in graph.node)
        assert counts["Int4Gemm"] == 4 * layers + 1  # q, k, v; o; gate, up; down; and the head
        assert not {"DequantizeLinear", "MatMul"} & set(counts)
        inputs = {value.name: value.type.tensor_type for value in graph.input}
        for node in graph.node:
            if node.op_type == "Int4Gemm":
                given = attributes(node)
                assert (given["plugin_version"], given["plugin_namespace"]) == (b"1", b"lora_drop")
                assert (given["block"], given["has_zero_points"]) == (32, 0)
                _, weights, scales = node.input
                assert inputs[weights].elem_type == onnx.TensorProto.INT8
                assert inputs[scales].elem_type == onnx.TensorProto.BFLOAT16
                rows, columns = (dim.dim_value for dim in inputs[weights].shape.dim)
                assert [dim.dim_value for dim in inputs[scales].shape.dim] == [rows, columns // 16]
        assert {name for name in inputs if name in table} == set(inputs) - {
            s.name for s in bundle.manifest.io(kind).inputs
        }
    packed = [weight for weight in table.values() if weight.dtype == "int8"]
    assert sum(len(weight.parts) for weight in packed) == MATRICES + 1  # and the embedding
    assert entry.weight_bytes == sum(weight.size_bytes for weight in table.values())
    assert any("weights once, as inputs of both engines" in line for line in describe(bundle))


CASES = {
    "int4": ("bfloat16", INT4),
    "int4 in blocks of 64, recurrent": ("float16", INT4 | {"block_size": 64, "surrogate": "recurrent"}),
    "int8 caches": ("float16", {"kv_dtype": "int8"}),
    "fp8 caches": ("float16", {"kv_dtype": "float8_e4m3fn"}),
    "int4, fp8 caches": ("bfloat16", INT4 | {"kv_dtype": "float8_e4m3fn", "policy": "backfill"}),
    "int8 caches, float32": ("float32", {"kv_dtype": "int8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_pytorch(case: str, made: Callable[..., Bundle]) -> None:
    """A ragged prefill and two cycles of both steps, against PyTorch over the bundle's own weights and scales."""
    activations, options = CASES[case]
    result = compare(made(activations, **options), target=TARGET)
    assert result.passed, result.summary()


@pytest.mark.parametrize(
    ("name", "zero_points"),
    [
        ("gptq-group-32", False),
        ("awq-group-32", True),
        ("compressed-tensors-asymmetric", True),
    ],
)
def test_quantized_checkpoints(name: str, zero_points: bool, library: TorchTrt, tmp_path: Path) -> None:
    """Their integers, and their zero points, are inputs as they lie in the bundle; the rest is in half precision."""
    checkpoint = open_checkpoint(str(QUANTIZED / name), tmp_path / "scratch", log=lambda _: None)
    traced = traced_once("packed", checkpoint, "float16")
    fake_library.engines_of(tmp_path / "b")
    options = {"targets": (TARGET,), "drop_layers": (1,), "always_first": 0, "always_last": 0, "max_seq_len": 48}
    bundle = make_bundle(Family(None, QUANTIZED / name, checkpoint, traced, "float16"), tmp_path / "b", **options)
    assert bundle.target(TARGET)[1].weight_sharing == "inputs"
    for kind, layers in ((StepKind.REFRESH, 2), (StepKind.LORA, 1)):
        nodes = [node for node in graph_of(bundle, kind).node if node.op_type == "Int4Gemm"]
        assert len(nodes) == 4 * layers  # the head is in float
        assert {attributes(node)["has_zero_points"] for node in nodes} == {zero_points}
    result = compare(bundle, target=TARGET)
    assert result.passed, result.summary()


TABLE = ("model.embed_tokens.weight", "model.embed_tokens.weight.scales")


def lookup(bundle: Bundle) -> onnx.ModelProto:
    """The part of the refresh step that looks up tokens."""
    whole = onnx.ModelProto(graph=graph_of(bundle, StepKind.REFRESH), ir_version=11)
    whole.opset_import.append(onnx.helper.make_opsetid("", 24))
    return onnx.utils.Extractor(whole).extract_model(["input_ids", *TABLE], ["hidden_states.0"])


def test_looked_up_rows_are_exact(made: Callable[..., Bundle]) -> None:
    """(q − 8) · scale of the stored bytes, rounded once."""
    bundle = made("float16", **CASES["int4 in blocks of 64, recurrent"][1])
    table = bundle.weight_inputs(TARGET)
    feeds = {"input_ids": np.array([[11, 90]])}
    for name in TABLE:
        data = b"".join(part.tobytes() for part in bundle.mapped_parts(table[name]))
        feeds[name] = np.frombuffer(data, table[name].dtype).reshape(table[name].shape)
    (rows,) = ReferenceEvaluator(lookup(bundle)).run(None, feeds)
    stored = read_tensors(bundle.root / "weights" / "model.safetensors")
    for token, row in zip((11, 90), rows[0], strict=True):
        packed, scales = (stored[name].read()[token] for name in TABLE)
        packed = packed.astype(np.uint8)
        q = np.stack([packed & 15, packed >> 4], -1).reshape(-1, 64).astype(np.float64)
        expected = (q - 8) * scales.astype(np.float64)[:, None]
        np.testing.assert_array_equal(row, expected.reshape(-1).astype(np.float16))


def test_the_library_builds_the_look_up(made: Callable[..., Bundle]) -> None:
    """TensorRT-RTX, whose parser and layers are TensorRT's, takes packed rows as an INT8 input."""
    bundle = made("float16", **CASES["int4 in blocks of 64, recurrent"][1])
    builder = RealBuilder("tensorrt-rtx", bundle.root, BuilderOptions(compute_capabilities=("8.9",)), Console())
    profile = {"batch": (1, 1, 2), "sequence": (1, 1, 8)}
    assert builder.build(lookup(bundle), {"decode": profile})


def test_runs_of_a_captured_graph_and_other_requests(made: Callable[..., Bundle]) -> None:
    """Whole cycles, twice: the second request's steps are replayed over the same caches and weights."""
    bundle = made("bfloat16", **CASES["int4, fp8 caches"][1])
    with Session.open(bundle.root, target=TARGET) as session:
        texts = [session.generate([[7, 3, 11, 19], [5, 2]], max_new_tokens=11) for _ in range(2)]
        engine: Any = session._opened()
        assert engine.captures > 0
        weights = engine.resident_bytes["weights"]
    assert [row.tolist() for row in texts[0]] == [row.tolist() for row in texts[1]]
    table = bundle.weight_inputs(TARGET)
    assert weights == sum(-(-weight.size_bytes // 256) * 256 for weight in table.values())  # once for both


def test_caches_of_8_bits_are_half_as_large(made: Callable[..., Bundle]) -> None:
    """In the session, in Eq. 13 and in what the engines are bound to."""
    counted = {}
    for name in ("int8 caches", "fp8 caches"):
        bundle = made("float16", **CASES[name][1])
        model = bundle.manifest.model
        assert model.token_kv_bytes([0]) == 2 * model.kv_heads * model.head_dim
        found = {spec.dtype for spec in bundle.manifest.io(StepKind.REFRESH, TARGET).inputs if "past_key" in spec.name}
        assert found == {model.kv_dtype}
        nodes = [node for node in graph_of(bundle, StepKind.REFRESH).node if node.op_type == "SkipWriteKVAttention"]
        inputs = {value.name: value.type.tensor_type for value in graph_of(bundle, StepKind.REFRESH).input}
        for layer, node in enumerate(nodes):
            assert attributes(node)["has_kv_scale"] == 1
            assert list(node.input[-2:]) == [f"kv_scales.{layer}.key", f"kv_scales.{layer}.value"]
            assert {inputs[name].elem_type for name in node.input[-2:]} == {onnx.TensorProto.FLOAT}
            assert [dim.dim_value for dim in inputs[node.input[-1]].shape.dim] == [model.kv_heads]
        with Session.open(bundle.root, target=TARGET) as session:
            session.generate([7, 3, 11], max_new_tokens=7)
            counted[name] = session.kv_bytes()
        assert any(f"K/V {name.split()[0]}" in line for line in describe(bundle))
        assert costs.kv_base_bytes(bundle.manifest, 10) == 10 * LAYERS * 2 * model.kv_heads * model.head_dim
    plain = made("float16")
    with Session.open(plain.root, target=TARGET) as session:
        session.generate([7, 3, 11], max_new_tokens=7)
        halves = session.kv_bytes()
    for found in counted.values():
        assert {part: 2 * size for part, size in found.items()} == halves


def test_why_weights_are_constants(library: TorchTrt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the plugin cannot take them they are constants, with the reason; who asked for inputs gets the reason."""
    for name, activations, options, reason in (
        ("native", "bfloat16", {"attention": "native"}, "needs --attention plugin"),
        ("wide", "float32", {}, "computes in half precision, and activations are float32"),
    ):
        fake_library.engines_of(tmp_path / name)
        made_with = {"targets": (TARGET,), **PLAN, **INT4, **options}
        bundle = make_bundle(source(activations), tmp_path / name, **made_with)
        assert bundle.target(TARGET)[1].weight_sharing == "constants"
        said = capsys.readouterr().err
        assert "tensorrt: int4 weights are constants, each engine holds its own" in said
        assert reason in said
        with pytest.raises(InputError, match="cannot be inputs of the engines") as caught:
            add_target(
                bundle.root,
                [TARGET],
                ExportOptions(targets=(TARGET,), force=True, **{**options, "weight_sharing": "inputs"}),
            )
        assert reason in caught.value.note


def test_refusals_of_caches(made: Callable[..., Bundle], library: TorchTrt, tmp_path: Path) -> None:
    command = ["--model", str(source("float32").directory), "--out", str(tmp_path / "b"), "--kv-dtype", "fp8"]
    command += ["--always-first", "1"]
    for more, words in (
        (["--target", TARGET, "--attention", "native"], "The native attention cannot take fp8 caches."),
        (["--target", TARGET, "--policy", "fill"], "--policy fill cannot write fp8 caches on tensorrt."),
        (["--target", "tensorrt-rtx"], "fp8 caches work only with target tensorrt."),
        (["--target", "ort"], "fp8 caches work only with target tensorrt."),
    ):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert main([*command, *more]) == 2
        assert words in said.getvalue()
    assert list(tmp_path.iterdir()) == []
    of_channels = make_bundle(source("float32"), tmp_path / "cpu", kv_dtype="int8", **PLAN)
    with pytest.raises(InputError, match="a scale for each channel"):
        add_target(of_channels.root, [TARGET])


def test_ort_takes_scales_of_heads(library: TorchTrt, tmp_path: Path) -> None:
    """A bundle of both targets has one scale a head, which ONNX Runtime gets for each of its channels."""
    fake_library.engines_of(tmp_path / "b")
    options = {"targets": ("ort", TARGET), "kv_dtype": "int8", "k": 2} | PLAN
    bundle = make_bundle(source("float32"), tmp_path / "b", **options)
    for target in ("ort", TARGET):
        result = compare(bundle, target=target)
        assert result.passed, result.summary()


@pytest.mark.parametrize("attention", ["plugin", "native"])
def test_layers_of_different_heads(library: TorchTrt, attention: str, tmp_path: Path) -> None:
    """And those that take the K and V of others: each node of the plugin is told its own layer's."""
    root = tmp_path / "b"
    fake_library.engines_of(root)
    options = {
        "policy": "backfill",
        "drop_layers": (1, 3, 4),
        "always_first": 0,
        "always_last": 0,
        "attention": attention,
    }
    bundle = make_bundle(more_family("gemma4"), root, targets=(TARGET,), max_seq_len=64, max_prompt_len=40, **options)
    assert compare(bundle, target=TARGET).passed
    if attention == "plugin":
        nodes = [attributes(node) for node in graph_of(bundle, StepKind.REFRESH).node if "kv_heads" in str(node)]
        assert [(node["kv_heads"], node["head_dim"]) for node in nodes] == [(2, 16), (1, 32), (1, 32), (2, 16), (1, 32)]
