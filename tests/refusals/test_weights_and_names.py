"""Weights and configs that hold no numbers, layers that the config does not tell of, names and lines without an end."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import lora_drop_tools.cli
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError, VerificationError
from lora_drop_runtime.text import TextCodec
from safetensors.torch import load_file, save_file

import lora_drop_export.cli
from lora_drop_export.check.figures import TOLERANCES, StepResult, Verification, failure
from lora_drop_export.check.verify import compare
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.compiler.early import check_names
from lora_drop_export.compiler.export import export
from lora_drop_export.compiler.options import ExportOptions
from tests.support.bundles import Family, family, heads_of, make_bundle


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "model", tmp_path / "model")


def change_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def test_infinity_among_the_weights_is_the_checkpoints(copied: Path, tmp_path: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.4.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    source = family("llama")
    checkpoint = open_checkpoint(str(copied), tmp_path / "scratch")
    bundle = make_bundle(Family(source.model, copied, checkpoint, source.traced), tmp_path / "b")
    result = compare(bundle, threads=1)
    assert not result.passed
    error = failure(result)
    assert isinstance(error, InputError)
    assert "logits that are not numbers" in str(error)
    assert "bug" not in str(error)


@pytest.mark.parametrize(("router", "words"), [(None, "This is a bug"), ("float16", "In float16 a router may choose")])
def test_a_router_in_half_precision_is_no_bug(router: str | None, words: str) -> None:
    """What a mixture's comparison says that fails, where the engine has no float32 to compare with."""
    step = StepResult(1, "lora", 0.5, 0.1, 0.98, 1.0, 0, False)
    error = failure(Verification("tensorrt-rtx", 3, (5,), TOLERANCES["float16"], (step,), half_router=router))
    assert isinstance(error, VerificationError)
    assert words in str(error)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_in_the_config(export_refused, copied: Path, value: float) -> None:
    change_config(copied, rms_norm_eps=value)
    export_refused(model=copied, words=("config.json is damaged", "NaN" if value != value else "Infinity"))


def test_more_layers_than_the_config_says(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(copied, num_hidden_layers=3)
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: heads_of(16, 2).traced)
    options = ExportOptions(drop_layers=(1,), always_first=1, max_seq_len=32, verify=False, targets=("none",))
    export(str(copied), tmp_path / "b", options)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: the checkpoint holds 8 layers and config.json says 3" in said


@pytest.mark.usefixtures("untraced")
def test_a_name_that_no_file_system_takes(refused, place: Path) -> None:
    model, out = place / "model", place / ("x" * 300)
    refused(lora_drop_export.cli.main, "--model", model, "--out", out, words=("cannot be used", "too long"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("option", ["--model", "--out"])
def test_a_place_whose_name_is_no_utf8(refused, place: Path, copied: Path, option: str) -> None:
    """The checkpoint was called damaged."""
    places = {"--model": place / "model", "--out": place / "out"}
    odd = places | {option: copied.rename(copied.parent / os.fsdecode(b"m\xff")) / os.fsdecode(b"\xfe")}
    refused(lora_drop_export.cli.main, *itertools.chain(*odd.items()), words=(f"The path at {option} is not UTF-8.",))


@pytest.mark.parametrize("option", ["--model", "--out"])
@pytest.mark.parametrize(("locale", "name"), [("iso8859-1", "mÃ©"), ("ascii", "m\udcc3\udca9")], ids=["latin-1", "c"])
def test_a_place_whose_name_the_locale_reads_as_another(
    monkeypatch: pytest.MonkeyPatch, locale: str, name: str, option: str
) -> None:
    """The checkpoint was called damaged, or the name, which is UTF-8, was said to be none."""
    places = {"--model": "model", "--out": "out"} | {option: name}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "getfilesystemencoding", lambda: locale)
        patch.setattr(os, "fsdecode", lambda name: name.decode(locale, "surrogateescape"))
        with pytest.raises(InputError) as caught:
            check_names(places["--model"], Path(places["--out"]))
    assert f"The path at {option} is not read as UTF-8." in str(caught.value)
    assert "PYTHONUTF8=1" in str(caught.value)


def test_a_bundle_whose_name_is_no_utf8(place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "bundle", tmp_path / os.fsdecode(b"b\xff"))
    with Session.open(copy) as session:
        assert session.generate([1, 2], 3)[0].size == 3
    assert lora_drop_export.cli.main(["--add-target", "ort", "--force", "--out", str(copy)]) == 0


def test_a_model_whose_name_a_terminal_would_obey(place: Path, copied: Path) -> None:
    """The bundle was made, and then its manifest said to be damaged."""
    model = copied.rename(copied.parent / "a\x1b[2Jb")
    assert lora_drop_export.cli.main(["--model", str(model), "--out", str(copied.parent / "out")]) == 0
    assert Bundle.open(copied.parent / "out").manifest.model.name == "a\\x1b[2Jb"


def test_a_line_without_an_end(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/zero").open(encoding="utf-8") as zeros:
        monkeypatch.setattr(sys, "stdin", zeros)
        assert lora_drop_tools.cli.main(["chat", str(place / "bundle"), "--threads", "1"]) == 2
    assert "A message is too long." in capsys.readouterr().err


def test_too_little_memory_is_no_damaged_tokenizer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("lora_drop_runtime.text.read_bounded", full)
    with pytest.raises(MemoryError):
        TextCodec.open(place / "bundle" / "tokenizer")


def test_a_prompt_without_tokens(refused, place: Path) -> None:
    arguments = ("generate", place / "bundle", "--prompt", "t1", "--prompt", "")
    refused(lora_drop_tools.cli.main, *arguments, words=("A prompt is empty.", "Prompt 2 has no tokens."))


@pytest.mark.usefixtures("untraced")
def test_an_empty_name_is_not_the_current_directory(
    export_refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "model")
    export_refused(model="", words=("name of the model is empty",))


def test_the_printed_command_of_a_name_like_an_option(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """With `--out=-engines` it would be refused."""
    shutil.copytree(place / "bundle", tmp_path / "-engines")
    monkeypatch.chdir(tmp_path)
    lora_drop_export.cli._print_exported(Bundle.open("-engines"), Path("-engines"))
    command = shlex.split(capsys.readouterr().out.rpartition("try: lora-drop ")[2])
    assert lora_drop_tools.cli.main([*command[:2], "--prompt", "t1", "--max-new-tokens", "1"]) == 0


def test_the_printed_command_on_windows(place: Path, capsys, monkeypatch) -> None:
    """Its shell knows no single quotes."""
    bundle = Bundle.open(place / "bundle")
    monkeypatch.setattr(sys, "platform", "win32")
    lora_drop_export.cli._print_exported(bundle, Path(r"C:\engines"))
    lora_drop_export.cli._print_exported(bundle, Path(r"C:\my engines"))
    first, second = capsys.readouterr().out.split("try: lora-drop generate ")[1:]
    assert first.startswith(r"C:\engines --")
    assert second.startswith(r'"C:\my engines" --')
