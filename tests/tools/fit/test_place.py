"""What lies at the place of an unfinished fit is looked at before the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_drop_tools.cli import main
from lora_drop_tools.fit.partial import _as_today

from lora_drop_export.decoder import loaded


@pytest.mark.parametrize(
    ("there", "options", "fact"),
    [
        ("", ("--resume",), "There is no such fit to resume."),
        ("notes.txt", (), "An unfinished fit is there."),
        ("notes.txt", ("--force",), "The place of an unfinished fit is taken."),
        ("notes.txt", ("--resume",), "There is no such fit to resume."),
    ],
)
def test_refused_before_the_model_is_loaded(
    there: str,
    options: tuple[str, ...],
    fact: str,
    model_dir: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loaded, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    if there:
        (tmp_path / "a.partial").mkdir()
        (tmp_path / "a.partial" / there).write_text("mine")
    given = ["fit", str(model_dir), "--text", str(words), "--out", str(tmp_path / "a"), *options]
    assert main(given) == 2
    assert f"error: {fact}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == (["a.partial"] if there else [])
    assert not there or (tmp_path / "a.partial" / there).read_text() == "mine"


def test_settings_of_version_01_are_those_of_today() -> None:
    """An unfinished fit of then goes on: its plan in sites, and `tokens` under today's name."""
    old = {"drop_layers": [3, 5], "injection": "attn_mlp", "policy": "skip", "tokens": 512, "steps": 4}
    assert _as_today(old) == {
        "sites": ["3.attn", "3.mlp", "5.attn", "5.mlp"],
        "bare_sites": [],
        "policy": "skip",
        "policies": ["skip"],
        "closed_form_tokens": 512,
        "steps": 4,
        "tokens": None,
        "dataset": None,
        "text_column": "text",
        "offset_weights": None,
    }
    today = _as_today(old)
    assert _as_today(today) == today
