"""Attention in code of its own, as GPT-Neo's and Falcon's, through transformers' attention interface after all.

Enters: transformers' model of such a family. Leaves: the same model, whose attentions make queries, keys and values as
before and give them to the attention function of a name, as other families do. Other models are told the name alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _mixed(module: Any, query: Any, key: Any, value: Any, **options: Any) -> Any:
    """What the attention function of the module's config makes of them: heads joined, [B, S, H·D]."""
    from transformers import AttentionInterface

    attend = AttentionInterface()[module.config._attn_implementation]
    return attend(module, query, key, value, None, **options)[0].flatten(2)


@functools.cache
def _gpt_neo(attention: type[Any]) -> Any:
    """Scores are not scaled; every other layer has a window."""

    class ThroughInterface(attention):  # type: ignore[misc]
        @property
        def layer_idx(self) -> int:
            return int(self.layer_id)

        def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
            query, key, value = (
                make(hidden_states).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
                for make in (self.q_proj, self.k_proj, self.v_proj)
            )
            window = self.config.window_size if self.attention_type == "local" else None
            mixed = _mixed(self, query, key, value, scaling=1.0, sliding_window=window)
            return self.out_proj(mixed), None

    return ThroughInterface


@functools.cache
def _falcon(attention: type[Any]) -> Any:
    """Queries, keys and values are one product: by groups of heads, by heads, or all queries before one key."""

    class ThroughInterface(attention):  # type: ignore[misc]
        def forward(self, hidden_states: Any, *_: Any, position_embeddings: Any = None, **__: Any) -> Any:
            from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

            groups = self.num_kv_heads
            made = self.query_key_value(hidden_states).unflatten(2, (groups, -1, self.head_dim))
            query, key, value = made[..., :-2, :].flatten(2, 3), made[..., -2, :], made[..., -1, :]
            query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            return self.dense(_mixed(self, query, key, value)), None

    return ThroughInterface


# Model type → the end of its class's name, and what it becomes. They are built with transformers' `eager`
_FORMS: Mapping[str, tuple[str, Any]] = MappingProxyType(
    {"gpt_neo": ("SelfAttention", _gpt_neo), "falcon": ("Attention", _falcon)}
)


def built_with(config: Any, attention: str) -> str:
    """The attention that a model is to be built with, to be told `attention` later."""
    return "eager" if config.model_type in _FORMS else attention


def tell_attention(model: Any, attention: str) -> None:
    """Let a model call the attention function of this name, for good."""
    if model.config.model_type not in _FORMS:
        model.set_attn_implementation(attention)
        return
    end, form = _FORMS[model.config.model_type]
    model.config._attn_implementation = attention
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__.endswith(end) and hasattr(module, "is_causal"):
            module.__class__ = form(kind)
