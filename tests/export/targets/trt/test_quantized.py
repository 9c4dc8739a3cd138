"""int4 weights on TensorRT: what the parser gets, that its values are the bundle's, and that the library builds it.

The graphs run on ONNX Runtime in float32 against the reference over dequantized weights; an engine needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.command_line import held_signals
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.cli import main
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.targets.trt import build
from lora_drop_export.targets.trt.build import EngineBuilder
from lora_drop_export.targets.trt.lower import trt_from_neutral
from lora_drop_export.targets.trt.quantized import sign_weights
from tests.support.bundles import make_bundle
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


@pytest.fixture(scope="module")
def with_zero_points(tmp_path_factory) -> Bundle:
    """As an AWQ checkpoint has them; activations are float32."""
    source, root = of_family("llama"), tmp_path_factory.mktemp("trt") / "b"
    made = make_bundle(source, root, targets=("none",), dtype="int4", always_first=1)
    assert not made.manifest.quantization["symmetric"]
    return add_target(made.root, [RTX], ExportOptions(targets=(RTX,), builder=ADA))


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory) -> Bundle:
    """What `--target tensorrt-rtx --dtype int4` makes of a bfloat16 checkpoint."""
    source, root = of_family("llama", "bfloat16"), tmp_path_factory.mktemp("trt") / "b"
    return make_bundle(source, root, targets=(RTX,), dtype="int4", builder=ADA, max_prompt_len=40, always_first=1)


def test_what_the_parser_reads_is_closed_and_goes(symmetric, monkeypatch):
    """Windows opens no file again that goes when it is closed."""
    files = []

    def signed(model, root, file):
        files.append(file)
        sign_weights(model, root, file)

    def parsing():
        assert files[0].closed
        assert Path(files[0].name).stat().st_size
        return held_signals()

    monkeypatch.setattr(build, "sign_weights", signed)
    monkeypatch.setattr(build, "held_signals", parsing)
    builder = EngineBuilder(RTX, symmetric.root, ADA, Console())
    builder.parse(onnx.load(symmetric.root / symmetric.target(RTX)[1].graphs["lora"], load_external_data=False))
    assert not Path(files[0].name).exists()


def test_symmetric_weights_stay_at_4_bits(symmetric):
    """Activations are in the checkpoint's half precision; each engine holds the weights that it uses."""
    entry, model = symmetric.target(RTX)[1], symmetric.manifest.model
    assert (model.dtype, model.weight_dtype) == ("bfloat16", "int4")
    assert symmetric.manifest.quantization["symmetric"]
    assert (entry.weight_sharing, entry.weights) == ("constants", None)
    assert quantized_constants(symmetric, StepKind.REFRESH) == [("INT4", "BF16")] * MATRICES
    dropped = len(symmetric.manifest.plan.dropped_layers)
    assert quantized_constants(symmetric, StepKind.LORA) == [("INT4", "BF16")] * (MATRICES - 7 * dropped)
    assert not list(symmetric.root.glob("signed-*"))
    assert entry.engine_bytes.keys() == {"refresh", "lora"}


def test_zero_points_become_8_bits(with_zero_points):
    assert quantized_constants(with_zero_points, StepKind.REFRESH) == [("INT8", "FLOAT")] * MATRICES


def test_graphs_compute_with_the_dequantized_weights(with_zero_points):
    """Every step of the ONNX that the engines are made of, against PyTorch over the bundle's own weights."""
    verification = with_zero_points.manifest.verification[RTX]
    if verification["status"] == "not run":  # no GPU here
        verification = verification["graphs_on_cpu"]
    assert verification["status"] == "passed"


def external(root: Path, tensor: onnx.TensorProto, dtype: type) -> np.ndarray:
    where = {entry.key: entry.value for entry in tensor.external_data}
    return np.fromfile(
        root / where["location"], dtype, int(where["length"]) // np.dtype(dtype).itemsize, offset=int(where["offset"])
    )


@pytest.mark.parametrize(("name", "scale"), [("with_zero_points", np.float32), ("symmetric", ml_dtypes.bfloat16)])
def test_signed_weights_are_the_bundle_s(name, scale, request, monkeypatch):
    """q · scale of what the parser reads is (q − zero point) · scale of what the bundle stores, read apart. Weights are
    larger than what is in memory at once."""
    monkeypatch.setattr("lora_drop_export.targets.trt.quantized._CHUNK_BYTES", 1000)
    bundle = request.getfixturevalue(name)
    graph = onnx.load(bundle.root / "refresh.onnx", load_external_data=False)
    path = bundle.root / "signed"
    try:
        with path.open("wb") as file:
            sign_weights(graph, bundle.root, file)
        tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
        nodes = [node for node in graph.graph.node if node.op_type == "DequantizeLinear"]
        stored = read_tensors(bundle.root / "weights" / "model.safetensors")
        assert len(nodes) == MATRICES
        for node in nodes:
            weight, scales = (tensors[name] for name in node.input)
            rows = weight.dims[0]
            bits = external(bundle.root, weight, np.int8)
            if weight.data_type == onnx.TensorProto.INT4:
                bits = np.stack([(bits << 4) >> 4, bits >> 4], -1)
            q = bits.reshape(rows, scales.dims[1], -1)
            ours = q * external(bundle.root, scales, scale).reshape(rows, -1, 1).astype(np.float32)
            packed, points = (stored[f"{weight.name}{end}"].read() for end in ("", ".zero_points"))
            nibbles = [np.stack([a & 15, a >> 4], -1).reshape(rows, -1).astype(np.float32) for a in (packed, points)]
            exact = stored[f"{weight.name}.scales"].read().astype(scale).astype(np.float32)
            theirs = (nibbles[0].reshape(q.shape) - nibbles[1][..., None]) * exact[..., None]
            np.testing.assert_array_equal(ours, theirs)
    finally:
        path.unlink()


def test_the_plugin_form_takes_them(symmetric):
    """Attention is the plugin, linear layers stay with quantized constants."""
    neutral = onnx.load(symmetric.root / "lora.onnx", load_external_data=False)
    proto = trt_from_neutral(neutral, {"kept": 9, "dropped": 9}, weight_sharing="constants", form="plugin").proto
    operators = [node.op_type for node in proto.graph.node]
    dropped = len(symmetric.manifest.plan.dropped_layers)
    assert operators.count("SkipWriteKVAttention") == LAYERS - dropped
    assert operators.count("DequantizeLinear") == MATRICES - 7 * dropped


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("checkpoint", "integers"), [("gptq-group-32", "INT4"), ("awq-group-32", "INT8"), ("gptq-8-bit-channel", "INT8")]
)
def test_quantized_checkpoints(checkpoint, integers, tmp_path):
    """Built with what is beside their integers in half precision: those of two layers, or of the first alone."""
    options = [
        "--target",
        RTX,
        "--always-first",
        "0",
        "--always-last",
        "0",
        "--compute-capability",
        "8.9",
        "--no-verify",
    ]
    assert main(["--model", str(QUANTIZED / checkpoint), "--out", str(tmp_path / "b"), *options]) == 0
    bundle = Bundle.open(tmp_path / "b")
    half = {"float16": "HALF", "bfloat16": "BF16"}[bundle.manifest.model.dtype]
    for kind, layers in ((StepKind.REFRESH, 2), (StepKind.LORA, 1)):
        assert quantized_constants(bundle, kind) == [(integers, half)] * 7 * layers


@pytest.mark.usefixtures("one_trace")
def test_signed_8_bits_are_the_checkpoint_s(tmp_path, monkeypatch):
    """(q − 128) · scale of what the parser reads is what the reference of the checkpoint says of its weights."""
    monkeypatch.setattr(EngineBuilder, "build", lambda *_: b"an engine")  # of the graph alone is something said
    options = ["--target", RTX, "--always-first", "0", "--always-last", "0", "--compute-capability", "8.9"]
    model = QUANTIZED / "gptq-8-bit-channel"
    assert main(["--model", str(model), "--out", str(tmp_path / "b"), *options, "--activation-dtype", "fp32"]) == 0
    bundle = Bundle.open(tmp_path / "b")
    verification = bundle.manifest.verification[RTX]
    if verification["status"] == "not run":  # no GPU here
        verification = verification["graphs_on_cpu"]
    assert verification["status"] == "passed"
    graph = onnx.load(bundle.root / "refresh.onnx", load_external_data=False)
    # What the checkpoint's own format says, read apart: words of four values along the inputs, scales of a column
    parts = read_tensors(model / "model.safetensors")
    with (bundle.root / "signed").open("wb") as file:
        sign_weights(graph, bundle.root, file)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    seen = 0
    for node in [node for node in graph.graph.node if node.op_type == "DequantizeLinear"]:
        weight, scales = (tensors[name] for name in node.input)
        assert weight.data_type == onnx.TensorProto.INT8
        q = external(bundle.root, weight, np.int8).reshape(weight.dims[0], scales.dims[1], -1)
        ours = (q * external(bundle.root, scales, np.float32).reshape(*q.shape[:2], 1)).reshape(weight.dims[0], -1)
        name = weight.name.removesuffix(".weight")
        words = parts[f"{name}.qweight"].read().view(np.uint8)
        theirs = (
            words.reshape(len(words), -1, 4).transpose(1, 0, 2).reshape(weight.dims[0], -1).astype(np.float32) - 128
        )
        np.testing.assert_array_equal(ours, theirs * parts[f"{name}.scales"].read().astype(np.float32)[0][:, None])
        seen += 1
    assert seen == 14


def test_negative_scales_of_8_bits_are_refused(symmetric, tmp_path):
    """What `--dtype int8` makes, should it ever come here: INT8 with its signs would be another weight."""
    made = make_bundle("llama", tmp_path / "b", targets=("none",), dtype="int8")
    graph = onnx.load(made.root / "refresh.onnx", load_external_data=False)
    with (made.root / "signed").open("wb") as file, pytest.raises(ModelError, match="cannot take these 8-bit weights"):
        sign_weights(graph, made.root, file)


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt-rtx,ort"])
def test_8_bits_with_zero_points_are_refused_before_the_trace(target, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_: pytest.fail("traced"), raising=False)
    targets = [word for name in target.split(",") for word in ("--target", name)]
    model = QUANTIZED / "compressed-tensors-8-bit"
    assert main(["--model", str(model), "--out", str(tmp_path / "b"), *targets]) == 2
    said = capsys.readouterr().err
    assert "cannot take the checkpoint's weights as they are" in said
    assert "has int8 blocks with zero points; tensorrt-rtx was asked for" in said
    assert "Hint: Use --target ort or openvino, or the model's float checkpoint." in said
    assert not (tmp_path / "b").exists()


def test_refusals(symmetric, tmp_path):
    with pytest.raises(InputError, match="cannot take int8 weights"):
        ExportOptions(dtype="int8", targets=(RTX,))
    with pytest.raises(InputError, match="cannot be inputs of the engines"):
        add_target(symmetric.root, [RTX], ExportOptions(targets=(RTX,), weight_sharing="inputs", force=True))
    with pytest.raises(InputError, match="cannot compute in bf16 with quantized weights"):
        add_target(symmetric.root, ["openvino"])


@pytest.mark.parametrize(
    ("points", "scale", "reason"),
    [("w.zero_points", 1.0, "zero points, INT8 has none"), ("w.symmetric_zero_points", -1.0, "negative scales")],
)
def test_8_bits_that_int8_cannot_hold_are_an_error(points, scale, reason, tmp_path):
    """Such as those of a bundle whose checkpoint mixes 4 and 8 bits."""
    integers, floats = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    data = {"w": (integers, np.zeros((1, 32), np.uint8)), "s": (floats, np.full((1, 1), scale, np.float32))}
    data[points] = integers, np.zeros(1, np.uint8)
    model = dequantization(tmp_path, data, axis=1, block_size=32)
    with (tmp_path / "signed").open("wb") as file, pytest.raises(ModelError) as caught:
        sign_weights(model, tmp_path, file)
    assert reason in caught.value.note
