"""transformers' attention interface, in the one shape that the trace, the reference and the teacher forcing want.

Enters: what transformers passes to an attention function. Leaves: an `AttentionCall` to a function of ours, and its
result [B, S, H, D] back. Features that no step graph holds are refused here, whoever runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lora_drop_runtime.errors import ModelError

from .context import window_within
from .refusals import unsupported

DOMAIN = "lora_drop"  # of the nodes that a trace makes
_SMALLEST = float(np.finfo(np.float32).tiny)
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {}  # that are registered, by name


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention, RoPE applied and heads split.

    Attributes:
        module: the attention module; its `layer_idx` is the layer.
        query: [B, H, S, D]; key and value: [B, Hkv, S, D], the narrower of them with zeros at the end, as most latent
            attention has them: caches of K and V have one shape.
        scale: of the scores.
        window: sliding window in positions, the token itself included; 0 for none.
        softcap: of the scores; 0 for none.
        sinks: [H], a score of each head that takes its share of the softmax and has no value; None for none.
    """

    module: Any
    query: Any
    key: Any
    value: Any
    scale: float
    window: int
    softcap: float
    sinks: Any = None

    @property
    def is_plain(self) -> bool:
        """Whether its softmax is that of the scores and of nothing else."""
        return not self.softcap and self.sinks is None

    def only(self, row: int, tokens: int) -> AttentionCall:
        """The first tokens of a row."""
        query, key, value = (tensor[row : row + 1, :, :tokens] for tensor in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def mixed(self, key: Any, value: Any, seen: Any) -> Any:
        """Attention [B, S, H, D] of the queries to K and V [B, Hkv, C, D], each as far as `seen` [S, C] says."""
        group = self.query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))  # [B, H, C, D]
        return (self.weights(self.query @ key.mT, seen) @ value).transpose(1, 2)

    def weights(self, products: Any, seen: Any) -> Any:
        """The softmax [.., H, S, C] of queries times keys, as far as they are seen, less what the sinks take of it.

        Args:
            products: [.., H, S, C], not yet scaled.
            seen: bool, of a shape that broadcasts to theirs.
        """
        import torch

        scores = products * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.to(scores.dtype).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def _masked_window(module: Any) -> int | None:
    """The window of the mask that transformers makes for this layer, whatever its attention is told."""
    types = getattr(module.config, "layer_types", None)
    is_windowed = types and types[module.layer_idx] == "sliding_attention"
    return getattr(module.config, "sliding_window", None) if is_windowed else None


def _widened(tensor: Any, width: int) -> Any:
    """Channels of zeros at its end: they add nothing to a product, and as values they leave as zeros."""
    import torch

    return tensor if tensor.shape[3] == width else torch.nn.functional.pad(tensor, (0, width - tensor.shape[3]))


def register_attention(name: str, attend: Callable[[Any], Any]) -> None:
    """Let models with `attn_implementation=name` call `attend` with an AttentionCall; it returns [B, S, H, D].

    A model of `exchange_convolutions` calls it with ConvolutionCalls as well, one of `exchange_recurrences` with
    RecurrenceCalls.

    The last function of a name counts: transformers looks it up at every call.
    """
    from transformers import AttentionInterface

    def attention(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, None]:
        for present, feature in (
            (attention_mask is not None, "an attention mask of its own"),
            (not getattr(module, "is_causal", True), "attention that is not causal"),
            (kwargs.get("position_bias") is not None, "an attention position bias"),
        ):
            if present:
                raise unsupported(feature, getattr(module, "config", None))
        scale = float(query.shape[3] ** -0.5 if scaling is None else scaling)
        window = window_within(module.config, sliding_window or _masked_window(module))
        softcap = float(softcap or 0.0)
        if abs(scale) < _SMALLEST or 0 < abs(softcap) < _SMALLEST:  # which engines take for none given
            raise ModelError(
                "The model's config cannot be used.",
                note=f"Its attention scales scores by {scale:g}, its soft cap is {softcap:g}: one is 0 in float32.",
                hint="Check config.json.",
            )
        width, value_width = max(key.shape[3], value.shape[3]), value.shape[3]
        query, key, value = (_widened(tensor, width) for tensor in (query, key, value))
        call = AttentionCall(module, query, key, value, scale, window, softcap, s_aux)
        mixed = attend(call)
        return (mixed if width == value_width else mixed[..., :value_width]), None

    AttentionInterface.register(name, attention)
    _FUNCTIONS[name] = attend


def attention_function(name: str) -> Callable[[Any], Any]:
    """What models with `attn_implementation=name` call."""
    return _FUNCTIONS[name]
