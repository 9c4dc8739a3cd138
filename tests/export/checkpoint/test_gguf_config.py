"""RoPE, windows and soft caps of a GGUF file are in the config: frequencies beside those of the model itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.decoder.context import context_length

HEADS, SIZE, THETA = 2, 64, 500000.0
said: list[str] = []  # of the file that was opened last


def llama3_factors(
    factor: float, low: float = 1.0, high: float = 4.0, original: int = 8192
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As llama.cpp's converter makes them, from Llama 3.1's own formula."""
    found = []
    for j in range(SIZE // 2):
        wavelength = 2 * math.pi * THETA ** (2 * j / SIZE)
        smooth = (original / wavelength - low) / (high - low)
        found.append(1.0 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def opened(tmp_path: Path, arch: str, tensors: dict[str, Any] | None = None, *, parts: int = 0, **fields: Any) -> Any:
    """The config of a file that has these fields besides a small model's, «__» for a dot; `parts` is 0 in one that was
    made of several."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / f"{arch}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    usual = {
        "context_length": 131072,
        "embedding_length": HEADS * SIZE,
        "block_count": 2,
        "feed_forward_length": 160,
        "attention__head_count": HEADS,
        "attention__head_count_kv": HEADS,
        "attention__key_length": SIZE,
        "rope__dimension_count": SIZE,
        "rope__freq_base": THETA,
        "attention__layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 37,
    }
    for key, value in (usual | fields).items():
        name = f"{arch}.{key.replace('__', '.')}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add[type(value)](name, value)
    writer.add_pad_token_id(0)
    writer.add_uint16("split.count", parts)
    embedding = {"token_embd.weight": np.ones((37, HEADS * SIZE), np.float32), "output_norm.weight": np.ones(128)}
    for name, values in (embedding | (tensors or {})).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said.clear()
    return open_checkpoint(str(path), tmp_path / "scratch", log=said.append).config


def rotary(config: Any) -> tuple[torch.Tensor, float]:
    """Angles a position and the factor of cosine and sine, of the model that transformers builds."""
    with torch.device("meta"):
        model_class = type(transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb)
    rope = model_class(config)
    return rope.inv_freq, rope.attention_scaling


def llama(**rope: Any) -> Any:
    return transformers.LlamaConfig(
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": THETA, **rope},
    )


LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("rope", "fields", "factors"),
    [
        ({"rope_type": "default"}, {}, None),
        ({"rope_type": "default"}, {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope_type": "default"}, {"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, np.ones(SIZE // 2)),
        (LLAMA3 | {"factor": 8.0}, {}, llama3_factors(8.0)),
        (LLAMA3 | {"factor": 32.0}, {}, llama3_factors(32.0)),
        (
            {"rope_type": "linear", "factor": 4.0},
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            None,
        ),
        ({"rope_type": "linear", "factor": 4.0}, {"rope__scale_linear": 4.0}, None),  # of older files
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 32768,
            },
            None,
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 0.5 * (1 + 0.1 * math.log(4)),
            },
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 4096,
                "rope__scaling__yarn_beta_fast": 16.0,
                "rope__scaling__yarn_beta_slow": 2.0,
                "rope__scaling__attn_factor": 0.5,
            },
            None,
        ),
    ],
)
def test_frequencies_are_those_of_the_model(rope, fields, factors, tmp_path):
    """Of the Llama whose file it is, to the rounding of factors in float32."""
    tensors = None if factors is None else {"rope_freqs.weight": factors}
    found, scale = rotary(opened(tmp_path, "llama", tensors, **fields))
    wanted, wanted_scale = rotary(llama(**rope))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert scale == pytest.approx(wanted_scale)


def test_llama3_by_the_factors_themselves(tmp_path):
    """Frequencies divided by the file's factors, which is what llama.cpp computes."""
    factors = llama3_factors(32.0)
    found, _ = rotary(opened(tmp_path, "llama", {"rope_freqs.weight": factors}))
    plain = THETA ** -(np.arange(SIZE // 2) / (SIZE // 2))
    np.testing.assert_allclose(found.numpy(), plain / factors, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, 1.25])
def test_longrope_is_that_of_the_model(scale, tmp_path):
    """Phi-4-mini's: three quarters of each head, short factors up to the original context."""
    factors = {name: np.linspace(1, last, 24).astype(np.float32) for name, last in (("short", 1.5), ("long", 40))}
    rope = {"rope_type": "longrope", "rope_theta": THETA, "partial_rotary_factor": 0.75}
    rope |= {f"{name}_factor": values.tolist() for name, values in factors.items()}
    rope |= {} if scale is None else {"attention_factor": scale}
    wanted = transformers.Phi3Config(
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        max_position_embeddings=131072,
        original_max_position_embeddings=8192,
        rope_parameters=rope,
    )
    tensors = {f"rope_factors_{name}.weight": values for name, values in factors.items()}
    fields: dict[str, Any] = {"rope__scaling__original_context_length": 8192, "rope__dimension_count": 48}
    fields |= {} if scale is None else {"rope__scaling__attn_factor": scale}
    config = opened(tmp_path, "phi3", tensors, **fields)
    for found, expected in zip(rotary(config), rotary(wanted), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))
    assert context_length(config) == context_length(wanted) == 8192


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "starcoder2", "stablelm"])
def test_the_base_of_the_frequencies(arch, tmp_path):
    """Which transformers' table has for some architectures alone."""
    extra = {"attention__layer_norm_epsilon": 1e-5} if arch in ("starcoder2", "stablelm") else {}
    turned = {"rope__dimension_count": SIZE // 4} if arch == "stablelm" else {}
    assert opened(tmp_path, arch, **extra, **turned).rope_parameters["rope_theta"] == THETA


def test_the_size_of_heads(tmp_path):
    """transformers takes 128 for Qwen3, whatever the file says."""
    config = opened(tmp_path, "qwen3")
    assert config.head_dim == SIZE
    assert len(rotary(config)[0]) == SIZE // 2


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        *(("llama", {"rope__scaling__factor": factor}) for factor in (math.nan, math.inf, -2.0)),
        ("llama", {"rope__freq_base": -1.0}),
        ("llama", {"rope__freq_base": 0.0}),
        ("gemma2", {"final_logit_softcapping": -1.0}),
        ("gemma2", {"attn_logit_softcapping": math.nan}),
        *(
            (
                "llama",
                {
                    "rope__scaling__type": "yarn",
                    "rope__scaling__factor": 4.0,
                    "rope__scaling__original_context_length": 4096,
                    f"rope__scaling__{name}": value,
                },
            )
            for name, value in (("attn_factor", 0.0), ("attn_factor", math.inf), ("yarn_beta_fast", -1.0))
        ),
    ],
)
def test_numbers_that_can_be_none_of_these(arch, fields, tmp_path):
    with pytest.raises(ModelError, match="The GGUF file cannot be read"):
        opened(tmp_path, arch, **fields)


def test_a_soft_cap_of_0_is_none(tmp_path):
    assert opened(tmp_path / "a", "gemma2", final_logit_softcapping=0.0).final_logit_softcapping is None
    opened(tmp_path / "b", "llama", final_logit_softcapping=0.0)


def test_a_part_of_each_head(tmp_path):
    """Phi-4-mini rotates three quarters."""
    config = opened(tmp_path, "phi3", rope__dimension_count=48)
    assert config.rope_parameters["partial_rotary_factor"] == 0.75
    assert len(rotary(config)[0]) == 24


def test_windows_and_soft_caps(tmp_path):
    assert opened(tmp_path / "a", "phi3", attention__sliding_window=2047).sliding_window == 2047
    assert opened(tmp_path / "b", "phi3").sliding_window is None
    gemma = opened(tmp_path / "c", "gemma2", attn_logit_softcapping=40.0, final_logit_softcapping=20.0)
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (40.0, 20.0)
    assert gemma.query_pre_attn_scalar == 256


def test_the_scale_of_gemma_2_with_27_billion_parameters(tmp_path):
    """Its file does not say it; 4608 / 32 in the model's own config."""
    tensors = {f"blk.{n}.attn_norm.weight": np.ones(128) for n in range(46)}
    assert opened(tmp_path, "gemma2", tensors, block_count=46).query_pre_attn_scalar == HEADS * SIZE // HEADS


def test_what_the_model_has_no_place_for_is_said(tmp_path):
    opened(tmp_path / "a", "llama", {f"blk.0.attn_{one}.bias": np.ones(128) for one in "qkv"})
    assert any("no place for blk.0.attn_q.bias and 2 more" in line for line in said)
    opened(tmp_path / "b", "llama", {"blk.0.attn_norm.weight": np.ones(128), "rope_freqs.weight": np.ones(32)})
    assert not any("no place" in line for line in said)


def test_a_part_of_a_model_is_refused(tmp_path):
    """One of several, as llama-gguf-split writes them; without a head it would be a model whose head is tied."""
    with pytest.raises(ModelError, match="is a part of a model") as error:
        opened(tmp_path, "llama", parts=3)
    assert "llama.gguf is one of 3 files" in error.value.note
    assert "--merge" in error.value.hint


def test_bytes_in_another_order_are_refused_with_what_turns_them(tmp_path):
    """As files for mainframes have them."""
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((37, HEADS * SIZE), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="bytes in the order of other machines") as error:
        open_checkpoint(str(path), tmp_path / "scratch", log=said.append)
    assert "big.gguf is big-endian, this machine is little-endian" in error.value.note
    assert "gguf-convert-endian FILE native" in error.value.hint


@pytest.mark.parametrize("name", ["blk.0.attn_q.scale", "blk.0.attn_q.weight.scale", "output.scale"])
def test_scales_beside_weights_are_refused(name, tmp_path):
    """Of NVFP4, which has one for a whole tensor besides those of its blocks."""
    with pytest.raises(ModelError, match="scales beside its weights") as error:
        opened(tmp_path, "llama", {name: np.full(1, 3.0)})
    assert name in error.value.note


@pytest.mark.parametrize(
    ("arch", "fields", "tensors", "words"),
    [
        ("llama", {"rope__scaling__type": "longrope"}, {}, "RoPE scaling of kind longrope"),
        ("phi3", {}, {"rope_factors_long.weight": np.ones(32)}, "LongRoPE without its factors"),
        ("llama", {}, {"rope_freqs.weight": np.linspace(1, 9, 32)}, "RoPE frequencies of its own"),
        ("llama", {}, {"rope_freqs.weight": llama3_factors(8.0, original=4096)}, "RoPE frequencies of its own"),
        ("llama", {}, {"rope_freqs.weight": np.full(16, 2.0)}, "RoPE frequencies of its own"),
        (
            "llama",
            {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
            {"rope_freqs.weight": llama3_factors(8.0)},
            "RoPE frequencies of its own",
        ),
        (
            "qwen2",
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0},
            {},
            "YaRN without its factor or original",
        ),
        (
            "qwen2",
            {"rope__scaling__type": "yarn", "rope__scaling__original_context_length": 4096},
            {},
            "YaRN without its factor or original",
        ),
        (
            "llama",
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 4096,
                "rope__scaling__yarn_ext_factor": 0.0,
            },
            {},
            "YaRN with yarn_ext_factor",
        ),
        (
            "qwen2",
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__yarn_log_multiplier": 0.1},
            {},
            "YaRN with yarn_log_multiplier",
        ),
        ("gemma3", {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}, {}, "for some of its layers"),
        ("qwen2", {"rope__dimension_count": 32}, {}, "RoPE on a part of each head"),
        ("llama", {"attention__sliding_window": 4096}, {}, "sliding-window attention"),
        ("qwen2", {"attention__sliding_window": 4096}, {}, "sliding-window attention"),
        ("llama", {"attn_logit_softcapping": 30.0}, {}, "soft-capped logits"),
    ],
)
def test_what_cannot_be_put_there_is_refused_by_name(arch, fields, tensors, words, tmp_path):
    with pytest.raises(ModelError, match=words) as error:
        opened(tmp_path, arch, tensors, **fields)
    assert "safetensors" in error.value.hint
