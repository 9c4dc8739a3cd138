"""fp8 weights on TensorRT: what the parser gets, that the library builds it, and where it is refused.

The graphs run on ONNX Runtime in float16 against the reference over dequantized weights; an engine needs a GPU.
"""

from __future__ import annotations

import copy
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_tools.inspect import describe

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.targets.trt.build import EngineBuilder
from lora_drop_export.targets.trt.lower import trt_from_neutral
from lora_drop_export.targets.trt.options import BuilderOptions
from lora_drop_export.targets.trt.quantized import sign_weights
from tests.export.targets.trt.test_against_oracle import parse_alone
from tests.support.bundles import PROMPTS, family, make_bundle, more_family
from tests.support.fake_gpu import BINDINGS, FakeGpu
from tests.support.trt_graphs import (
    ADA,
    LAYERS,
    MATRICES,
    QUANTIZED,
    RTX,
    dequantization,
    of_family,
    quantized_constants,
)

FP8 = "float8_e4m3fn"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """What `--target tensorrt-rtx --dtype fp8` makes of a bfloat16 checkpoint."""
    source, root = of_family("llama", "bfloat16"), tmp_path_factory.mktemp("trt") / "b"
    return make_bundle(source, root, targets=(RTX,), dtype=FP8, builder=ADA, max_prompt_len=40, always_first=1)


def test_engines_hold_fp8(bundle):
    """Built by the library; the matrices alone are fp8, each engine holds those that it uses."""
    entry, model = bundle.target(RTX)[1], bundle.manifest.model
    assert (model.dtype, model.weight_dtype) == ("bfloat16", FP8)
    assert (entry.weight_sharing, entry.weights) == ("constants", None)
    assert entry.engine_bytes.keys() == {"refresh", "lora"}
    assert quantized_constants(bundle, StepKind.REFRESH) == [("FP8", "BF16")] * MATRICES
    dropped = len(bundle.manifest.plan.dropped_layers)
    assert quantized_constants(bundle, StepKind.LORA) == [("FP8", "BF16")] * (MATRICES - 7 * dropped)
    places = read_tensors(bundle.root / "weights" / "model.safetensors")
    stored = {name: place.dtype for name, place in places.items() if not name.endswith(".scales")}
    assert {name for name, dtype in stored.items() if dtype != FP8} == {name for name in stored if "norm" in name}
    assert {dtype for name, dtype in stored.items() if "norm" in name} == {"bfloat16"}
    assert not list(bundle.root.glob("signed-*"))


def test_experts(tmp_path, monkeypatch):
    """Of both of their matrices a row has a scale, though the rows are not as long."""
    monkeypatch.setattr(EngineBuilder, "build", parse_alone)
    options = {"targets": (RTX,), "dtype": FP8, "activation_dtype": "float16", "builder": ADA, "max_prompt_len": 40}
    source = more_family("qwen2_moe")
    bundle = make_bundle(source, tmp_path / "b", always_first=1, always_last=0, **options)
    places = read_tensors(bundle.root / "weights" / "model.safetensors")
    for part in ("gate_up_proj", "down_proj"):
        rows = f"model.layers.1.mlp.experts.{part}.rows"
        assert (places[rows].dtype, places[f"{rows}.scales"].shape) == (FP8, places[rows].shape[:1])
    (gate,) = bundle.manifest.quantization["departures"]
    assert (gate["weights"], gate["block_size"]) == ("model.layers.*.mlp.gate.weight", None)


def test_the_manifest_says_it(bundle):
    assert bundle.manifest.quantization == {"bits": 8, "block_size": None, "method": "rtn", "symmetric": True}
    assert Bundle.open(bundle.root).manifest == bundle.manifest
    assert "weights      fp8, a scale for each row, rtn" in describe(bundle)


def test_the_library_has_no_fp8_for_older_gpus(bundle):
    """The reason for the refusal before the trace."""
    builder = EngineBuilder(RTX, bundle.root, BuilderOptions(compute_capabilities=("8.6",)), Console())
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT8E4M3FN, (32, 64), bytes(32 * 64), raw=True)
    scales = onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT16, (32,), np.ones(32, np.float16).tobytes(), raw=True)
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["values"], axis=0),
        onnx.helper.make_node("Transpose", ["values"], ["columns"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "columns"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(*io) for io in (("x", 10, ["b", 64]), ("y", 10, ["b", 32])))
    graph = onnx.helper.make_graph(nodes, "refresh", [x], [y], [weight, scales])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11)
    trt = builder.trt
    parts = trt.Builder(builder._logger)
    network = parts.create_network(0)
    parser = trt.OnnxParser(network, builder._logger)
    assert parser.parse(model.SerializeToString())
    built = {}
    for capability in ("SM86", "SM89", "SM120"):
        config = parts.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
        profile = parts.create_optimization_profile()
        profile.set_shape("x", (1, 64), (1, 64), (8, 64))
        config.add_optimization_profile(profile)
        built[capability] = parts.build_serialized_network(network, config) is not None
    assert built == {"SM86": False, "SM89": True, "SM120": True}
    assert any("fp8" in line for line in builder._logger.lines)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(("checkpoint", "half"), [("fp8-channel", "BF16"), ("fp8-tensor", "HALF")])
def test_checkpoints(checkpoint, half, tmp_path, capsys):
    """Their values and scales as they lie, and every step of the graph against PyTorch where the CPU can run it."""
    model = QUANTIZED / f"compressed-tensors-{checkpoint}"
    options = ["--target", RTX, "--always-first", "0", "--always-last", "0"]
    options += [] if half == "BF16" else ["--compute-capability", "8.9"]
    options += ["--activation-dtype", {"HALF": "fp16", "BF16": "bf16"}[half]]
    assert main(["--model", str(model), "--out", str(tmp_path / "b"), *options]) == 0
    said = capsys.readouterr().err
    assert "the checkpoint's fp8 weights are taken as they are (compressed-tensors)" in said
    assert ("more than weights" in said) == (checkpoint != "fp8-channel")
    assert "tensorrt-rtx: fp8 weights are constants, each engine holds its own" in said
    bundle = Bundle.open(tmp_path / "b")
    of_default = half == "BF16"
    assert ("not built for compute capability 8.6, which has no fp8" in said) == of_default
    assert bundle.target(RTX)[1].compute_capabilities == (("8.9", "12.0") if of_default else ("8.9",))
    for kind, layers in ((StepKind.REFRESH, 2), (StepKind.LORA, 1)):
        assert quantized_constants(bundle, kind) == [("FP8", half)] * 7 * layers
    verification = bundle.manifest.verification[RTX]
    if half == "HALF":
        verification = verification.get("graphs_on_cpu", verification)
        assert verification["status"] == "passed"
    given, stored = (
        read_tensors(file) for file in (model / "model.safetensors", bundle.root / "weights/model.safetensors")
    )
    names = [name for name, place in given.items() if place.dtype == FP8]
    assert len(names) == 14
    for name in names:
        for places in (given, stored):
            assert places[name].dtype == FP8
        assert given[name].read().tobytes() == stored[name].read().tobytes()
        kind = {"HALF": np.float16, "BF16": ml_dtypes.bfloat16}[half]
        scales = given[f"{name.removesuffix('weight')}weight_scale"].read().reshape(-1).astype(kind)
        rows = stored[name].shape[0]
        np.testing.assert_array_equal(
            np.asarray(stored[f"{name}.scales"].read(), np.float32), np.broadcast_to(scales, rows).astype(np.float32)
        )


def test_near_the_float_model(tmp_path):
    """Logits of the model with the bundle's weights, by transformers, beside its own and those of int4.

    A value of E4M3 is off by at most 1/16 of itself, one of int4 by 1/16 of the block's range: in normal weights about
    three times as much, and divergence grows with the square.
    """
    source = family("llama")
    ids = torch.tensor([PROMPTS[0] + PROMPTS[2]])

    def logits(dtype: str) -> torch.Tensor:
        made = make_bundle(source, tmp_path / dtype, targets=("none",), dtype=dtype)
        stored = open_checkpoint(str(made.root / "weights"), tmp_path / "scratch").tensors
        model = copy.deepcopy(source.model)
        for name, parameter in model.named_parameters():
            parameter.data = torch.from_numpy(np.array(stored[name].read(), np.float32))
        with torch.no_grad():
            return model(ids).logits[0].log_softmax(-1)

    with torch.no_grad():
        whole = source.model(ids).logits[0].log_softmax(-1)
    apart = {dtype: float((whole.exp() * (whole - logits(dtype))).sum(-1).mean()) for dtype in (FP8, "int4")}
    assert 0 < apart[FP8] < apart["int4"] / 4
    assert apart[FP8] < 0.1


def test_the_plugin_form_takes_them(bundle):
    """Attention is the plugin, linear layers stay with constants in fp8."""
    neutral = onnx.load(bundle.root / "lora.onnx", load_external_data=False)
    proto = trt_from_neutral(neutral, {"kept": 9, "dropped": 9}, weight_sharing="constants", form="plugin").proto
    operators = [node.op_type for node in proto.graph.node]
    dropped = len(bundle.manifest.plan.dropped_layers)
    assert operators.count("SkipWriteKVAttention") == LAYERS - dropped
    assert operators.count("DequantizeLinear") == MATRICES - 7 * dropped


@pytest.mark.parametrize(("scale", "reason"), [(-1.0, "negative scales"), (0.0, None)])
def test_scales_that_tensorrt_refuses(scale, reason, tmp_path):
    """Of a checkpoint: a negative one is an error, 0 becomes the least positive value."""
    weight, scales = np.full((2, 4), 0x38, np.uint8), np.array([1, scale], np.float16)
    data = {"w": (onnx.TensorProto.FLOAT8E4M3FN, weight), "s": (onnx.TensorProto.FLOAT16, scales)}
    model = dequantization(tmp_path, data, axis=0)
    with (tmp_path / "signed").open("wb") as file:
        if reason is not None:
            with pytest.raises(ModelError) as caught:
                sign_weights(model, tmp_path, file)
            assert reason in caught.value.note
            return
        sign_weights(model, tmp_path, file)
    weight, scales = model.graph.initializer
    assert {entry.key: entry.value for entry in weight.external_data}["location"] == "data"
    assert {entry.key: entry.value for entry in scales.external_data}["location"] == "signed"
    assert np.fromfile(tmp_path / "signed", np.float16).tolist() == [1, np.finfo(np.float16).smallest_subnormal]


# ── what is refused, before the trace ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def untraced(monkeypatch):
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_: pytest.fail("traced"), raising=False)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--target ort", ("cannot take fp8 weights", "only with tensorrt or tensorrt-rtx; ort was asked for")),
        ("--target openvino", ("cannot take fp8 weights", "openvino was asked for")),
        (f"--target {RTX} --target ort", ("cannot take fp8 weights", "ort was asked for")),
        (
            f"--target {RTX} --compute-capability 8.6 --compute-capability 8.9",
            ("Compute capability 8.6 has no fp8", "need 8.9 or newer", "Hint: Name newer ones"),
        ),
        (f"--target {RTX} --weight-sharing inputs", ("cannot be inputs of the engines", "no plugin takes fp8")),
        (f"--target {RTX} --block-size 64", ("--block-size applies only to int4 and int8 weights", "--dtype is fp8")),
        (f"--target {RTX} --quantization gptq", ("--quantization applies only to int4 and int8", "--dtype is fp8")),
        (f"--target {RTX} --head-dtype int8", ("--head-dtype applies only to int4 weights", "--dtype is fp8")),
        (f"--target {RTX} --kv-dtype fp8", ("fp8 caches work only with target tensorrt", "--dtype is fp8")),
    ],
)
def test_refusals(arguments, words, tmp_path, capsys):
    out = tmp_path / "b"
    model = str(family("llama").directory)
    assert main(["--model", model, "--out", str(out), "--dtype", "fp8", *arguments.split()]) == 2
    said = capsys.readouterr().err
    for word in (*words, "Note: ", "Hint: "):
        assert word in said
    assert not out.exists()


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--target ort --dtype fp8", ("cannot take fp8 weights", "Use --target tensorrt or tensorrt-rtx, or another")),
        (f"--target {RTX} --compute-capability 7.5 --activation-dtype fp16", ("Compute capability 7.5 has no fp8",)),
    ],
)
def test_refusals_of_checkpoints(arguments, words, tmp_path, capsys):
    model = str(QUANTIZED / "compressed-tensors-fp8-channel")
    assert main(["--model", model, "--out", str(tmp_path / "b"), *arguments.split()]) == 2
    said = capsys.readouterr().err
    for word in (*words, "Note: ", "Hint: "):
        assert word in said
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("capability", "arguments", "fact"),
    [
        ((8, 6), "", "Compute capability 8.6 has no fp8"),
        ((8, 9), "--hardware-compatible", "--hardware-compatible does not go with fp8"),
    ],
)
def test_tensorrt_on_this_machines_gpu(capability, arguments, fact, tmp_path, capsys, monkeypatch):
    """The library and CUDA are stand-ins; a GPU with fp8 and without such options gets as far as the trace."""
    gpu = FakeGpu()
    gpu.capability = capability
    for name in BINDINGS:
        monkeypatch.setitem(sys.modules, name, gpu)
    monkeypatch.setattr("lora_drop_export.targets.trt.target.check_buildable", lambda *_: None)
    given = ["--target", "tensorrt", "--attention", "native", "--dtype", "fp8", *arguments.split()]
    model = str(family("llama").directory)
    assert main(["--model", model, "--out", str(tmp_path / "b"), *given]) == 2
    said = capsys.readouterr().err
    for word in (fact, "8.9 or newer", "Hint: "):
        assert word in said


def test_a_target_for_the_cpu_is_not_added(bundle):
    with pytest.raises(InputError, match="cannot take fp8 weights"):
        add_target(bundle.root, ["ort"])
    options = ExportOptions(targets=(RTX,), builder=BuilderOptions(compute_capabilities=("8.6",)), force=True)
    with pytest.raises(InputError, match="has no fp8"):
        add_target(bundle.root, [RTX], options)
