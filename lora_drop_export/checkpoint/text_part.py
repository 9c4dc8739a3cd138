"""The text decoder of a checkpoint whose model sees as well."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

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


def text_config(config: Any) -> Any:
    """Of the decoder alone; its end tokens are the whole model's, where that has some, as in transformers."""
    text = config.get_text_config()
    text.tie_word_embeddings = text.tie_word_embeddings or getattr(config, "tie_word_embeddings", False)
    if getattr(config, "eos_token_id", None) is not None:
        text.eos_token_id = config.eos_token_id
    return text
