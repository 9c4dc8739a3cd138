"""Features of a model that a step graph cannot hold, each refused by its name."""

from __future__ import annotations

from typing import Any

from lora_drop_runtime.errors import ModelError

_DATA_DEPENDENT_ROPE = ("dynamic", "longrope")


def unsupported(feature: str, config: Any) -> ModelError:
    model_type = getattr(config, "model_type", "this")
    return ModelError(
        f"The model has {feature}, which a step graph cannot hold.",
        note=f"Model type {model_type!r}; supported are decoders whose layers are attention and MLP with residuals.",
        hint="Choose a dense decoder-only model.",
    )


def refuse_by_config(config: Any) -> None:
    """Features that the config tells."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    rope_types = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    recurrent = [t for t in getattr(text, "layer_types", None) or () if "attention" not in t or "linear" in t]
    for present, feature in (
        (config.is_encoder_decoder, "an encoder (cross attention)"),
        (getattr(text, "add_cross_attention", False), "cross attention"),
        (text is not config, "a vision or audio tower (multimodal config)"),
        (getattr(text, "num_local_experts", 0) or getattr(text, "num_experts", 0), "an MoE router"),
        (rope_types & set(_DATA_DEPENDENT_ROPE), "RoPE frequencies that depend on the sequence length"),
        (recurrent, f"layers of type {recurrent[0] if recurrent else ''}"),
    ):
        if present:
            raise unsupported(feature, config)


def refuse_by_modules(layers: Any) -> None:
    for layer in layers:
        for name, module in layer.named_modules():
            if "moe" in type(module).__name__.lower() or name.endswith((".experts", ".router")):
                raise unsupported("an MoE router", layer.config if hasattr(layer, "config") else None)
