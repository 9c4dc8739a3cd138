"""How far a model sees, as its config says."""

from __future__ import annotations

from typing import Any

from lora_drop_runtime.errors import InputError, ModelError

_SIZES = ("max_position_embeddings", "n_positions", "max_sequence_length")
_ORIGINAL = "original_max_position_embeddings"
_UNKNOWN = 2048
CONVOLUTION = "conv"  # type of a layer with a short convolution, in `layer_types`
RECURRENT = ("linear_attention", "mamba", "hybrid")  # the same of those with a recurrent state
_MLPS = ("mlp", "moe")  # and of one that is an MLP alone, in families whose layers are halves of others'
_HALVES = ("nemotron_h",)  # these families
_TAPS = ("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel")
_MOST = 2**63 - 1  # of a manifest


def _longrope_context(config: Any) -> Any:
    """Tokens up to which LongRoPE has its short factors; None for a model without it."""
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    ropes = [one for one in (rope, *rope.values()) if isinstance(one, dict)]  # of all layers, or of each type of them
    return next((one.get(_ORIGINAL) for one in ropes if one.get("rope_type") == "longrope"), None)


def context_length(config: Any) -> int:
    """Tokens that the model can see; with LongRoPE those up to which its frequencies are the same for all texts.

    Raises:
        InputError: the config says none that can be.
    """
    said = {_ORIGINAL: _longrope_context(config)}
    said |= {name: getattr(config, name, None) for name in _SIZES}
    for name, length in said.items():
        if length:
            if type(length) is not int or not 2 <= length <= _MOST:
                raise InputError(
                    "The model's config does not say how long its context is.",
                    note=f"{name} is {length!r:.80}; needed is a whole number of tokens, 2 at least and below 2^63.",
                    hint="Check config.json.",
                )
            return length
    return _UNKNOWN


def context_in_words(config: Any) -> str:
    """The context's tokens for a message, and why they are fewer than the config's own number."""
    context = context_length(config)
    if context == _longrope_context(config):
        return f"{context} (up to which LongRoPE's frequencies are the same for all texts)"
    return str(context)


def convolution_window(config: Any) -> int:
    """Positions that a short convolution sees, as LFM2 has them; 0 in models without any."""
    size = getattr(config, "conv_L_cache", None)
    return size if type(size) is int else 0


def recurrence_window(config: Any) -> int:
    """Positions that the convolution before a recurrent state sees; 0 in models without any."""
    size = next((size for name in _TAPS if (size := getattr(config, name, None))), None)
    return size if type(size) is int else 0


def is_recurrent(config: Any) -> bool:
    """Whether layers have a recurrent state."""
    return not {*RECURRENT}.isdisjoint(getattr(config, "layer_types", None) or ())


def is_mlp(config: Any, layer: int) -> bool:
    """Whether a layer mixes no tokens: in families whose layers are halves of others' the types say so, but for configs
    of a checkpoint's own code."""
    types = getattr(config, "layer_types", None) or ()
    return config.model_type in _HALVES and layer < len(types) and types[layer] in _MLPS


def window_within(config: Any, size: int | None) -> int:
    """A sliding window in positions; 0 for none, and for one as wide as the context, which hides nothing.

    Raises:
        ModelError: the window is negative.
    """
    if size and size < 0:
        raise ModelError(
            "The model's config cannot be used.",
            note=f"sliding_window is {size!r:.80}; needed is a whole number, 0 at least.",
            hint="Check config.json.",
        )
    return size if size and size < context_length(config) else 0
