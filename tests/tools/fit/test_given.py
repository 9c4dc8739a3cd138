"""`lora-drop fit --adapters`: a fit that goes on from adapters of an earlier one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.errors import LoraDropError
from lora_drop_tools.fit import distill
from lora_drop_tools.fit.fit import Fit, fit
from lora_drop_tools.fit.settings import FitSettings
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lora_drop_export.decoder import loaded as torch_model
from tests.support.bundles import make_bundle

SMALL = {"window": 32, "batch": 2}


def run_fit(model: Path, words: Path, out: Path, **options: Any) -> Fit:
    return fit(str(model), FitSettings(text=(words,), out=out, **(SMALL | options)))


def header(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize(
    "plan",
    [
        {"drop_layers": (3, 4, 6), "policies": ("backfill",), "alpha": 6.0},
        {"drop_layers": (3, 4, 6), "policies": ("backfill",), "apart": True},
        {"drop_layers": (3, 4, 6), "surrogate": "residual-delta", "always_first": 2},
        {"drop_layers": (3, 4, 6), "surrogate": "residual-gated", "policies": ("backfill",), "alpha": 6.0},
        {"drop_layers": ("3.attn", "3.mlp", "5.mlp"), "adapters_for": "mlp", "policies": ("fill",)},
        {"drop_layers": (4,), "surrogate": "recurrent", "policies": ("skip", "backfill")},
    ],
    ids=str,
)
def test_it_begins_with_what_they_reached(plan: dict[str, Any], model_dir: Path, words: Path, tmp_path: Path) -> None:
    """Judged on the same held-out text they have the same figures, whatever their plan and scale."""
    before = run_fit(model_dir, words, tmp_path / "a", rank=3, closed_form_tokens=512, steps=0, **plan)
    policies = {"policies": plan["policies"]} if len(plan.get("policies", ())) > 1 else {}
    apart = {"apart": True} if plan.get("apart") else {}
    result = run_fit(model_dir, words, tmp_path / "b", adapters=tmp_path / "a", steps=5, **policies, **apart)
    assert list(result.stages) == ["base", "given adapters", "distillation"]
    assert result.stages["base"] == before.stages["base"]
    for name, figure in before.stages["closed form"].items():
        assert result.stages["given adapters"][name] == pytest.approx(figure, rel=1e-4)
    assert result.kept == min(("given adapters", "distillation"), key=lambda stage: result.stages[stage]["kl"])
    ours, theirs = header(tmp_path / "b"), header(tmp_path / "a")
    assert ours["lora_drop"] == theirs["lora_drop"]
    assert (ours["r"], ours["lora_alpha"]) == (3, 3)
    assert result.settings["closed_form_tokens"] == 0


def test_they_are_replaced_by_what_goes_on_from_them(model_dir: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    small = {"steps": 0, "closed_form_tokens": 512}
    first = run_fit(model_dir, words, out, drop_layers=(4, 5), rank=3, policies=("backfill",), **small)
    second = run_fit(model_dir, words, out, adapters=out, steps=3, force=True, seed=1)
    assert second.plan == first.plan
    assert json.loads((out / "fit.json").read_text())["stages"].keys() == second.stages.keys()


def test_an_interrupted_one_goes_on_with_the_same_adapters_alone(
    model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_fit(model_dir, words, tmp_path / "a", drop_layers=(4,), rank=3, steps=0, closed_form_tokens=512)
    run_fit(model_dir, words, tmp_path / "other", drop_layers=(4,), rank=3, steps=0, closed_form_tokens=256)
    options: dict[str, Any] = {"adapters": tmp_path / "a", "steps": 4, "checkpoint_minutes": 0}
    whole = run_fit(model_dir, words, tmp_path / "whole", **options)

    genuine, done = distill.run_batch, list[None]()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        done.append(None)
        if len(done) > 6:  # four judge what it begins with
            raise KeyboardInterrupt
        return genuine(*args, **kwargs)

    monkeypatch.setattr(distill, "run_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(model_dir, words, tmp_path / "b", **options)
    monkeypatch.setattr(distill, "run_batch", genuine)
    with pytest.raises(LoraDropError, match="other adapters under this name"):
        run_fit(model_dir, words, tmp_path / "b", **options | {"adapters": tmp_path / "other"}, resume=True)
    again = run_fit(model_dir, words, tmp_path / "b", **options, resume=True)
    assert again.stages == whole.stages


def test_a_bundle_has_to_have_their_plan(
    model_dir: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle("llama", tmp_path / "bundle", drop_layers=(4,), policy="backfill", rank=3).root
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    monkeypatch.setattr(torch_model, "read_tokenizer", lambda *_: tokenizer)
    options: dict[str, Any] = {"rank": 3, "steps": 0, "closed_form_tokens": 512, "policies": ("backfill",)}
    for layer in (4, 5):
        run_fit(model_dir, words, tmp_path / f"a{layer}", drop_layers=(layer,), **options)
    result = run_fit(bundle, words, tmp_path / "b", adapters=tmp_path / "a4", steps=1)
    assert result.plan["sites"] == ("4",)
    with pytest.raises(LoraDropError, match="another drop list"):
        run_fit(bundle, words, tmp_path / "c", adapters=tmp_path / "a5", steps=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop_layers": (3,)}, "--drop-layers would change nothing"),
        ({"drop_ratio": 0.25}, "--drop-ratio would change nothing"),
        ({"rank": 4}, "--rank would change nothing"),
        ({"surrogate": "anchor"}, "--surrogate would change nothing"),
        ({"closed_form_tokens": 64}, "--closed-form-tokens would change nothing"),
        ({"always_first": 1}, "--always-first would change nothing"),
        ({"steps": 0}, "Nothing would be fitted"),
    ],
)
def test_what_they_bring_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoraDropError, match=re.escape(said)):
        FitSettings(out=Path("o"), text=(Path("t"),), adapters=Path("a"), **options)


def test_what_are_no_adapters_of_this_model(model_dir: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraDropError, match=r"adapter_config\.json"):
        run_fit(model_dir, words, tmp_path / "b", adapters=tmp_path / "none", steps=1)
    run_fit(model_dir, words, tmp_path / "a", drop_layers=(4,), rank=3, steps=0, closed_form_tokens=512)
    other = shutil.copytree(model_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraDropError, match="another base model"):
        run_fit(other, words, tmp_path / "b", adapters=tmp_path / "a", steps=1)
    assert not (tmp_path / "b").exists()
    config = header(tmp_path / "a")
    del config["lora_drop"]["sites"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraDropError, match="do not say what they stand in for"):
        run_fit(model_dir, words, tmp_path / "b", adapters=tmp_path / "a", steps=1)
