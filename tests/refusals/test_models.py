"""Refused by `lora-drop-export`: models that are damaged, or have features that a step graph cannot hold."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from huggingface_hub.errors import GatedRepoError
from lora_drop_runtime.plan.surrogate import SURROGATES
from safetensors.numpy import load_file, save_file

from tests.support.bundles import family, more_family, traced_model
from tests.support.models import SIZES, build

NO_NAMES = ["~nobody-has-this-name/model", "n" * 300, "n" * 5000, "a/" + "n" * 300, "a\0b"]

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
def test_what_is_no_model_is_not_looked_up_on_the_hub(export_refused, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("it was looked up"))
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.gguf")
    os.mkfifo("pipe")
    Path("link").symlink_to("nothing")
    export_refused(model="pipe.gguf", words=("no such model", "a device, a pipe or a socket"))
    export_refused(model="pipe", words=("a device, a pipe or a socket",))
    export_refused(model="link", words=("link is a link to nothing",))
    export_refused(model="missing.GGUF", words=("missing.GGUF is not there",))


@pytest.mark.usefixtures("untraced")
def test_a_gated_model_is_not_said_to_be_missing(export_refused, monkeypatch):
    def gated(*_, **__):
        answer = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError("Access to model a/b is restricted.", response=answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    said = export_refused(model="a/b", words=("'a/b': Access to model a/b is restricted.", "hf auth login"))
    assert "no such model" not in said


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("length", [8, 24, 2000, -100])
def test_a_gguf_file_that_ends_early(export_refused, tmp_path, length):
    writer = gguf.GGUFWriter(tmp_path / "whole", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "SHORT.GGUF"
    file.write_bytes((tmp_path / "whole").read_bytes()[:length])
    export_refused(model=file, words=("GGUF file cannot be read", "ends before what its header promises"))


@pytest.mark.usefixtures("untraced")
def test_a_gguf_file_whose_list_goes_on_behind_its_end(export_refused, tmp_path):
    """Of 2^40 elements, say, whose places would fill the memory; this is one of a million."""
    file = tmp_path / "long.gguf"
    key = struct.pack("<Q4sI", 4, b"long", gguf.GGUFValueType.ARRAY)
    length = struct.pack("<IQ", gguf.GGUFValueType.UINT8, 10**6)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + length + bytes(100))
    export_refused(model=file, words=("GGUF file cannot be read", "ends before what its header promises"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_no_file_has(export_refused, name):
    """Too long for a file system, of nobody's home, not UTF-8: of the model and of a drop list."""
    export_refused(model=name)
    export_refused("--drop-list", name)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_no_adapters_have(export_refused, name):
    export_refused("--adapters", name)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_directories_in_the_place_of_files(export_refused, model, file):
    (model / file).unlink()
    (model / file).mkdir()
    export_refused(model=model, words=("is no file", file))


@pytest.mark.usefixtures("untraced")
def test_devices_are_no_files(export_refused, model):
    """Reading them may never end."""
    export_refused("--drop-list", "/dev/zero", words=("drop list cannot be read", "/dev/zero"))
    for file in ("config.json", "model.safetensors"):
        content = (model / file).read_bytes()
        (model / file).unlink()
        (model / file).symlink_to("/dev/zero")
        export_refused(model=model)
        (model / file).unlink()
        (model / file).write_bytes(content)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".", "", "n" * 300])
def test_index_that_leads_elsewhere(export_refused, model, name):
    """Shards lie beside their index."""
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors").rename(model / "model-00001.safetensors")  # a whole file is read without an index
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    export_refused(model=model, words=("model.safetensors.index.json", name[:50]))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_attention_heads": 0}, ("cannot read the model's config", "ZeroDivisionError")),
        ({"hidden_size": -64}, ("hidden_size is -64",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers is 1000000000", "tensors")),
        ({"hidden_act": "no_such_function"}, ("cannot build this model", "no_such_function")),
        ({"hidden_size": 10**12}, ("error",)),
        ({"vocab_size": None}, ("vocab_size",)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, ("error",)),
        ({"max_position_embeddings": "many"}, ("max_position_embeddings", "many")),
        ({"eos_token_id": "</s>"}, ("eos_token_id", "</s>")),
    ],
)  # fmt: skip
def test_config_of_other_values(export_refused, model, monkeypatch, changed, words):
    """What the model's class cannot be made of is said before the model is traced."""
    monkeypatch.setattr("lora_drop_export.decoder.trace._export", lambda *_: pytest.fail("it was traced"))
    (model / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changed))
    export_refused(model=model, words=words)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, ("no config.json",)),
        ("config.json", b"{}", ("cannot read the model's config",)),
        ("config.json", b"not json", ("config.json is damaged",)),
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
    if file == "model.safetensors.index.json":
        (model / "model.safetensors").rename(model / "model-00001.safetensors")  # a whole file is read without it
    if content is not None:
        (model / file).write_bytes(content)
    export_refused(model=model, words=words)
    export_refused("--target", "none", model=model, words=words)


@pytest.mark.usefixtures("untraced")
def test_directory_of_a_gguf_file(export_refused, tmp_path):
    """As a download from the hub leaves it: the file is named."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.Q4_1.gguf").write_bytes(b"GGUF")
    export_refused(model=tmp_path / "model", words=("no config.json", str(tmp_path / "model" / "tiny.Q4_1.gguf")))


@pytest.mark.usefixtures("untraced")
def test_shard_is_missing(export_refused, tmp_path):
    family("llama").model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    export_refused(model=tmp_path / "model", words=("shard", shard.name))
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    export_refused(model=tmp_path / "model", words=("shard", "is one of 6 files", shard.name, "Download the rest"))


@pytest.mark.usefixtures("untraced")
def test_weights_are_truncated(export_refused, model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        export_refused(model=model, words=("model.safetensors",))


@pytest.mark.usefixtures("untraced")
def test_a_calibration_text_that_says_too_little(export_refused, model, tmp_path):
    text = tmp_path / "text.txt"
    for said, words in (("t1 " * 2000, ("too short", "2000 tokens")), ("t1 t2 " * 2000, ("too little", "2 kinds"))):
        text.write_text(said)
        options = ("--dtype", "int8", "--quantization", "gptq", "--calibration", text)
        export_refused(*options, model=model, words=words)


@pytest.mark.usefixtures("traced")
def test_weights_do_not_fit_the_config(export_refused, model):
    tensors = load_file(model / "model.safetensors")
    name, fused = (f"model.layers.5.mlp.{part}.weight" for part in ("up_proj", "gate_up_proj"))
    for changed, words in (
        ({name: None}, ("Parameter", name, "missing", "Check that the config is")),
        ({name: None, fused: tensors[name]}, ("Parameter", name, fused, "which the model has not", "Convert fused")),
        ({name: tensors[name][:-1]}, ("Parameter", name, "(95, 64)", "Check that the config is")),
        ({name: tensors[name].astype(np.int32)}, ("not taken", name, "int32", "float32, float16, bfloat16")),
        ({name: tensors[name].astype(np.float64)}, ("not taken", name, "float64", "Convert it")),
        ({name: tensors[name].astype(np.int8)}, ("not taken", name, "I8", "use the unquantized checkpoint")),
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
FALCON = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
NAMED = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}


def _unsupported() -> dict[str, tuple[Any, str]]:
    """A config and the words that name what is in the way."""
    t = transformers
    no_kv_heads = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    return {
        "gpt_oss": (t.GptOssConfig(**TINY, num_local_experts=4, swiglu_limit=-1.0), "experts with a gate of their own"),
        "gemma4": (t.Gemma4TextConfig(**TINY, head_dim=16, enable_moe_block=True, num_experts=4, top_k_experts=2,
                                      moe_intermediate_size=16, hidden_activation="relu"),
                   "experts with another activation than SiLU and GELU"),
        "t5": (t.T5Config(vocab_size=131, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16), "an encoder"),
        "bart": (t.BartConfig(vocab_size=131, d_model=64, encoder_layers=2, decoder_layers=2), "an encoder"),
        "bart_decoder": (t.BartConfig(vocab_size=131, d_model=64, decoder_layers=2, num_hidden_layers=2,
                                      is_encoder_decoder=False, is_decoder=True), "cross attention"),
        "bert": (t.BertConfig(**NAMED, num_attention_heads=4), "attention that is not causal"),
        "mamba": (t.MambaConfig(vocab_size=131, hidden_size=64, num_hidden_layers=4), "type linear_attention"),
        "minimax": (t.MiniMaxConfig(**TINY), "type linear_attention"),
        "recurrent_gemma": (t.RecurrentGemmaConfig(**no_kv_heads), "type linear_attention"),
        "aya_vision": (t.AyaVisionConfig(text_config=t.Cohere2Config(**TINY)), "a vision or audio tower"),
        "bloom": (t.BloomConfig(vocab_size=131, hidden_size=64, n_layer=4, n_head=4), "ALiBi"),
        "mpt": (t.MptConfig(vocab_size=131, d_model=64, n_layers=4, n_heads=4), "ALiBi"),
        "mpt_without_alibi": (t.MptConfig(vocab_size=131, d_model=64, n_layers=4, n_heads=4,
                                          attn_config={"alibi": False}), "attention in code of its own"),
        "falcon_alibi": (t.FalconConfig(**FALCON, alibi=True), "ALiBi"),
        "llama4": (t.Llama4TextConfig(**TINY, moe_layers=[]), "type chunked_attention"),
        "gemma3n": (t.Gemma3nTextConfig(**TINY | {"intermediate_size": [96] * 4}, num_kv_shared_layers=0,
                                        activation_sparsity_pattern=[0.0] * 4), "several residual streams"),
        "doge": (t.DogeConfig(**TINY), "an attention mask of its own"),
        "doge_moe": (t.DogeConfig(**TINY, is_moe=True, num_experts=4, num_experts_per_tok=2), "an MoE router"),
    }  # fmt: skip


UNSUPPORTED = _unsupported()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_feature(export_refused, tmp_path, name):
    config, feature = UNSUPPORTED[name]
    config.save_pretrained(tmp_path / "model")
    tensors = {f"weight{i}": np.zeros(4, np.float32) for i in range(40)}  # as many as it has layers, at least
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    export_refused(model=tmp_path / "model", words=(feature, config.model_type))


def test_an_operation_that_onnx_has_not(export_refused, tmp_path, monkeypatch):
    """DeepSeek-V2 rotates in complex numbers, of which the trace has to spell one operation."""
    monkeypatch.setattr("lora_drop_export.decoder.trace._complex_unsqueezed", contextlib.nullcontext)
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": None}
    config = transformers.DeepseekV2Config(**TINY | heads | {"num_hidden_layers": 1, "first_k_dense_replace": 1})
    transformers.DeepseekV2ForCausalLM(config).save_pretrained(tmp_path / "model")
    words = ("cannot be traced", "deepseek_v2", "complex", "operations ONNX has, in real numbers")
    export_refused(model=tmp_path / "model", words=words)


def test_a_model_that_sees_without_the_tensors_of_its_text(export_refused, tmp_path):
    transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TINY)).save_pretrained(tmp_path / "model")
    tensors = {f"vision_tower.{i}": np.zeros(4, np.float32) for i in range(40)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    export_refused(model=tmp_path / "model", words=("does not hold the model", "there are 0 tensors"))


@pytest.mark.parametrize(
    ("name", "rank", "surrogate"),
    [
        *zip(itertools.cycle(["gptj", "stablelm_parallel"]), (0, 0, 4, 4), SURROGATES, strict=False),
        *zip(itertools.cycle(["stablelm_parallel", "gptj"]), (4, 4, 0, 0), SURROGATES, strict=False),
    ],
)
def test_parallel_residual_with_attn_mlp(export_refused, monkeypatch, name, surrogate, rank):
    """Of attention and MLP, which both read the layer's input; the two differ in the order of the additions."""
    parallel = more_family(name)
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: parallel.traced)
    monkeypatch.setattr("lora_drop_export.compiler.export.store_weights", None)  # which takes minutes, and more by text
    options = ("--injection", "attn_mlp", "--surrogate", surrogate, "--rank", rank)
    options += ("--drop-layers", "1", "--always-first", "0", "--always-last", "0")
    export_refused(*options, model=parallel.directory, words=("halves run in parallel", "--injection block"))


def test_a_residual_stream_that_changes_its_shape(export_refused, monkeypatch):
    """OPT's halves run one after the other, but its MLP takes the tokens of all rows in one line."""
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
    opt = traced_model(build(transformers.OPTForCausalLM, transformers.OPTConfig, 3, **sizes))
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: opt.traced)
    for site in ("1.attn", "1.mlp"):
        words = ("No residual stream is found", "the sum is reshaped or normalized first", "drop whole layers")
        options = ("--drop-layers", site, "--always-first", "0", "--always-last", "0")
        export_refused(*options, model=opt.directory, words=words)
