"""Refused by `lora-drop`: bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_drop_tools.cli
import pytest
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.errors import BundleError, InputError, LoraDropError, PlanError

from lora_drop_export.compiler.files import BUNDLE
from tests.support.bundles import make_bundle
from tests.support.refused import Refused

COMMANDS = (("generate", "--prompt", "t1"), ("chat",), ("inspect",), ("inspect", "--check"), ("compare",))


@pytest.fixture
def bundle(place, tmp_path) -> Path:
    """A copy of the bundle to be damaged."""
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def bundle_refused(refused) -> Refused:
    """Every command refuses a bundle."""

    def run(bundle: Path, *words: str) -> None:
        for command, *arguments in COMMANDS:
            refused(lora_drop_tools.cli.main, command, bundle, *arguments, words=words)

    return run


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    change(data)
    (bundle / MANIFEST_NAME).write_text(json.dumps(data))


def test_not_a_bundle(bundle_refused, bundle, place):
    bundle_refused(place / "none", "no bundle here", "not a directory")
    bundle_refused(place / ("x" * 300), "no bundle here", "not a directory")
    bundle_refused(place / "model", "no bundle here", MANIFEST_NAME)
    bundle_refused(bundle / MANIFEST_NAME, "no bundle here", "not a directory")


@pytest.mark.parametrize("version", [0, 1, 2, "3", None])
def test_other_format_version(bundle_refused, bundle, version):
    edit_manifest(bundle, lambda data: data.update(format_version=version))
    bundle_refused(bundle, "another format version", f"version {version}", "version 5", "Export the model again")


def test_a_bundle_of_0_1(bundle_refused, tmp_path):
    """One error with the export's command; and an export may replace it, as it may any bundle."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copyfile(Path(__file__).with_name("bundle_of_0_1.json"), old / MANIFEST_NAME)
    bundle_refused(old, "another format version", "version 2", "version 5", "lora-drop-export --model")
    assert BUNDLE.files(old) >= {MANIFEST_NAME, "refresh.onnx", "ort/steps.onnx"}


@pytest.mark.parametrize(
    "file", ["refresh.onnx", "ort/steps.onnx", "weights/model.safetensors", "weights/adapters.safetensors",
             "tokenizer/tokenizer.json"],
)  # fmt: skip
def test_file_is_missing_or_truncated_or_locked(bundle_refused, bundle, file):
    whole = (bundle / file).read_bytes()
    (bundle / file).write_bytes(whole[:-1])
    bundle_refused(bundle, "wrong size", file, f"{len(whole) - 1} bytes", str(len(whole)))
    (bundle / file).write_bytes(whole + b"\0")
    bundle_refused(bundle, "wrong size", file)
    (bundle / file).unlink()
    bundle_refused(bundle, "missing", file, f"{len(whole)} bytes: No such file")
    (bundle / file).symlink_to((bundle / file).name)  # stands in for a directory that may not be looked into
    bundle_refused(bundle, "cannot be read", file, "Too many levels of symbolic links", "Check its permissions")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\x80\x81\x82", b'{"format_version": 5}'])
def test_manifest_is_no_manifest(bundle_refused, bundle, content):
    (bundle / MANIFEST_NAME).write_bytes(content)
    bundle_refused(bundle, "manifest is damaged", MANIFEST_NAME)


SECTIONS = ("model", "plan", "limits", "special_tokens", "targets", "files", "versions", "verification")


@pytest.mark.parametrize("section", SECTIONS)
def test_manifest_is_damaged(bundle_refused, bundle, section):
    """A section that is gone, or is of another kind, or holds what it should not."""
    whole = (bundle / MANIFEST_NAME).read_text()
    damages: list[Callable[[dict[str, Any]], object]] = [lambda data: data.pop(section)]
    damages += [lambda data, value=value: data.update({section: value}) for value in (None, 3, "x", [], [1])]
    if section in ("model", "plan", "limits"):
        damages.append(lambda data: data[section].pop(next(iter(data[section]))))
        damages.append(lambda data: data[section].update(surprise=1))
    if section in ("targets", "files"):
        damages.append(lambda data: data[section].update(ort=3))
    for damage in damages:
        (bundle / MANIFEST_NAME).write_text(whole)
        edit_manifest(bundle, damage)
        bundle_refused(bundle, "manifest is damaged", MANIFEST_NAME)


def test_manifest_holds_an_impossible_plan(bundle_refused, bundle):
    edit_manifest(bundle, lambda data: data["plan"].update(sites=["4", "9"]))
    bundle_refused(bundle, "Layer 9")


def test_hash_is_another(refused, bundle):
    """A file changed without changing its size: only --check reads them all."""
    for file in ("refresh.onnx", "weights/config.json", "weights/adapters.safetensors"):
        whole = (bundle / file).read_bytes()
        (bundle / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(lora_drop_tools.cli.main, "inspect", bundle, "--check", words=("has changed", file))
        (bundle / file).write_bytes(whole)
    assert lora_drop_tools.cli.main(["inspect", str(bundle), "--check"]) == 0


@pytest.mark.parametrize("content", [b"", b"\x08\x0bnot an ONNX file"])
def test_graph_is_garbage(refused, bundle, content):
    """A damaged graph whose size is right."""
    file = "ort/steps.onnx"
    whole = (bundle / file).read_bytes()
    (bundle / file).write_bytes(content.ljust(len(whole), b"\xff"))
    for command, *arguments in (("generate", "--prompt", "t1"), ("chat",), ("compare",)):
        refused(lora_drop_tools.cli.main, command, bundle, *arguments, words=(file,))


def test_graphs_only_bundle(refused, tmp_path):
    make_bundle("llama", tmp_path / "graphs", targets=("none",))
    for command, *arguments in (("generate", "--prompt", "t1"), ("chat",), ("compare",)):
        refused(
            lora_drop_tools.cli.main, command, tmp_path / "graphs", *arguments, words=("no target", "--target none")
        )
        refused(lora_drop_tools.cli.main, command, tmp_path / "graphs", *arguments, "--target", "ort", words=("'ort'",))


def test_bundle_without_tokenizer(refused, tmp_path):
    make_bundle("llama", tmp_path / "mute")
    for command, *arguments in (("generate", "--prompt", "t1"), ("chat",)):
        refused(lora_drop_tools.cli.main, command, tmp_path / "mute", *arguments, words=("tokenizer",))


def test_errors_are_one_hierarchy():
    """What `run_command` prints without a traceback."""
    assert issubclass(InputError, LoraDropError)
    assert issubclass(BundleError, LoraDropError)
    assert {InputError.exit_code, BundleError.exit_code, PlanError.exit_code} == {2}
