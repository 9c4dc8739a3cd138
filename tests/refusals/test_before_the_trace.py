"""What options, config.json and headers of files tell is refused before the model is traced or its weights written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime.plan.drop_plan import DropPlan

import lora_drop_export.cli
from lora_drop_export.compiler.early import windows_of_config
from lora_drop_export.decoder.context import context_length
from tests.support.bundles import family, more_family, save_adapters, traced_model
from tests.support.models import SIZES, build

QUANTIZED = Path(__file__).parents[1] / "export" / "checkpoint" / "quantized"


class Traced(BaseException):
    """The checks are passed: the trace would begin."""


@pytest.fixture
def stops_at_the_trace(monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise Traced

    monkeypatch.setattr("lora_drop_export.compiler.export.trace", stop)


@pytest.fixture
def passes(place, tmp_path):
    """Runs an export up to the trace, and returns what it printed."""

    def run(*arguments: object, model: object = None) -> None:
        given = ("--model", place / "model" if model is None else model, "--out", tmp_path / "passes", *arguments)
        with pytest.raises(Traced):
            lora_drop_export.cli.main([str(argument) for argument in given])

    return run


def changed_model(place: Path, to: Path, **config: Any) -> Path:
    """A copy of the tiny Llama with another config."""
    shutil.copytree(place / "model", to)
    written = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(written | config))
    return to


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("arguments", ["", "--dtype int4", "--kv-dtype int8", "--target tensorrt-rtx --target ort"])
def test_an_old_onnx_runtime(export_refused, monkeypatch, arguments):
    """What lowers the graphs in float32 runs them too, in the verification."""
    monkeypatch.setattr("onnxruntime.__version__", "1.31.2")
    export_refused(*arguments.split(), words=("too old for graphs in float32", "1.31.2; 1.32 or newer", "[cpu]"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rms_norm_eps": 1e300}, ("rms_norm_eps is 1e+300", "that float32 holds")),
        ({"rms_norm_eps": -1e-5}, ("rms_norm_eps is -1e-05", "0 at least")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, ("rope_theta is 0.0", "above 0")),
        ({"routed_scaling_factor": -2.5}, ("routed_scaling_factor is -2.5", "above 0")),
        ({"max_position_embeddings": 2**63}, ("max_position_embeddings is 9223372036854775808", "below 2^63")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_numbers_out_of_range(export_refused, place, tmp_path, config, words):
    export_refused(model=changed_model(place, tmp_path / "model", **config), words=words)


def test_a_number_that_json_makes_infinite(export_refused, place, tmp_path):
    model = changed_model(place, tmp_path / "model", rms_norm_eps=7e77)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("7e+77", "1e999"))
    export_refused(model=model, words=("rms_norm_eps is inf", "that float32 holds"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "granite", "attention_multiplier": 0.0}, ("scales scores by 0",)),
        ({"model_type": "granite", "attention_multiplier": 1e-300}, ("scales scores by 1e-300",)),
        ({"model_type": "mistral", "sliding_window": -1}, ("sliding_window is -1", "0 at least")),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}},
            ("frequencies that are not numbers, or infinite", "rope_parameters"),
        ),
    ],
    ids=["scale", "small scale", "window", "frequencies"],
)
def test_numbers_that_the_model_makes_nothing_of(export_refused, place, tmp_path, monkeypatch, config, words):
    """Seen where it is run on shapes."""
    monkeypatch.setattr("lora_drop_export.decoder.trace._export", lambda *_: pytest.fail("traced"))
    export_refused(model=changed_model(place, tmp_path / "model", **config), words=words)


@pytest.mark.usefixtures("stops_at_the_trace")
def test_caches_in_8_bits_of_layers_that_differ(passes):
    """Whose config transformers gives the size of a head of a layer's own alone."""
    passes("--kv-dtype", "int8", model=more_family("gemma4").directory)


@pytest.mark.usefixtures("stops_at_the_trace")
def test_caches_in_8_bits_of_latent_attention(export_refused, passes, monkeypatch, tmp_path):
    """They hold the wider of keys and values, of which the config's `head_dim` is a part alone."""
    monkeypatch.setattr("lora_drop_export.targets.trt.target.check_buildable", lambda *_: None)
    options = ("--target", "tensorrt", "--kv-dtype", "int8")
    export_refused(*options, model=more_family("deepseek_v3").directory, words=("A head has 24 values", "of 16"))
    model = shutil.copytree(more_family("deepseek_v3").directory, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"v_head_dim": 32}))
    passes(*options, model=model)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--k 33", ("Too many LoRA steps follow each other", "They are 33", "k of 32 or less")),
        ("--target openvino --dtype bf16", ("are computed in float32", "would be bfloat16", "--dtype fp32")),
        ("--target ort --target tensorrt-rtx", ("Target tensorrt-rtx does not run", "--target ort or openvino")),
        ("--target none --dtype bf16", ("are computed in float32", "would be bfloat16", "--dtype fp32")),
        ("--kv-dtype int8", ("has no caches of 8 bits", "--kv-dtype is int8")),
        ("--drop-layers 0 --always-first 0", ("Layer 0 is named", "a short convolution or a recurrent state")),
    ],
)
def test_recurrent_states(export_refused, arguments, words):
    export_refused(*arguments.split(), model=more_family("qwen3_5").directory, words=words)


@pytest.mark.usefixtures("stops_at_the_trace")
@pytest.mark.parametrize("arguments", ["--dtype fp16", "--dtype bf16", "--target none"])
def test_an_old_onnx_runtime_is_good_for_a_gpu(passes, monkeypatch, arguments):
    monkeypatch.setattr("onnxruntime.__version__", "1.31.2")
    passes(*arguments.split())


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--adapters nope", ("not a directory of LoRA-Drop adapters", "nope")),
        ("--drop-list nope", ("drop list cannot be read", "nope")),
        ("--rank 65", ("--rank is too large", "It is 65; the largest possible is 64, the model's hidden size")),
        ("--rank 4 --drop-ratio 0", ("--rank leaves room", "no layer is dropped")),
        ("--always-first 99", ("No layer of the model may be dropped", "Of 8 the first 99 and the last 1")),
        ("--always-first 4 --always-last 4", ("No layer of the model may be dropped", "first 4", "last 4")),
        ("--always-last 8 --drop-ratio 0", ("No layer of the model may be dropped", "last 8")),
        ("--drop-layers 3 --always-first 4", ("always kept", "Layer 3")),
        ("--drop-layers 3,70000", ("does not have", "Layer 70000")),
        ("--drop-layers 3,999", ("does not have", "Layer 999", "0 to 7")),
        ("--max-seq-len 300", ("--max-seq-len is too large", "300", "context is 256")),
        ("--max-prompt-len 256", ("--max-prompt-len is too large", "256")),
        ("--weights link --target none --dtype bf16", ("cannot be linked", "float32", "bf16")),
        ("--weights link --dtype int4", ("cannot be linked", "in float", "int4")),
        ("--target tensorrt", ("library of the target is not installed", "'lora-drop-export[tensorrt]'")),
        ("--dtype int8 --target tensorrt-rtx", ("cannot take int8 weights", "tensorrt-rtx")),
        ("--kv-dtype int8 --dtype bf16 --target openvino", ("int8 caches work only with", "openvino cannot")),
    ],
)
def test_refused_by_the_config_or_the_options(export_refused, arguments, words):
    export_refused(*arguments.split(), words=words)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dtype bf16 --target openvino", ("weights of a quantized checkpoint stay", "--dtype is bf16")),
        ("--dtype bf16 --target tensorrt-rtx", ("weights of a quantized checkpoint stay", "--activation-dtype")),
        ("--target openvino --activation-dtype bf16", ("cannot compute in bf16", "openvino was asked for")),
        ("--dtype int4 --quantization gptq", ("nothing to round by a text", "int4 blocks of 32 already")),
        ("--quantization rtn", ("applies only to int4 and int8 weights", "--dtype is not given")),
        ("--block-size 64", ("applies only to int4 and int8 weights", "--dtype is not given")),
        ("--weights link", ("cannot be linked", "the bundle needs int4")),
    ],
)
def test_quantized_checkpoint(export_refused, arguments, words):
    """Its integers are stored as they are, by targets that take them."""
    plan = ("--always-first", "0", "--always-last", "0")
    export_refused(*arguments.split(), *plan, model=QUANTIZED / "gptq-group-32", words=words)


@pytest.mark.usefixtures("untraced")
def test_quantized_checkpoint_in_bin_files(export_refused, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(QUANTIZED / "gptq-group-32" / "config.json", model / "config.json")
    (model / "pytorch_model.bin").write_bytes(b"")
    export_refused(model=model, words=("quantized, and not in safetensors files", "quantization_config"))


@pytest.mark.usefixtures("untraced")
def test_quantized_checkpoint_of_scattered_inputs(export_refused):
    export_refused(model=QUANTIZED / "gptq-act-order", words=("in a form that is not read", "desc_act"))


@pytest.mark.usefixtures("untraced")
def test_adapters_that_do_not_fit(export_refused, place, tmp_path):
    """Of more layers, another width, another rank: the headers tell."""
    from lora_drop_runtime.bundle.bundle import Bundle

    manifest = Bundle.open(place / "bundle").manifest
    wide = save_adapters(tmp_path / "wide", manifest.plan, 96, manifest.model.fingerprint)
    export_refused("--adapters", wide, words=("wrong shape", "(4, 96)", "(4, 64)"))
    deep = DropPlan(12, ("11",), rank=4, always_last=0)
    deep = save_adapters(tmp_path / "deep", deep, 64, manifest.model.fingerprint)
    export_refused("--adapters", deep, words=("does not have", "Layer 11", "0 to 7"))
    ranked = save_adapters(tmp_path / "rank", manifest.plan, 64, manifest.model.fingerprint)
    export_refused("--adapters", ranked, "--rank", 5, words=("another rank", "--rank is 5", "has rank 4"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_disk_that_is_too_small_by_the_headers(export_refused, place, monkeypatch, dtype):
    """Less than the headers' bytes: what a weight takes was written down here."""
    values = sum(p.numel() for p in family("llama").model.parameters())
    least = {"fp32": 4.0, "int8": 1.0, "int4": 0.5}[dtype] * values  # scales, zero points and 64 MiB come on top
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=int(least + (64 << 20)) - 1))
    export_refused("--dtype", dtype, words=("too little free disk space",))


@pytest.mark.usefixtures("stops_at_the_trace")
def test_enough_disk_passes(passes, monkeypatch):
    size = sum(p.numel() for p in family("llama").model.parameters()) * 4
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size + (65 << 20)))
    passes("--dtype", "fp32")
    passes("--dtype", "int4")


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("code", "words"), [(errno.EXDEV, "another file system"), (errno.EPERM, "yours or writable to you")]
)
def test_weights_that_the_system_does_not_link(export_refused, tmp_path, place, monkeypatch, code, words):
    """Those of another user's read-only model, too, as models that many share are."""

    def fail(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code), source, None, target)

    access = os.access
    monkeypatch.setattr("os.link", fail)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).suffix != ".safetensors" and access(path, mode))
    export_refused("--weights", "link", "--target", "none", words=("cannot be linked", words, "--weights copy"))


@pytest.mark.usefixtures("untraced")
def test_windowed_layers_that_the_config_tells(export_refused, place, tmp_path):
    config = {"layer_types": ["full_attention", "sliding_attention"] * 4, "sliding_window": 5}
    model = changed_model(place, tmp_path / "qwen", model_type="qwen2", **config, use_sliding_window=True)
    export_refused("--drop-layers", "4,5", model=model, words=("Layer 5", "sliding window"))


@pytest.mark.usefixtures("untraced")
def test_texts_longer_than_longropes_short_factors(export_refused, place, tmp_path):
    """Behind them its frequencies are others for all positions."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope["original_max_position_embeddings"] = 64
    model = changed_model(place, tmp_path / "model", rope_parameters=rope)
    words = ("--max-seq-len is too large", "It is 65, the model's context is 64 (up to which LongRoPE")
    export_refused("--max-seq-len", "65", model=model, words=words)


def test_a_window_as_wide_as_the_context_is_none():
    """As in Phi-3.5 and Phi-4-mini: their layers can be dropped under `skip`."""
    source = more_family("phi3_longrope")
    assert source.checkpoint.config.sliding_window == context_length(source.checkpoint.config) == 128
    assert windows_of_config(source.checkpoint.config) == source.traced.windows == (0, 0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "mistral", "phi3"])
def test_windows_of_a_config_are_those_of_the_trace(name):
    source = family(name)
    assert windows_of_config(source.checkpoint.config) == source.traced.windows


class Seen(Exception):
    """The windows of a dry run."""


def test_one_window_for_all_layers(monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    def seen(wrapper, layers, calls, *_):
        raise Seen(calls.windows)

    monkeypatch.setattr("lora_drop_export.decoder.trace._graph", seen)
    model = build(MistralForCausalLM, MistralConfig, seed=3, sliding_window=7, num_hidden_layers=2)
    with pytest.raises(Seen) as found:
        traced_model(model)
    assert windows_of_config(model.config) == tuple(found.value.args[0].values()) == (7, 7)


def test_windows_of_strange_configs():
    """A config that does not say its layers is left to the trace."""
    assert windows_of_config(SimpleNamespace()) is None
    assert windows_of_config(SimpleNamespace(num_hidden_layers="8")) is None
    assert windows_of_config(SimpleNamespace(num_hidden_layers=2, sliding_window="wide")) == (0, 0)
    assert windows_of_config(SimpleNamespace(num_hidden_layers=2, sliding_window=4)) == (0, 0)  # code of its own
    strange = SimpleNamespace(num_hidden_layers=2, sliding_window=4, layer_types=["sliding_attention"])
    assert windows_of_config(strange) == (0, 0)


@pytest.mark.usefixtures("stops_at_the_trace")
@pytest.mark.parametrize("arguments", [("--drop-ratio", "0"), ("--drop-ratio", "0.1")])
def test_a_plan_that_drops_nothing_is_said(passes, capsys, arguments):
    passes(*arguments)
    assert "warning: no layer is dropped: of 8 the first 3 and the last 1 are always kept." in capsys.readouterr().err


@pytest.mark.usefixtures("stops_at_the_trace")
def test_a_model_of_windows_alone_says_why_nothing_is_dropped(passes, place, tmp_path, capsys):
    passes(model=changed_model(place, tmp_path / "model", model_type="mistral", sliding_window=9))
    assert "8 have a sliding window, a short convolution or a recurrent state" in capsys.readouterr().err


@pytest.mark.usefixtures("stops_at_the_trace")
def test_layers_that_others_need_are_among_why_nothing_is_dropped(passes, place, tmp_path, capsys):
    types = ["sliding_attention", "full_attention"] * 4
    model = changed_model(place, tmp_path / "model", layer_types=types, num_kv_shared_layers=2, sliding_window=9)
    passes("--always-last", "2", "--drop-ratio", "0.1", model=model)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "always kept, 4 have a sliding window, a short convolution or a recurrent state, other layers take the K and V "
        "of 2. Every step" in said
    )


@pytest.mark.usefixtures("stops_at_the_trace")
def test_layers_that_are_always_kept_come_with_the_files(passes, place, tmp_path, capsys, monkeypatch):
    """Of adapters and of drop lists: taken where nothing is asked for, else the difference is named."""
    from lora_drop_runtime.bundle.bundle import Bundle

    from lora_drop_export.compiler import early

    plans = []
    monkeypatch.setattr(early, "_warn_of_plan", lambda plan, console: plans.append(plan))
    listed = tmp_path / "list.json"
    listed.write_text('{"drop_layers": [1, 4], "always_first": 1, "always_last": 2}')
    passes("--drop-list", listed)
    assert (plans[-1].always_first, plans[-1].always_last) == (1, 2)
    assert "warning" not in capsys.readouterr().err
    passes("--drop-list", listed, "--always-first", 0)
    assert (plans[-1].always_first, plans[-1].always_last) == (0, 2)
    assert f"warning: --always-first is 0; {listed} was made with 1" in capsys.readouterr().err
    passes("--drop-list", listed, "--always-first", 1)
    assert "warning" not in capsys.readouterr().err

    manifest = Bundle.open(place / "bundle").manifest
    plan = DropPlan(8, ("1",), rank=4, always_first=1)
    adapters = save_adapters(tmp_path / "adapters", plan, SIZES["hidden_size"], manifest.model.fingerprint)
    config = json.loads((adapters / "adapter_config.json").read_text())
    config["lora_drop"] |= {"always_first": 0, "always_last": 3}
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    passes("--adapters", adapters)
    assert (plans[-1].always_first, plans[-1].always_last) == (0, 3)
    passes("--adapters", adapters, "--always-last", 1)
    assert (plans[-1].always_first, plans[-1].always_last) == (0, 1)
    assert f"warning: --always-last is 1; {adapters} was made with 3" in capsys.readouterr().err
