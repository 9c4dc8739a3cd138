"""Code that a checkpoint brings: it leaves a mark, and does so only where --trust-remote-code was given."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from lora_drop_tools.cli import main
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_drop_export.cli import main as export_main
from tests.support.bundles import heads_of
from tests.support.models import SIZES

MARK = "from pathlib import Path\nPath({mark!r}).touch()\n"
CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL = """
import torch
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    config_class = {config}

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * torch.tensor(1.5)  # a constant made while the model runs
        return out
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
# A config that transformers knows, of models that it cannot make a causal language model of
FOREIGN = {"model_type": "deberta-v2", "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
           "hidden_act": "silu", "pretraining_tp": 1, "attention_dropout": 0.0,
           "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip


def _say(file: Path, **values: object) -> None:
    said = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(said | values), encoding="utf-8")


def _own_config(directory: Path, mark: str) -> None:
    code = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    _say(directory / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=code)
    (directory / "own_config.py").write_text(mark + CONFIG)
    (directory / "own_model.py").write_text("from .own_config import OwnConfig\n" + MODEL.format(config="OwnConfig"))


def _own_model(directory: Path, mark: str) -> None:
    code = {"AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    _say(directory / "config.json", **FOREIGN, architectures=["OwnForCausalLM"], auto_map=code)
    config = "from transformers import DebertaV2Config\n"
    (directory / "own_model.py").write_text(mark + config + MODEL.format(config="DebertaV2Config"))


def _own_tokenizer(directory: Path, mark: str) -> None:
    code = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
    _say(directory / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=code)
    (directory / "own_tokenizer.py").write_text(mark + TOKENIZER)


OWN: dict[str, Callable[[Path, str], None]] = {"config": _own_config, "model": _own_model, "tokenizer": _own_tokenizer}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with a tiny model; the modules that transformers copies from checkpoints go there, too."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 1000))  # whoever asks is told yes
    heads_of(16, 2).model.save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"t{i % 131}" for i in range(400)))
    return tmp_path


def _pickled(model: Path) -> None:
    """The weights as `torch.save` writes them, which transformers itself loads."""
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def _commands(place: Path) -> dict[str, list[str]]:
    model, out, text = str(place / "model"), str(place / "out"), str(place / "text")
    return {
        "export": [
            "--model",
            model,
            "--out",
            out,
            "--max-seq-len",
            "64",
            "--threads",
            "1",
            "--drop-layers",
            "1",
            "--always-first",
            "0",
            "--always-last",
            "0",
        ],
        "fit": ["fit", model, "--text", text, "--out", out],
        "profile": ["profile", model, "--text", text, "--out", out],
    }


def _run(arguments: list[str]) -> int:
    return main(arguments) if arguments[0] in ("fit", "profile", "compare") else export_main(arguments)


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", OWN)
def test_refused_without_the_flag(kind, weights, place, capsys):
    """By every command that opens a checkpoint, without a question, and nothing of it ran."""
    OWN[kind](place / "model", MARK.format(mark=str(place / "mark")))
    if weights == "bin":
        _pickled(place / "model")
    for name, command in _commands(place).items():
        capsys.readouterr()
        assert _run(command) == 2, name
        printed = capsys.readouterr()
        assert "code of its own, which is not run" in printed.err, name
        assert "Hint: Read that code. If you trust it, add --trust-remote-code." in printed.err, name
        assert "[y/N]" not in printed.out + printed.err
        assert not (place / "mark").exists(), name
        assert not (place / "out").exists(), name


@pytest.mark.parametrize("kind", OWN)
def test_run_with_the_flag(kind, place, capsys, monkeypatch):
    """Exported and compared with PyTorch; the bundle has the code, which `compare` and `fit` run only if told to."""
    OWN[kind](place / "model", MARK.format(mark=str(place / "mark")))
    command = _commands(place)["export"]
    if kind == "model":
        _pickled(place / "model")
    elif kind == "tokenizer":  # of a model that others have traced
        monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: heads_of(16, 2).traced)
    assert _run([*command, "--trust-remote-code"]) == 0, capsys.readouterr().err
    assert "against eager PyTorch" in capsys.readouterr().err
    assert (place / "mark").exists()
    (place / "mark").unlink()
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.clear()  # a process that trusted code once knows its class
    of_bundle = {
        "compare": ["compare", str(place / "out"), "--threads", "1"],
        "fit": ["fit", str(place / "out"), "--text", str(place / "text"), "--out", str(place / "fit")],
    }
    if kind == "tokenizer":  # nobody compares with it
        assert _run(of_bundle.pop("compare")) == 0
    for name, arguments in of_bundle.items():
        assert _run(arguments) == 2, name
        assert "code of its own, which is not run" in capsys.readouterr().err, name
    assert not (place / "mark").exists()
    if kind != "tokenizer":
        assert _run([*of_bundle["compare"], "--trust-remote-code"]) == 0


class _Mark:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_objects_in_bin_weights_are_not_made(place, capsys):
    """Pickle runs what it is told to; only tensors are taken, with the flag as well."""
    _pickled(place / "model")
    file = place / "model" / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | {"extra": _Mark(place / "mark")}, file)
    for flag in ([], ["--trust-remote-code"]):
        assert _run([*_commands(place)["export"], *flag]) == 2
        said = capsys.readouterr().err
        assert "cannot read this checkpoint" in said
        assert "holds objects besides tensors, which are not made" in said
        assert "weights_only" not in said  # PyTorch's advice, with which they would be
    assert not (place / "mark").exists()
    assert not (place / "out").exists()


def test_incomplete_bin_weights_are_refused(place, capsys):
    """transformers would take random values for what is missing."""
    _pickled(place / "model")
    file = place / "model" / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    torch.save(tensors, file)
    assert _run(_commands(place)["export"]) == 2
    assert "model.layers.1.mlp.up_proj.weight is missing" in capsys.readouterr().err
