"""Calibrated rounding of whole models: every family, what is left alone, the text."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError
from safetensors.numpy import save_file

from lora_drop_export.check.calibration_text import (
    CALIBRATION_TEXT,
    LEAST_KINDS,
    LEAST_TOKENS,
    WINDOW,
    WINDOWS,
    calibration_windows,
    read_calibration_text,
)
from lora_drop_export.check.gptq import round_model
from lora_drop_export.check.verify import compare
from lora_drop_export.checkpoint.checkpoint import TensorSource
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.compiler.early import check_before_trace
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.console import Console
from lora_drop_export.decoder.loaded import load_model
from lora_drop_export.quantize.choice import Quantization
from lora_drop_export.quantize.dequantized import dequantized_tensors
from lora_drop_export.quantize.formats import Blocked, BlockFormat, dequantize
from lora_drop_export.quantize.gptq import DAMPING, gptq_rows, triangle
from lora_drop_export.quantize.rounding import quantize_rows
from lora_drop_export.weights.rounded import RoundedTensor
from tests.support.bundles import family, first_layers, make_bundle, more_family
from tests.support.models import FAMILIES
from tests.support.tokenizers import character_tokenizer

OPTIONS = {"dtype": "int4", "quantization": "gptq"}
PLAN = {"always_first": 0, "always_last": 0}
LAYERS = 2  # of a family: one after the other is rounded, and what that costs is a layer's


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for models of 64 channels."""
    monkeypatch.setattr("lora_drop_export.check.calibration_text.WINDOWS", 4)
    monkeypatch.setattr("lora_drop_export.check.calibration_text.WINDOW", 64)


def weights(root: Path) -> dict[str, np.ndarray]:
    file = root / "weights" / "model.safetensors"
    return {name: place.read() for name, place in dequantized_tensors(file, read_tensors(file)).items()}


def linear_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Of every decoder layer, by their names."""
    return {
        f"{name}.weight": module.weight.detach().numpy()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-2:-1] != ["lm_head"]
    }


# Of which rounding meets what it does in none of the others
OTHERS = (
    *("stablelm_parallel", "exaone", "deepseek_v3", "modernbert_decoder"),
    *("gemma4", "gemma4_experts", "qwen2_moe", "granitemoe", "gpt_oss", "lfm2", "qwen3_5"),
)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_every_family(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is exported and verified, and no linear layer has the values that the search gives it."""
    source = first_layers(name, LAYERS) if name in FAMILIES else more_family(name)
    target = "openvino" if name == "gemma4_experts" else "ort"
    bundle = make_bundle(source, tmp_path / "b", targets=(target,), **PLAN, **OPTIONS)
    said = capsys.readouterr().err
    assert compare(bundle, target=target).passed
    assert bundle.manifest.quantization["method"] == "gptq"
    assert "gptq: calibrated on 256 tokens of random tokens" in said
    # A linear layer behind the last decoder layer; one before the first, and a table that each layer has a part of
    has_another = name in ("modernbert_decoder", "gemma4")
    assert ("rounded by search" in said) == has_another
    stored, quantization = weights(bundle.root), Quantization.of("int4")
    checked = 0
    for tensor, theirs in linear_weights(source.model).items():
        form = quantization.format_of(theirs.shape)
        if tensor in stored and form is not None and "per_layer_model_projection" not in tensor:
            searched = dequantize(*quantize_rows(theirs, form, "search"))
            assert (stored[tensor] != searched).mean() > 0.5, tensor
            checked += 1
    assert checked >= 2 * 3 or name == "exaone"  # whose tensors have names of their own
    assert not [path for path in bundle.root.iterdir() if path.name.startswith("rounded")]


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoe"])
def test_experts_are_calibrated(name: str, tmp_path: Path) -> None:
    """On the text that it was calibrated on, the model loses less than by the search."""
    source, errors = more_family(name), []
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 131, (4, 64)))
    for quantization in ("gptq", "search"):
        bundle = make_bundle(source, tmp_path / quantization, **PLAN, **OPTIONS | {"quantization": quantization})
        with torch.no_grad():
            logits = load_model(str(bundle.root)).model(ids).logits
            errors.append(float((logits - source.model(ids).logits).square().mean()))
    assert errors[0] < 0.7 * errors[1]  # 0.5 and 0.63


def test_experts_of_which_some_matrices_have_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GGUF file may hold them in two formats: what has integers is left alone, and the rest is calibrated."""
    source, ends = more_family("granitemoe"), (".gate_up_proj.rows", ".down_proj.rows")
    stored = []
    for native in (None, *ends):

        def has_native(ref: TensorSource, _: BlockFormat, native: str | None = native) -> bool:
            return native is not None and ref.name.endswith(native)

        monkeypatch.setattr("lora_drop_export.check.gptq.has_native", has_native)
        bundle = make_bundle(source, tmp_path / f"b{len(stored)}", **PLAN, **OPTIONS)
        stored.append({name: rows for name, rows in weights(bundle.root).items() if name.endswith(ends)})
    calibrated, without_up, without_down = stored
    for name, rows in calibrated.items():
        is_up = name.endswith(ends[0])
        assert np.array_equal(without_down[name], rows) == (is_up and ".0." in name), (
            name
        )  # what follows sees other inputs
        assert not np.array_equal(without_up[name], rows), name


def test_the_way_is_that_of_the_layers(tmp_path: Path) -> None:
    """A Llama's weights in the bundle are those of a plain loop: hooks on transformers' own models, layer by layer.

    Written apart: the whole model runs anew, its weights so far rounded, for each tensor that linear layers share; and
    what a layer is to give there is least squares' of what it gives in the model as it was.
    """
    source = first_layers("llama", LAYERS)
    bundle = make_bundle(source, tmp_path / "b", **PLAN, **OPTIONS)
    stored = weights(bundle.root)
    model, quantization = copy.deepcopy(source.model), Quantization.of("int4")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 131, (4, 64)))

    def put(weight: torch.nn.Parameter, blocks: Blocked) -> None:
        with torch.no_grad():
            weight.copy_(torch.from_numpy(dequantize(*blocks)))

    def inputs(of: torch.nn.Module, name: str) -> torch.Tensor:
        seen = []
        hook = of.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            of(ids)
        hook.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])

    def change(x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """[K, K] of the inputs that makes what they lack, by least squares."""
        eye = torch.eye(x.shape[1])
        root = (DAMPING * x.square().sum(0).mean()).sqrt()
        a, b = torch.cat([x, root * eye]), torch.cat([exact - x, 0 * eye])
        return torch.linalg.lstsq(a.double(), b.double()).solution.float()

    def wanted_weights(w: torch.Tensor, x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        half = len(x) // 2
        made, lacks = x[half:] @ change(x[:half], exact[:half]), exact[half:] - x[half:]
        holds = ((made * lacks).sum() / made.square().sum()).clamp(0, 1)
        shares.append(float(holds))
        return w + holds * (w @ change(x, exact).T)

    shares: list[float] = []
    names = {module: name for name, module in model.named_modules()}
    table = model.model.embed_tokens.weight
    put(table, quantize_rows(table.detach().numpy(), quantization.format_of(table.shape), "search"))
    stages = [
        [getattr(part, name) for name in names]
        for layer in model.model.layers
        for part, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj")),
            (layer.self_attn, ("o_proj",)),
            (layer.mlp, ("gate_proj", "up_proj")),
            (layer.mlp, ("down_proj",)),
        )
    ]
    for members in [*stages, [model.lm_head]]:
        x, exact = (inputs(of, names[members[0]]) for of in (model, source.model))
        parts = [module.weight.detach() for module in members]
        wanted = wanted_weights(torch.cat(parts), x, exact).split([len(part) for part in parts])
        for module, w in zip(members, wanted, strict=True):
            form, own = quantization.format_of(w.shape), stored[f"{names[module]}.weight"]
            theirs = dequantize(*gptq_rows(w.numpy().copy(), *triangle((x.T @ x).numpy()), form))
            assert np.isclose(own, theirs, rtol=1e-3, atol=1e-4).mean() > 0.97, names[module]
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(own))  # a tie that fell the other way changes all that follows
    assert len({*shares}) > 2


def test_each_layer_has_the_arguments_of_its_own_kind(tmp_path: Path) -> None:
    """A layer without a window behind one that has one, whose RoPE is another's: what reaches its output projection."""
    source, form = more_family("modernbert_decoder"), BlockFormat(4, 32, False)
    assert source.model.config.layer_types == ["sliding_attention", "full_attention"]
    module, name = source.model.model.layers[1].attn.Wo, "model.layers.1.attn.Wo.weight"
    refs = {name: source.checkpoint.tensors[name]}
    windows, seen = np.random.default_rng(0).integers(0, 131, (4, 64)), list[torch.Tensor]()
    found = round_model(source.checkpoint, refs, {name: form}, windows, tmp_path)
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        source.model(torch.from_numpy(windows))
    hook.remove()
    theirs = gptq_rows(module.weight.detach().numpy().copy(), *triangle((seen[0].T @ seen[0]).numpy()), form)
    assert (found[name].native_rows(0, 64)[0] == theirs[0]).mean() > 0.97


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    source = first_layers("qwen2", LAYERS)
    bundles = [make_bundle(source, tmp_path / name, targets=("none",), **PLAN, **OPTIONS) for name in "ab"]
    files = [bundle.root / "weights" / "model.safetensors" for bundle in bundles]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_embedding_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """Before a layer runs, which takes minutes."""
    source, name = family("llama"), "model.embed_tokens.weight"
    tensors = {n: place.read() for n, place in source.checkpoint.tensors.items()}
    tensors[name] = np.where(np.arange(64) == 5, np.float32(np.nan), tensors[name])
    model = shutil.copytree(source.directory, tmp_path / "m")
    save_file(tensors, model / "model.safetensors")
    checkpoint = open_checkpoint(str(model), tmp_path / "scratch")
    refs = {n: checkpoint.tensors[n] for n in source.traced.parameters}
    windows, rounded = np.arange(128).reshape(4, 32), tmp_path / "rounded"
    with pytest.raises(InputError, match=f"{name} has values that are infinite or not a number"):
        round_model(checkpoint, refs, {name: BlockFormat(4, 32, False)}, windows, rounded, pytest.fail)


def test_what_has_its_integers_already_is_left_alone(tmp_path: Path) -> None:
    """As the blocks of a GGUF file do."""
    source = family("llama")
    name, form = "model.layers.0.self_attn.q_proj.weight", BlockFormat(4, 32, True)
    refs = {n: source.checkpoint.tensors[n] for n in source.traced.parameters}
    native = {**refs, name: RoundedTensor(refs[name], form, (tmp_path, tmp_path, tmp_path))}
    formats = dict.fromkeys([name, "model.layers.0.self_attn.k_proj.weight"], BlockFormat(4, 32, False))
    windows = np.random.default_rng(0).integers(0, 131, (4, 64))
    assert [*round_model(source.checkpoint, native, formats, windows, tmp_path)] == [[*formats][1]]


def test_layers_that_all_have_their_integers_are_refused(tmp_path: Path) -> None:
    """Before the trace; one of them in float is enough to go on."""
    checkpoint, quantization = family("llama").checkpoint, Quantization.of("int4")
    tensors: dict[str, Any] = dict(checkpoint.tensors)
    for name, ref in checkpoint.tensors.items():
        form = quantization.format_of(ref.shape)
        if form is not None and "layers" in name:
            tensors[name] = RoundedTensor(ref, form, (tmp_path, tmp_path, tmp_path))
    options = ExportOptions(**OPTIONS)

    def check(tensors: dict[str, Any]) -> None:
        check_before_trace(dataclasses.replace(checkpoint, tensors=tensors), "float32", options, tmp_path, Console())

    with pytest.raises(InputError, match="nothing to round") as error:
        check(tensors)
    assert "have int4 blocks of" in str(error.value)
    one = "model.layers.3.mlp.up_proj.weight"
    check({**tensors, one: checkpoint.tensors[one]})


def test_inputs_that_are_no_numbers_leave_a_layer_to_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = first_layers("llama", LAYERS)
    model = copy.deepcopy(source.model)
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight[3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"), tmp_path / "scratch")
    made_from = dataclasses.replace(source, model=model, checkpoint=checkpoint)  # a trace has no weights
    make_bundle(made_from, tmp_path / "b", targets=("none",), **PLAN, **OPTIONS)
    said = capsys.readouterr().err
    for part in ("gate", "up", "down"):
        assert (
            f"rounded by search, the calibration has no inputs of it: model.layers.*.mlp.{part}_proj.weight (1)" in said
        )
    assert "q_proj" not in said


# ── the text ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_windows_are_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    character_tokenizer(tmp_path)
    text = tmp_path / "text"
    text.write_text("".join(chr(97 + i // 64 % 26) for i in range(64 * 20)) * 2)
    monkeypatch.setattr("lora_drop_export.check.calibration_text.LEAST_TOKENS", 1000)
    rows, what = calibration_windows(tmp_path, 131, 256, text)
    assert rows.shape == (4, 64)
    assert len({int(row[0]) for row in rows}) == 4
    assert str(text) in what
    assert calibration_windows(tmp_path, 131, 16, text)[0].shape == (4, 16)  # a shorter context


def test_the_bundled_text_has_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer that has a token for about five letters."""
    assert len(resources.files("lora_drop_export.check").joinpath(CALIBRATION_TEXT).read_text()) > 5 * WINDOWS * WINDOW
    character_tokenizer(tmp_path)
    rows, what = calibration_windows(tmp_path, 131, 256, None)
    assert rows.shape == (4, 64)
    assert what == "the bundled text"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text" * LEAST_TOKENS, encoding="utf-8-sig")
    assert read_calibration_text(tmp_path / "text") == "text" * LEAST_TOKENS


def test_refused_texts(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("too short")
    with pytest.raises(InputError, match="too short") as error:  # before there is a tokenizer
        ExportOptions(calibration=text, **OPTIONS)
    assert f"has 9 bytes; needed are {LEAST_TOKENS}" in str(error.value)
    text.write_text("🙂" * (LEAST_TOKENS - 1))
    with pytest.raises(InputError, match="no tokenizer"):
        calibration_windows(tmp_path, 131, 256, text)
    character_tokenizer(tmp_path)
    with pytest.raises(InputError, match="too short") as error:
        calibration_windows(tmp_path, 131, 256, text)
    assert f"tokens; needed are {LEAST_TOKENS}" in str(error.value)
    for said in (" \n", "one two "):
        text.write_text(said * LEAST_TOKENS)
        with pytest.raises(InputError, match="says too little") as error:
            calibration_windows(tmp_path, 131, 256, text)
        assert f"kinds; needed are {LEAST_KINDS}." in str(error.value)
    text.write_bytes(b"\xff\xfe")
    for options, words in (
        ({"calibration": text}, "applies only to --quantization gptq"),
        ({"calibration": text, "dtype": "int4", "quantization": "rtn"}, "applies only to --quantization gptq"),
        ({"calibration": text, **OPTIONS}, "cannot be read"),
        ({"calibration": tmp_path / "none", **OPTIONS}, "cannot be read"),
        ({"calibration": Path("/dev/zero"), **OPTIONS}, "cannot be read"),
        ({"calibration": tmp_path / "text.jsonl", **OPTIONS}, "A file of rows is no plain text"),
        ({"quantization": "gptq", "dtype": "float32"}, "--quantization applies only to int4 and int8 weights"),
        ({"quantization": "gptq"}, "--quantization applies only to int4 and int8 weights"),
    ):
        with pytest.raises(InputError, match=words):
            ExportOptions(**options)
