"""A bundle as the model of an export: its weights go into the other bundle as they lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import BundleError, InputError
from safetensors import safe_open

from lora_drop_export import ExportOptions, export
from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.decoder.trace import TracedModel
from tests.support.bundles import family, heads_of, make_bundle, record_again, save_adapters
from tests.support.tokenizers import character_tokenizer

FORMS = {
    "float": {},
    "with zero points": {"dtype": "int4"},
    "head of its own": {"dtype": "int4", "quantization": "rtn", "head_dtype": "int8"},
    "int8": {"dtype": "int8", "block_size": 64},
    "a scale for each row": {"dtype": "int8", "block_size": "channel", "targets": ("openvino",)},
    "fp8": {"dtype": "float8_e4m3fn", "targets": ("none",)},
}


def tensors(root: Path) -> dict[str, bytes]:
    """Of the weights, as the safetensors library reads them."""
    found = {}
    for path in (root / "weights").glob("*.safetensors"):
        if path.name != "adapters.safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    value = file.get_tensor(name).contiguous()
                    found[name] = value.flatten().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_another_plan_over_the_same_weights(form: str, tmp_path: Path) -> None:
    options, source = FORMS[form], heads_of(16, 2)
    built = {name: options[name] for name in ("targets",) if name in options}
    other = {"drop_layers": (2,), "always_first": 1, "always_last": 0, "surrogate": "recurrent", "rank": 4}
    first = make_bundle(source, tmp_path / "a", drop_layers=(1,), always_first=1, **options)
    plain = make_bundle(source, tmp_path / "c", **other, **options)
    with_its_weights = dataclasses.replace(source, checkpoint=open_checkpoint(str(first.root), tmp_path / "scratch"))
    again = make_bundle(with_its_weights, tmp_path / "b", **other, **built)
    assert tensors(again.root) == tensors(first.root)
    assert again.manifest.model == plain.manifest.model
    assert again.manifest.plan == plain.manifest.plan
    assert again.manifest.quantization == plain.manifest.quantization
    for name, record in plain.manifest.files.items():
        assert again.manifest.files[name].sha256 == record.sha256, name


def test_the_folder_of_its_weights_is_a_checkpoint_in_float(int4: Bundle, tmp_path: Path) -> None:
    source = dataclasses.replace(family("llama"), checkpoint=open_checkpoint(str(int4.root / "weights"), tmp_path))
    again = make_bundle(source, tmp_path / "b")
    assert again.manifest.model.weight_dtype == "float32"
    assert not again.manifest.quantization
    first, second = (read_tensors(one.root / "weights" / "model.safetensors") for one in (int4, again))
    assert {name for name in first if not name.endswith((".scales", ".zero_points"))} == set(second)
    assert {tensor.dtype for tensor in second.values()} == {"float32"}


def test_export_in_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters of the model itself; the full schedule gives the same logits."""

    def traced(checkpoint: Checkpoint, *_: object, **__: object) -> TracedModel:
        source = family("llama")
        assert checkpoint.config.to_diff_dict() == source.checkpoint.config.to_diff_dict()
        return source.traced

    monkeypatch.setattr("lora_drop_export.compiler.export.trace", traced)
    bundle = make_bundle("llama", tmp_path / "b", dtype="int4", drop_layers=(3,))
    model, ids = bundle.manifest.model, np.array([[3, 5, 7, 11]])
    with Session.open(bundle.root, k=0, threads=1) as session:
        before = session.prefill(ids, max_new_tokens=2)
    plan = dataclasses.replace(bundle.manifest.plan, sites=("4",), rank=4)
    adapters = save_adapters(
        tmp_path / "adapters", plan, model.hidden_size, family("llama").checkpoint.fingerprint(), 4
    )
    made = export(str(bundle.root), bundle.root, ExportOptions(adapters=adapters, max_seq_len=64, force=True))
    assert made.manifest.plan.sites == ("4",)
    assert made.manifest.model.fingerprint == family("llama").checkpoint.fingerprint()
    assert made.manifest.verification["ort"]["status"] == "passed"
    with Session.open(made.root, k=0, threads=1) as session:
        np.testing.assert_array_equal(session.prefill(ids, max_new_tokens=2), before)


def test_the_tokenizers_files_in_folders(tmp_path: Path) -> None:
    """Chat templates beside the first, as transformers writes them."""
    bundle = make_bundle("llama", tmp_path / "b")
    character_tokenizer(bundle.root)
    named = Path("additional_chat_templates", "tool_use.jinja")
    (bundle.root / "tokenizer" / named).parent.mkdir()
    (bundle.root / "tokenizer" / named).write_text("tools")
    record_again(bundle.root)
    opened = open_checkpoint(str(bundle.root), tmp_path / "scratch")
    assert (opened.directory / "tokenizer.json").is_file()
    assert (opened.directory / named).read_text() == "tools"


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"dtype": "int8"}, "--dtype"),
        ({"dtype": "float16"}, "--dtype"),
        ({"dtype": "int4", "block_size": 64, "quantization": "rtn"}, "--block-size, --quantization"),
        ({"dtype": "int4", "symmetric": True}, "--symmetric"),
        ({"dtype": "int4", "head_dtype": "int8"}, "--head-dtype"),
    ],
)
def test_what_would_round_them_again_is_refused(options: dict[str, object], flags: str, int4: Bundle, tmp_path) -> None:
    with pytest.raises(InputError, match="weights of a bundle stay as they are") as refused:
        export(str(int4.root), tmp_path / "out", ExportOptions(targets=("none",), **options))  # type: ignore[arg-type]
    assert refused.value.note == f"It has int4 weights (search); given is {flags}."
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle("llama", tmp_path_factory.mktemp("int4") / "b", dtype="int4")


def test_a_target_that_takes_no_such_weights_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle("llama", tmp_path / "b", **FORMS["a scale for each row"])
    with pytest.raises(InputError, match="cannot take the checkpoint's weights") as refused:
        export(str(bundle.root), tmp_path / "out", ExportOptions())
    assert "int8 rows with no zero points; ort was asked for" in refused.value.note
    assert "--target openvino" in refused.value.hint


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle("llama", tmp_path / "b", dtype="int4")
    file = bundle.root / "weights" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="has changed") as refused:
        export(str(bundle.root), tmp_path / "out", ExportOptions())
    assert "weights/model.safetensors" in refused.value.note
