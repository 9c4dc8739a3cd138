"""`lora-drop profile`'s drop lists in an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora_drop_tools.profile.result import Profile

import lora_drop_export.cli
from tests.support.bundles import family


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, llama_dir: Path, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: family("llama").traced)
    fixed = ("--model", llama_dir, "--out", tmp_path / "bundle", "--target", "none", "--max-seq-len", 64)
    return lambda *more: lora_drop_export.cli.main([str(argument) for argument in (*fixed, *more)])


def test_export_takes_a_list(
    made: tuple[Profile, Path], export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, out = made
    best = result.best(0.5)
    assert export("--drop-list", out / best.file) == 0
    assert json.loads((tmp_path / "bundle" / "lora_drop.json").read_text())["plan"]["sites"] == list(best.sites)
    assert "warning" not in capsys.readouterr().err


def test_export_warns_of_a_bad_base(
    export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {"recurrent": {"4": 1.25, "6": 1.5, "5": 0.9}, "anchor": {"4": 0.9, "5": 1.0, "6": 0.8}}
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [6, 5, 4], "base_errors": errors}))
    for surrogate, warned in (("recurrent", True), ("anchor", False), ("residual", False)):
        assert export("--drop-list", tmp_path / "list.json", "--surrogate", surrogate, "--force") == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
        assert bool(lines) is warned
        if warned:
            assert "--surrogate recurrent" in lines[0]
            assert "layers 4, 6 (relative errors 1.25 to 1.50)" in lines[0]


def test_export_takes_the_policy(export: Callable[..., int], tmp_path: Path) -> None:
    """That the list was chosen for, unless another one is asked for."""
    (tmp_path / "list.json").write_text(json.dumps({"sites": [4], "policy": "backfill"}))
    for more, policy in (((), "backfill"), (("--policy", "fill"), "fill")):
        assert export("--drop-list", tmp_path / "list.json", "--force", *more) == 0
        assert json.loads((tmp_path / "bundle" / "lora_drop.json").read_text())["plan"]["policy"] == policy


def test_profile_json_is_no_drop_list(
    made: tuple[Profile, Path], export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a file of the profile's and has "sites", so the message says which file is meant."""
    assert export("--drop-list", made[1] / "profile.json") == 2
    message = capsys.readouterr().err
    assert "nor what lora-drop profile writes into a drop-….json." in message
    assert "Use a drop-….json that lora-drop profile wrote" in message


def test_export_refuses_a_list_of_another_model(
    export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [4], "fingerprint": "0123456789abcdef"}))
    assert export("--drop-list", tmp_path / "list.json") == 2
    message = capsys.readouterr().err
    assert "error: The drop list was chosen for another model." in message
    assert "0123456789ab, tiny-llama is" in message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "facts", [{"fingerprint": 7}, {"policy": "drop"}, {"base_errors": [1]}, {"base_errors": {"anchor": {"x": 1}}}]
)
def test_export_refuses_a_damaged_list(
    facts: dict[str, Any], export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(json.dumps({"drop_layers": [4]} | facts))
    assert export("--drop-list", tmp_path / "list.json") == 2
    assert "holds no drop list" in capsys.readouterr().err
