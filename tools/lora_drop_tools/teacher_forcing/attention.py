"""What a token may attend to where all tokens of a text run at once.

Enters: the positions of the queries, K and V from before. Leaves: the attention function that transformers calls. The
attention interface passes no user data, so what the running layer may see is set before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lora_drop_export.decoder.attention_interface import AttentionCall, register_attention
from lora_drop_export.decoder.convolutions import ConvolutionCall, exchange_convolutions
from lora_drop_export.decoder.own_attentions import tell_attention
from lora_drop_export.decoder.recurrences import RecurrenceCall, exchange_recurrences, shifted_window

ATTENTION_NAME = "lora_drop_teacher_forcing"
Entries: TypeAlias = "dict[type, tuple[Any, Any]]"  # class of a call → what its layer keeps of the tokens


@dataclass
class Attention:
    """What the attention function of the layer that is running may see, and what it saw.

    Attributes:
        positions: of the queries, [S].
        memory: by the kind of call, K and V before the layer's own, or a state's entries.
        memory_positions: theirs.
        last_visible: of the memory, for each query; [S].
        seen: by the kind of call, K and V of the layer's own tokens, [B, Hkv, S, D], or a state's entries.
        window: positions of a sliding window, 0 for none; of the call that runs.
        shifted_window: positions that a hole would shift.
        state_values: values of a row's recurrent state, 0 for none.
        masks: those that were made before.
    """

    positions: Any
    memory: Entries | None = None
    memory_positions: Any = None
    last_visible: Any = None
    seen: Entries = field(default_factory=dict)
    window: int = 0
    shifted_window: int = 0
    state_values: int = 0
    masks: dict[Any, Any] | None = None


_running: Attention


def _mask(state: Attention) -> Any:
    """bool [S, M + S]: which K/V a query sees, those of the memory first."""
    import torch

    assert state.masks is not None
    memory = 0 if state.memory is None else len(state.memory_positions)
    key = (tuple(state.positions.tolist()), memory, state.window)
    if key not in state.masks:
        rows = state.positions[:, None]
        own = state.positions[None] <= rows
        places = state.positions
        if state.memory is not None:
            own = own & (state.positions[None] > state.last_visible[:, None])
            own = torch.cat([state.memory_positions[None] <= state.last_visible[:, None], own], dim=1)
            places = torch.cat([state.memory_positions, places])
        if state.window:
            own = own & (places[None] > rows - state.window)
        state.masks[key] = own
    return state.masks[key]


def _attend(call: AttentionCall | ConvolutionCall | RecurrenceCall) -> Any:
    """Attention of tokens [B, H, S, D] to the memory as far as each may see it, and causally to each other."""
    import torch

    key, value = call.key, call.value
    state = _running
    state.seen[type(call)], state.window = (key, value), call.window
    state.shifted_window = max(state.shifted_window, shifted_window(call))
    if isinstance(call, RecurrenceCall):
        state.state_values = call.form.state_values
    causal = state.memory is None and not call.window
    if state.memory is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(state.memory[type(call)], (key, value), strict=True))
    if not isinstance(call, AttentionCall) or not call.is_plain:
        return call.mixed(key, value, _mask(state)).contiguous()
    query, group = call.query, call.query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    seen = {"is_causal": True} if causal else {"attn_mask": _mask(state)}
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=call.scale, **seen)
    return mixed.transpose(1, 2).contiguous()


def exchange_attention(model: Any) -> None:
    """Let a model's layers call `_attend`, for good."""
    register_attention(ATTENTION_NAME, _attend)
    tell_attention(model, ATTENTION_NAME)
    exchange_convolutions(model)
    exchange_recurrences(model)


def begin(state: Attention) -> None:
    """The next layer sees this."""
    global _running
    _running = state
