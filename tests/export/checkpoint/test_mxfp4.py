"""Experts in MXFP4, against what transformers makes of the same files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime.bundle.bundle import Bundle
from safetensors.torch import load_file, save_file

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from lora_drop_export.decoder.loaded import load_model
from lora_drop_export.weights.resolve import find_tensor
from tests.support.bundles import more_family
from tests.support.models import gpt_oss, qwen2_moe

PREFIX = "model.layers.1.mlp.experts"
WHOLE = ["--drop-layers", "1", "--always-first", "0", "--always-last", "0", "--max-seq-len", "32", "--threads", "1"]


def write(directory, damage=None, builder=gpt_oss):
    """A checkpoint whose experts are any values of MXFP4 at all, the rest bfloat16."""
    builder().save_pretrained(directory)
    file, generator = directory / "model.safetensors", np.random.default_rng(7)
    tensors = {}
    for name, tensor in load_file(file).items():
        if not name.endswith((".gate_up_proj", ".down_proj")):
            tensors[name] = tensor.bfloat16()
            continue
        count, columns, rows = tensor.shape
        shape = count, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.from_numpy(generator.integers(0, 256, (*shape, 16), np.uint8))
        tensors[f"{name}_scales"] = torch.from_numpy(generator.integers(116, 123, shape, np.uint8))
    if damage is not None:
        damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    path.write_text(json.dumps(config), "utf-8")


@pytest.fixture
def traced_once(monkeypatch):
    """The trace knows nothing of MXFP4: it is made once for all files of tests."""
    source = more_family("gpt_oss")
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)


def test_it_is_read_as_transformers_reads_it(tmp_path):
    write(tmp_path)
    theirs = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    ours = dict(load_model(str(tmp_path)).model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in theirs)
    rows = find_tensor(open_checkpoint(str(tmp_path), tmp_path / "scratch"), f"{PREFIX}.gate_up_proj.rows")
    want = theirs[f"{PREFIX}.gate_up_proj"].float().transpose(1, 2).flatten(0, 1).detach().numpy()
    for begin, end in ((0, len(want)), (191, 194), (5, 5), (700, 9999)):
        assert np.array_equal(rows.rows(begin, end), want[begin:end]), (begin, end)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.usefixtures("traced_once")
def test_integers_hold_it(dtype, tmp_path):
    """Of 8 bits in blocks of its own size they are the very values; those of 4 lie otherwise, and are rounded."""
    write(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--dtype", dtype]
    assert main([*arguments, "--block-size", "32", *WHOLE, "--target", "ort", "--target", "openvino"]) == 0
    want, found = (dict(load_model(str(tmp_path / one)).model.named_parameters()) for one in ("model", "out"))
    for part in ("gate_up_proj", "down_proj"):
        a, b = want[f"{PREFIX}.{part}"], found[f"{PREFIX}.{part}"]
        assert torch.equal(a, b) == (dtype == "int8")
        assert (a - b).abs().max() <= a.abs().max() / 7
    if dtype == "int8":
        departures = Bundle.open(tmp_path / "out").manifest.quantization["departures"]
        assert [one["weights"] for one in departures] == ["model.layers.*.mlp.router.weight"]


def _no_number(tensors):
    tensors[f"{PREFIX}.down_proj_scales"][2, 3, 1] = 255


def _no_scales(tensors):
    del tensors[f"{PREFIX}.down_proj_scales"]


def _no_blocks(tensors):
    for name in [name for name in tensors if name.endswith(("_blocks", "_scales"))]:
        del tensors[name]


def _few_scales(tensors):
    tensors[f"{PREFIX}.down_proj_scales"] = tensors[f"{PREFIX}.down_proj_scales"][:, :, :2].contiguous()


def _in_float_too(tensors):
    tensors[f"{PREFIX}.down_proj"] = torch.zeros(4, 96, 64)


def _signed(tensors):
    tensors[f"{PREFIX}.down_proj_blocks"] = tensors[f"{PREFIX}.down_proj_blocks"].view(torch.int8)


@pytest.mark.parametrize(
    ("damage", "builder", "note"),
    [
        (_no_number, gpt_oss, "down_proj_scales has an exponent of 255, which stands for no number"),
        (_no_scales, gpt_oss, "down_proj_blocks is uint8 [4, 64, 3, 16], and model.layers.1.mlp.experts.down_proj_sc"),
        (_no_blocks, gpt_oss, "says mxfp4, and no tensor is called *_blocks"),
        (_few_scales, gpt_oss, "_scales uint8 [4, 64, 2]; needed are"),
        (_in_float_too, gpt_oss, "down_proj and model.layers.1.mlp.experts.down_proj_blocks are the same ones"),
        (_signed, gpt_oss, "down_proj_blocks is I8 [4, 64, 3, 16]"),
        (None, qwen2_moe, "It has mxfp4 in a model of type 'qwen2_moe'"),
    ],
)
@pytest.mark.usefixtures("traced_once")
def test_damaged_ones_are_refused(damage, builder, note, tmp_path, capsys):
    write(tmp_path / "model", damage, builder)
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *WHOLE]) == 2
    assert note in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
