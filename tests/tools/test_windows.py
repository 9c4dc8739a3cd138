"""Without --window, the tools that cut a text take pieces that the bundle or the model allows."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from unittest import mock

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools.cli import main
from lora_drop_tools.eval.eval import eval
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.fit.fit import fit
from lora_drop_tools.fit.settings import FitSettings
from lora_drop_tools.profile.profile import profile
from lora_drop_tools.profile.settings import ProfileSettings

from lora_drop_export.compiler.export import export
from lora_drop_export.compiler.options import ExportOptions
from tests.support.bundles import family
from tests.support.tokenizers import with_tokenizer

SHORT = 48
SMALL = {"tokens": 256, "sensitivity_tokens": 256, "rankings": ("influence",)}  # of a profile


pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"t{i * i % 127}" for i in range(6000)))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose context is 256 tokens, exported for 48."""
    root = tmp_path_factory.mktemp("bundle")
    model = with_tokenizer("llama", root / "model")
    options = ExportOptions(drop_layers=(3, 5), rank=3, max_seq_len=SHORT, max_prompt_len=10, verify=False)
    with mock.patch("lora_drop_export.compiler.export.trace", return_value=family("llama").traced):
        return export(str(model), root / "engines", options).root


def test_eval(bundle: Path, text: Path) -> None:
    settings = {"text": text, "windows": 2, "threads": 1, "k": (1,)}
    shrunk = eval(bundle, EvalSettings(**settings), out=io.StringIO())
    asked = eval(bundle, EvalSettings(**settings, window=SHORT, prompt=10), out=io.StringIO())
    for ours, theirs in zip(shrunk.rows, asked.rows, strict=True):
        assert ours.text == theirs.text
        assert ours.text is not None
    assert shrunk.arguments["window"] == SHORT
    assert shrunk.arguments["prompt"] == 10


def test_generate(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tokens of a prompt leave room for 46; the usual number is 64."""
    assert main(["generate", str(bundle), "--prompt", "t1 t2", "--threads", "1"]) == 0
    assert capsys.readouterr().err.startswith("46 tokens in ")
    assert main(["generate", str(bundle), "--prompt", "t1 t2", "--max-new-tokens", "47"]) == 2
    assert "2 + 47 tokens, the bundle allows 48" in capsys.readouterr().err


def test_fit_and_profile(bundle: Path, text: Path, tmp_path: Path) -> None:
    fit(str(bundle), FitSettings(text=(text,), out=tmp_path / "a", rank=3, closed_form_tokens=512, steps=0, batch=2))
    assert json.loads((tmp_path / "a/fit.json").read_text())["settings"]["window"] == SHORT
    found = profile(str(bundle), ProfileSettings(out=tmp_path / "p", **SMALL, text=(text,)))
    assert found.settings["window"] == SHORT


def test_a_model_with_a_short_context(text: Path, tmp_path: Path) -> None:
    model = with_tokenizer("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    fit(str(model), FitSettings(text=(text,), out=tmp_path / "a", rank=3, closed_form_tokens=512, steps=0, batch=2))
    assert json.loads((tmp_path / "a/fit.json").read_text())["settings"]["window"] == 40


def test_longrope_ends_where_its_frequencies_change(text: Path, tmp_path: Path) -> None:
    """As bundles do: a longer window would be learned from with the frequencies of long texts."""
    model = with_tokenizer("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    settings = ProfileSettings(out=tmp_path / "p", **SMALL, text=(text,))
    assert profile(str(model), settings).settings["window"] == 40
    with pytest.raises(InputError, match="The window is longer than the model's context") as caught:
        profile(str(model), dataclasses.replace(settings, window=41, out=tmp_path / "q"))
    assert "--window is 41, the context is 40 (up to which LongRoPE" in caught.value.note
