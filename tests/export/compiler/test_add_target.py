"""What an existing bundle fixes, what can be added to it, and what it says of a target that is built again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.errors import BundleError, InputError

from lora_drop_export.cli import main
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from tests.support.bundles import family, family_trace, make_bundle

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return make_bundle("llama", tmp_path_factory.mktemp("bundle") / "b")


def test_int8_caches_are_refused_as_an_export_refuses_them(tmp_path, monkeypatch):
    """Whatever the form of attention; before anything is built."""
    made = make_bundle("llama", tmp_path / "b", kv_dtype="int8", targets=("none",), drop_layers=(4,))
    with pytest.raises(InputError) as of_export:
        ExportOptions(kv_dtype="int8", targets=(RTX,))
    before = {file: file.stat().st_mtime_ns for file in made.root.rglob("*")}
    with pytest.raises(InputError) as refused:
        add_target(made.root, [RTX], ExportOptions(verify=False))
    assert refused.value.fact == of_export.value.fact
    assert "int8 caches" in refused.value.note
    assert RTX in refused.value.note
    assert "--kv-dtype" in refused.value.hint
    assert {file: file.stat().st_mtime_ns for file in made.root.rglob("*")} == before
    add_target(made.root, ["ort"], ExportOptions(verify=False))  # which takes them


def test_the_hint_names_no_option_that_a_bundle_fixes(tmp_path):
    """Of a target that does not compute in the bundle's dtype."""
    source = family("llama")
    half = dataclasses.replace(source, traced=family_trace("llama", "float16"), dtype="float16")
    made = make_bundle(half, tmp_path / "b", targets=("none",))
    with pytest.raises(InputError, match="does not compute in that dtype") as refused:
        add_target(made.root, ["openvino"])
    assert refused.value.hint.startswith("Export the model again with --dtype fp32")


@pytest.mark.parametrize(("targets", "word"), [(["ort", "ort"], "names a value twice"), (["nope"], "Unknown target")])
def test_refusals_name_the_option_that_was_given(targets, word, tmp_path, capsys):
    """--target is another one, and refused beside it."""
    made = make_bundle("llama", tmp_path / "b", targets=("none",))
    assert main(["--out", str(made.root), *(part for name in targets for part in ("--add-target", name))]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert "--add-target" in error
    assert "--target" not in error


@pytest.mark.parametrize("target", ["ort", RTX])
def test_a_scale_for_each_channel_is_refused(target: str, tmp_path: Path) -> None:
    """By each target that has no kernel for it, before anything is built."""
    made = make_bundle("llama", tmp_path / "b", dtype="int4", block_size="channel", targets=("none",))
    with pytest.raises(InputError, match="cannot take a scale for each channel") as refused:
        add_target(made.root, [target], ExportOptions(verify=False))
    assert f"{made.root} has int4 weights in that form; {target} was asked for" in refused.value.note
    assert refused.value.hint == "Export the model again, with --block-size 128."
    assert not (made.root / target).exists()


def test_damaged_weights_are_not_verified_against_themselves(tmp_path):
    """Their size is right, and the new target would read what its reference reads. Its own files may be damaged."""
    made = make_bundle("llama", tmp_path / "b")
    (made.root / "ort" / "steps.onnx").write_bytes(bytes((made.root / "ort" / "steps.onnx").stat().st_size))
    assert add_target(made.root, ["ort"], ExportOptions(force=True, verify=False)).check_hashes() == []
    weights = made.root / "weights" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"(?s)has changed.*weights/model.safetensors"):
        add_target(made.root, ["ort"], ExportOptions(force=True))
    assert weights.read_bytes() == content


@pytest.mark.parametrize("others", [[], [{"target": RTX, "steps": [{"step": 0}]}]])
def test_steps_of_an_engine_that_is_replaced_are_forgotten(others, tmp_path):
    """They are those of the old one; what other targets' comparisons said stays, and the file's record is right."""
    made = make_bundle("llama", tmp_path / "b")
    path = made.root / "verify.json"
    path.write_text(json.dumps([{"target": "ort", "steps": []}, *others]))
    manifest = dataclasses.replace(
        made.manifest,
        files=made.manifest.files | {"verify.json": record_file(path)},
        verification={"ort": {"status": "passed"}, RTX: {"status": "not run"}},
    )
    (made.root / MANIFEST_NAME).write_text(manifest.to_json())
    again = add_target(made.root, ["ort"], ExportOptions(force=True, verify=False))
    assert again.manifest.verification == {RTX: {"status": "not run"}}
    assert again.check_hashes() == []
    if others:
        assert json.loads(path.read_text()) == others
    else:
        assert not path.exists()
        assert "verify.json" not in again.manifest.files


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", "3"], "--k 3"),
        (["--max-batch", "8"], "--max-batch 8"),
        (["--weights", "copy"], "--weights copy"),
        (["--always-first", "3"], "--always-first 3"),
        (["--target", "ort"], "--target ort"),
        (["--drop-layers", "4,6"], "--drop-layers 4,6"),
        (["--model", "somewhere"], "--model somewhere"),
    ],
)
def test_an_option_that_the_bundle_fixes_is_seen_also_with_its_default(arguments, said, bundle: Bundle, capsys):
    before = (bundle.root / MANIFEST_NAME).read_bytes()
    assert main(["--out", str(bundle.root), "--add-target", "ort", "--force", "--no-verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"An existing bundle fixes that option.\nNote: {said} was given with --add-target.\n" in error
    assert (bundle.root / MANIFEST_NAME).read_bytes() == before


def test_what_the_bundle_does_not_fix_may_be_given(tmp_path: Path, capsys):
    made = make_bundle("llama", tmp_path / "b")
    more = ["--force", "--no-verify", "--trust-remote-code"]
    assert main(["--out", str(made.root), "--add-target", "ort", *more]) == 0
    assert capsys.readouterr().out == "targets: ort\n"


@pytest.mark.parametrize("where", ["at its place", "on its way out"])
def test_what_a_killed_one_left_is_settled_first(where, tmp_path, capsys):
    """Also where the bundle has the target already, so that nothing is to be done."""
    made = make_bundle("llama", tmp_path / "b")
    left = tmp_path / ".b.abcdefgh.lora-drop"
    (left / "new").mkdir(parents=True)
    if where == "on its way out":
        inodes = {"old": made.root.stat().st_ino, "new": (left / "new").stat().st_ino}
        (left / "journal").write_text(json.dumps(inodes | {"files": []}))
        made.root.rename(left / "old")
    assert main(["--out", str(tmp_path / "b"), "--add-target", "ort"]) == 2
    assert "has that target already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert not Bundle.open(tmp_path / "b").check_hashes()
