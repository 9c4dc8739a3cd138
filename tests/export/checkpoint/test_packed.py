"""GPTQ, AWQ and compressed-tensors: checkpoints that those libraries wrote, and what they themselves make of them.

quantized/write.py wrote the checkpoints, and beside each the SHA-256 of the weights as its library dequantizes them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_tools.inspect import describe
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from lora_drop_export import ExportOptions, export
from lora_drop_export.check.verify import compare
from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.checkpoint.packed import PackedTensor
from lora_drop_export.decoder.loaded import load_model
from lora_drop_export.decoder.trace import TracedModel
from lora_drop_export.quantize.formats import BlockFormat
from tests.support.bundles import Family, make_bundle, traced_family

DIRECTORY = Path(__file__).parent / "quantized"
# Name → (bits, blocks of 64 columns, blocks of 96, symmetric). Rows of 96 have three groups of 32, an odd number: with
# 4-bit zero points the blocks are halves of groups. A channel is as many blocks as it takes.
FORMS = {
    "gptq-group-32": (4, 32, 32, True),
    "gptq-asymmetric": (4, 32, 16, False),
    "gptq-v2": (4, 32, 16, False),
    "gptq-8-bit-channel": (8, 64, 32, True),
    "awq-group-32": (4, 32, 16, False),
    "compressed-tensors-group-32": (4, 32, 32, True),
    "compressed-tensors-asymmetric": (4, 32, 16, False),
    "compressed-tensors-channel": (4, 64, 32, True),
    "compressed-tensors-8-bit": (8, 32, 32, False),
}
FLOATS = {f"compressed-tensors-fp8-{kind}" for kind in ("channel", "dynamic", "tensor", "block")}
FLOATS |= {"compressed-tensors-nvfp4"}  # test_float8.py, test_float4.py
PLAN = {"drop_layers": (1,), "always_first": 0, "always_last": 0, "max_seq_len": 48}
ANOTHER_FORM = "quantized in a form that is not read"


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(str(directory), Path("/nonexistent"), log=lambda _: None)


def reference(name: str) -> tuple[dict[str, str], Callable[[np.ndarray], str]]:
    """Of each quantized weight the library's digest, and what makes one of our float32 values."""
    said = json.loads((DIRECTORY / name / "reference.json").read_text())
    kind = np.dtype(ml_dtypes.bfloat16 if said["dtype"] == "bfloat16" else said["dtype"])
    return said["sha256"], lambda values: hashlib.sha256(values.astype(kind).tobytes()).hexdigest()


@functools.cache
def traced() -> TracedModel:
    """All checkpoints are of one model."""
    model = LlamaForCausalLM(opened(DIRECTORY / "gptq-group-32").config)
    return traced_family("packed", model, "float32").traced


def bundle_of(name: str, root: Path, **options: Any) -> Bundle:
    checkpoint = opened(DIRECTORY / name)
    made_from: Any = Family(None, DIRECTORY / name, checkpoint, traced())  # type: ignore[arg-type]
    return make_bundle(made_from, root, **PLAN, **options)


def test_every_checkpoint_is_here() -> None:
    assert {path.parent.name for path in DIRECTORY.glob("*/config.json")} == {*FORMS, *FLOATS, "gptq-act-order"}


@pytest.mark.parametrize("name", FORMS)
def test_values_are_the_librarys(name: str) -> None:
    """All of them bit by bit, in the dtype of the scales; in rows as in the whole."""
    checkpoint, (digests, digest) = opened(DIRECTORY / name), reference(name)
    packed = {name: tensor for name, tensor in checkpoint.tensors.items() if isinstance(tensor, PackedTensor)}
    assert set(packed) == set(digests)
    assert len(digests) == 14
    for weight, tensor in packed.items():
        values = tensor.read()
        assert (tensor.shape, tensor.dtype, tensor.size_bytes) == (values.shape, "float32", values.nbytes)
        assert digest(values) == digests[weight], weight
        assert np.array_equal(tensor.rows(3, 21), values[3:21])
        assert np.array_equal(tensor.rows(len(values) - 1, len(values) + 5), values[-1:])
        bits, of_64, of_96, symmetric = FORMS[name]
        size = of_96 if tensor.shape[1] == 96 else of_64
        assert tensor.native == BlockFormat(bits, size, symmetric)
        assert len(np.unique(tensor.native_rows(0, 32)[0])) > 10
    assert not hasattr(checkpoint.config, "quantization_config")


def products(bundle: Bundle) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values of each weight that a MatMulNBits of target ort reads, by that operator's definition."""
    path = bundle.root / "ort/steps.onnx"
    outer = onnx.load(path, load_external_data=False).graph
    graphs = [outer, *(attribute.g for node in outer.node for attribute in node.attribute if attribute.HasField("g"))]
    tensors = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}

    def array(name: str, kind: type) -> np.ndarray:
        place = {entry.key: entry.value for entry in tensors[name].external_data}
        file, offset, length = bundle.root / place["location"], int(place["offset"]), int(place["length"])
        return np.frombuffer(file.read_bytes()[offset : offset + length], kind)

    for node in (node for graph in graphs for node in graph.node if node.op_type == "MatMulNBits"):
        n, k, bits, size = (
            next(a.i for a in node.attribute if a.name == name) for name in ("N", "K", "bits", "block_size")
        )

        def values(data: np.ndarray, bits: int = bits) -> np.ndarray:
            return data if bits == 8 else np.stack([data % 16, data // 16], axis=-1)

        scales = array(node.input[2], np.float32).reshape(n, k // size, 1)
        zero_points: Any = 1 << (bits - 1)
        if len(node.input) > 3 and node.input[3]:
            zero_points = values(array(node.input[3], np.uint8)).reshape(n, k // size, 1).astype(np.float32)
        q = values(array(node.input[1], np.uint8)).reshape(n, k // size, size).astype(np.float32)
        yield node.input[1].removesuffix(".blocks"), ((q - zero_points) * scales).reshape(n, k)


@pytest.mark.parametrize("name", FORMS)
def test_graphs_have_the_librarys_integers(name: str, tmp_path: Path) -> None:
    """What the exported graph multiplies with; of each form of blocks the logits of both targets against PyTorch."""
    is_first = name in {form: name for name, form in reversed(FORMS.items())}.values()
    targets = ("ort", "openvino") if is_first else ("ort",)
    bundle = bundle_of(name, tmp_path / "b", targets=targets)
    digests, digest = reference(name)
    found: dict[str, str] = {}
    for joined, values in products(bundle):
        *layer, inner, _ = joined.split(".")
        begin = 0
        for part in inner.split("+"):
            weight = ".".join([*layer, part, "weight"])
            rows = traced().parameters[weight][0]
            found[weight] = digest(values[begin : begin + rows])
            begin += rows
        assert begin == len(values)
    assert found == digests
    for target in targets if is_first else ():
        result = compare(bundle, target=target, threads=1)
        assert result.passed, result
    manifest = Bundle.open(bundle.root).manifest
    assert manifest.model.weight_dtype == f"int{FORMS[name][0]}"
    assert manifest.quantization["method"].endswith(" of the checkpoint")
    assert [entry["block_size"] for entry in manifest.quantization["departures"]] == [None]


@pytest.mark.parametrize(("dtype", "bits"), [(None, None), ("float32", None), ("int8", 8), ("int4", 4)])
def test_the_rest(dtype: str | None, bits: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedding, which is the head too, stays in float, or is quantized in the dtype that is asked for."""
    bundle = bundle_of("compressed-tensors-channel", tmp_path / "b", dtype=dtype)
    said = capsys.readouterr().err
    stored = open_checkpoint(str(bundle.root / "weights"), tmp_path / "scratch")
    digests, digest = reference("compressed-tensors-channel")
    assert {name: digest(stored.tensors[name].read()) for name in digests} == digests
    (path,) = (bundle.root / "weights").glob("*.safetensors")
    kinds = {name: place.dtype for name, place in read_tensors(path).items() if "embed" in name}
    assert kinds["model.embed_tokens.weight"] == ("float32" if bits is None else "uint8")
    table = load_file(path)["model.embed_tokens.weight"]
    assert table.shape == (40, {None: 64, 8: 64, 4: 32}[bits])
    assert compare(bundle, threads=1).passed
    line = {
        None: "left in float: lm_head.weight (1)",
        8: "quantized to 8 bits in blocks of 32, symmetric: lm_head.weight (1)",
        4: "quantized in blocks of 32, with zero points: lm_head.weight (1)",
    }[bits]
    assert line in said
    shown = "\n".join(describe(Bundle.open(bundle.root)))
    assert "weights      int4, blocks of 64, symmetric, compressed-tensors of the checkpoint" in shown
    assert {None: "float: lm", 8: "int8, blocks of 32, symmetric: lm", 4: "blocks of 32, with zero points: lm"}[
        bits
    ] in shown


@pytest.mark.parametrize("left", [0, 1])
def test_a_layer_that_was_left_in_float(left: int, tmp_path: Path) -> None:
    """The other one, which is alike but for that, has integers."""
    directory = copy(tmp_path, "compressed-tensors-group-32")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in opened(directory).tensors.items():
        if isinstance(tensor, PackedTensor) and f".layers.{left}." in name:
            tensors = {part: values for part, values in tensors.items() if not part.startswith(name)}
            tensors[name] = tensor.read()
    save_file(tensors, directory / "model.safetensors")
    made_from: Any = Family(None, directory, opened(directory), traced())  # type: ignore[arg-type]
    targets = ("ort", "openvino")
    bundle = make_bundle(made_from, tmp_path / "b", **PLAN, targets=targets)
    for target in targets:
        assert compare(bundle, target=target, threads=1).passed


@pytest.mark.parametrize("name", ["awq-group-32", "compressed-tensors-channel", "gptq-8-bit-channel"])
def test_a_bundle_of_it_says_the_same_of_another(name: str, tmp_path: Path) -> None:
    """Weights in blocks that no export would choose are no departures there either."""
    targets = ("openvino",) if name.startswith("gptq-8") else ("ort",)
    first = bundle_of(name, tmp_path / "a", targets=targets)
    made_from: Any = Family(None, first.root, open_checkpoint(str(first.root), tmp_path / "scratch"), traced())  # type: ignore[arg-type]
    again = make_bundle(made_from, tmp_path / "b", **PLAN, targets=targets)
    assert again.manifest.quantization == first.manifest.quantization


@pytest.mark.parametrize("name", ["awq-group-32", "gptq-8-bit-channel"])
def test_what_a_bundle_of_it_has_in_float_stays_so(name: str, tmp_path: Path) -> None:
    """The perplexity that it says of its weights is that of all of them."""
    targets = ("openvino",) if name.startswith("gptq-8") else ("ort",)
    bundle = bundle_of(name, tmp_path / "a", targets=targets)
    dtype = f"int{bundle.manifest.quantization['bits']}"
    with pytest.raises(InputError, match="weights of a bundle stay as they are") as refused:
        export(str(bundle.root), tmp_path / "b", ExportOptions(dtype=dtype, targets=("none",)))
    assert "given is --dtype." in str(refused.value)


def test_tools_take_it() -> None:
    """`fit` and `profile` load the dequantized model."""
    loaded = load_model(str(DIRECTORY / "awq-group-32"), log=lambda _: None)
    digests, digest = reference("awq-group-32")
    weights = {name: weight.detach().numpy() for name, weight in loaded.model.named_parameters()}
    assert {name: digest(weights[name]) for name in digests} == digests


def test_zero_points_were_taken_less_one_in_words(tmp_path: Path) -> None:
    """GPTQModel subtracts 0x11111111 from words of 8 zero points: a 0 borrows from the next one, and is 0 again."""
    changed = copy(tmp_path, "gptq-v2", checkpoint_format="gptq", format="gptq")
    tensors = load_file(changed / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.qzeros"
    words = np.random.default_rng(0).integers(0, 1 << 32, tensors[name].shape, np.uint32) & np.uint32(0xFFFF0F0F)
    for other in (other for other in tensors if other.endswith("qzeros")):
        tensors[other] = (tensors[other].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    tensors[name] = (words - np.uint32(0x11111111)).view(np.int32)
    save_file(tensors, changed / "model.safetensors")
    checkpoint, original = opened(changed), opened(DIRECTORY / "gptq-v2")
    weight = "model.layers.0.self_attn.q_proj.weight"
    for other, tensor in original.tensors.items():
        if other != weight:
            assert np.array_equal(tensor.read(), checkpoint.tensors[other].read())
    found: Any = checkpoint.tensors[weight]
    wanted = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)).reshape(len(words), -1).T
    assert np.array_equal(found.native_rows(0, 64)[2], wanted)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


def copy(place: Path, name: str, **changes: Any) -> Path:
    """A checkpoint with other values in quantization_config."""
    target = place / "changed"
    shutil.copytree(DIRECTORY / name, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def of_weights(name: str = "compressed-tensors-group-32", **changes: Any) -> dict[str, Any]:
    config = json.loads((DIRECTORY / name / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    return {"config_groups": {"group_0": groups["group_0"] | {"weights": groups["group_0"]["weights"] | changes}}}


FLOAT = "compressed-tensors-fp8-channel"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptq-group-32", {"quant_method": "quark"}, "quant_method 'quark'"),
    ("gptq-group-32", {"quant_method": ["gptq"]}, "quant_method ['gptq']"),
    ("gptq-group-32", {"bits": 3}, "gptq with bits 3"),
    ("gptq-group-32", {"checkpoint_format": "marlin"}, "gptq of format 'marlin'"),
    ("gptq-group-32", {"is_marlin_format": True}, "is_marlin_format True"),
    ("gptq-group-32", {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    ("awq-group-32", {"bits": 8}, "awq with bits 8"),
    ("awq-group-32", {"version": "gemv"}, "awq of version 'gemv'"),
    ("compressed-tensors-group-32", {"format": "int-quantized"}, "of format 'int-quantized'"),
    ("compressed-tensors-group-32", {"format": "float-quantized"}, "of format 'pack-quantized'"),
    ("compressed-tensors-group-32", {"kv_cache_scheme": {"num_bits": 8}}, "quantized caches"),
    ("compressed-tensors-group-32", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ("compressed-tensors-group-32", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ("compressed-tensors-group-32", of_weights(type="float"), "of type 'float'"),
    ("compressed-tensors-group-32", of_weights(num_bits=3), "num_bits 3"),
    ("compressed-tensors-group-32", of_weights(strategy="block"), "strategy 'block'"),
    (FLOAT, of_weights(FLOAT, strategy="group"), "strategy 'group'"),
    (FLOAT, of_weights(FLOAT, type="int"), "of type 'int'"),
    (FLOAT, of_weights(FLOAT, num_bits=4), "num_bits 4"),
    (FLOAT, of_weights(FLOAT, symmetric=False), "symmetric False"),
]


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_another_form_is_refused_by_name(name: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=ANOTHER_FORM) as error:
        opened(copy(tmp_path, name, **changes))
    assert words in str(error.value)


def test_scattered_inputs_are_refused_by_name(tmp_path: Path) -> None:
    """GPTQModel's `desc_act`, with the order and where it was lost."""
    with pytest.raises(ModelError, match=ANOTHER_FORM) as error:
        opened(DIRECTORY / "gptq-act-order")
    assert "desc_act" in str(error.value)
    lost = copy(tmp_path, "gptq-act-order")
    tensors = load_file(lost / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "g_idx" not in name}, lost / "model.safetensors")
    with pytest.raises(ModelError, match="is damaged") as error:
        opened(lost)
    assert "nothing says of which groups" in str(error.value)


@pytest.mark.parametrize("name", ["gptq-asymmetric", "awq-group-32", "compressed-tensors-group-32"])
def test_a_shorter_last_group_is_refused(name: str, tmp_path: Path) -> None:
    """Two scales of 96 inputs, where the config says groups of 64, are not of 48 each."""
    directory = copy(tmp_path, name, **(of_weights(group_size=64) if name.startswith("comp") else {"group_size": 64}))
    tensors = load_file(directory / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    for part in ("scales", "qzeros"):
        if f"{layer}.{part}" in tensors:
            tensors[f"{layer}.{part}"] = tensors[f"{layer}.{part}"][:2]
    if f"{layer}.weight_scale" in tensors:
        tensors[f"{layer}.weight_scale"] = np.ascontiguousarray(tensors[f"{layer}.weight_scale"][:, :2])
    if f"{layer}.g_idx" in tensors:
        tensors[f"{layer}.g_idx"] = tensors[f"{layer}.g_idx"] // 2
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=ANOTHER_FORM) as error:
        opened(directory)
    assert f"groups of 64 in {layer}.weight [64, 96], the last of 32" in str(error.value)


def test_a_lost_order_of_compressed_tensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is damaged") as error:
        opened(copy(tmp_path, "compressed-tensors-group-32", **of_weights(actorder="group")))
    assert "nothing says of which groups" in str(error.value)


@pytest.mark.parametrize("name", ["gptq-group-32", "compressed-tensors-group-32"])
def test_an_order_that_changes_nothing(name: str, tmp_path: Path) -> None:
    """`desc_act` with static groups, `actorder` weight: inputs are in their order."""
    changes = {"desc_act": True} if name.startswith("gptq") else of_weights(actorder="weight")
    checkpoint, (digests, digest) = opened(copy(tmp_path, name, **changes)), reference(name)
    assert {weight: digest(checkpoint.tensors[weight].read()) for weight in digests} == digests


@pytest.mark.parametrize("config", [5, "gptq", [], {}, {"quant_method": "compressed-tensors"}, {"bits": 4}])
def test_damaged_config(config: Any, tmp_path: Path) -> None:
    changed = copy(tmp_path, "compressed-tensors-group-32")
    said = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(said | {"quantization_config": config}))
    with pytest.raises(ModelError) as error:
        opened(changed)
    assert error.value.note
    assert error.value.hint


@pytest.mark.parametrize("name", ["gptq-asymmetric", "awq-group-32", "compressed-tensors-asymmetric"])
@pytest.mark.parametrize("how", ["missing", "flat", "float"])
def test_damaged_parts(name: str, how: str, tmp_path: Path) -> None:
    """Each part of a weight, but for those that may be absent."""
    tensors = load_file(DIRECTORY / name / "model.safetensors")
    optional = ("g_idx",) if how == "missing" else ("scales", "weight_scale", "weight_shape")
    prefix = "model.layers.1.mlp.up_proj."
    parts = [part for part in tensors if part.startswith(prefix) and not part.endswith((*optional, "qweight"))]
    assert parts
    directory = copy(tmp_path, name)
    for part in parts:
        changed = dict(tensors)
        if how == "missing":
            del changed[part]
        else:
            changed[part] = changed[part].reshape(-1) if how == "flat" else changed[part].astype(np.float64)
        save_file({key: np.ascontiguousarray(value) for key, value in changed.items()}, directory / "model.safetensors")
        if how == "missing" and part.endswith("weight_packed"):
            continue  # then it is no quantized weight
        if how == "flat" and tensors[part].ndim == 1:
            continue
        with pytest.raises((ModelError, InputError)) as error:
            opened(directory)
        assert error.value.note, part


def test_no_quantized_weight(tmp_path: Path) -> None:
    changed = copy(tmp_path, "gptq-group-32", quant_method="awq", version="gemm")
    tensors = load_file(changed / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "proj" not in name}, changed / "model.safetensors")
    with pytest.raises(ModelError, match="does not hold the model") as error:
        opened(changed)
    assert "no tensor is called *.qweight" in str(error.value)
