"""What an export says of its LoRA steps, against the oracle's logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Limits

from lora_drop_export.check.lora_steps import PROMPT, ROWS, report_lora_steps
from lora_drop_export.check.sample import sample_ids
from lora_drop_export.compiler.verify import verify
from lora_drop_export.console import Console
from tests.support import oracle
from tests.support.bundles import family, fitted_adapters, make_bundle, more_family, oracle_plan
from tests.support.tokenizers import character_tokenizer


def by_oracle(bundle: Bundle, prompt: int, steps: int, k: int, adapters: Path | None = None) -> list[bool]:
    """Of each LoRA step of each text: whether its most likely token is transformers' own."""
    model, plan = family("llama").model, oracle_plan(bundle, adapters)
    policy = bundle.manifest.plan.refresh_policy.in_steps.name
    rows = np.resize(sample_ids(bundle.root, 131), (ROWS, prompt + steps + 1))
    same = []
    for row in rows.tolist():
        with torch.no_grad():
            full = model(torch.tensor([row])).logits[0].argmax(-1)[prompt:-1]
        found = oracle.decode_row(model, plan, row[:prompt], row[prompt:-1], k, policy)[1:]
        places = zip(range(1, steps + 1), found, full, strict=True)
        same += [bool(ours.argmax() == theirs) for j, ours, theirs in places if not oracle.is_refresh(j, k)]
    return same


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"k": 3}, 8),
        ({"k": 3, "policy": "backfill", "surrogate": "recurrent", "rank": 4}, 8),
        ({"k": 3, "policy": "lossless"}, 8),
        ({"k": 40, "drop_ratio": 0.25}, 16),
        ({"k": 1, "drop_layers": ("6.attn",)}, 4),  # the one that is not warned of
    ],
    ids=str,
)
def test_the_share_is_the_oracles(options: dict, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapters = fitted_adapters(family("llama"), tmp_path / "a", **options) if "rank" in options else None
    bundle = make_bundle("llama", tmp_path / "b", adapters=adapters, **options)
    character_tokenizer(bundle.root)
    found = report_lora_steps(Bundle.open(bundle.root), Console())
    expected = by_oracle(bundle, PROMPT, steps, options["k"], adapters)
    assert found == {"tokens": len(expected), "agreement": pytest.approx(np.mean(expected))}
    said = capsys.readouterr().err
    assert f"that of all layers in {np.mean(expected):.0%} of {len(expected)} places" in " ".join(said.split())
    assert ("lora-drop fit" in said) == (np.mean(expected) < 0.5) == ("drop_layers" not in options)
    assert ("draft" in said) == (options.get("policy") == "lossless")


def test_no_fit_is_told_of_where_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"drop_layers": ("1",), "always_first": 0, "always_last": 0}
    bundle = make_bundle(more_family("gemma4"), tmp_path / "b", **options)
    character_tokenizer(bundle.root)
    report_lora_steps(Bundle.open(bundle.root), Console())
    said = " ".join(capsys.readouterr().err.split())
    assert "so few that its own text would be another than the model's: drop fewer, or decode with --k 0" in said


def test_short_requests(tmp_path: Path) -> None:
    bundle = make_bundle("llama", tmp_path / "b", k=3, max_seq_len=5)
    character_tokenizer(bundle.root)
    found = report_lora_steps(Bundle.open(bundle.root), Console())
    assert found == {"tokens": 3 * ROWS, "agreement": pytest.approx(np.mean(by_oracle(bundle, 1, 3, 3)))}
    least = dataclasses.replace(bundle.manifest, limits=Limits(2, 1, 1))
    assert report_lora_steps(dataclasses.replace(bundle, manifest=least), Console()) == {}


@pytest.mark.parametrize("options", [{"k": 0}, {"drop_ratio": 0.0}, {}])
def test_nothing_to_measure(options: dict, tmp_path: Path) -> None:
    """No LoRA steps, no layer dropped, no tokenizer."""
    bundle = make_bundle("llama", tmp_path / "b", **options)
    if options:
        character_tokenizer(bundle.root)
    assert report_lora_steps(Bundle.open(bundle.root), Console()) == {}


def test_it_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundle = make_bundle("llama", tmp_path / "b")
    character_tokenizer(bundle.root)
    verified = verify(Bundle.open(bundle.root), console=Console())
    cost = verified.manifest.lora_steps
    assert cost == Bundle.open(bundle.root).manifest.lora_steps
    assert cost["tokens"] == 6 * ROWS
    verify(verified, console=Console())  # as for a target that is added: it is not measured again
    assert capsys.readouterr().err.count("LoRA steps on a sample text: the") == 1
