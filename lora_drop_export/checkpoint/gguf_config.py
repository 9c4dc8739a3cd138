"""What a GGUF file says of its model's computation and transformers does not read of it.

Enters: transformers' config of the file, gguf's reader. Leaves: the config completed, or a refusal by name. What is not
in the config is in no layer of the model that is traced, and the check against PyTorch has the same one: a file whose
frequencies were lost would pass it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.errors import ModelError

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of all releases
_GEMMA2_27B_LAYERS = 46  # whose scale of the scores llama.cpp knows by this number


class _Fields:
    """A file's metadata, without the architecture's name in front of the keys."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields | getattr(reader, "misread", {})
        self._prefix = self._fields["general.architecture"].contents()

    def get(self, key: str) -> Any:
        field = self._fields.get(f"{self._prefix}.{key}")
        return None if field is None else field.contents()

    def number(self, key: str, least: float = -math.inf) -> float | None:
        """A finite number above `least`. Raises ValueError."""
        value = self.get(key)
        if value is not None and not least < float(value) < math.inf:
            raise ValueError(f"{key} is {value}")
        return None if value is None else float(value)


def _not_read(what: str, found: object) -> ModelError:
    return ModelError(
        f"The GGUF file has {what}, which is read from safetensors checkpoints alone.",
        note=f"It says {found!s:.120}.",
        hint="Take the model's safetensors checkpoint.",
    )


def _frequencies(config: Any, rope: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Angles a position of a RoPE, [head size / 2], by transformers."""
    import copy

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    asked = copy.deepcopy(config)
    asked.rope_parameters = rope
    return np.asarray(ROPE_INIT_FUNCTIONS[rope["rope_type"]](asked, "cpu")[0], np.float64)


def _divided(config: Any, rope: dict[str, Any], factors: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The RoPE of a file that divides frequencies by factors, as Llama 3.1 and later do.

    The file has the factors alone, transformers wants what they were made from: that of all releases is tried.
    """
    if np.all(factors == 1):
        return rope
    found = rope | {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    base = float(rope["rope_theta"]) ** (-np.arange(len(factors)) / len(factors))
    made = _frequencies(config, found)
    if rope["rope_type"] != "default" or made.shape != base.shape or not np.allclose(made, base / factors, rtol=1e-3):
        raise _not_read("RoPE frequencies of its own", f"rope_freqs.weight, 1 to {factors.max():g}")
    return found


def _yarn(fields: _Fields, rope: dict[str, Any], factor: float) -> dict[str, Any]:
    original = fields.number("rope.scaling.original_context_length", 0)
    for key, usual in (("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0)):
        value = fields.number(f"rope.scaling.{key}")
        if value not in (None, usual):
            raise _not_read(f"YaRN with {key}", value)
    if original is None or factor == 1:
        raise _not_read("YaRN without its factor or original context", f"rope.scaling.factor {factor:g}")
    found = rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        value = fields.number(f"rope.scaling.{theirs}", 0)
        found |= {} if value is None else {ours: value}
    scale = fields.number("rope.scaling.attn_factor", 0)
    return found | ({} if scale in (None, 1.0) else {"attention_factor": scale * (1 + 0.1 * float(np.log(factor)))})


def _longrope(fields: _Fields, tensors: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """The RoPE of a file with factors for short and for long texts, as of Phi-3.5 and Phi-4-mini."""
    original = fields.number("rope.scaling.original_context_length", 0)
    short, long = (tensors.get(f"rope_factors_{name}.weight") for name in ("short", "long"))
    if original is None or short is None or long is None or rope.get("rope_type") != "default":
        raise _not_read("LongRoPE without its factors or original context", f"an original context of {original}")
    found = {"rope_type": "longrope", "original_max_position_embeddings": int(original)}
    found |= {"short_factor": short.data.tolist(), "long_factor": long.data.tolist()}
    scale = fields.number("rope.scaling.attn_factor", 0)
    return rope | found | ({} if scale is None else {"attention_factor": scale})


def _scaled(fields: _Fields, rope: dict[str, Any]) -> dict[str, Any]:
    """The RoPE with the file's scaling; linear where it names a factor and no kind, as in llama.cpp."""
    kind = fields.get("rope.scaling.type") or "linear"
    factor = fields.number("rope.scaling.factor", 0) or fields.number("rope.scale_linear", 0) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return rope
    if rope.get("rope_type") != "default" or any(isinstance(value, dict) for value in rope.values()):
        raise _not_read(f"RoPE scaling ({kind}) for some of its layers", f"a factor of {factor:g}")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(fields, rope, factor)
    raise _not_read(f"RoPE scaling of kind {kind}", f"a factor of {factor:g}")


def _rotated_share(config: Any, fields: _Fields, rope: dict[str, Any]) -> dict[str, Any]:
    """The share of a head's dimensions that is rotated, where the file has another than the config."""
    rotated = fields.get("rope.dimension_count")
    size = (
        fields.get("attention.key_length")
        or getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    if rotated is None or rotated == int(size * rope.get("partial_rotary_factor", 1.0)):
        return {}
    if "partial_rotary_factor" not in rope:
        raise _not_read("RoPE on a part of each head", f"{rotated} of {size} dimensions")
    return {"partial_rotary_factor": rotated / size}


def _complete_rope(config: Any, fields: _Fields, tensors: dict[str, Any]) -> None:
    rope = dict(config.rope_parameters)
    if config.model_type == "gpt_oss":  # whose config has a scaling where none is said
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    base = fields.number("rope.freq_base", 0)  # which transformers reads for most architectures
    if base is not None and "rope_theta" in rope:
        rope["rope_theta"] = base
    if any(name.startswith("rope_factors_") for name in tensors):
        rope = _longrope(fields, tensors, rope)
    else:
        rope = _scaled(fields, rope)
    if config.model_type == "gpt_oss" and rope["rope_type"] == "yarn":
        rope["truncate"] = False  # which no file says
    if "rope_freqs.weight" in tensors:
        rope = _divided(config, rope, np.asarray(tensors["rope_freqs.weight"].data, np.float64))
    config.rope_parameters = rope | _rotated_share(config, fields, rope)
    if original := rope.get("original_max_position_embeddings"):  # of which Phi-3's config has one more
        config.original_max_position_embeddings = original


def _complete_window(config: Any, fields: _Fields) -> None:
    window = fields.get("attention.sliding_window")
    if not window or window >= config.max_position_embeddings or window == getattr(config, "sliding_window", None):
        return
    layer_types = getattr(config, "layer_types", None)
    if not hasattr(config, "sliding_window") or (layer_types and "sliding_attention" not in layer_types):
        raise _not_read("sliding-window attention", f"a window of {window} tokens")
    config.sliding_window = int(window)


_EXPERT_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def complete_config(config: Any, reader: Any) -> None:
    """Put into a file's config what it says of RoPE, windows, soft caps, the sizes of experts and LFM2's norms.

    Args:
        config: transformers', changed in place.
        reader: gguf's, of that file.

    Raises:
        ModelError: the file has a kind of one of them that cannot be put there.
        ValueError: a number that can be none of these.
    """
    fields = _Fields(reader)
    size = fields.get("attention.key_length")
    if size is not None and getattr(config, "head_dim", size) != size:
        config.head_dim = int(size)
    epsilon = fields.number("attention.layer_norm_rms_epsilon", 0)
    if epsilon is not None and hasattr(config, "norm_eps"):  # LFM2's, which older versions do not read
        config.norm_eps = epsilon
    if isinstance(getattr(config, "rope_parameters", None), dict):
        _complete_rope(config, fields, {tensor.name: tensor for tensor in reader.tensors})
    _complete_window(config, fields)
    for key, name in _EXPERT_SIZES.items():
        size = fields.number(key, 0)
        if size is not None and hasattr(config, name):
            setattr(config, name, int(size))
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = fields.number(name, 0) if fields.get(name) else None  # 0 is none, too
        if fields.get(name) is not None and cap != getattr(config, name, None):
            if not hasattr(config, name):
                raise _not_read("soft-capped logits", f"{name} {cap:g}")
            setattr(config, name, cap)
    if config.model_type == "gemma2" and config.num_hidden_layers == _GEMMA2_27B_LAYERS:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
