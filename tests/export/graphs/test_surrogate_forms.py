"""Surrogate forms, and new ones that are added here without touching another file.

Each new form has one of the known bases under a name that nobody has heard of. It is exported, decoded by ONNX Runtime,
verified against the reference, and compared with an oracle that looks bases up in a history.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.surrogate import SURROGATES, Base, SurrogateForm

from lora_drop_export.check.verify import compare
from tests.support.bundles import PROMPTS, family, make_bundle, save_adapters
from tests.support.history import decode_row, history_plan, random_matrices

TOLERANCE = 3e-5  # of the row's largest |logit|: float32 sums in another order


@pytest.fixture(params=Base, ids=[base.name for base in Base])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SurrogateForm:
    """A form that no file knows."""
    form = SurrogateForm("homemade", request.param)
    monkeypatch.setitem(SURROGATES, form.name, form)
    return form


def test_the_table() -> None:
    assert list(SURROGATES) == [form.name for form in SURROGATES.values()]
    assert list(SURROGATES) == [
        *("residual", "recurrent", "anchor", "residual-delta", "residual-gated", "residual-delta-gated")
    ]
    assert [form.base_is_state for form in SURROGATES.values()] == [False, True, True, False, False, False]
    assert [form.updates_state for form in SURROGATES.values()] == [False, True, False, False, False, False]
    assert [form.feature_size(3) for form in SURROGATES.values()] == [3, 3, 3, 6, 3, 6]
    assert [form.of_runs for form in SURROGATES.values()] == [False, False, False, True, True, True]


def test_a_plan_knows_the_rows_of_the_table_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="Unknown value for --surrogate") as caught:
        DropPlan(num_layers=6, sites=(3,), surrogate="homemade")
    known = "residual, recurrent, anchor, residual-delta, residual-gated, residual-delta-gated"
    assert f"'homemade' was given, {known} are known." in str(caught.value)
    form = SurrogateForm("homemade", Base.PREVIOUS)
    monkeypatch.setitem(SURROGATES, form.name, form)
    for rank, updates in ((0, False), (2, True)):
        plan = DropPlan(num_layers=6, sites=(3,), surrogate="homemade", rank=rank)
        assert (plan.form, plan.has_state, plan.updated_states) == (form, True, ("3",) if updates else ())


@pytest.mark.parametrize("rank", [0, 3])
def test_a_new_form_is_exported_and_run(form: SurrogateForm, rank: int, tmp_path: Path) -> None:
    """Injections take turns: a base or a rank meets both."""
    injection = ("block", "attn_mlp")[([*Base].index(form.base) + bool(rank)) % 2]
    options = {"surrogate": "homemade", "injection": injection, "drop_layers": (3, 4, 6)}
    targets = ("none",) if rank else ("ort",)  # adapters are for a plan
    bundle = make_bundle("llama", tmp_path / "b", rank=rank, targets=targets, **options)
    plan = bundle.manifest.plan
    assert json.loads((bundle.root / MANIFEST_NAME).read_text())["plan"]["surrogate"] == "homemade"
    matrices = {site: (a, b, 1.0) for site, (a, b) in random_matrices(plan.sites if rank else (), 64, 3).items()}
    if rank:
        directory = tmp_path / "a"
        save_adapters(directory, plan, 64, bundle.manifest.model.fingerprint, rank=3, matrices=matrices)
        bundle = make_bundle("llama", tmp_path / "c", adapters=directory, **options)

    graph = onnx.load(bundle.root / "lora.onnx", load_external_data=False).graph
    states = {f"state.{site}" for site in plan.sites}
    read = {value.name.removeprefix("past_") for value in graph.input if "state" in value.name}
    written = {value.name.removeprefix("present_") for value in graph.output if "state" in value.name}
    assert read == (set() if form.base is Base.INPUT else states)
    assert written == (states if form.base is Base.PREVIOUS and rank else set())

    forced = np.random.default_rng(2).integers(0, 131, (9, 3))
    padded, lengths = np.zeros((3, 5), np.int64), np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt
    with Session.open(bundle.root, threads=1) as session:
        ours = [session.prefill(padded, lengths, max_new_tokens=10, k=3).copy()]
        ours += [session.step(column).copy() for column in forced]
    theirs = history_plan((3, 4, 6), injection, matrices)
    for row, prompt in enumerate(PROMPTS):
        wanted = decode_row(family("llama").model, theirs, form.base, prompt, forced[:, row].tolist(), 3)
        for step, (a, b) in enumerate(zip(ours, wanted, strict=True)):
            assert np.abs(a[row] - b.numpy()).max() < TOLERANCE * b.abs().max(), (row, step)
    assert compare(bundle, threads=1).passed


def test_the_bases_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the oracle finds under one base is not what it finds under another, so the test above tells them apart."""
    theirs = history_plan((3, 4), "block", {s: (*p, 1.0) for s, p in random_matrices(("3", "4"), 64, 3).items()})
    found = [decode_row(family("llama").model, theirs, base, [5, 6], [7, 8, 9], 3)[-1] for base in Base]
    for number, logits in enumerate(found):
        for other in found[:number]:
            assert (logits - other).abs().max() > 100 * TOLERANCE * other.abs().max()
