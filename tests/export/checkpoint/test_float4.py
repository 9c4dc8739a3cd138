"""Checkpoints with weights in NVFP4, against the library that writes them and the format's definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.errors import ModelError
from safetensors.torch import load_file, save_file

from lora_drop_export.checkpoint.float4 import Float4Values
from lora_drop_export.decoder.loaded import load_model

from .test_float8 import plain_model, run, traced_plain
from .test_packed import ANOTHER_FORM, DIRECTORY, copy, of_weights, opened, reference

NAME = "compressed-tensors-nvfp4"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def write(directory: Path, *, apart: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    """A checkpoint as ModelOpt has it, of any values at all; returns those of its weights in NVFP4.

    Args:
        apart: what it says lies in a file of its own.
    """
    plain_model().save_pretrained(directory)
    file, stored, wanted = directory / "model.safetensors", {}, {}
    generator = torch.Generator().manual_seed(5)
    for name, tensor in load_file(file).items():
        if "proj" not in name:
            stored[name] = tensor.bfloat16()
            continue
        n, k = tensor.shape
        codes = torch.randint(0, 16, (n, k), generator=generator)
        scales = (torch.rand(n, k // 16, generator=generator) * 200).to(torch.float8_e4m3fn)
        whole = torch.tensor(0.0007)
        magnitudes = torch.tensor(E2M1)[codes % 8]
        values = torch.where(codes < 8, magnitudes, -magnitudes)
        wanted[name] = values * (scales.float() * whole).repeat_interleave(16, dim=1)
        stored |= {name: (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8), f"{name}_scale": scales}
        stored |= {f"{name}_scale_2": whole, name.replace("weight", "input_scale"): torch.ones(())}
    save_file(stored, file, metadata={"format": "pt"})
    path = directory / "config.json"
    said = json.loads(path.read_text("utf-8")) | {"dtype": "bfloat16"}
    config = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"} | changes
    if apart:
        (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": config}), "utf-8")
    else:
        said["quantization_config"] = {"quant_method": "modelopt"} | config
    path.write_text(json.dumps(said), "utf-8")
    return wanted


def test_values_are_the_librarys() -> None:
    """Those of llmcompressor bit by bit, in the dtype of the checkpoint; in rows as in the whole."""
    checkpoint, (digests, digest) = opened(DIRECTORY / NAME), reference(NAME)
    found = {name: one for name, one in checkpoint.tensors.items() if isinstance(one, Float4Values)}
    assert set(found) == set(digests)
    assert len(digests) == 14
    assert not [name for name in checkpoint.tensors if "scale" in name or "packed" in name]
    for weight, tensor in found.items():
        values = tensor.read()
        assert (tensor.shape, tensor.dtype, tensor.size_bytes) == (values.shape, "float32", values.nbytes)
        assert digest(values) == digests[weight], weight
        assert np.array_equal(tensor.rows(3, 21), values[3:21])
        assert np.array_equal(tensor.rows(len(values) - 1, len(values) + 5), values[-1:])


@pytest.mark.parametrize("apart", [False, True])
def test_each_value_by_the_definition(apart: bool, tmp_path: Path) -> None:
    wanted = write(tmp_path, apart=apart)
    tensors = opened(tmp_path).tensors
    assert {name for name, one in tensors.items() if isinstance(one, Float4Values)} == wanted.keys()
    assert not [name for name in tensors if "scale" in name]
    for name, want in wanted.items():
        assert np.array_equal(tensors[name].read(), want.numpy()), name


@pytest.mark.parametrize("options", [(), ("--dtype", "int8", "--block-size", "32")])
def test_bundles(options: tuple[str, ...], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: traced_plain())
    wanted = write(tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", *options) == 0
    said = capsys.readouterr().err
    assert "the checkpoint's NVFP4 weights are read as floats" in said
    assert "ort against eager PyTorch" in said
    weights = dict(load_model(str(tmp_path / "out"), log=lambda _: None).model.named_parameters())
    for name, want in wanted.items():
        limit = float(want.abs().max()) / 127 if options else 0.0
        assert float((weights[name] - want).abs().max()) <= limit, name


@pytest.mark.parametrize("changes", [{"strategy": "group"}, {"group_size": 32}, {"num_bits": 8}, {"symmetric": False}])
def test_another_form_is_refused_by_name(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=ANOTHER_FORM) as error:
        opened(copy(tmp_path, NAME, **of_weights(NAME, **changes)))
    assert str(next(iter(changes.values()))) in error.value.note


@pytest.mark.parametrize("how", ["scale", "scale_2", "wide", "flat", "halves", "bare"])
def test_damaged_parts(how: str, tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    stored = load_file(file)
    if how in ("scale", "scale_2"):
        del stored[f"{name}_{how}"]
    elif how == "wide":
        stored[f"{name}_scale_2"] = torch.ones(2)
    elif how == "flat":
        stored[name] = stored[name].reshape(-1)
    elif how == "halves":
        stored[f"{name}_scale"] = stored[f"{name}_scale"].to(torch.bfloat16)
    else:
        stored = {key: value for key, value in stored.items() if value.dtype != torch.uint8}
    save_file(stored, file, metadata={"format": "pt"})
    assert run(tmp_path / "model", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert ("no tensor *.weight is uint8" if how == "bare" else name) in said
    assert not (tmp_path / "out").exists()
