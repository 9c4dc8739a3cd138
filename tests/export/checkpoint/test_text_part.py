"""Checkpoints of multimodal models: their text decoders write what the whole model writes of a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError, ModelError
from safetensors.numpy import load_file, save_file

from lora_drop_export.checkpoint.experts import to_rows
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.checkpoint.text_part import own_names, text_config
from lora_drop_export.cli import main
from lora_drop_export.decoder.loaded import load_model
from lora_drop_export.weights.resolve import find_tensor
from tests.support.bundles import Family, family, heads_of, more_family
from tests.support.models import SIZES, skip_without

TEXT: dict[str, Any] = SIZES | {"num_hidden_layers": 3, "head_dim": 16}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ANY_SIZE = {name: VISION[name] for name in VISION if name != "image_size"}  # towers that take pictures of any


def gemma3() -> Any:
    """Tied; the text model's names stand in `language_model.model`."""
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    text = transformers.Gemma3TextConfig(**TEXT | layers, sliding_window=5)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def gemma4() -> Any:
    """As the smaller ones have it: layers of different heads, the last two with the K and V of others, and an input of
    each layer's own."""
    text = transformers.Gemma4TextConfig(**more_family("gemma4").model.config.to_dict() | {"pad_token_id": 0})
    vision = {"head_dim": 16, "num_key_value_heads": 2} | ANY_SIZE
    return transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(
            text_config=text, vision_config=transformers.Gemma4VisionConfig(**vision), audio_config=None
        )
    )


def llava() -> Any:
    """A head of its own, in `language_model` as well."""
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.LlavaForConditionalGeneration(config)


def smolvlm() -> Any:
    """`model.text_model`, and the head outside of it."""
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=VISION, tie_word_embeddings=False
    )
    return transformers.SmolVLMForConditionalGeneration(config)


_PATCHES = VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": SIZES["hidden_size"]}


def qwen2_5_vl() -> Any:
    """Beside the tower, without a prefix; tied in the whole model's config alone."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = transformers.Qwen2_5_VLTextConfig(**SIZES, rope_parameters=rope, rms_norm_eps=1e-6)  # as Qwen2 has it
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=_PATCHES, tie_word_embeddings=True)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    """Three positions in turns; features of a picture go into several layers."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = transformers.Qwen3VLTextConfig(**SIZES, head_dim=32, rope_parameters=rope)
    vision = _PATCHES | {"deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Qwen3VLForConditionalGeneration(config)


def glm4v(other: dict[str, Any]) -> Any:
    """Its heads share the hidden size, and no config says how wide they are."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]} | other
    text = transformers.Glm4vTextConfig(**SIZES | {"num_hidden_layers": 3}, rope_parameters=rope)
    config = transformers.Glm4vConfig(text_config=text, vision_config=_PATCHES, tie_word_embeddings=False)
    return transformers.Glm4vForConditionalGeneration(config)


def drawn(model: Any) -> Any:
    """With every parameter drawn."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model.eval()


def muse_glimmer() -> Any:
    """Of which transformers has no causal language model: windows, a layer without RoPE, scaled and capped logits."""
    skip_without("MuseGlimmerConfig")
    own = {"num_hidden_layers": 2, "sliding_window": 5, "output_multiplier": 0.6, "final_logit_softcapping": 3.0}
    config = transformers.MuseGlimmerConfig(
        text_config=TEXT | own | {"pad_token_id": 0}, vision_config=ANY_SIZE, out_hidden_size=128
    )
    return transformers.MuseGlimmerForConditionalGeneration(config)


KNOWN: dict[Callable[[], Any], Callable[[], Family]] = {  # decoders that others have traced
    gemma4: lambda: more_family("gemma4"),
    llava: lambda: heads_of(16, 2),
    qwen2_5_vl: lambda: family("qwen2"),
    qwen3_vl: lambda: family("qwen3"),
    smolvlm: lambda: heads_of(16, 2),
}


@pytest.mark.parametrize("build", [gemma3, muse_glimmer, *KNOWN])
def test_the_text_decoder_of_a_multimodal_model(
    build: Callable[[], Any], tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if build in KNOWN:
        known = KNOWN[build]().traced
        monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: known)
    model = drawn(build())
    model.save_pretrained(tmp_path / "model")
    options = ["--drop-layers", "1", "--always-first", "0", "--always-last", "0", "--policy", "backfill"]
    options += ["--max-seq-len", "32", "--no-verify"]
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options]) == 0
    assert f"its text decoder alone is taken ({model.config.model_type})" in capsys.readouterr().err

    ids = np.random.default_rng(1).integers(5, 120, (1, 12))
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids)).logits[0]
        again = load_model(str(tmp_path / "out")).model(torch.from_numpy(ids)).logits[0]
    with Session.open(tmp_path / "out", k=0, threads=1) as session:
        ours = [session.prefill(ids[:, :6], max_new_tokens=7)[0].copy()]
        ours += [session.step(ids[:, place])[0].copy() for place in range(6, 11)]
    bound = 3e-5 * float(theirs.abs().max())
    assert np.abs(np.stack(ours) - theirs[5:11].numpy()).max() < bound
    assert float((again - theirs).abs().max()) < bound


def assert_loaded_as(model: Any, directory: Path) -> None:
    """The decoder of a model's directory writes what the model does."""
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        theirs, ours = model(input_ids=ids).logits, load_model(str(directory)).model(ids).logits
    assert float((ours - theirs).abs().max()) < 3e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(
    "rope",
    [{}, {"rope_type": "linear", "factor": 2.0}, {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}],
    ids=["default", "linear", "half"],
)
def test_as_much_of_a_head_is_rotated(rope: dict[str, Any], tmp_path: Path) -> None:
    """GLM 4 rotates half of each head where nothing is said, and GLM 4V all of it; nor are its heads as wide."""
    model = drawn(glm4v(rope))
    model.save_pretrained(tmp_path)
    assert_loaded_as(model, tmp_path)


def test_windows_that_the_decoder_has_not(tmp_path: Path) -> None:
    """Qwen3-VL has none, whatever its config says."""
    model = drawn(qwen3_vl())
    model.config.text_config.update({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0})
    model.save_pretrained(tmp_path)
    assert_loaded_as(model, tmp_path)


def lfm3_vl() -> Any:
    """Layers of each kind in the text's decoder, and kinds of their own in the tower."""
    skip_without("Lfm3VlConfig")
    own = {"layer_types": ["conv", "sliding_attention", "full_attention"], "sliding_window": 5, "conv_L_cache": 4}
    vision = ANY_SIZE | {"num_key_value_heads": 1}
    config = transformers.Lfm3VlConfig(text_config=transformers.Lfm3Config(**TEXT | own), vision_config=vision)
    return transformers.Lfm3VlForConditionalGeneration(config)


def voxtral() -> Any:
    """It hears."""
    audio = transformers.VoxtralEncoderConfig(
        **{name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=2,
    )
    return transformers.VoxtralForConditionalGeneration(
        transformers.VoxtralConfig(text_config=transformers.LlamaConfig(**TEXT), audio_config=audio)
    )


def mistral4() -> Any:
    """Of which transformers has a causal language model, and AutoModelForCausalLM none."""
    skip_without("Mistral4Config")
    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
    text = TEXT | latent | routed | {"topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    config = transformers.Mistral3Config(
        text_config=transformers.Mistral4Config(**text),
        vision_config=transformers.PixtralVisionConfig(**VISION, head_dim=16),
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen3_5() -> Any:
    """Three positions in turns, gated delta rules, and a head that predicts further, which is left."""
    skip_without("Qwen3_5TextConfig")
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    sizes |= {"linear_value_head_dim": 24, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    config = transformers.Qwen3_5Config(text_config=TEXT | sizes, vision_config=_PATCHES, tie_word_embeddings=True)
    return transformers.Qwen3_5ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [lfm3_vl, mistral4, qwen3_5, voxtral])
def test_other_multimodal_models(build: Callable[[], Any], tmp_path: Path) -> None:
    model = drawn(build())
    model.save_pretrained(tmp_path)
    assert_loaded_as(model, tmp_path)


def test_a_text_config_that_no_decoder_can_be_made_of(tmp_path: Path) -> None:
    qwen2_5_vl().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_attention_heads"] = 0
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config cannot be used"):
        open_checkpoint(str(tmp_path), tmp_path / "scratch")


@pytest.mark.parametrize("swapped", [True, False], ids=["hub", "saved"])
def test_experts_that_the_checkpoint_has_transposed(swapped: bool, tmp_path: Path) -> None:
    """Those of the hub are; what transformers writes of a model that it has made is not."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    few = {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    text = transformers.Qwen3VLMoeTextConfig(**TEXT | few, rope_parameters=rope, norm_topk_prob=False)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=_PATCHES, tie_word_embeddings=False)
    config.vision_config.deepstack_visual_indexes = [0]
    model = drawn(transformers.Qwen3VLMoeForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    tensors, place = load_file(tmp_path / "model.safetensors"), "model.language_model.layers.0.mlp.experts."
    experts = {name: one for name, one in tensors.items() if name.startswith(place)}
    assert {name.removeprefix(place): one.shape for name, one in experts.items()} == {
        "gate_up_proj": (4, 48, 64),
        "down_proj": (4, 64, 24),
    }
    if swapped:
        turned = {name: np.ascontiguousarray(one.swapaxes(1, 2)) for name, one in experts.items()}
        save_file(tensors | turned, tmp_path / "model.safetensors", {"format": "pt"})

    assert_loaded_as(model, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), tmp_path / "scratch")
    for name, one in experts.items():
        rows = find_tensor(checkpoint, f"{own_names([name]).popitem()[0]}.rows")
        assert rows is not None
        wanted = to_rows(one, f"{name}.rows", turned=False)
        np.testing.assert_array_equal(rows.read(), wanted)
        np.testing.assert_array_equal(rows.rows(5, 71), wanted[5:71])


def test_how_checkpoints_call_them() -> None:
    stored = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "model.text_model.embed_tokens.weight": "model.embed_tokens.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }
    others = ("lm_head.weight", "model.norm.weight", "vision_tower.vision_model.head.weight", "model.vision_model.a")
    assert own_names([*stored, *others]) == {own: name for name, own in stored.items()}


def test_end_tokens_are_the_whole_models(tmp_path: Path) -> None:
    """Without a generation config. Gemma 3 has its end of a turn outside of the text's config."""
    transformers.Gemma3Config(eos_token_id=[1, 106]).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_model_config(config).eos_token_id
    assert text_config(config).eos_token_id == theirs == [1, 106]
    assert text_config(transformers.Gemma3Config()).eos_token_id == 1


def test_weights_that_the_text_config_says_are_quantized(tmp_path: Path) -> None:
    """As transformers has it: without it they would be taken for weights in float."""
    model = qwen2_5_vl()
    model.config.text_config.quantization_config = {"quant_method": "quark"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="quantized in a form that is not read"):
        open_checkpoint(str(tmp_path), tmp_path / "scratch")


def test_bin_files_of_a_model_that_sees(tmp_path: Path) -> None:
    gemma3().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="from safetensors files alone"):
        open_checkpoint(str(tmp_path), tmp_path / "scratch")
