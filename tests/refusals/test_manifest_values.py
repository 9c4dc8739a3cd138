"""Values of a manifest that are not what they should be are named where they stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lora_drop_tools.cli
import pytest
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME

INT4 = {"bits": 4, "block_size": 32, "method": "rtn", "symmetric": True}


@pytest.fixture
def bundle(place, tmp_path) -> Path:
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    ("place_of", "value", "words"),
    [
        ("model.kv_heads", None, ("model.kv_heads is null", "whole number")),
        ("model.kv_heads", True, ("model.kv_heads is True",)),
        ("model.kv_heads", 0, ("model.kv_heads is 0", "at least 1")),
        ("model.kv_heads", 2.0, ("model.kv_heads is 2.0",)),
        ("model.kv_heads", "2", ("model.kv_heads is '2'",)),
        ("model.kv_heads", -2, ("model.kv_heads is -2",)),
        ("model.layer_heads", [{"num_heads": 4, "kv_heads": 2, "head_dim": 16}], ("model.layer_heads has 1 elements",)),
        ("model.layer_heads", [{"num_heads": 4, "kv_heads": 2, "head_dim": 0}] * 8, ("layer_heads[0].head_dim is 0",)),
        ("plan.kv_sources", [8], ("plan.kv_sources names layer 8, there are 8",)),
        ("model.hidden_size", 2**63, ("63 bits",)),
        ("model.layer_bytes", None, ("model.layer_bytes is null", "list")),
        ("model.layer_bytes", [1], ("model.layer_bytes has 1 elements", "num_layers is 8")),
        ("model.layer_bytes", [0] * 8, ("layer_bytes",)),
        ("model.layer_bytes", [1] * 7 + ["x"], ("model.layer_bytes[7] is 'x'",)),
        ("model.windows", [0] * 9, ("model.windows has 9 elements",)),
        ("model.num_layers", 2**40, ("num_layers",)),
        ("model.dtype", "complex64", ("model.dtype is 'complex64'", "float32")),
        ("model.kv_dtype", "int2", ("model.kv_dtype",)),
        ("model.weight_dtype", "int4", ("quantization.bits is null",)),
        ("model.name", "a\x1b[2Jb", ("model.name", "control characters")),
        ("model.name", "a\u202eb", ("model.name is 'a\\u202eb'", "control characters")),
        ("plan.num_layers", 2**40, ("plan.num_layers is 1099511627776",)),
        ("plan.sites", [["4"]], ("plan.sites[0] is a list",)),
        ("plan.sites", ["4.norm"], ("4.norm", "no half of one")),
        ("plan.bare_sites", 4, ("plan.bare_sites",)),
        ("model.attention_bytes", [10**9] * 8, ("attention_bytes", "layer_bytes")),
        ("plan.k", None, ("plan.k is null",)),
        ("limits", None, ("limits is null", "object")),
        ("limits.max_batch", 0, ("limits.max_batch is 0",)),
        ("limits.max_seq_len", 10**9, ("limits.max_seq_len is 1000000000",)),
        ("special_tokens.eos", None, ("special_tokens.eos is null",)),
        ("special_tokens.eos", 2, ("special_tokens.eos is 2", "list")),
        ("targets.ort.steps", None, ("targets.ort needs either 'steps', or 'graphs' and 'weights'",)),
        ("targets.ort.steps", "ort/other.onnx", ("'ort/other.onnx'", "does not record")),
        ("targets.ort", [], ("targets.ort is a list",)),
        ("targets.tensorrt", {}, ("targets.tensorrt has no 'form'",)),
        ("verification", {"ort": 3}, ("verification.'ort' is 3",)),
        ("verification", {"ort": {}}, ("verification.ort.status is null",)),
        ("verification", {"ort": {"status": "passed", "steps": 3}}, ("verification.ort.max_abs_error is null",)),
        ("verification", {"ort": {"status": "x", "steps": "3"}}, ("verification.ort.steps is '3'",)),
        ("verification", {"ort": {"status": "x", "graphs_on_cpu": {}}}, ("graphs_on_cpu.status is null",)),
        ("quantization", {"bits": 4}, ("quantization.block_size is null",)),
        ("quantization", [], ("quantization is a list",)),
        ("quantization", {"bits": 4, "block_size": 0, "method": "rtn", "symmetric": True}, ("block_size is 0",)),
        ("quantization", {"bits": 4, "block_size": "row"}, ("quantization.block_size is 'row'",)),
        ("quantization", INT4 | {"departures": 3}, ("quantization.departures is 3",)),
        ("quantization", INT4 | {"departures": [{"weights": "a"}]}, ("departures[0].count is null",)),
        ("quantization", INT4 | {"forms": {}}, ("quantization.forms.measured is null",)),
        ("quantization", INT4 | {"forms": {"measured": [], "chosen": 0}}, ("forms.chosen is 0, of 0",)),
        ("quantization", INT4 | {"forms": {"measured": [{}], "chosen": 0}}, ("measured[0].perplexity is null",)),
        ("files.lora.onnx.size_bytes", "x", ("size_bytes is 'x'",)),
        ("versions.numpy", 2, ("versions.'numpy' is 2",)),
        ("surprise", 1, ("'surprise'", "unknown")),
        ("model.surprise", 1, ("model has 'surprise'", "unknown")),
    ],
)  # fmt: skip
def test_a_value(refused, bundle, place_of, value, words) -> None:
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    *way, last = place_of.replace("lora.onnx", "lora\0onnx").split(".")
    holder: Any = data
    for key in way:
        holder = holder[key.replace("\0", ".")]
    holder[last] = value
    (bundle / MANIFEST_NAME).write_text(json.dumps(data))
    for command in (("inspect", bundle), ("generate", bundle, "--prompt", "t1")):
        refused(lora_drop_tools.cli.main, *command, words=words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"kv_heads": 2', '"kv_heads": NaN', "NaN"),
        ('"kv_heads": 2', '"kv_heads": 1e999', "1e999"),
        ('"kv_heads": 2', '"kv_heads": 1' + "0" * 5000, "5001 digits"),
        ('"kv_heads": 2', '"kv_heads": 2, "kv_heads": 2', "'kv_heads' twice"),
        ('"kv_heads": 2', '"kv_heads": ' + "[" * 60 + "]" * 60, "nested deeper"),
        ('"kv_heads": 2', '"kv_heads": ' + "[" * 100_000 + "]" * 100_000, "nested deeper"),
        ('"kv_heads": 2', '"kv_heads": 2,,', "not JSON"),
    ],
)  # fmt: skip
def test_json_that_no_bundle_holds(refused, bundle, old, new, words) -> None:
    text = (bundle / MANIFEST_NAME).read_text()
    assert old in text
    (bundle / MANIFEST_NAME).write_text(text.replace(old, new))
    refused(lora_drop_tools.cli.main, "inspect", bundle, words=("manifest is damaged", words))


def test_a_twin_among_very_many_keys(refused, bundle) -> None:
    """Each was compared with each other: hours for a manifest of the size that is read."""
    keys = "".join(f'"{key}": 0, ' for key in range(100_000))
    (bundle / MANIFEST_NAME).write_text(f'{{{keys}"99999": 0}}')
    refused(lora_drop_tools.cli.main, "inspect", bundle, words=("'99999' twice",))


def test_more_layers_than_any_model_has(refused, bundle) -> None:
    """Of a manifest of 800 KB each site was compared with each other; so are the layers by `inspect`."""
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    count = 16_000
    lists = ("windows", "layer_bytes", "attention_bytes", "kv_bytes")
    data["model"] |= {name: data["model"][name][:1] * count for name in lists} | {"num_layers": count}
    sites = [f"{layer}.{half}" for layer in range(3, count - 1) for half in ("attn", "mlp")]
    data["plan"] |= {"num_layers": count, "sites": sites}
    (bundle / MANIFEST_NAME).write_text(json.dumps(data))
    refused(lora_drop_tools.cli.main, "inspect", bundle, words=("model.num_layers is 16000, more than 4096",))


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"vocab_size": 7}),
        ("model", {"head_dim": 8}),
        ("model", {"kv_heads": 1}),
        ("model", {"kv_dtype": "int8"}),
        ("plan", {"sites": []}),
        ("plan", {"sites": ["4", "5"]}),
        ("plan", {"policy": "fill"}),
        ("plan", {"surrogate": "recurrent"}),
    ],
)
def test_a_manifest_of_another_graph(refused, bundle, section, changes) -> None:
    """Every value is a possible one; the graph that is loaded says otherwise."""
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    data[section] |= changes
    (bundle / MANIFEST_NAME).write_text(json.dumps(data))
    words = ("ort/steps.onnx",)
    refused(lora_drop_tools.cli.main, "generate", bundle, "--prompt", "t1", "--max-new-tokens", 4, words=words)
