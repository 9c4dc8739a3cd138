"""Checkpoints whose models see as well: their text decoders write what the whole model writes of a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.checkpoint.text_part import own_names, text_config
from lora_drop_export.cli import main
from lora_drop_export.decoder.loaded import load_model
from tests.support.bundles import heads_of, more_family
from tests.support.models import SIZES

TEXT: dict[str, Any] = SIZES | {"num_hidden_layers": 3, "head_dim": 16}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


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
    vision = {"head_dim": 16, "num_key_value_heads": 2} | {key: VISION[key] for key in VISION if key != "image_size"}
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


@pytest.mark.parametrize("build", [gemma3, gemma4, llava, smolvlm])
def test_the_text_decoder_of_a_model_that_sees(
    build: Callable[[], Any], tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if build is not gemma3:  # their decoder is one that others have traced
        known = more_family("gemma4") if build is gemma4 else heads_of(16, 2)
        monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: known.traced)
    generator = torch.Generator().manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
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


def test_bin_files_of_a_model_that_sees(tmp_path: Path) -> None:
    gemma3().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="from safetensors files alone"):
        open_checkpoint(str(tmp_path), tmp_path / "scratch")
