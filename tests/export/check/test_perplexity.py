"""The perplexity of quantized weights is that of the bundle as its engine runs it."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.errors import NoDeviceError, VerificationError
from lora_drop_runtime.text import TextCodec
from safetensors.numpy import load_file, save_file

from lora_drop_export.check import perplexity as module
from lora_drop_export.check.sample import sample_ids
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from lora_drop_export.console import Console
from tests.support.bundles import family, make_bundle, record_again
from tests.support.export_array import stored_weights
from tests.support.tokenizers import character_tokenizer

PLAN = {"always_first": 0, "drop_layers": (4,), "surrogate": "recurrent", "rank": 2}  # states and a second cache group


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Bundle:
    """Symmetric int4: of a table the engine takes zero points of 0 where none are given."""
    root = tmp_path_factory.mktemp("perplexity") / "b"
    make_bundle("llama", root, dtype="int4", quantization="rtn", **PLAN)
    character_tokenizer(root)
    record_again(root)
    return Bundle.open(root)


def dequantized(bundle: Bundle):
    """The model with the weights that the bundle holds."""
    model = copy.deepcopy(family("llama").model)
    model.load_state_dict(stored_weights(bundle))
    return model


def measured(bundle: Bundle) -> dict[str, float] | None:
    checkpoint = family("llama").checkpoint
    return module.report_perplexity(bundle, checkpoint, "ort", provider=None, console=Console(), threads=1)


def likeliest(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0, :-1].argmax(-1).numpy()


def eager(model, ids: np.ndarray) -> float:
    """Log of transformers' own perplexity."""
    with torch.no_grad():
        return float(model(torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss)


def test_it_is_transformers(good, monkeypatch):
    """In one chunk and in several, of which the last is short: within what rounded activations cost."""
    ids = sample_ids(good.root, 131)[:128]  # as many as the bundle takes
    model = family("llama").model
    for chunk in (128, 50):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        found = measured(good)
        assert found is not None
        assert found["tokens"] == len(ids) == 128
        assert math.log(found["float"]) == pytest.approx(eager(model, ids), rel=1e-4)
        assert math.log(found["int4"]) == pytest.approx(eager(dequantized(good), ids), rel=0.03)
        same = (likeliest(model, ids) == likeliest(dequantized(good), ids)).mean()
        assert 0.1 < same < 0.9
        assert found["agreement"] == pytest.approx(same, abs=0.1)  # of which rounded activations change some


def without_zero_points(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            without_zero_points(attribute.g)
        if node.op_type == "GatherBlockQuantized":
            del node.input[3:]


def test_a_wrong_graph_shows(good, tmp_path):
    """The weights are right, the graph looks them up wrongly."""
    root = shutil.copytree(good.root, tmp_path / "b")
    path = root / "ort" / "steps.onnx"
    steps = onnx.load(path, load_external_data=False)
    without_zero_points(steps.graph)
    path.write_bytes(steps.SerializeToString())
    record_again(root)
    truth = eager(dequantized(good), sample_ids(good.root, 131)[:128])
    right, found = (abs(math.log(measured(bundle)["int4"]) - truth) for bundle in (good, Bundle.open(root)))
    assert found > 5 * right


def test_a_graph_that_cannot_run_is_an_error(good, monkeypatch):
    monkeypatch.setattr(OrtEngine, "prepare", lambda *_: lambda: [][0])
    with pytest.raises(VerificationError, match="cannot be executed") as refused:
        measured(good)
    assert "list index out of range" in refused.value.note


def test_a_checkpoint_that_computes_no_numbers_is_an_error(good, tmp_path):
    """Kernels that round activations make numbers of NaN, PyTorch does not."""
    model = shutil.copytree(family("llama").directory, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, model / "model.safetensors")
    checkpoint = open_checkpoint(str(model), tmp_path / "scratch")
    with pytest.raises(VerificationError, match="checkpoint computes logits that are not numbers") as error:
        module.report_perplexity(good, checkpoint, "ort", provider=None, console=Console(), threads=1)
    assert "128 tokens of a text is nan, in PyTorch" in error.value.note


def test_what_is_not_run_is_said(good, monkeypatch, capsys):
    def no_device(*_):
        raise NoDeviceError("No GPU.", note="There is none here.", hint="Find one.")

    monkeypatch.setattr(module, "open_engine", no_device)
    assert measured(good) is None
    assert "not measured, ort was not run on this machine: There is none here." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--no-verify",), ("--target", "none")])
def test_nothing_is_said_of_what_was_not_executed(arguments, tmp_path, monkeypatch, capsys):
    """The checkpoint brings a tokenizer, so that it could have been measured."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_: family("llama").traced)
    model = shutil.copytree(family("llama").directory, tmp_path / "m")
    character_tokenizer(tmp_path)
    shutil.copyfile(tmp_path / "tokenizer" / "tokenizer.json", model / "tokenizer.json")
    command = ["--model", model, "--out", tmp_path / "b", "--dtype", "int4", "--max-seq-len", 64, *arguments]
    assert main([str(argument) for argument in command]) == 0
    assert "perplexity" not in capsys.readouterr().err
    bundle = Bundle.open(tmp_path / "b")
    assert "perplexity" not in bundle.manifest.quantization
    assert TextCodec.open(bundle.root / "tokenizer").encode("a")
