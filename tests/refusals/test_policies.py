"""Policies that a bundle cannot run are refused by every command before it works."""

from __future__ import annotations

from pathlib import Path

import lora_drop_tools.cli
import pytest

from tests.support.bundles import make_bundle

COMMANDS = {
    "compare": (),
    "bench": ("--contexts", "8", "--new-tokens", "12", "--k", "1"),
    "eval": ("--text", "words.txt"),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policies")
    for policy in ("fill", "skip"):
        make_bundle("llama", root / policy, drop_layers=(4,), policy=policy)
    (root / "words.txt").write_text("t1 t2 t3 " * 400)
    return root


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("own", "asked"), [("fill", "skip"), ("fill", "lossless"), ("skip", "fill")])
def test_another_policy(refused, bundles, command, own, asked, monkeypatch):
    monkeypatch.chdir(bundles)
    words = (f"cannot be decoded under policy {asked}", f"--policy {own}")
    refused(lora_drop_tools.cli.main, command, own, "--policy", asked, *COMMANDS[command], words=words)


def test_no_bundle_is_evaluated_before_all_are_looked_at(refused, bundles, monkeypatch, capsys):
    monkeypatch.chdir(bundles)
    words = ("cannot be decoded under policy skip",)
    refused(lora_drop_tools.cli.main, "eval", "skip", "fill", "--policy", "skip", "--text", "words.txt", words=words)
    assert "text, k" not in capsys.readouterr().err
