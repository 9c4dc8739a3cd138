"""What cannot be served is refused: exit code 2, fact, Note and Hint on standard error, nothing changed on disk."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lora_drop_tools.cli
import numpy as np
import pytest
import transformers
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError, LoraDropError, PlanError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_drop_export.cli
from lora_drop_export.checkpoint.open import open_checkpoint
from tests.support.bundles import family, make_bundle, save_adapters, traced_model
from tests.support.models import SIZES, build

Refused = Callable[..., str]
PARTS = re.compile(r"^error: .+\nNote: .+\nHint: .+\n\Z", re.MULTILINE)
LIMITS = {"max_seq_len": 32, "max_prompt_len": 8, "max_batch": 2}
CONTEXT = SIZES["max_position_embeddings"]


def snapshot(directory: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a directory; its own time may change, since a temporary sibling comes and goes."""
    entries = {}
    for path in directory.rglob("*"):
        stat = path.lstat()
        size = 0 if path.is_dir() else stat.st_size
        entries[str(path.relative_to(directory))] = stat.st_mode, size, stat.st_mtime_ns, stat.st_ino, stat.st_nlink
    return entries


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model`, a tiny Llama with a tokenizer, and `bundle`, made from it."""
    place = tmp_path_factory.mktemp("place")
    source = family("llama")
    model = place / "model"
    shutil.copytree(source.directory, model)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    checkpoint = open_checkpoint(str(model), place / "scratch")
    made_from = dataclasses.replace(source, directory=model, checkpoint=checkpoint)
    make_bundle(made_from, place / "bundle", rank=4, **LIMITS)
    return place


@pytest.fixture
def refused(place, tmp_path, capsys) -> Refused:
    """Runs a command that must be refused, and returns its message."""

    def run(main: Callable[[list[str]], int], *arguments: object, words: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        before = snapshot(place), snapshot(tmp_path)
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert code == 2, printed.err
        message = PARTS.search(printed.err)
        assert message, printed.err
        for word in words:
            assert word in message[0]
        assert (snapshot(place), snapshot(tmp_path)) == before
        return message[0]

    return run


@pytest.fixture
def export_refused(refused, place) -> Iterator[Refused]:
    """The same for `lora-drop-export` on the tiny Llama, unless another model is given."""

    def run(*arguments: object, model: object = None, words: tuple[str, ...] = ()) -> str:
        model = place / "model" if model is None else model
        return refused(lora_drop_export.cli.main, "--model", model, "--out", place / "out", *arguments, words=words)

    yield run
    shutil.rmtree(place / "out", ignore_errors=True)  # of an export that was not refused


@pytest.fixture
def untraced(monkeypatch):
    """For refusals that may not cost a trace."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("the model was traced before the refusal")

    monkeypatch.setattr("lora_drop_export.compiler.export.trace", fail)


@pytest.fixture
def traced(monkeypatch):
    """For refusals after the trace: the tiny Llama's, made once."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: family("llama").traced)


# ── lora-drop-export: options ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--drop-ratio -0.1", ("drop ratio", "-0.1", "between 0 and 1")),
        ("--drop-ratio 1.5", ("drop ratio", "1.5")),
        ("--drop-ratio nan", ("drop ratio", "nan")),
        ("--drop-ratio half", ("--drop-ratio", "half")),
        ("--drop-ratio 0.5 --drop-layers 4,6", ("given twice", "0.5", "4, 6")),
        ("--drop-ratio 0.5 --drop-list LIST", ("given twice", "0.5", "4, 6")),
        ("--drop-layers 4 --drop-list LIST", ("given twice", "--drop-layers", "--drop-list")),
        ("--drop-layers four,six", ("layer numbers", "four,six")),
        ("--drop-layers 4.5", ("layer numbers", "4.5")),
        ("--k -1", ("k", "-1")),
        ("--k three", ("--k", "three")),
        ("--surrogate linear", ("--surrogate", "linear", "residual")),
        ("--injection mlp", ("--injection", "mlp", "block")),
        ("--dtype fp8", ("dtype", "fp8")),
        ("--target metal", ("Unknown target", "metal", "ort")),
        ("--target ort --target none", ("targets", "ort, none")),
        ("--target ort --target ort", ("targets", "ort, ort")),
        ("--weights move", ("--weights", "move")),
        ("--max-batch 0", ("--max-batch", "0")),
        ("--max-seq-len 0", ("--max-seq-len", "0")),
        ("--max-prompt-len -4", ("--max-prompt-len", "-4")),
        ("--threads 0", ("--threads", "0")),
        ("--no-such-option", ("--no-such-option",)),
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
    [b"", b"4,6", b"{}", b'{"drop_layers": null}', b'{"drop_layers": 4}', b'[4, "6"]', b"[4.5]", b"[true]", b'"46"',
     b"7", b"\x89PNG\xff\x00"],
)  # fmt: skip
def test_drop_list_file_is_garbage(export_refused, tmp_path, content):
    (tmp_path / "list.json").write_bytes(content)
    export_refused("--drop-list", tmp_path / "list.json", words=("no drop list", "list.json"))


@pytest.mark.usefixtures("untraced")
def test_drop_list_file_is_missing(export_refused, tmp_path):
    export_refused("--drop-list", tmp_path / "none.json", words=("cannot be read", "none.json"))
    export_refused("--drop-list", tmp_path, words=("cannot be read", str(tmp_path)))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--drop-layers 4,8", ("Layer 8", "0 to 7")),
        ("--drop-layers=-1,4", ("Layer -1", "0 to 7")),
        ("--drop-layers 4,6,4", ("twice", "4, 4, 6")),
        ("--drop-layers 2,4", ("Layer 2", "first 3")),
        ("--drop-layers 4,7", ("Layer 7", "last 1")),
        ("--drop-layers 4 --always-first 5", ("Layer 4", "first 5")),
        ("--always-first -1", ("--always-first", "-1")),
        ("--rank -1", ("rank", "-1")),
        (f"--max-seq-len {CONTEXT + 1}", ("--max-seq-len", str(CONTEXT + 1), f"context is {CONTEXT}")),
        ("--max-seq-len 16 --max-prompt-len 16", ("--max-prompt-len", "16", "15")),
        ("--max-seq-len 4", ("too short to be verified", "--max-seq-len is 4")),
        ("--weights link --target none --dtype bf16", ("linked", "float32", "bfloat16")),
    ],
)
def test_options_that_do_not_fit_the_model(export_refused, arguments, words):
    export_refused(*arguments.split(), words=words)


def test_windowed_layer_in_the_drop_list(export_refused, monkeypatch):
    windowed = dataclasses.replace(family("llama").traced, windows=(5, 0, 5, 0, 5, 0, 5, 0))
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: windowed)
    export_refused("--drop-layers", "4,5", words=("Layer 4", "sliding window"))


@pytest.mark.usefixtures("traced")
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
    export(tmp_path / "notes" / "a.txt" / "out", words=("cannot be made",))


@pytest.mark.usefixtures("untraced")
def test_directories_above_out_vanish_again(refused, tmp_path):
    out = tmp_path / "a" / "b" / "out"
    refused(lora_drop_export.cli.main, "--model", tmp_path / "none", "--out", out, words=("no such model",))


# ── lora-drop-export: the model ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def model(place, tmp_path) -> Path:
    """A copy of the tiny Llama to be damaged."""
    shutil.copytree(place / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.usefixtures("untraced")
def test_model_is_not_there(export_refused, place, tmp_path):
    for missing in (tmp_path / "none", "./none/at/all", "no/such/model"):
        export_refused(model=missing, words=("no such model", str(missing)))
    export_refused(model=place / "model" / "config.json", words=("not a GGUF file", ".json"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, ("no config.json",)),
        ("config.json", b"{}", ("cannot read the model's config",)),
        ("config.json", b"not json", ("cannot read the model's config",)),
        ("config.json", b'{"model_type": "hyena-9"}', ("cannot read the model's config", "hyena-9")),
        ("model.safetensors", None, ("no weights", "safetensors")),
        ("model.safetensors", b"", ("not a whole safetensors file",)),
        ("model.safetensors", b"<!DOCTYPE html><html>", ("not a whole safetensors file",)),
        ("model.safetensors", (8).to_bytes(8, "little") + b"{broken}", ("not a whole safetensors file",)),
        ("model.safetensors", (9).to_bytes(8, "little") + b'{"a": {}}', ("not a whole safetensors file",)),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", ("no weights",)),
        ("model.safetensors.index.json", b"not json", ("index", "model.safetensors.index.json")),
        ("model.safetensors.index.json", b"{}", ("index", "model.safetensors.index.json")),
    ],
)  # fmt: skip
def test_model_directory_is_damaged(export_refused, model, file, content, words):
    (model / file).unlink(missing_ok=True)
    if content is not None:
        (model / file).write_bytes(content)
    export_refused(model=model, words=words)
    export_refused("--target", "none", model=model, words=words)


@pytest.mark.usefixtures("untraced")
def test_shard_is_missing(export_refused, tmp_path):
    family("llama").model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    export_refused(model=tmp_path / "model", words=("shard", shard.name))


@pytest.mark.usefixtures("untraced")
def test_weights_are_truncated(export_refused, model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        export_refused(model=model, words=("model.safetensors",))


@pytest.mark.usefixtures("traced")
def test_weights_do_not_fit_the_config(export_refused, model):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.5.mlp.up_proj.weight"
    for changed, words in (
        ({name: None}, ("Parameter", name, "missing")),
        ({name: tensors[name][:-1]}, ("Parameter", name, "(95, 64)")),
        ({name: tensors[name].astype(np.int32)}, ("not floating point", name, "I32", "F32, F16, BF16")),
        ({name: tensors[name].astype(np.int8)}, ("cannot be read", name, "I8", "BF16")),
    ):
        save_file({n: a for n, a in (tensors | changed).items() if a is not None}, model / "model.safetensors")
        export_refused(model=model, words=words)


@pytest.mark.usefixtures("traced")
def test_weights_do_not_fit_the_dtype(export_refused, model):
    """Infinite weights would be a silently broken model."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, model / "model.safetensors")
    words = ("too large for the dtype", "model.norm.weight", "float16")
    export_refused("--target", "none", "--dtype", "fp16", model=model, words=words)


# ── lora-drop-export: features that a step graph cannot hold ───────────────────────────────────────────────────

TINY = SIZES | {"num_hidden_layers": 4}
NAMED = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}


def _unsupported() -> dict[str, tuple[Any, str]]:
    """A config and the words that name what is in the way."""
    t = transformers
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    no_kv_heads = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    return {
        "mixtral": (t.MixtralConfig(**TINY, num_local_experts=4), "an MoE router"),
        "qwen2_moe": (t.Qwen2MoeConfig(**TINY, num_experts=4, moe_intermediate_size=16), "an MoE router"),
        "deepseek_v3": (t.DeepseekV3Config(**TINY, n_routed_experts=8), "an MoE router"),
        "t5": (t.T5Config(vocab_size=131, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16), "an encoder"),
        "bart": (t.BartConfig(vocab_size=131, d_model=64, encoder_layers=2, decoder_layers=2), "an encoder"),
        "bert": (t.BertConfig(**NAMED, num_attention_heads=4), "attention that is not causal"),
        "mamba": (t.MambaConfig(vocab_size=131, hidden_size=64, num_hidden_layers=4), "type linear_attention"),
        "qwen3_next": (t.Qwen3NextConfig(**TINY, num_experts=0), "type linear_attention"),
        "recurrent_gemma": (t.RecurrentGemmaConfig(**no_kv_heads), "type linear_attention"),
        "dynamic_rope": (t.LlamaConfig(**TINY, rope_parameters=dynamic), "RoPE frequencies that depend on"),
        "llava": (t.LlavaConfig(text_config=t.LlamaConfig(**TINY)), "a vision or audio tower"),
        "bloom": (t.BloomConfig(vocab_size=131, hidden_size=64, n_layer=4, n_head=4), "attention interface"),
        "falcon": (t.FalconConfig(vocab_size=131, hidden_size=64, num_hidden_layers=4, num_attention_heads=4),
                   "attention interface"),
    }  # fmt: skip


UNSUPPORTED = _unsupported()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_feature(export_refused, tmp_path, name):
    config, feature = UNSUPPORTED[name]
    config.save_pretrained(tmp_path / "model")
    save_file({"weight": np.zeros(4, np.float32)}, tmp_path / "model" / "model.safetensors")
    export_refused(model=tmp_path / "model", words=(feature, config.model_type))


@pytest.fixture(scope="module", params=["GPTNeoX", "Cohere"])
def parallel(request):
    """Models whose attention and MLP both read the layer's input; they differ in the order of the additions."""
    family = (getattr(transformers, f"{request.param}{kind}") for kind in ("ForCausalLM", "Config"))
    return traced_model(build(*family, 3))


@pytest.mark.parametrize("surrogate", ["residual", "recurrent", "anchor"])
@pytest.mark.parametrize("rank", [0, 4])
def test_parallel_residual_with_attn_mlp(export_refused, parallel, monkeypatch, surrogate, rank):
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: parallel.traced)
    options = ("--injection", "attn_mlp", "--surrogate", surrogate, "--rank", rank)
    export_refused(*options, model=parallel.directory, words=("halves run in parallel", "--injection block"))


# ── lora-drop-export: adapters ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def adapters(place, tmp_path) -> Path:
    """Adapters of rank 4 that fit the bundle's plan, to be damaged."""
    manifest = Bundle.open(place / "bundle").manifest
    return save_adapters(tmp_path / "adapters", manifest.plan, SIZES["hidden_size"], manifest.model.fingerprint)


def edit_config(adapters: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = adapters / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(adapters: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = adapters / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A4 = "base_model.model.model.layers.4.lora_A.weight"
B4 = "base_model.model.model.layers.4.lora_B.weight"


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rank 8", ("rank", "8", "4")),
        ("--drop-layers 3,5", ("another drop list", "layers 4,6", "layers 3,5")),
        ("--drop-ratio 1", ("another drop list", "layers 4,6", "layers 3,4,5,6")),
        ("--drop-ratio 0", ("another drop list", "layers 4,6")),
        ("--surrogate anchor", ("another surrogate", "residual", "anchor")),
        ("--injection attn_mlp", ("another injection", "block", "attn_mlp")),
    ],
)
def test_adapters_of_another_plan(export_refused, adapters, arguments, words):
    export_refused("--adapters", adapters, *arguments.split(), words=words)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["lora_drop"].update(base_fingerprint="beef" * 16), ("another base model", "beefbeefbeef")),
        (lambda c: c["lora_drop"].update(drop_layers=[4, 7]), ("Layer 7", "always kept")),
        (lambda c: c["lora_drop"].update(surrogate="sideways"), ("--surrogate", "sideways", "recurrent")),
        (lambda c: c.update(r=5), ("wrong shape", "(4, 64)", "(5, 64)")),
        (lambda c: c.update(r=0), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(r="four"), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.pop("r"), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(lora_drop=[]), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(peft_type="LOHA"), ("not a directory of LoRA-Drop adapters",)),
        (lambda c: c.update(use_rslora=True), ("use_rslora",)),
        (lambda c: c.update(use_dora=True), ("use_dora",)),
        (lambda c: c.update(alpha_pattern={"layers.4": 3}), ("alpha_pattern",)),
    ],
)
def test_adapter_config(export_refused, adapters, change, words):
    edit_config(adapters, change)
    export_refused("--adapters", adapters, words=words)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: (t.pop(A4), t.pop(B4)), ("do not cover", "layer 4 is missing", "layers 4,6")),
        (lambda t: t.pop(B4), ("do not cover", "lora_B of layer 4 is missing")),
        (lambda t: t.update({A4.replace("4", "5"): t[A4]}), ("do not cover", "layer 5 is there but not in the plan")),
        (lambda t: t.update({A4.replace("lora_A", "self_attn.lora_A"): t[A4]}), ("do not cover", "layer 4.attn")),
        (lambda t: t.update({A4: t[A4][:, :32].copy()}), ("wrong shape", "(4, 32)", "(4, 64)")),
        (lambda t: t.update({B4: t[B4][:, :2].copy()}), ("wrong shape", "(64, 2)", "(64, 4)")),
        (lambda t: t.update({A4: t[A4].T.copy()}), ("wrong shape", "(64, 4)")),
        (lambda t: t.update({A4: t[A4].astype(np.int32)}), ("no LoRA-Drop adapter", A4, "I32")),
        (lambda t: t.update({B4: t[B4].astype(np.float64)}), ("no LoRA-Drop adapter", B4, "F64")),
        (lambda t: t.update({"model.embed_tokens.weight": t[A4]}), ("no LoRA-Drop adapter", "embed_tokens")),
    ],
)
def test_adapter_tensors(export_refused, adapters, change, words):
    edit_tensors(adapters, change)
    export_refused("--adapters", adapters, words=words)


@pytest.mark.usefixtures("traced")
def test_not_an_adapter_directory(export_refused, adapters, place, tmp_path):
    for other in (tmp_path / "none", place / "model", place / "model" / "config.json"):
        export_refused("--adapters", other, words=("not a directory of LoRA-Drop adapters", str(other)))
    weights = adapters / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    export_refused("--adapters", adapters, words=("truncated", "adapter_model.safetensors"))
    weights.unlink()
    export_refused("--adapters", adapters, words=("no weights", "adapter_model.safetensors"))
    (adapters / "adapter_config.json").write_bytes(b"\xff\xfe{")
    export_refused("--adapters", adapters, words=("not a directory of LoRA-Drop adapters",))


def test_adapters_in_a_session(place, adapters, tmp_path):
    """The session refuses the same, and goes on with the adapters it has."""
    bundle = Bundle.open(place / "bundle")
    plan, fingerprint = bundle.manifest.plan, bundle.manifest.model.fingerprint
    wider = save_adapters(tmp_path / "rank", plan, SIZES["hidden_size"], fingerprint, rank=5)
    foreign = save_adapters(tmp_path / "base", plan, SIZES["hidden_size"], "beef" * 16)
    with Session.open(bundle.root) as session:
        session.load_adapters(adapters)
        before = session.generate([[5, 7]], 9)[0]
        for directory, error, words in (
            (wider, PlanError, "another rank"),
            (foreign, PlanError, "another base model"),
            (tmp_path, BundleError, "not a directory of LoRA-Drop adapters"),
        ):
            with pytest.raises(error, match=words):
                session.load_adapters(directory)
        assert np.array_equal(session.generate([[5, 7]], 9)[0], before)
    make_bundle("llama", tmp_path / "roomless")
    with Session.open(tmp_path / "roomless") as session, pytest.raises(InputError, match="no room for adapters"):
        session.load_adapters(adapters)


# ── lora-drop: requests ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "t1 " * 9], ("prompt is longer", "9 tokens", "allows 8")),
        (["--prompt", "t1 " * 8, "--max-new-tokens", "25"], ("8 + 25 tokens", "allows 32")),
        (["--prompt", "t1", "--prompt", "t1 " * 9], ("prompt is longer", "9 tokens", "allows 8")),
        (["--prompt", ""], ("empty",)),
        (["--prompt", "t1", "--prompt", " "], ("empty",)),
        ([], ("no prompt", "--prompt")),
        (["--prompt", "a", "--prompt", "b", "--prompt", "c"], ("batch", "3 rows", "allows 2")),
        (["--prompt", "t1", "--max-new-tokens", "0"], ("max_new_tokens is 0",)),
        (["--prompt", "t1", "--max-new-tokens", "many"], ("--max-new-tokens", "many")),
        (["--prompt", "t1", "--k", "-1"], ("k", "-1")),
        (["--prompt", "t1", "--policy", "backfil"], ("--policy", "backfil", "skip")),
        (["--prompt", "t1", "--threads", "0"], ("threads", "0")),
        (["--prompt", "t1", "--target", "metal"], ("metal", "ort")),
        (["--prompt", "t1", "--target", "tensorrt"], ("tensorrt", "ort")),
        (["--prompt", "t1", "--provider", "cuda"], ("provider", "cuda", "cpu")),
        (["--prompt", "t1", "--provider", "abacus"], ("provider", "abacus", "cpu")),
        (["--prompt", "t1", "--temperature", "-1"], ("temperature", "-1")),
        (["--prompt", "t1", "--temperature", "nan"], ("temperature", "nan")),
        (["--prompt", "t1", "--top-k", "-1"], ("top_k", "-1")),
        (["--prompt", "t1", "--top-p", "0"], ("top_p", "0.0")),
        (["--prompt", "t1", "--top-p", "1.5"], ("top_p", "1.5")),
        (["--prompt", "t1", "--repetition-penalty", "0"], ("repetition_penalty", "0.0")),
        (["--prompt", "t1", "--seed", "-7"], ("seed", "-7")),
        (["--prompt", "t1", "--stop", ""], ("stop string",)),
        (["--prompt", "t1", "--chat"], ("chat template",)),
        (["--prompt-file", "/no/such/file"], ("prompt file", "/no/such/file")),
    ],
)  # fmt: skip
def test_generate(refused, place, arguments, words):
    refused(lora_drop_tools.cli.main, "generate", place / "bundle", *arguments, words=words)


def test_prompt_file_is_not_text(refused, place, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"t1 \xff\xfe t2")
    arguments = ("--prompt-file", tmp_path / "prompt.bin")
    refused(lora_drop_tools.cli.main, "generate", place / "bundle", *arguments, words=("prompt.bin", "UTF-8"))


@pytest.mark.parametrize("command", ["chat", "compare", "inspect"])
def test_other_commands(refused, place, tmp_path, command):
    run = lora_drop_tools.cli.main
    refused(run, command, words=("BUNDLE",))
    refused(run, command, place / "bundle", "--no-such-option", words=("--no-such-option",))
    if command != "inspect":
        for option, value in (("--target", "metal"), ("--target", "tensorrt"), ("--provider", "cuda"), ("--k", "-1")):
            refused(run, command, place / "bundle", option, value, words=(value,))
    if command == "compare":
        refused(run, command, place / "bundle", "--json", tmp_path / "no" / "dir.json", words=("dir.json",))


def test_no_command(refused):
    refused(lora_drop_tools.cli.main, words=("COMMAND",))
    refused(lora_drop_tools.cli.main, "gnerate", words=("gnerate",))


def test_requests_through_python(place):
    """What the command line cannot ask for."""
    vocab_size = SIZES["vocab_size"]
    with Session.open(place / "bundle") as session:

        def refuse(words: str, call: Callable[[], object]) -> None:
            with pytest.raises(InputError, match=words) as caught:
                call()
            assert re.fullmatch(r".+\nNote: .+\nHint: .+", str(caught.value))

        refuse("no running request", lambda: session.step([1]))
        refuse("no running request", lambda: session.next_step)
        for wrong in (vocab_size, vocab_size + 1000, -1):
            refuse(f"outside the vocabulary[^$]*{wrong}", lambda w=wrong: session.generate([[5, w]], 2))
            refuse(f"outside the vocabulary[^$]*{wrong}", lambda w=wrong: session.prefill([[w, 5]]))
            refuse(f"outside the vocabulary[^$]*{wrong}", lambda w=wrong: list(session.stream([w], 2)))
        for empty in ([], [[]], [[5], []]):
            refuse("empty", lambda e=empty: session.generate(e, 2))
        refuse("empty", lambda: list(session.stream([], 2)))
        refuse("empty", lambda: session.prefill([[1, 2], [3, 4]], [2, 0]))
        refuse("lengths do not fit", lambda: session.prefill([[1, 2], [3, 4]], [2, 3]))
        refuse("lengths do not fit", lambda: session.prefill([[1, 2], [3, 4]], [2]))
        refuse("batch is larger", lambda: session.generate([[1], [2], [3]], 2))
        refuse("longer than the bundle allows", lambda: session.generate([[1] * 9], 2))
        refuse("longer than the bundle allows", lambda: session.prefill([[1] * 8], max_new_tokens=25))
        session.prefill([[1, 2], [3, 4]], max_new_tokens=3)
        for batch in ([1], [1, 2, 3], [[1, 2]]):
            refuse("another batch", lambda b=batch: session.step(b))
        refuse("outside the vocabulary", lambda: session.step([1, vocab_size]))
        for _ in range(2):
            session.step([1, 2])
        refuse("caches are full", lambda: session.step([1, 2]))
        assert session.generate([[1] * 8], 24)[0].shape == (24,)  # refusals leave the session usable


# ── lora-drop: bundles ─────────────────────────────────────────────────────────────────────────────────────────

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
    bundle_refused(place / "model", "no bundle here", MANIFEST_NAME)
    bundle_refused(bundle / MANIFEST_NAME, "no bundle here", "not a directory")


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_other_format_version(bundle_refused, bundle, version):
    edit_manifest(bundle, lambda data: data.update(format_version=version))
    bundle_refused(bundle, "another format version", f"version {version}", "version 2")


@pytest.mark.parametrize(
    "file", ["refresh.onnx", "ort/steps.onnx", "weights/model.safetensors", "weights/adapters.safetensors",
             "tokenizer/tokenizer.json"],
)  # fmt: skip
def test_file_is_missing_or_truncated(bundle_refused, bundle, file):
    whole = (bundle / file).read_bytes()
    (bundle / file).write_bytes(whole[:-1])
    bundle_refused(bundle, "wrong size", file, f"{len(whole) - 1} bytes", str(len(whole)))
    (bundle / file).write_bytes(whole + b"\0")
    bundle_refused(bundle, "wrong size", file)
    (bundle / file).unlink()
    bundle_refused(bundle, "missing", file, f"{len(whole)} bytes")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\x80\x81\x82", b'{"format_version": 2}'])
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
    edit_manifest(bundle, lambda data: data["plan"].update(drop_layers=[4, 9]))
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
