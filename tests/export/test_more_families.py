"""Families whose checkpoints, buffers or halves are unlike Llama's: exported, verified and decoded with few layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_drop_runtime.decoding.session import Session

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from lora_drop_export.decoder.loaded import load_model
from tests.support import oracle
from tests.support.bundles import more_family
from tests.support.models import MORE_FAMILIES, quartered
from tests.support.oracle import OraclePlan

BOTH = ("ort", "openvino")
TARGETS = {"gemma4_experts": ("openvino",), "qwen3_5": ("ort",)}  # where it is not both
TOLERANCE = 3e-5  # of the row's largest |logit|: both sides are float32 and differ in the order of their sums
PROMPT, STEPS, K = [7, 3, 11, 19, 2], 6, 2


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_more_families(name, tmp_path, capsys, monkeypatch):
    """The command verifies the bundle on engines of a CPU; their logits equal the oracle's, and the logits of the
    tools' model those of transformers."""
    source = more_family(name)  # its trace is made from such a checkpoint, once for all files of tests
    model = source.model
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source.traced)
    options = [
        "--drop-layers",
        "1",
        "--always-first",
        "0",
        "--always-last",
        "0",
        "--k",
        str(K),
        "--max-seq-len",
        "32",
        "--threads",
        "1",
        *(word for target in TARGETS.get(name, BOTH) for word in ("--target", target)),
    ]
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().err
    assert all(f"{target} against eager PyTorch" in printed for target in TARGETS.get(name, BOTH))

    tokens = np.random.default_rng(1).integers(0, 131, STEPS).tolist()
    theirs = oracle.decode_row(model, OraclePlan(("1",)), PROMPT, tokens, K, "skip")
    for target in TARGETS.get(name, BOTH):
        with Session.open(tmp_path / "out", target=target, threads=1) as session:
            ours = [session.prefill([PROMPT], max_new_tokens=STEPS + 1)[0].copy()]
            ours += [session.step([token])[0].copy() for token in tokens]
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert np.abs(a - b.numpy()).max() < TOLERANCE * np.abs(b.numpy()).max(), f"{target}, step {step}"

    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        want, got = model(ids).logits, load_model(str(tmp_path / "out")).model(ids).logits
    assert (want - got).abs().max() < TOLERANCE * want.abs().max()


def test_latent_attention_in_bfloat16(tmp_path, capsys):
    """Its keys are put into a tensor that is made for them: of bfloat16 in the neutral graph, and not in OpenVINO's."""
    quartered(MORE_FAMILIES["deepseek_v3"]()).save_pretrained(tmp_path / "model")
    options = ["--dtype", "bf16", "--target", "openvino", "--max-seq-len", "32", "--threads", "1"]
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options]) == 0
    assert "openvino against eager PyTorch" in capsys.readouterr().err


def test_names_of_exaone_are_the_checkpoints(tmp_path):
    """What is renamed keeps its name in the file, of which bundle and fingerprint are made."""
    MORE_FAMILIES["exaone"]().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), tmp_path / "scratch")
    stored = "transformer.h.0.attn.attention.q_proj.weight"
    assert stored in checkpoint.tensors
    assert checkpoint.renamed["model.layers.0.self_attn.q_proj.weight"] == stored
    assert not any(name in checkpoint.tensors for name in checkpoint.renamed)
