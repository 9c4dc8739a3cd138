"""Refused by `lora-drop-export`: its options and the output directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora_drop_export.cli
from tests.support.bundles import family
from tests.support.refused import CONTEXT

# ── lora-drop-export: options ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--drop-ratio -0.1", ("--drop-ratio is too small", "-0.1", "0 to 1")),
        ("--drop-ratio 1.5", ("--drop-ratio is too large", "1.5")),
        ("--drop-ratio nan", ("--drop-ratio is not a number", "nan")),
        ("--drop-ratio half", ("--drop-ratio", "half")),
        ("--drop-ratio 0.5 --drop-layers 4,6", ("given twice", "0.5", "4, 6")),
        ("--drop-ratio 0.5 --drop-list LIST", ("given twice", "0.5", "4, 6")),
        ("--drop-layers 4 --drop-list LIST", ("given twice", "--drop-layers", "--drop-list")),
        ("--drop-layers four,six", ("no layer and no half", "'four'")),
        ("--drop-layers 4.5", ("no layer and no half", "4.5", "9.attn")),
        ("--k -1", ("k", "-1")),
        ("--k three", ("--k", "three")),
        ("--surrogate linear", ("--surrogate", "linear", "residual")),
        ("--injection mlp", ("--injection", "mlp", "block")),
        ("--dtype fp8", ("dtype", "fp8")),
        ("--target metal", ("Unknown target", "metal", "ort")),
        ("--target ort --target none", ("targets", "ort, none")),
        ("--target ort --target ort", ("--target names a value twice", "ort, ort")),
        ("--weights move", ("--weights", "move")),
        ("--max-batch 0", ("--max-batch", "0")),
        ("--max-seq-len 0", ("--max-seq-len", "0")),
        ("--max-prompt-len -4", ("--max-prompt-len", "-4")),
        ("--threads 0", ("--threads", "0")),
        ("--no-such-option", ("--no-such-option",)),
        ("--drop-layers 4,,5", ("no layer and no half", "''")),
        ("--drop-layers 4,", ("no layer and no half", "''")),
        ("--drop-layers=", ("no layer and no half", "''")),
        ("--drop-layers 4,6,4", ("--drop-layers names a value twice", "4, 4, 6")),
        ("--threads 2 --no-verify", ("--threads would change nothing", "It is 2, and --no-verify was given")),
        ("--threads 2 --target none", ("--threads would change nothing", "nothing is verified")),
        ("--hardware-compatible", ("--hardware-compatible would change nothing", "the targets are ort")),
        ("--version-compatible", ("--version-compatible would change nothing", "tensorrt")),
        ("--weight-sharing constants", ("--weight-sharing would change nothing", "It is constants")),
        ("--attention plugin", ("--attention would change nothing", "It is plugin")),
        ("--attention native --target none", ("--attention would change nothing", "the targets are none")),
        ("--workspace-mib 64", ("--workspace-mib would change nothing", "It is 64")),
        ("--optimization-level 0", ("--optimization-level would change nothing", "It is 0")),
    ],
)
def test_export_options(export_refused, tmp_path, arguments, words):
    """Refused by themselves, whatever the model."""
    (tmp_path / "list.json").write_text('{"drop_layers": [4, 6]}')
    export_refused(*arguments.replace("LIST", str(tmp_path / "list.json")).split(), words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ("required", "--out")),
        ("--model somewhere", ("required", "--out")),
        ("--out somewhere", ("no model to export", "--add-target")),
        ("--add-target ort", ("required", "--out")),
        ("--add-target ort --out somewhere", ("no bundle here", "somewhere")),
    ],
)
def test_export_without_model_or_out(refused, arguments, words):
    refused(lora_drop_export.cli.main, *arguments.split(), words=words)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    "content",
    [b"", b"4,6", b"{}", b'{"drop_layers": null}', b'{"drop_layers": 4}', b'[4, "six"]', b"[4.5]", b"[true]", b'"46"',
     b"7", b"\x89PNG\xff\x00"],
)  # fmt: skip
def test_drop_list_file_is_garbage(export_refused, tmp_path, content):
    (tmp_path / "list.json").write_bytes(content)
    export_refused("--drop-list", tmp_path / "list.json", words=("no drop list", "list.json"))


@pytest.mark.usefixtures("untraced")
def test_drop_list_file_is_missing(export_refused, tmp_path):
    export_refused("--drop-list", tmp_path / "none.json", words=("cannot be read", "none.json"))
    export_refused("--drop-list", tmp_path, words=("cannot be read", str(tmp_path)))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--drop-layers 4,8", ("Layer 8", "0 to 7")),
        ("--drop-layers=-1,4", ("no layer and no half", "-1")),
        ("--drop-layers 4,6,4", ("twice", "4, 4, 6")),
        ("--drop-layers 2,4", ("Layer 2", "first 3")),
        ("--drop-layers 4,7", ("Layer 7", "last 1")),
        ("--drop-layers 4 --always-first 5", ("Layer 4", "first 5")),
        ("--always-first -1", ("--always-first", "-1")),
        ("--rank -1", ("rank", "-1")),
        (f"--max-seq-len {CONTEXT + 1}", ("--max-seq-len", str(CONTEXT + 1), f"context is {CONTEXT}")),
        ("--max-seq-len 16 --max-prompt-len 16", ("--max-prompt-len", "16", "15")),
        ("--weights link --target none --dtype bf16", ("linked", "float32", "bf16")),
    ],
)
def test_options_that_do_not_fit_the_model(export_refused, arguments, words):
    export_refused(*arguments.split(), words=words)


def test_windowed_layer_in_the_drop_list(export_refused, monkeypatch):
    windowed = dataclasses.replace(family("llama").traced, windows=(5, 0, 5, 0, 5, 0, 5, 0))
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: windowed)
    export_refused("--drop-layers", "4,5", words=("Layer 4", "sliding window"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("arguments", [(), ("--target", "none", "--dtype", "bf16")])
def test_too_little_disk(export_refused, monkeypatch, arguments):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    export_refused(*arguments, words=("disk space", "3 MiB are free"))


# ── lora-drop-export: the output directory ─────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("untraced")
def test_out_exists(refused, place, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "empty").mkdir()

    def export(out: Path, *arguments: str, words: tuple[str, ...]) -> None:
        main = lora_drop_export.cli.main
        refused(main, "--model", place / "model", "--out", out, *arguments, words=(str(out), *words))

    export(place / "bundle", words=("exists already", "--force"))
    for other in (tmp_path / "notes", tmp_path / "empty", tmp_path / "notes" / "a.txt"):
        export(other, words=("exists already",))
        export(other, "--force", words=("not a bundle",))
    export(tmp_path / "notes" / "a.txt" / "out", words=("cannot be made", "a.txt is not a directory"))


@pytest.mark.usefixtures("untraced")
def test_directories_above_out_vanish_again(refused, tmp_path):
    out = tmp_path / "a" / "b" / "out"
    refused(lora_drop_export.cli.main, "--model", tmp_path / "none", "--out", out, words=("no such model",))
