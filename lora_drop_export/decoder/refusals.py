"""Features of a model that a step graph cannot hold, each refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.experts import TURNED
from lora_drop_export.checkpoint.foreign import refused

from .context import CONVOLUTION, RECURRENT, is_mlp
from .gates import gate_of

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")  # as families call it
_ALIBI = ("bloom",)  # whose configs do not say so
_ABOVE_ZERO = ("rope_theta", "routed_scaling_factor")
_UNBOUND = ("time_step_limit",)  # Mamba's, which is infinite in configs of models without such layers, too
_LARGEST = float(np.finfo(np.float32).max)
_SHORT_CONVOLUTIONS = ("lfm2", "lfm2_moe", "lfm3")
_RECURRENT = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"),
    *("kimi_linear", "bailing_hybrid", "granitemoehybrid", "bamba", "falcon_h1", "nemotron_h"),
)
_OWN_ATTENTION = ("mpt",)
_OTHER_ATTENTION = ("linear", "chunked", "compressed", "indexed", "reference")  # words in the types of layers


def unsupported(feature: str, config: Any) -> ModelError:
    model_type = getattr(config, "model_type", "this")
    return ModelError(
        f"The model has {feature}, which a step graph cannot hold.",
        note=f"Model type {model_type!r}; supported are decoders whose layers are attention and MLP with residuals.",
        hint="Choose another decoder-only model.",
    )


def _features_of_config(config: Any) -> list[tuple[Any, str]]:
    """Whether it has each of the features, and how it is called."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ()
    known = [CONVOLUTION] if text.model_type in _SHORT_CONVOLUTIONS else []
    known += RECURRENT if text.model_type in _RECURRENT else ()
    unknown = [t for layer, t in enumerate(types) if t not in known and not is_mlp(text, layer)]
    other = [t for t in unknown if "attention" not in t or any(word in t for word in _OTHER_ATTENTION)]
    alibi = getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False)
    return [
        (config.is_encoder_decoder, "an encoder (cross attention)"),
        (getattr(text, "add_cross_attention", False), "cross attention"),
        (text is not config, "a vision or audio tower (multimodal config)"),
        (alibi or text.model_type in _ALIBI, "ALiBi (position biases on the scores) instead of RoPE"),
        (text.model_type in _OWN_ATTENTION, "attention in code of its own, past transformers' attention interface"),
        (other, f"layers of type {other[0] if other else ''}"),
    ]


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers in a value of a config, each with the name that it or its list has."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, key)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
    elif type(value) in (int, float):
        yield name, value


def _refuse_number(name: str, number: float) -> None:
    """A number with which no step computes what is meant: engines differ there, and transformers checks no ranges."""
    for fits, needed in (
        (abs(number) <= _LARGEST or name in _UNBOUND, "a number that float32 holds"),
        (number >= 0 or not str(name).endswith(("_eps", "epsilon")), "a number, 0 at least"),
        (number > 0 or name not in _ABOVE_ZERO, "a number above 0"),
    ):
        if not fits:
            raise ModelError(
                "The model's config cannot be used.",
                note=f"{name!s:.80} is {number!r:.80}; needed is {needed}.",
                hint="Check config.json.",
            )


def refuse_by_config(config: Any) -> None:
    """Features that the config tells.

    Raises:
        ModelError: the model has one of them, or the config is of no shape that can be read.
    """
    with refused("The model's config cannot be used.", "config.json"):
        for name in _SIZES:
            size = getattr(config.get_text_config(), name, None)
            if size is not None and (type(size) is not int or size < 1):
                raise ModelError(
                    "The model's config cannot be used.",
                    note=f"{name} is {size!r:.80}; needed is a whole number, 1 at least.",
                    hint="Check config.json.",
                )
        for name, number in _numbers(config.to_dict(), ""):
            _refuse_number(name, number)
        for present, feature in _features_of_config(config):
            if present:
                raise unsupported(feature, config)


def is_of_experts(module: Any) -> bool:
    """Whether a module holds experts that are called through transformers' interface (experts.py)."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "has_gate")


def _refuse_experts(experts: Any, config: Any) -> None:
    """Experts of another formula than that of experts.py, or whose matrices lie in no form that is known."""
    from transformers.integrations import moe

    turned = config.model_type in TURNED
    usual = getattr(type(experts), "_apply_gate", None) is moe._default_apply_gate
    joined = "experts with another activation than SiLU and GELU" if usual else "experts with a gate of their own"
    for other, feature in (
        (not experts.has_gate, "experts without a gate"),
        (experts.has_bias and not turned, "experts with biases"),
        (experts.is_transposed and not turned, "experts whose matrices are transposed"),
        (not getattr(experts, "is_concatenated", True) and not turned, "experts whose gate and up lie in turns"),
        (getattr(experts, "has_post_expert_norm", False), "experts whose outputs are normed"),
        (experts.has_gate and gate_of(experts) is None, joined),
    ):
        if other:
            raise unsupported(feature, config)
    count = experts.gate_up_proj.shape[0]
    for chosen in (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN):
        if isinstance(chosen, int) and chosen > count:
            raise ModelError(
                "The model's config cannot be used.",
                note=f"Its routers send a token to {chosen} experts; there are {count}.",
                hint="Check config.json.",
            )


def _refuse_groups(router: Any, count: int) -> None:
    """Groups of experts, of which a router chooses some first, that are not alike or have too few experts."""
    if not hasattr(router, "num_group") or getattr(router, "topk_method", None) == "greedy":
        return
    groups, chosen, experts = router.num_group, router.topk_group, router.top_k
    least = 1 if hasattr(router, "topk_method") else 2  # but for DeepSeek-V2's, a group counts by its two best
    known = all(type(number) is int and number > 0 for number in (groups, chosen, experts))
    if not known or count % groups or count // groups < least or not experts <= chosen * count // groups <= count:
        raise ModelError(
            "The model's config cannot be used.",
            note=f"Its routers choose {experts!r:.80} experts out of {chosen!r:.80} groups (topk_group) of "
            f"{groups!r:.80} (n_group); there are {count} experts.",
            hint="Check config.json.",
        )


def refuse_by_modules(model: Any, layers: Any) -> None:
    """Features that the modules show; a family of MoE models may have dense ones, too."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    for layer in layers:
        mixtures = [module for module in layer.modules() if is_of_experts(module)]
        for experts in mixtures:
            _refuse_experts(experts, model.config)
            for router in layer.modules():
                _refuse_groups(router, experts.gate_up_proj.shape[0])
        for name, module in layer.named_modules():
            if name in ("encoder_attn", "crossattention"):  # Bart and kin, which count positions too
                raise unsupported("cross attention", model.config)
            kind = type(module).__name__.removeprefix(family).lower()  # each class of Qwen2Moe has it in its name
            is_mixture = any(word in kind for word in ("moe", "router", "experts"))
            if not mixtures and (is_mixture or name.endswith((".experts", ".router"))):
                raise unsupported("an MoE router past transformers' experts interface", model.config)
