"""Refusals name options and values as the command line has them."""

from __future__ import annotations

import json

import pytest
from lora_drop_runtime.errors import InputError
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.fit.settings import FitSettings

from lora_drop_export.cli import main
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from tests.support.bundles import make_bundle


def test_a_dtype_is_named_as_it_is_given(tmp_path, capsys):
    assert main(["--model", "m", "--out", str(tmp_path / "b"), "--dtype", "foo"]) == 2
    said = capsys.readouterr().err
    assert "'foo' was given, known are fp32, fp16, bf16, int8, fp8 and int4." in said
    assert "Hint: Use --dtype fp32." in said
    assert main(["--add-target", "ort", "--out", str(tmp_path / "b"), "--dtype", "fp32"]) == 2
    assert "--dtype fp32 was given with --add-target" in capsys.readouterr().err


def test_a_ratio_beside_a_drop_list(tmp_path, capsys):
    (tmp_path / "list.json").write_text(json.dumps([4]))
    arguments = ["--drop-ratio", "0.5", "--drop-list", str(tmp_path / "list.json")]
    assert main(["--model", "m", "--out", str(tmp_path / "b"), *arguments]) == 2
    said = capsys.readouterr().err
    assert "--drop-ratio 0.5 and the layers 4 exclude each other" in said
    assert "--drop-layers 4" not in said  # which nobody gave


def test_a_record_of_verifications_that_cannot_be_read_is_in_nobodys_way(tmp_path):
    bundle = make_bundle("llama", tmp_path / "b")
    added = add_target(bundle.root, ["ort"], ExportOptions(force=True))
    file = added.root / "verify.json"
    file.write_bytes(bytes(file.stat().st_size))
    again = add_target(added.root, ["ort"], ExportOptions(force=True))
    assert [result["target"] for result in json.loads((again.root / "verify.json").read_bytes())] == ["ort"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (lambda path: FitSettings(text=(path,), out=path, seed=-1), "--seed is too small"),
        (lambda path: FitSettings(text=(path,), out=path, threads=0), "--threads is too small"),
        (
            lambda path: FitSettings(text=(path,), out=path, drop_ratio=0.5, drop_layers=(4,)),
            "--drop-ratio and --drop-l",
        ),
        (lambda path: EvalSettings(text=path, seed=-1), "--seed is too small"),
    ],
)
def test_settings_refuse_what_would_end_in_a_traceback(settings, words, tmp_path):
    with pytest.raises(InputError, match=words):
        settings(tmp_path / "x")
