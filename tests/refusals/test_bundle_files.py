"""Files of a bundle stay inside it, are ordinary ones, and what the manifest does not record is not run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lora_drop_tools.cli
import onnx
import pytest
from lora_drop_runtime.bundle.graph_files import graph_files
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME

import lora_drop_export.cli
from tests.support.bundles import make_bundle, record_again

GENERATE = ("--prompt", "t1", "--max-new-tokens", "1")
STEPS, WEIGHTS = "ort/steps.onnx", "weights/model.safetensors"


@pytest.fixture
def bundle(place, tmp_path) -> Path:
    shutil.copytree(place / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def opening_refused(refused, bundle) -> Callable[..., None]:
    """Every command refuses the bundle."""

    def run(*words: str) -> None:
        refused(lora_drop_tools.cli.main, "inspect", bundle, words=words)
        refused(lora_drop_tools.cli.main, "generate", bundle, *GENERATE, words=words)
        refused(lora_drop_export.cli.main, "--out", bundle, "--add-target", "ort", "--force", words=words)

    return run


def rename_in_manifest(bundle: Path, old: str, new: str) -> None:
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    data["files"][new] = data["files"].pop(old)
    if old == STEPS:
        data["targets"]["ort"]["steps"] = new
    (bundle / MANIFEST_NAME).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name",
    ["../steps.onnx", "ort/../../steps.onnx", "/tmp/steps.onnx", "", ".", "ort//steps.onnx", "ort/./steps.onnx", "ort/",
     "C:/steps.onnx", "ort\\steps.onnx", "ort/\ud800"],
)  # fmt: skip
def test_a_name_that_leads_out(opening_refused, bundle, name) -> None:
    shutil.copy(bundle / STEPS, bundle.parent / "steps.onnx")
    rename_in_manifest(bundle, STEPS, name)
    opening_refused("name that leads out of it")


@pytest.mark.parametrize("name", [STEPS, WEIGHTS, "tokenizer/tokenizer.json"])
def test_a_link_that_leads_out(opening_refused, bundle, name) -> None:
    shutil.move(bundle / name, bundle.parent / "outside")
    (bundle / name).symlink_to(bundle.parent / "outside")
    opening_refused("leads out of it", "is a link to")


def test_a_folder_that_is_a_link(opening_refused, bundle) -> None:
    shutil.move(bundle / "weights", bundle.parent / "outside")
    (bundle / "weights").symlink_to(bundle.parent / "outside")
    opening_refused("leads out of it")


@pytest.mark.parametrize("what", ["pipe", "directory", "device", "circle", "nothing"])
@pytest.mark.parametrize("name", [STEPS, MANIFEST_NAME])
def test_what_is_no_ordinary_file(opening_refused, bundle, name, what) -> None:
    """A pipe would be waited for, and a device read for ever."""
    (bundle / name).unlink()
    if what == "pipe":
        os.mkfifo(bundle / name)
    elif what == "directory":
        (bundle / name).mkdir()
    elif what != "nothing":
        (bundle / name).symlink_to("/dev/zero" if what == "device" else (bundle / name).name)
    opening_refused(str(name))


def test_a_tokenizer_that_may_not_be_read(refused, bundle, monkeypatch) -> None:
    def copyfile(source: Path, target: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    words = ("bundle/tokenizer/", ": Permission denied.", "Check the permissions")
    refused(lora_drop_export.cli.main, "--model", bundle, "--out", bundle.parent / "out", words=words)


def test_links_inside_and_hard_links_are_fine(bundle) -> None:
    shutil.move(bundle / WEIGHTS, bundle / "weights" / ".stored")
    (bundle / WEIGHTS).symlink_to(".stored")
    (bundle / STEPS).rename(bundle.parent / "steps")
    os.link(bundle.parent / "steps", bundle / STEPS)
    linked = bundle.parent / "link"
    linked.symlink_to(bundle)
    assert lora_drop_tools.cli.main(["generate", str(linked), *GENERATE]) == 0


@pytest.mark.parametrize("name", [STEPS, WEIGHTS, "weights/adapters.safetensors"])
def test_a_file_that_is_not_recorded_is_not_read(refused, bundle, name) -> None:
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    del data["files"][name]
    (bundle / MANIFEST_NAME).write_text(json.dumps(data))
    refused(lora_drop_tools.cli.main, "generate", bundle, *GENERATE, words=(name, "record"))


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/chat_template.jinja",
        "tokenizer/additional_chat_templates/tool_use.jinja",
        "weights/modeling.py",
        "weights/other.safetensors",
    ],
)
def test_a_file_beside_those_that_are_recorded(opening_refused, bundle, name) -> None:
    """Folders that are read as a whole: whoever can put a file there would have it run."""
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("{{ 'let in' }}")
    opening_refused("does not record", name)


def test_a_manifest_that_records_itself(opening_refused, bundle) -> None:
    """--add-target would link it, and then write the new one through the link."""
    data = json.loads((bundle / MANIFEST_NAME).read_text())
    data["files"][MANIFEST_NAME] = {"size_bytes": 99_999, "sha256": "0" * 64}
    text = json.dumps(data)
    (bundle / MANIFEST_NAME).write_text(text + " " * (99_999 - len(text)))
    opening_refused("manifest records itself")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "../secret"}, ("'../secret'", "not in the manifest")),
        ({"location": "/etc/passwd"}, ("'/etc/passwd'", "not in the manifest")),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, ("_ORT_MEM_ADDR_", "not in the manifest")),
        ({"location": "weights/../weights/model.safetensors"}, ("not in the manifest",)),
        ({"offset": "1062168"}, ("reads", "which has")),
        ({"length": "9999999999"}, ("reads", "which has")),
        ({"offset": "-1"}, ("offset is no number",)),
        ({"offset": "9" * 30}, ("offset is no number",)),
        ({"length": "x"}, ("length is no number",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_weights_that_a_graph_names(refused, bundle, entries, words, inside) -> None:
    """In a graph and in the graphs within it; such a bundle was written so, its hashes are right."""
    model = onnx.load(bundle / STEPS, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    if inside:
        constant = onnx.helper.make_node("Constant", [], ["x"])
        constant.attribute.append(onnx.helper.make_attribute("value", tensor))
        graph = onnx.helper.make_graph([constant], "inner", [], [])
        node = onnx.helper.make_node("If", ["lora_step"], [], then_branch=graph, else_branch=graph)
        model.graph.node.append(node)
        tensor = model.graph.node[-1].attribute[0].g.node[0].attribute[0].t
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    (bundle / STEPS).write_bytes(model.SerializeToString())
    record_again(bundle)
    refused(lora_drop_tools.cli.main, "generate", bundle, *GENERATE, words=words)


def test_weights_in_a_field_that_is_spelled_in_more_bits(refused, bundle) -> None:
    """ONNX Runtime reads a tag of 35 bits as its lower 32, so that the graph is one to it."""
    model = onnx.load(bundle / STEPS, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = ".unrecorded"
    shutil.copy(bundle / WEIGHTS, bundle / ".unrecorded")
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = bytes((len(graph) >> shift & 127) | (128 if shift < 28 else 0) for shift in range(0, 35, 7))
    (bundle / STEPS).write_bytes(model.SerializeToString() + b"\xba\x80\x80\x80\x70" + size + graph)
    record_again(bundle)
    refused(lora_drop_tools.cli.main, "generate", bundle, *GENERATE, words=(STEPS, "more than 32 bits"))


def test_an_engine_that_a_graph_names(refused, bundle) -> None:
    """For ONNX Runtime's providers: beside the graph, and recorded like it."""
    node = onnx.helper.make_node("EPContext", [], [], domain="com.microsoft", ep_cache_context="../../evil.engine")
    (bundle / STEPS).write_bytes(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])).SerializeToString()
    )
    record_again(bundle)
    refused(lora_drop_tools.cli.main, "generate", bundle, *GENERATE, words=("evil.engine", "not in the manifest"))


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x3a\xff", b"\x3b", b"\0\0\0\0ORTM", b"\x3a\x05location"])
def test_bytes_that_are_no_graph(refused, bundle, content) -> None:
    (bundle / STEPS).write_bytes(content)
    record_again(bundle)
    refused(lora_drop_tools.cli.main, "generate", bundle, *GENERATE, words=(STEPS,))


@pytest.mark.parametrize("content", [b"", b"\x08\x0bnot", b"\xff" * 99])
def test_graphs_that_a_target_is_added_from(refused, bundle, content) -> None:
    for name in ("refresh.onnx", "lora.onnx"):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content)
        record_again(bundle)
        refused(lora_drop_export.cli.main, "--out", bundle, "--add-target", "ort", "--force", words=(name, "damaged"))
        (bundle / name).write_bytes(whole)


def test_all_files_that_a_graph_reads(tmp_path) -> None:
    """Found as the onnx library finds them."""
    root = make_bundle("llama", tmp_path / "bundle", rank=4, surrogate="recurrent").root
    for name in (STEPS, "refresh.onnx", "lora.onnx"):
        model = onnx.load(root / name, load_external_data=False)
        wanted = sorted(
            tuple(entry.value for entry in tensor.external_data)
            for tensor in onnx.external_data_helper._get_all_tensors(model)
            if onnx.external_data_helper.uses_external_data(tensor)
        )
        found = [(p.location, str(p.offset_bytes), str(p.size_bytes)) for p in graph_files((root / name).read_bytes())]
        assert sorted(found) == wanted
        assert wanted
