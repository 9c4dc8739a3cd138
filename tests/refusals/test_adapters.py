"""Refused by `lora-drop-export` and by a session: adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.bundle.adapters import read_adapters
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from safetensors.numpy import load_file, save_file

from tests.support.bundles import make_bundle, save_adapters
from tests.support.models import SIZES


@pytest.fixture
def adapters(place, tmp_path) -> Path:
    """Adapters of rank 4 that fit the bundle's plan, to be damaged."""
    manifest = Bundle.open(place / "bundle").manifest
    return save_adapters(tmp_path / "adapters", manifest.plan, SIZES["hidden_size"], manifest.model.fingerprint)


def edit_config(adapters: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = adapters / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(adapters: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = adapters / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A4 = "base_model.model.model.layers.4.lora_A.weight"
B4 = "base_model.model.model.layers.4.lora_B.weight"


@pytest.mark.parametrize("shape", [[1] * 65, [1] * 65 + [0], [0, 2**62, 2**62], [2**63 - 1] * 400])
def test_shapes_that_no_array_has(place, adapters, shape):
    """Their bytes are as many as they say."""
    header = {A4: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0 if 0 in shape else 4]}}
    text = json.dumps(header).encode()
    (adapters / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with Session.open(place / "bundle") as session, pytest.raises(BundleError, match="that no array has"):
        session.load_adapters(adapters)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rank 8", ("rank", "8", "4")),
        ("--drop-layers 3,5", ("another drop list", "has 4,6", "needed is 3,5")),
        ("--drop-ratio 1", ("another drop list", "has 4,6", "needed is 3,4,5,6")),
        ("--drop-ratio 0", ("another drop list", "has 4,6", "needed is none")),
        ("--surrogate anchor", ("another surrogate", "residual", "anchor")),
        ("--injection attn_mlp", ("another drop list", "4.attn,4.mlp")),
    ],
)
def test_adapters_of_another_plan(export_refused, adapters, arguments, words):
    export_refused("--adapters", adapters, *arguments.split(), words=words)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["lora_drop"].update(base_fingerprint="beef" * 16), ("another base model", "beefbeefbeef")),
        (lambda c: c["lora_drop"].update(sites=["4", "7"]), ("Layer 7", "always kept")),
        (lambda c: c["lora_drop"].update(surrogate="sideways"), ("surrogate that is unknown", "sideways", "recurrent")),
        (lambda c: c["lora_drop"].update(policy="hop"), ("policy that is unknown", "'hop'", "skip, backfill")),
        (lambda c: c["lora_drop"].update(apart="yes"), ("not a directory of LoRA-Drop adapters", "lora_drop.apart")),
        (lambda c: c.update(r=5), ("wrong shape", "(4, 64)", "(5, 64)")),
        (lambda c: c["lora_drop"].update(always_first="three"), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(r=0), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(r="four"), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.pop("r"), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(lora_drop=[]), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(peft_type="LOHA"), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(use_rslora=True), ("use_rslora",)),
        (lambda c: c.update(use_dora=True), ("use_dora",)),
        (lambda c: c.update(alpha_pattern={"layers.4": 3}), ("alpha_pattern",)),
    ],
)
def test_adapter_config(export_refused, adapters, change, words):
    edit_config(adapters, change)
    export_refused("--adapters", adapters, words=words)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: (t.pop(A4), t.pop(B4)), ("do not cover", "layer 4 is missing", "4,6")),
        (lambda t: t.pop(B4), ("do not cover", "lora_B of layer 4 is missing")),
        (lambda t: t.update({A4.replace("4", "5"): t[A4]}), ("do not cover", "layer 5 is there but not in the plan")),
        (lambda t: t.update({A4.replace("lora_A", "self_attn.lora_A"): t[A4]}), ("do not cover", "layer 4.attn")),
        (lambda t: t.update({A4: t[A4][:, :32].copy()}), ("wrong shape", "(4, 32)", "(4, 64)")),
        (lambda t: t.update({B4: t[B4][:, :2].copy()}), ("wrong shape", "(64, 2)", "(64, 4)")),
        (lambda t: t.update({A4: t[A4].T.copy()}), ("wrong shape", "(64, 4)")),
        (lambda t: t.update({A4: t[A4].astype(np.int32)}), ("no LoRA-Drop adapter", A4, "int32")),
        (lambda t: t.update({B4: t[B4].astype(np.float64)}), ("no LoRA-Drop adapter", B4, "float64")),
        (lambda t: t.update({"model.embed_tokens.weight": t[A4]}), ("no LoRA-Drop adapter", "embed_tokens")),
    ],
)
def test_adapter_tensors(export_refused, adapters, change, words):
    edit_tensors(adapters, change)
    export_refused("--adapters", adapters, words=words)


@pytest.mark.usefixtures("untraced")
def test_not_an_adapter_directory(export_refused, adapters, place, tmp_path):
    for other in (tmp_path / "none", place / "model", place / "model" / "config.json"):
        export_refused("--adapters", other, words=("not a directory of LoRA-Drop adapters", str(other)))
    weights = adapters / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    export_refused("--adapters", adapters, words=("truncated", "adapter_model.safetensors"))
    weights.unlink()
    export_refused("--adapters", adapters, words=("no weights", "adapter_model.safetensors"))
    (adapters / "adapter_config.json").write_bytes(b"\xff\xfe{")
    export_refused("--adapters", adapters, words=("not a directory of LoRA-Drop adapters",))


def test_adapters_in_a_session(place, adapters, tmp_path):
    """The session refuses the same, and goes on with the adapters it has."""
    bundle = Bundle.open(place / "bundle")
    plan, fingerprint = bundle.manifest.plan, bundle.manifest.model.fingerprint
    wider = save_adapters(tmp_path / "rank", plan, SIZES["hidden_size"], fingerprint, rank=5)
    foreign = save_adapters(tmp_path / "base", plan, SIZES["hidden_size"], "beef" * 16)
    with Session.open(bundle.root) as session:
        session.load_adapters(adapters)
        before = session.generate([[5, 7]], 9)[0]
        for directory, error, words in (
            (wider, PlanError, "another rank"),
            (foreign, PlanError, "another base model"),
            (tmp_path, BundleError, "not a directory of LoRA-Drop adapters"),
        ):
            with pytest.raises(error, match=words):
                session.load_adapters(directory)
        assert np.array_equal(session.generate([[5, 7]], 9)[0], before)
    make_bundle("llama", tmp_path / "roomless")
    with Session.open(tmp_path / "roomless") as session, pytest.raises(InputError, match="no room for adapters"):
        session.load_adapters(adapters)


@pytest.mark.parametrize(
    ("surrogate", "fitted", "policy", "apart", "taken"),
    [
        ("residual", "backfill", "skip", False, True),
        ("residual", "backfill", "fill", False, False),  # K and V would be made of what means nothing alone
        ("residual", "backfill", "fill", True, True),
        ("residual", "backfill", "fill", None, True),  # of version 0.1, which fitted layer by layer
        ("residual", "fill", "backfill", False, True),
        ("residual-delta", "backfill", "lossless", False, True),
        ("residual-delta", "backfill", "fill", False, False),
        ("residual-delta", "fill", "backfill", False, False),  # the change would be another one
        ("residual-gated", "backfill", "lossless", False, True),
        ("residual-gated", "fill", "backfill", False, False),  # each would be given what is not its run's
    ],
)
def test_runs_of_neighbours_under_another_policy(surrogate, fitted, policy, apart, taken, tmp_path):
    plan = DropPlan(8, (3, 4, 6), surrogate=surrogate, rank=4, policy=policy)
    directory = save_adapters(tmp_path / "a", plan, 64, None)
    edit_config(directory, lambda c: c["lora_drop"].update(policy=fitted, apart=apart))
    if taken:
        assert list(read_adapters(directory, plan, 64, "any")) == ["3", "4", "6"]
        return
    run = "3, 4" if fitted == "backfill" else "3"
    with pytest.raises(PlanError, match=f"another policy than {policy}") as caught:
        read_adapters(directory, plan, 64, "any")
    assert f"layers {run} are one run of neighbours under {fitted}" in str(caught.value)
    assert f"--policy {fitted}" in str(caught.value)
