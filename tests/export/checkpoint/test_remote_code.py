"""A checkpoint that brings its own code: refused without --trust-remote-code, exported and compared with it."""

from __future__ import annotations

import json

from lora_drop_tools.cli import main

from lora_drop_export.cli import main as export_main
from tests.support.models import llama

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * torch.tensor(1.5)  # a constant made while the model runs
        return out
"""


def test_remote_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "model"
    llama(num_hidden_layers=5).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(CODE)
    command = ["--model", str(directory), "--out", str(tmp_path / "out"), "--max-seq-len", "64", "--threads", "1"]
    assert export_main(command) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert export_main([*command, "--trust-remote-code"]) == 0
    assert "against eager PyTorch" in capsys.readouterr().err
    compare = ["compare", str(tmp_path / "out"), "--threads", "1"]
    assert main(compare) == 2
    assert main([*compare, "--trust-remote-code"]) == 0
