"""The text decoder of a checkpoint whose model sees as well."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .checkpoint import TensorSource

# Model types that give their text, where no picture is, to an ordinary decoder as it is
SEEING = (
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "smolvlm",
)
_IN_PART = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(.*)")


def own_names(names: Iterable[str]) -> dict[str, str]:
    """What the decoder itself calls each tensor of a text part → the checkpoint's name; a bundle's have that, too."""
    found = {}
    for name in names:
        inside = _IN_PART.fullmatch(name)
        if inside:
            found[inside[1] if inside[1].startswith("lm_head.") else f"model.{inside[1]}"] = name
    return found


def text_tensors(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Those of the decoder and of its head, under the checkpoint's names."""
    return {name: one for name, one in tensors.items() if _IN_PART.fullmatch(name) or name.startswith("lm_head.")}


def text_config(config: Any) -> Any:
    """Of the decoder alone; its end tokens are the whole model's, where that has some, as in transformers."""
    text = config.get_text_config()
    text.tie_word_embeddings = text.tie_word_embeddings or getattr(config, "tie_word_embeddings", False)
    if getattr(config, "eos_token_id", None) is not None:
        text.eos_token_id = config.eos_token_id
    return text
