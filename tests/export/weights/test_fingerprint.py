"""The fingerprint is of values, not of their storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_drop_export.checkpoint.open import open_checkpoint
from tests.support.stored_weights import cast, export, save, short

pytestmark = pytest.mark.usefixtures("traced")


def fingerprint(directory: Path) -> str:
    return open_checkpoint(str(directory), directory / "scratch").fingerprint()


def test_fingerprint_is_of_values_not_of_storage(tmp_path, model):
    rounded = cast(model, torch.bfloat16)
    in_bfloat16 = fingerprint(model)
    cast(model, torch.float32)
    assert fingerprint(model) == in_bfloat16
    loaded = type(short().model).from_pretrained(model, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="80KB")
    assert fingerprint(tmp_path / "shards") == in_bfloat16
    save({name: rounded[name] for name in reversed(list(rounded))}, model)
    assert fingerprint(model) == in_bfloat16


def test_fingerprint_changes_with_the_weights(model):
    whole = load_file(model / "model.safetensors")
    seen = {fingerprint(model)}
    for name in whole:
        changed = whole | {name: whole[name].clone()}
        changed[name].view(-1)[0] += 0.5
        save(changed, model)
        seen.add(fingerprint(model))
    for changed in (
        {name: t for name, t in whole.items() if name != "lm_head.weight"},
        whole | {"lm_head.weight": whole["lm_head.weight"][:-1]},
        {name.replace("layers.2.", "layers.9."): t for name, t in whole.items()},
    ):
        save(changed, model)
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(whole) + 3


def test_fingerprint_is_the_bundles(tmp_path, model):
    """The manifest has the checkpoint's, also when the weights were converted."""
    cast(model, torch.bfloat16)
    assert export(model, tmp_path / "out").manifest.model.fingerprint == fingerprint(model)


def test_weights_that_the_model_has_no_place_for_may_be_of_any_dtype(tmp_path, model):
    """Such as a quantized part of a model that sees; they are another model all the same."""
    whole, seen = load_file(model / "model.safetensors"), {fingerprint(model)}
    for dtype in (torch.int8, torch.float8_e5m2):
        save(whole | {"vision_tower.weight": torch.zeros(4, 4, dtype=dtype)}, model)
        seen.add(fingerprint(model))
    assert len(seen) == 3
    assert export(model, tmp_path / "out").manifest.model.fingerprint in seen
