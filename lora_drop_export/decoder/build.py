"""transformers' model of a checkpoint's config, without its weights."""

from __future__ import annotations

from typing import Any

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.foreign import refused


def build_model(checkpoint: Checkpoint, dtype: str, attention: str | None = None) -> Any:
    """The causal language model in eval mode, on the device or in the mode that the caller has chosen.

    Args:
        dtype: of the parameters: `float32`, `float16` or `bfloat16`.
        attention: name of a registered attention function; transformers' own choice when None.

    Raises:
        ModelError: the model's class cannot be made of this config, or is code that is not trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = checkpoint.config
    chosen = {} if attention is None else {"attn_implementation": attention}
    with refused(
        "transformers cannot build this model as a causal language model.",
        f"Model type {config.model_type!r:.80}",
        "Check the sizes in config.json; the model's attention must go through transformers' attention interface.",
    ):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=checkpoint.trust_remote_code, **chosen
        ).eval()
