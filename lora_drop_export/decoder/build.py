"""transformers' model of a checkpoint's config, without its weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.checkpoint.foreign import refused
from lora_drop_export.weights.resolve import find_tensor

from .convolutions import exchange_convolutions
from .experts import exchange_experts
from .own_attentions import built_with, tell_attention
from .recurrences import exchange_recurrences
from .text_models import register_text_model

_ROWS = 4096  # that are compared at a time


def _differ(a: TensorSource, b: TensorSource) -> bool:
    if a.shape != b.shape:
        return True
    begins = range(0, a.shape[0], _ROWS)
    return any(not np.array_equal(a.rows(n, n + _ROWS), b.rows(n, n + _ROWS)) for n in begins)


def _has_two_tables(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has another head than the embedding, though its config says that they are one."""
    names = {id(module): name for name, module in model.named_modules()}
    places = [
        find_tensor(checkpoint, f"{names[id(module)]}.weight")
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if id(module) in names
    ]
    embedding, head = places if len(places) == 2 else (None, None)
    return embedding is not None and head is not None and embedding is not head and _differ(embedding, head)


def build_model(checkpoint: Checkpoint, dtype: str, attention: str | None = None, experts: str = "eager") -> Any:
    """The causal language model in eval mode, on the device or in the mode that the caller has chosen.

    Where the config ties head and embedding and the checkpoint has two different ones, both are taken, as transformers
    does, and the checkpoint's config says so from then on.

    Args:
        dtype: of the parameters: `float32`, `float16` or `bfloat16`.
        attention: name of a registered attention function; transformers' own choice when None.
        experts: name of a registered experts function.

    Raises:
        ModelError: the model's class cannot be made of this config, or is code that is not trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = checkpoint.config
    built = None if attention is None else built_with(config, attention)
    chosen = {"experts_implementation": "eager"} | ({} if built is None else {"attn_implementation": built})
    with refused(
        "transformers cannot build this model as a causal language model.",
        f"Model type {config.model_type!r:.80}",
        "Check the sizes in config.json; the model's attention must go through transformers' attention interface.",
    ):
        register_text_model(config)

        def build() -> Any:
            return AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=checkpoint.trust_remote_code, **chosen
            ).eval()

        model = build()
        text = config.get_text_config()
        if text.tie_word_embeddings and _has_two_tables(model, checkpoint):
            text.tie_word_embeddings = False
            model = build()
        model.config._experts_implementation = experts  # older versions take their own names alone as an option
        exchange_experts(model)
    if attention is not None:
        if built != attention:
            tell_attention(model, attention)
        exchange_convolutions(model)
        exchange_recurrences(model)
    return model
