"""Checkpoints with weights in fp8, against the library that writes them, transformers, and the formats' definitions."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import ModelError
from safetensors.torch import load_file, save_file

from lora_drop_export.checkpoint.float8 import Float8Tensor, Float8Values
from lora_drop_export.cli import main
from lora_drop_export.compiler.facts import with_small_floats
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.decoder.loaded import load_model
from lora_drop_export.quantize.formats import row_format
from lora_drop_export.weights.resolve import find_tensor
from tests.support.bundles import traced_family
from tests.support.models import llama, qwen2_moe

from .test_packed import ANOTHER_FORM, DIRECTORY, copy, of_weights, opened, reference

ROWS = ("compressed-tensors-fp8-channel", "compressed-tensors-fp8-dynamic", "compressed-tensors-fp8-tensor")
BLOCKS = "compressed-tensors-fp8-block"
Grid = Callable[[int, int], tuple[int, int]]  # rows and columns of a matrix → of what shares a scale
FP8 = torch.float8_e4m3fn


def _blocks(high: int, wide: int) -> Grid:
    return lambda n, k: (high, wide)


def _rows(n: int, k: int) -> tuple[int, int]:
    return 1, k


def _whole(n: int, k: int) -> tuple[int, int]:
    return n, k


# quantization_config, what shares a scale, the dtype of scales; `modelopt.json` has it in a file of its own
FORMS: dict[str, tuple[dict[str, Any], Grid, torch.dtype]] = {
    "blocks": ({"quant_method": "fp8", "weight_block_size": [32, 16]}, _blocks(32, 16), torch.float32),
    "odd-blocks": ({"quant_method": "fp8", "weight_block_size": [20, 48]}, _blocks(20, 48), torch.bfloat16),
    "as-wide": ({"quant_method": "fp8", "weight_block_size": [20, 64]}, _blocks(20, 64), torch.float32),
    "default-blocks": ({"quant_method": "fp8", "fmt": "e4m3"}, _blocks(128, 128), torch.float32),
    "powers": (
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        _blocks(32, 32),
        torch.float8_e8m0fnu,
    ),
    "static": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        _whole,
        torch.float32,
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, _rows, torch.float32),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {}}, _whole, torch.float32),
    "modelopt.json": ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, _whole, torch.float32),
}
KEPT = ("static", "fbgemm", "modelopt", "modelopt.json")


def rounded(weight: torch.Tensor, grid: Grid, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in fp8, its scales, and the values that both stand for, each by its own block."""
    (n, k), (high, wide) = weight.shape, grid(*weight.shape)
    rows, columns = torch.arange(n) // high, torch.arange(k) // wide
    found = np.zeros((int(rows[-1]) + 1, int(columns[-1]) + 1), np.float32)
    np.maximum.at(found, (rows.numpy()[:, None], columns.numpy()[None, :]), weight.abs().numpy())
    largest = torch.from_numpy(found)
    scales = largest / 300
    scales = torch.exp2(scales.log2().ceil()).to(kind) if kind == torch.float8_e8m0fnu else scales.to(kind)
    each = scales.float()[rows[:, None], columns[None, :]]
    values = (weight / each).to(FP8)
    return values, scales, values.float() * each


def write(directory: Path, form: str, model: Any = None, **changes: Any) -> dict[str, torch.Tensor]:
    """A checkpoint in this form; returns the values of its weights in fp8."""
    config, grid, kind = FORMS[form]
    (model or plain_model()).save_pretrained(directory)
    file, stored, wanted = directory / "model.safetensors", {}, {}
    end = "_scale_inv" if config.get("quant_method") == "fp8" else "_scale"
    for name, tensor in load_file(file).items():
        if "proj" not in name or not name.endswith(".weight") or tensor.ndim != 2:
            stored[name] = tensor.bfloat16()
            continue
        values, scales, wanted[name] = rounded(tensor.float(), grid, kind)
        stored |= {name: values, f"{name}{end}": scales.reshape(()) if form in ("static", "modelopt") else scales}
        stored[name.replace("weight", "activation_scale" if end == "_scale_inv" else "input_scale")] = torch.ones(())
    if form.startswith("modelopt"):
        stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(stored, file, metadata={"format": "pt"})
    path = directory / "config.json"
    said = json.loads(path.read_text("utf-8")) | {"dtype": "bfloat16"}
    if form == "modelopt.json":
        own = {"producer": {"name": "modelopt"}, "quantization": config | changes}
        (directory / "hf_quant_config.json").write_text(json.dumps(own), "utf-8")
    else:
        said["quantization_config"] = config | changes
    path.write_text(json.dumps(said), "utf-8")
    return wanted


def plain_model() -> Any:
    """Down projections have 96 columns, which blocks of 128 hold once, and of 20 rows and 48 columns not evenly; the
    others have 64."""
    return llama(hidden_size=64, intermediate_size=96, num_hidden_layers=2, tie_word_embeddings=True)


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*ROWS, BLOCKS])
def test_values_are_the_librarys(name: str) -> None:
    """Those of llmcompressor bit by bit, in the dtype of the scales; in rows as in the whole."""
    checkpoint, (digests, digest) = opened(DIRECTORY / name), reference(name)
    found = {name: one for name, one in checkpoint.tensors.items() if isinstance(one, Float8Values)}
    assert set(found) == set(digests)
    assert len(digests) == 14
    for weight, tensor in found.items():
        values = tensor.read()
        assert (tensor.shape, tensor.dtype, tensor.size_bytes) == (values.shape, "float32", values.nbytes)
        assert digest(values) == digests[weight], weight
        assert np.array_equal(tensor.rows(3, 21), values[3:21])
        assert np.array_equal(tensor.rows(len(values) - 1, len(values) + 5), values[-1:])
        assert isinstance(tensor, Float8Tensor) == (name != BLOCKS)
        if isinstance(tensor, Float8Tensor):
            assert tensor.native == row_format(tensor.shape[1])
            assert len(np.unique(tensor.native_rows(0, 32)[0])) > 10
            assert np.array_equal(tensor.widened.read(), values)
    assert not hasattr(checkpoint.config, "quantization_config")


@pytest.mark.parametrize("form", FORMS)
def test_each_form(form: str, tmp_path: Path) -> None:
    """Every value is its E4M3 times the scale of its block."""
    wanted = write(tmp_path, form)
    tensors = opened(tmp_path).tensors
    found = {name: one for name, one in tensors.items() if isinstance(one, Float8Values)}
    assert found.keys() == wanted.keys()
    assert not [name for name in tensors if "scale" in name]
    for name, want in wanted.items():
        one, values = found[name], want.numpy()
        assert isinstance(one, Float8Tensor) == (form in KEPT)
        for begin, end in ((0, len(values)), (0, 1), (19, 21), (31, 33), (39, 64), (5, 5), (63, 99)):
            assert np.array_equal(one.rows(begin, end), values[begin:end]), (name, begin, end)
    weights = dict(load_model(str(tmp_path), log=lambda _: None).model.named_parameters())
    assert all(torch.equal(weights[name], want) for name, want in wanted.items())


@pytest.mark.parametrize("form", ["blocks", "static"])
def test_as_transformers_reads_it(form: str, tmp_path: Path) -> None:
    write(tmp_path, form)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    want = dict(theirs.named_parameters())
    found = dict(load_model(str(tmp_path), log=lambda _: None).model.named_parameters())
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("stacked", [False, True])
def test_experts(stacked: bool, tmp_path: Path) -> None:
    """Each a tensor of its own, or all of a layer's one, whose scales have the blocks of each."""
    wanted = write(tmp_path, "blocks", qwen2_moe())
    prefix, file = "model.layers.1.mlp.experts", tmp_path / "model.safetensors"
    parts = [f"{prefix}.{expert}.{half}_proj.weight" for expert in range(6) for half in ("gate", "up")]
    down = [f"{prefix}.{expert}.down_proj.weight" for expert in range(6)]
    if stacked:
        stored = load_file(file)
        for end in ("", "_scale_inv"):
            both = [stored.pop(f"{part}{end}").view(torch.uint8 if not end else torch.float32) for part in parts]
            joined = torch.stack([torch.cat(both[i : i + 2]) for i in range(0, len(both), 2)])
            stored[f"{prefix}.gate_up_proj{end}"] = joined if end else joined.view(FP8)
            each = torch.stack(
                [stored.pop(f"{one}{end}").view(torch.uint8 if not end else torch.float32) for one in down]
            )
            stored[f"{prefix}.down_proj{end}"] = each if end else each.view(FP8)
        stored = {name: one for name, one in stored.items() if not ("experts." in name and "activation" in name)}
        save_file(stored, file, metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    rows = find_tensor(checkpoint, f"{prefix}.gate_up_proj.rows")
    halves = torch.stack([wanted[part] for part in parts]).unflatten(0, (6, 2))
    want = halves.transpose(1, 2).flatten(0, 2).numpy()  # a row of gate and one of up in turns
    assert rows is not None
    for begin, end in ((0, len(want)), (63, 67), (130, 131)):
        assert np.array_equal(rows.rows(begin, end), want[begin:end])
    theirs = find_tensor(checkpoint, f"{prefix}.down_proj", experts=6)
    assert theirs is not None
    assert np.array_equal(theirs.read(), torch.stack([wanted[one] for one in down]).numpy())


# ── bundles ──────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def traced_plain() -> Any:
    return traced_family("float8", plain_model(), "float32").traced


def run(model: Path, out: Path, *options: str) -> int:
    plan = ["--drop-layers", "1", "--always-first", "0", "--always-last", "0", "--max-seq-len", "32", "--threads", "1"]
    return main(["--model", str(model), "--out", str(out), *plan, *options])


@pytest.mark.parametrize("form", ["blocks", "fbgemm"])
@pytest.mark.parametrize("options", ["--target ort", "--target ort --dtype int8 --block-size 32"])
def test_bundles_for_a_cpu(form: str, options: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Floats as in the checkpoint, which the export compares with PyTorch; integers are rounded from these."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: traced_plain())
    wanted = write(tmp_path / "model", form)
    assert run(tmp_path / "model", tmp_path / "out", *options.split()) == 0
    said = capsys.readouterr().err
    assert "the checkpoint's fp8 weights are read as floats" in said
    assert "more than weights" in said
    assert ("take more bytes" in said) == ("int8" not in options)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest.verification["ort"]["status"] == "passed"
    assert bundle.manifest.model.weight_dtype == ("int8" if "int8" in options else "float32")
    weights = dict(load_model(str(tmp_path / "out"), log=lambda _: None).model.named_parameters())
    for name, want in wanted.items():
        found, limit = weights[name], 0.0 if "int8" not in options else float(want.abs().max()) / 127
        assert float((found - want).abs().max()) <= limit, name


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        (ROWS[0], {"targets": ("ort",)}, False),
        (ROWS[0], {"targets": ("ort", "tensorrt-rtx")}, False),
        (ROWS[0], {"targets": ("tensorrt-rtx",)}, True),
        (ROWS[0], {"targets": ("none",)}, True),
        (ROWS[0], {"targets": ("tensorrt-rtx",), "dtype": "int4"}, False),
        (BLOCKS, {"targets": ("tensorrt-rtx",)}, False),
        (BLOCKS, {"targets": ("tensorrt-rtx",), "dtype": "float8_e4m3fn"}, False),
    ],
)
def test_who_takes_them_as_they_are(name: str, options: dict[str, Any], kept: bool) -> None:
    before = opened(DIRECTORY / name)
    after = with_small_floats(before, ExportOptions(**options), Console())
    assert any(isinstance(one, Float8Tensor) for one in after.tensors.values()) == kept
    assert after.fingerprint() == before.fingerprint()
    assert all(np.array_equal(one.read(), before.tensors[name].read()) for name, one in after.tensors.items())


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        ("blocks", {"fmt": "e5m2"}, "fp8 of format 'e5m2'"),
        ("blocks", {"expert_dtype": "fp4"}, "experts of dtype 'fp4'"),
        ("modelopt", {"quant_algo": "MIXED_PRECISION"}, "modelopt with quant_algo 'MIXED"),
        ("modelopt.json", {"quant_algo": "W4A8_AWQ"}, "modelopt with quant_algo 'W4A8_AWQ'"),
        ("blocks", {"quant_method": "mxfp8"}, "quant_method 'mxfp8'"),
    ],
)
def test_another_form_is_refused_by_name(form: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path, form, **changes)
    with pytest.raises(ModelError, match=ANOTHER_FORM) as error:
        opened(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize("size", [[0, 128], [128], 128, "128", ["a", "b"], {"rows": 128}])
def test_no_size_of_blocks(size: Any, tmp_path: Path) -> None:
    write(tmp_path, "blocks", weight_block_size=size)
    with pytest.raises(ModelError, match=r"cannot be used|cannot read"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "changed", ignore_errors=True)
    with pytest.raises(ModelError, match="cannot be used"):
        opened(copy(tmp_path, BLOCKS, **of_weights(BLOCKS, block_structure=size)))


@pytest.mark.parametrize("how", ["missing", "flat", "integers", "wide", "no number", "bare"])
@pytest.mark.parametrize("form", ["powers", "static"])
def test_damaged_parts(form: str, how: str, tmp_path: Path) -> None:
    write(tmp_path, form)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    stored = load_file(file)
    scale = stored[f"{name}_scale_inv"]
    if how == "missing":
        del stored[f"{name}_scale_inv"]
    elif how == "flat":
        stored[name] = stored[name].reshape(-1)
    elif how == "integers":
        stored[f"{name}_scale_inv"] = scale.view(torch.uint8 if form == "powers" else torch.int32)
    elif how == "wide":
        stored[f"{name}_scale_inv"] = torch.cat([scale.reshape(1, -1).view(torch.uint8)] * 5, 1).view(scale.dtype)
    elif how == "no number" and form == "powers":
        stored[f"{name}_scale_inv"] = torch.full_like(scale.view(torch.uint8), 255).view(scale.dtype)
    elif how == "bare":
        stored = {key: value for key, value in stored.items() if value.dtype != FP8}
    save_file(stored, file, metadata={"format": "pt"})
    if how == "no number" and form != "powers":
        return
    with pytest.raises(ModelError) as error:
        opened(tmp_path).tensors[name].read()
    assert ("no tensor is in fp8" if how == "bare" else name) in error.value.note


def test_what_engines_round_activations_by_is_left_out_by_its_whole_name(tmp_path: Path) -> None:
    """A parameter of a model may end as the names of scales do."""
    write(tmp_path, "modelopt")
    file = tmp_path / "model.safetensors"
    others = {"model.layers.0.mlp.block_scale": torch.ones(3), "model.layers.0.mlp.k_scale": torch.ones(())}
    save_file(load_file(file) | others, file, metadata={"format": "pt"})
    tensors = opened(tmp_path).tensors
    assert [name for name in others if name in tensors] == ["model.layers.0.mlp.block_scale"]


def test_a_file_of_its_own_that_speaks_of_caches_alone(tmp_path: Path) -> None:
    plain_model().save_pretrained(tmp_path)
    said = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said), "utf-8")
    assert not [one for one in opened(tmp_path).tensors.values() if isinstance(one, Float8Values)]


def test_a_file_of_its_own_that_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, "modelopt.json")
    for text in ("{}", "[]", "{"):
        (tmp_path / "hf_quant_config.json").write_text(text, "utf-8")
        with pytest.raises(Exception, match="cannot be used"):
            opened(tmp_path)
