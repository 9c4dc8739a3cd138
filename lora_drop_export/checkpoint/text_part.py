"""The text decoder of a checkpoint whose model sees or hears as well."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .checkpoint import TensorSource
from .experts import DOWN, GATE_UP, SwappedExperts

# Model types that give their text, where no picture and no sound is, to an ordinary decoder as it is
MULTIMODAL = (
    "apertus1p5",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "exaone4_5",
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "lfm2_vl",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "muse_glimmer",
    "ovis2",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llama_3",
    "video_llava",
    "vipllava",
    "voxtral",
)
# Decoders that rotate by three positions of a token, and what they are where these are one, as in a text
_ONE_POSITION = {
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
_OF_THREE_POSITIONS = ("mrope_interleaved", "mrope_section", "type")  # the last is rope_type, as it was called before
_IN_PART = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(.*)")
_BESIDE_TOWER = re.compile(r"model\.(?:embed_tokens|layers|norm)\..*")  # where the decoder has no prefix of its own


def own_names(names: Iterable[str]) -> dict[str, str]:
    """What the decoder itself calls each tensor of a text part → the checkpoint's name; a bundle's have that, too."""
    found = {}
    for name in names:
        inside = _IN_PART.fullmatch(name)
        if inside:
            found[inside[1] if inside[1].startswith("lm_head.") else f"model.{inside[1]}"] = name
    return found


def _as_transformers_has(name: str, tensor: TensorSource, text: Any) -> TensorSource:
    """Qwen3-VL's experts, which its checkpoints have transposed."""
    height = {GATE_UP: 2 * text.moe_intermediate_size, DOWN: text.hidden_size}.get(name.rpartition(".")[2])
    swapped = height is not None and len(tensor.shape) == 3 and tensor.shape[1] != height == tensor.shape[2]
    return SwappedExperts(tensor) if swapped else tensor


def text_tensors(tensors: Mapping[str, TensorSource], config: Any) -> dict[str, TensorSource]:
    """Those of the decoder and of its head, under the checkpoint's names.

    Args:
        config: of the whole model.
    """
    inside = _IN_PART if any(map(_IN_PART.fullmatch, tensors)) else _BESIDE_TOWER
    found = {name: one for name, one in tensors.items() if inside.fullmatch(name) or name.startswith("lm_head.")}
    if config.model_type == "qwen3_vl_moe":
        found = {name: _as_transformers_has(name, one, config.get_text_config()) for name, one in found.items()}
    return found


def _of_one_position(text: Any) -> Any:
    from transformers import AutoConfig

    kind = type(text).model_type
    fields = text.to_dict()
    del fields["model_type"]
    fields["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if kind.startswith("qwen3_vl"):  # which has no windows, whatever its config says
        fields["use_sliding_window"] = False
    if kind == "qwen3_vl_moe_text":  # whose routers do so whatever their config says
        fields["norm_topk_prob"] = True
    rope = {name: value for name, value in fields.pop("rope_parameters").items() if name not in _OF_THREE_POSITIONS}
    rope.setdefault("partial_rotary_factor", 1.0)  # GLM 4's is another one
    fields["partial_rotary_factor"] = rope["partial_rotary_factor"]  # older versions let it win
    made = AutoConfig.for_model(_ONE_POSITION[kind], rope_parameters=rope, **fields)
    made.eos_token_id = text.eos_token_id  # GLM 4's has some of its own
    return made


def text_config(config: Any) -> Any:
    """Of the decoder alone; its end tokens are the whole model's, where that has some, as in transformers."""
    text = config.get_text_config()
    if type(text).model_type in _ONE_POSITION:
        text = _of_one_position(text)
    text.tie_word_embeddings = text.tie_word_embeddings or getattr(config, "tie_word_embeddings", False)
    if getattr(config, "eos_token_id", None) is not None:
        text.eos_token_id = config.eos_token_id
    return text
