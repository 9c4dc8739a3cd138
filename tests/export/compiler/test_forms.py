"""`--block-size auto`: which forms there are, which one is chosen, what the bundle is then, what is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError, NoDeviceError
from lora_drop_tools.inspect import _quantization

from lora_drop_export.check.calibration_text import calibration_windows, held_back_windows
from lora_drop_export.check.perplexity import engine_on_text
from lora_drop_export.check.verify import compare
from lora_drop_export.compiler import forms
from lora_drop_export.compiler.early import check_before_trace
from lora_drop_export.compiler.export import export, write_bundle
from lora_drop_export.compiler.forms import Form, best_form, fastest_form, forms_of, tokens_per_second, tried_forms
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from tests.support.bundles import Family, family, heads_of, make_bundle
from tests.support.tokenizers import character_tokenizer

AUTO = {"dtype": "int4", "block_size": "auto", "always_first": 1, "max_seq_len": 128}


@pytest.fixture
def few_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a bundle."""
    monkeypatch.setattr(forms, "BLOCK_SIZES", (32, 64))


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for models of 64 channels."""
    monkeypatch.setattr("lora_drop_export.check.calibration_text.WINDOWS", 4)
    monkeypatch.setattr("lora_drop_export.check.calibration_text.WINDOW", 64)


@pytest.mark.parametrize(
    ("options", "points", "heads"),
    [
        ({"dtype": "int4"}, (False, True), ("int4", "int8")),
        ({"dtype": "int4", "quantization": "gptq"}, (False, True), ("int4", "int8")),
        ({"dtype": "int4", "quantization": "rtn"}, (False,), ("int4", "int8")),  # has no zero points anyway
        ({"dtype": "int4", "symmetric": True}, (True,), ("int4", "int8")),
        ({"dtype": "int4", "head_dtype": "int8"}, (False, True), ("int8",)),
        ({"dtype": "int4", "head_dtype": "int4"}, (False, True), ("int4",)),
        ({"dtype": "int4", "targets": ("tensorrt-rtx",)}, (False,), ("int4",)),  # nor has it; it takes no int8
        ({"dtype": "int8"}, (False,), (None,)),
    ],
)
def test_the_forms_are_what_the_options_leave_open(
    options: dict[str, Any], points: tuple[bool, ...], heads: tuple[str | None, ...]
) -> None:
    given = ExportOptions(block_size="auto", **options)
    found = forms_of(given)
    assert set(found) == {Form(size, point, head) for size in (32, 64, 128) for point in points for head in heads}
    assert len(found) == 3 * len(points) * len(heads)
    for form in found:
        assert form.of(given).weights_format.block_size == form.block_size
        head = form.of(given).head_format
        assert (head and head.bits) == (8 if form.head_dtype == "int8" else None)


A, B, C = Form(32, False, None), Form(64, False, None), Form(128, False, None)


@pytest.mark.parametrize(
    ("losses", "chosen", "asked"),
    [
        ({A: 10.1, B: 10.2, C: 10.3}, C, [B, C]),
        ({A: 10.1, B: 10.2, C: 10.31}, B, [B, C]),
        ({A: 10.3, B: 10.31, C: 10.4}, A, [B, A]),  # C is coarser than B, and not rounded
        ({A: 10.5, B: 10.4, C: 10.6}, B, [B, A]),  # none is within 10.3: the least loss
    ],
)
def test_the_fastest_within_the_bound(losses: dict[Form, float], chosen: Form, asked: list[Form]) -> None:
    rates = {A: 1.0, B: 2.0, C: 3.0}
    found = tried_forms(rates, losses.__getitem__, 10.3)
    assert list(found.items()) == [(form, losses[form]) for form in asked]
    assert best_form(rates, found, 10.3) == chosen


def test_few_of_many_forms_are_rounded() -> None:
    """Whatever the speeds, and wherever the bound lies, where what is finer in each respect loses less: the form is
    that of looking at all, and at most every second one is rounded."""
    every = forms_of(ExportOptions(dtype="int4", block_size="auto"))
    assert len(every) == 12
    for seed in range(300):
        generator = np.random.default_rng(seed)
        rates = dict(zip(every, generator.permutation(12).tolist(), strict=True))
        of_block = dict(zip((32, 64, 128), generator.random(3).cumsum(), strict=True))
        of_points, of_head = generator.random(2)
        losses = {
            form: of_block[form.block_size] + of_points * form.symmetric + of_head * (form.head_dtype == "int4")
            for form in every
        }
        most = float(generator.uniform(0, 1.1 * max(losses.values())))
        found = tried_forms(rates, losses.__getitem__, most)
        assert best_form(rates, found, most) == best_form(rates, losses, most)
        assert len(found) <= 6


@functools.cache
def source() -> Family:
    """Few layers: there is a bundle for each form."""
    return heads_of(16, 2)


def search(root: Path, source: Family, **options: Any) -> Bundle:
    """As `export` does it after the trace."""
    given = ExportOptions(**AUTO, **options)
    root.mkdir()
    character_tokenizer(root)

    def write(place: Path, form: ExportOptions, stand_in: bool) -> Bundle:
        return write_bundle(place, source.checkpoint, source.traced, source.dtype, form, Console(), stand_in=stand_in)

    windows = held_back_windows(root, source.traced.vocab_size, 256, given.calibration)
    return fastest_form(root, source.checkpoint, windows, given, write, Console())


def form_of(bundle: Bundle) -> tuple[int, bool, bool]:
    how = bundle.manifest.quantization
    return how["block_size"], how["symmetric"], any(one.get("bits") == 8 for one in how.get("departures", ()))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, few_forms: None) -> Callable[[dict[Any, float], dict[Any, float]], None]:
    """Speeds and losses over float of forms; what is not named is slow and loses much."""

    def put(rates: dict[Any, float], losses: dict[Any, float]) -> None:
        monkeypatch.setattr(forms, "tokens_per_second", lambda bundle, *_: rates.get(form_of(bundle), 1.0))
        likeliest = lambda ids: np.zeros(np.atleast_2d(ids)[:, 1:].size, np.int64)  # noqa: E731
        monkeypatch.setattr(forms.Reference, "on_text", lambda _, ids, *__: (10.0, likeliest(ids)))
        lost = lambda bundle, *_: (10 * (1 + losses.get(form_of(bundle), 0.5)), None)  # noqa: E731
        monkeypatch.setattr(forms, "engine_on_text", lost)

    return put


@pytest.mark.parametrize("quantization", ["search", "gptq"])
def test_the_bundle_is_that_of_the_form(
    quantization: str, tmp_path: Path, made_up: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bytes of its weights and graphs, as if its options had been given; the manifest has the table."""
    rates = {(64, True, True): 9.0, (64, False, True): 8.0, (32, True, True): 7.0}
    made_up(rates, {(64, True, True): 0.04, (64, False, True): 0.03, (32, True, True): 0.01})
    options = {"quantization": quantization, "head_dtype": "int8"}
    bundle = search(tmp_path / "auto", source(), **options)
    said = capsys.readouterr().err
    assert form_of(bundle) == (64, False, True)
    assert Bundle.open(bundle.root).manifest == bundle.manifest
    made_from, given = source(), ExportOptions(**{**AUTO, "block_size": 64}, **options)
    (tmp_path / "b").mkdir()
    character_tokenizer(tmp_path / "b")
    plain = write_bundle(tmp_path / "b", made_from.checkpoint, made_from.traced, made_from.dtype, given, Console())
    assert plain.manifest.files == bundle.manifest.files
    for name in ("weights/model.safetensors", "refresh.onnx", "lora.onnx"):
        assert (bundle.root / name).read_bytes() == (plain.root / name).read_bytes(), name
    assert sorted(path.name for path in bundle.root.iterdir()) == sorted(path.name for path in plain.root.iterdir())
    record = bundle.manifest.quantization["forms"]
    assert (record["float"], record["bound"], record["chosen"], record["tokens"]) == (10, 0.03, 1, 8 * 64)
    measured = record["measured"]
    assert [row["tokens_per_second"] for row in measured] == [9, 8, 7, 1]
    assert [row["perplexity"] for row in measured] == [pytest.approx(10.4), pytest.approx(10.3), None, None]
    assert measured[1]["weight_bytes"] == sum(plain.manifest.model.layer_bytes) + plain.manifest.model.head_bytes
    assert said.count("gptq: calibrated on") == (2 if quantization == "gptq" else 0)
    assert "chosen" in said
    assert "not measured" in said


def test_where_none_is_within_the_bound_it_is_the_least_loss(
    tmp_path: Path, made_up: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up({(64, True, True): 9.0}, {(32, True, True): 0.2})
    bundle = search(tmp_path / "auto", source(), symmetric=True, head_dtype="int8")
    assert form_of(bundle) == (32, True, True)
    assert "no form costs less than 3 % of perplexity" in capsys.readouterr().err
    assert None not in [row["perplexity"] for row in bundle.manifest.quantization["forms"]["measured"]]


def test_forms_of_the_same_weights_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_up: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 channels have no block of 128."""
    monkeypatch.setattr(forms, "BLOCK_SIZES", (64, 128))
    made_up({(64, True, True): 2.0}, {(64, True, True): 0.01})
    bundle = search(tmp_path / "auto", source(), quantization="rtn", head_dtype="int8")
    assert form_of(bundle)[0] == 64
    measured = bundle.manifest.quantization["forms"]["measured"]
    assert [row["block_size"] for row in measured] == [64]
    assert "form 2 is that of blocks of 64" in capsys.readouterr().err
    text = "\n".join(_quantization(bundle.manifest))
    assert "--block-size auto: of 1 form the fastest within 3 % of perplexity; this one costs" in text


def test_what_is_measured(tmp_path: Path, few_forms: None) -> None:
    """Perplexity in float is transformers' own on the windows, the form's is that of the bundle; speeds are numbers."""
    source = family("llama_tied")
    bundle = search(tmp_path / "auto", source, symmetric=True, head_dtype="int8")
    assert compare(bundle).passed
    windows = held_back_windows(bundle.root, source.traced.vocab_size, 256, None)
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        wanted = float(source.model(ids, labels=ids).loss.exp())
    record = bundle.manifest.quantization["forms"]
    assert record["float"] == pytest.approx(wanted, rel=1e-4)
    row = record["measured"][record["chosen"]]
    assert row["perplexity"] == pytest.approx(
        engine_on_text(bundle, "ort", None, 1, windows, lambda *_: None)[0], rel=1e-3
    )
    assert all(row["tokens_per_second"] > 0 for row in record["measured"])
    assert (form_of(bundle)[1:], len(record["measured"])) == ((True, True), 2)


@pytest.mark.parametrize("max_seq_len", [3, 64, 96])
def test_steps_are_timed_that_a_short_sequence_has_room_for(max_seq_len: int, tmp_path: Path) -> None:
    bundle = make_bundle("llama", tmp_path / "b", max_seq_len=max_seq_len)
    assert tokens_per_second(bundle, "ort", None, 1, np.arange(max_seq_len)) > 0


def test_the_measured_windows_are_none_that_is_rounded_on(tmp_path: Path) -> None:
    character_tokenizer(tmp_path)
    used, _ = calibration_windows(tmp_path, 131, 256, None)
    held = held_back_windows(tmp_path, 131, 256, None)
    assert (used.shape, held.shape) == ((4, 64), (8, 64))
    assert not {row.tobytes() for row in used} & {row.tobytes() for row in held}


def test_a_text_without_a_window_to_spare_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_drop_export.check.calibration_text.WINDOWS", 32)
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijklmnop" * 128)
    with pytest.raises(InputError, match="too short") as error:
        search(tmp_path / "auto", source(), calibration=text)
    assert "has 32 windows of 64" in str(error.value)
    assert f"{33 * 64} tokens at least; {40 * 64} are used" in str(error.value)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the trace, which takes minutes for a large model."""
    traced = lambda *_, **__: pytest.fail("it was traced")  # noqa: E731
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", traced)
    with pytest.raises(InputError, match="has no tokenizer"):
        export(str(family("llama").directory), tmp_path / "auto", ExportOptions(**AUTO))
    assert not (tmp_path / "auto").exists()


def test_a_machine_without_the_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_forms: None
) -> None:
    def no_device(*_: Any) -> float:
        raise NoDeviceError("No GPU.", note="There is none.", hint="Get one.")

    monkeypatch.setattr(forms, "tokens_per_second", no_device)
    with pytest.raises(InputError, match="cannot be timed") as error:
        search(tmp_path / "auto", source(), symmetric=True, head_dtype="int8")
    assert "There is none." in str(error.value)


def test_without_the_gpu_it_is_refused_before_the_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_device(*_: Any) -> str:
        raise NoDeviceError("No GPU.", note="There is none.", hint="Get one.")

    monkeypatch.setattr("lora_drop_runtime.engines.trt.cuda_device.device_compute_capability", no_device)
    given = ExportOptions(**AUTO, targets=("tensorrt-rtx", "ort"))
    with pytest.raises(InputError, match="cannot be timed") as error:
        check_before_trace(family("llama").checkpoint, "bfloat16", given, tmp_path, Console())
    assert "There is none." in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32", "block_size": "auto"}, ("applies only to int4 and int8 weights", "auto")),
        ({"dtype": "int4", "block_size": "auto", "targets": ("none",)}, ("has nothing to measure", "none")),
        ({"dtype": "int4", "block_size": "fast"}, ("--block-size", "'fast'")),
        ({"dtype": "int8", "symmetric": True}, ("--symmetric applies only to int4 weights", "int8")),
        ({"symmetric": True}, ("--symmetric applies only to int4 weights", "not given")),
    ],
)
def test_refusals(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        ExportOptions(**options)
    for word in words:
        assert word in str(error.value)


def test_disk_for_all_forms_is_asked_for_before_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("lora_drop_export.compiler.early.check_disk", lambda root, count: needed.append(count))
    for size in (32, "auto"):
        given = ExportOptions(dtype="int4", block_size=size, max_seq_len=128)
        check_before_trace(family("llama").checkpoint, "float32", given, tmp_path, Console())
    assert needed[1] == 12 * needed[0]


def test_symmetric_weights(tmp_path: Path) -> None:
    """Every zero point is the middle; the other form has others."""
    for symmetric in (False, True):
        bundle = make_bundle("llama", tmp_path / str(symmetric), dtype="int4", symmetric=symmetric, targets=("none",))
        assert bundle.manifest.quantization["symmetric"] is symmetric


def test_from_the_command_to_the_manifest(tmp_path: Path, made_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole export, verified; what was measured and the perplexity stand side by side."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: source().traced)
    made_up({(32, True, True): 2.0}, {(32, True, True): 0.0})
    model = tmp_path / "model"
    source().model.save_pretrained(model)
    character_tokenizer(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").rename(model / "tokenizer.json")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    bundle = export(str(model), tmp_path / "out", ExportOptions(**AUTO, symmetric=True, head_dtype="int8"))
    assert form_of(bundle) == (32, True, True)
    assert {"perplexity", "forms"} <= set(bundle.manifest.quantization)
    assert np.isfinite(bundle.manifest.quantization["perplexity"]["int4"])
