"""A text as a bundle would decode it token by token, but all tokens of a layer at once; for fitting and profiling.

Enters: a transformers model, token ids, which tokens are LoRA steps, surrogates. Leaves: hidden states and logits, with
gradients for the surrogates. Knows no optimizer and no files. Any decoder family runs, through its own layers and
transformers' attention interface.

Because the tokens are given, layer i needs only layer i − 1. What a token attends to is what it finds in the caches at
deployment (docs/algorithm.md), so there are two streams through the layers:

    exact      [B, T, d]   every token through the full model
    decoded    what a bundle computes. If refreshes are exact [B, S, d], the S tokens of LoRA steps: in kept layers
               they attend to exact K/V up to the last refresh and to this stream's own since.
               If refreshes take nothing back [B, T, d]: in a kept layer every token attends to all before it; in a
               dropped layer only prompt and refresh tokens run, and they see only each other (holes).
               Other policies have no such stream (layout.check_policy)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import Policy

from lora_drop_export.decoder.anatomy import Recorder, between_halves, decoder_layers, head_replaced
from lora_drop_export.decoder.attention_interface import AttentionCall, register_attention

from .layout import Layout
from .surrogates import Surrogates, features, product

ATTENTION_NAME = "lora_drop_teacher_forcing"


@dataclass(frozen=True)
class ExactLayer:
    """What the decoded stream needs of the exact one at a layer.

    Attributes:
        keys, values: [B, Hkv, T, D], RoPE applied.
        output: [B, T, d].
        middle: the residual stream between attention and MLP, [B, T, d].
    """

    keys: Any
    values: Any
    output: Any
    middle: Any


@dataclass
class _Attention:
    """What the attention function of the layer that is running may see, and what it saw."""

    positions: Any  # of the queries, [S]
    memory: tuple[Any, Any] | None = None  # K and V before the layer's own
    memory_positions: Any = None
    last_visible: Any = None  # of the memory, for each query; [S]
    seen: tuple[Any, Any] | None = None
    window: int = 0
    masks: dict[Any, Any] | None = None


_attention_state: _Attention  # the attention interface passes no user data


def _mask(state: _Attention) -> Any:
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


def _attend(call: AttentionCall) -> Any:
    """Attention of tokens [B, H, S, D] to the memory as far as each may see it, and causally to each other."""
    import torch

    query, key, value, softcap = call.query, call.key, call.value, call.softcap
    state = _attention_state
    state.seen, state.window = (key, value), call.window
    causal = state.memory is None and not call.window
    if state.memory is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(state.memory, (key, value), strict=True))
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if causal and not softcap:
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=call.scale)
        return mixed.transpose(1, 2).contiguous()
    mask = _mask(state)
    if not softcap:
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scale)
        return mixed.transpose(1, 2).contiguous()
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * call.scale / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous()


_LAYOUTS = 16  # arguments and masks of so many are kept


class TeacherForcing:
    """Runs the layers of one model over given texts.

    Args:
        model: transformers' causal language model in eval mode; its attention is exchanged for good.
    """

    def __init__(self, model: Any) -> None:
        register_attention(ATTENTION_NAME, _attend)
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.layers = decoder_layers(model)
        self.device = model.get_input_embeddings().weight.device
        self._arguments: dict[Any, list[tuple[Any, Any]]] = {}
        self._masks: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def embed(self, ids: Any) -> Any:
        """The first layer's input [B, T, d] of token ids [B, T]."""
        import torch

        return self._record(ids, torch.arange(ids.shape[1], device=self.device))[0]

    def windows(self) -> tuple[int, ...]:
        """Each layer's sliding window in positions, 0 for none; as its attention function is told."""
        import torch

        ids = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            hidden, found = self.embed(ids), []
            for index in range(len(self)):
                hidden = self.exact_layer(index, hidden).output
                found.append(_attention_state.window)
        return tuple(found)

    def exact_layer(self, index: int, hidden: Any) -> ExactLayer:
        """A layer in full over whole texts [B, T, d]."""
        import torch

        positions = torch.arange(hidden.shape[1], device=self.device)
        output, middle, (keys, values) = self._run(index, hidden, _Attention(positions))
        return ExactLayer(keys, values, output, middle)

    def exact(self, ids: Any) -> list[ExactLayer]:
        """All layers over texts [B, T]; keep them where several plans see the same texts."""
        import torch

        with torch.no_grad():
            hidden, layers = self.embed(ids), []
            for index in range(len(self)):
                layers.append(self.exact_layer(index, hidden))
                hidden = layers[-1].output
        return layers

    def decoded_layer(
        self,
        index: int,
        hidden: Any,
        exact: ExactLayer,
        layout: Layout,
        plan: DropPlan,
        surrogates: Surrogates,
        policy: Policy,
    ) -> Any:
        """A layer, kept or dropped, of the decoded stream: [B, S, d] if refreshes are exact, else [B, T, d]."""
        if index not in plan.drop_layers:
            return self.kept_layer(index, hidden, exact, layout, policy)
        full = self.full_tokens(index, hidden, exact, layout, policy)
        x = hidden if policy.exact_refreshes else hidden[:, layout.lora]
        for site, state in self.sites(index, plan, full):
            feature, base = features(x, state, layout, plan.form)
            x = base + product(feature, surrogates.get(site))
        return self.joined(x, full, layout, policy)

    def kept_layer(self, index: int, hidden: Any, exact: ExactLayer, layout: Layout, policy: Policy) -> Any:
        """A kept layer over the decoded stream."""
        import torch

        if not policy.exact_refreshes:
            return self._run(index, hidden, _Attention(torch.arange(hidden.shape[1], device=self.device)))[0]
        state = _Attention(
            layout.lora,
            memory=(exact.keys, exact.values),
            memory_positions=torch.arange(exact.keys.shape[2], device=self.device),
            last_visible=layout.anchor,
        )
        return self._run(index, hidden, state)[0]

    def full_tokens(
        self, index: int, hidden: Any, exact: ExactLayer, layout: Layout, policy: Policy
    ) -> tuple[Any, Any]:
        """What a dropped layer computes of prompt and refresh tokens: middle and output, [B, T − S, d] each."""
        if policy.exact_refreshes:
            return exact.middle[:, layout.full], exact.output[:, layout.full]
        output, middle, _ = self._run(index, hidden[:, layout.full], _Attention(layout.full))
        return middle, output

    def sites(self, index: int, plan: DropPlan, full: tuple[Any, Any]) -> list[tuple[str, Any]]:
        """A dropped layer's surrogates by name, in order, each with what the full tokens gave there."""
        if plan.injection == "block":
            return [(f"{index}", full[1])]
        return [(f"{index}.attn", full[0]), (f"{index}.mlp", full[1])]

    def joined(self, lora: Any, full: tuple[Any, Any], layout: Layout, policy: Policy) -> Any:
        """A dropped layer's output in the decoded stream, from that of LoRA steps [B, S, d] and of full tokens."""
        import torch

        if policy.exact_refreshes:
            return lora
        output = torch.empty(lora.shape[0], len(layout.is_lora), lora.shape[2], dtype=lora.dtype, device=lora.device)
        return output.index_copy(1, layout.lora, lora).index_copy(1, layout.full, full[1])

    def decode(
        self,
        exact: Sequence[ExactLayer],
        ids: Any,
        layout: Layout,
        plan: DropPlan,
        surrogates: Surrogates,
        policy: Policy,
    ) -> Any:
        """The last layer's output of the decoded stream; with gradients for the surrogates."""
        first = min(plan.drop_layers, default=len(exact))
        before = exact[first - 1].output if first else self.embed(ids)  # nothing differs before the first dropped layer
        hidden = before[:, layout.lora] if policy.exact_refreshes else before
        for index in range(first, len(exact)):
            hidden = self.decoded_layer(index, hidden, exact[index], layout, plan, surrogates, policy)
        return hidden

    def logits(self, hidden: Any) -> Any:
        """What the model makes of its last layer's output [B, S, d]: norm, head and whatever follows; [B, S, V]."""
        import torch

        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        recorded = Recorder(self.layers, hidden)
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            recorded.restore()

    def _record(self, ids: Any, positions: Any) -> tuple[Any, list[tuple[Any, Any]]]:
        """The first layer's input of ids [B, S] at positions [S], and each layer's other arguments there."""
        import torch

        recorded = Recorder(self.layers)
        try:
            with torch.no_grad(), head_replaced(self.model, lambda x: x[..., :1]):
                self.model(input_ids=ids, position_ids=positions.expand(len(ids), -1), use_cache=False)
        finally:
            recorded.restore()
        return recorded.inputs[0], recorded.arguments

    def _run(self, index: int, hidden: Any, state: _Attention) -> tuple[Any, Any, tuple[Any, Any]]:
        """One layer; its output, the stream between its halves, and its K and V."""
        import torch

        global _attention_state
        key = (hidden.shape[0], tuple(state.positions.tolist()))
        if key not in self._arguments:
            if len(self._arguments) >= _LAYOUTS:
                self._arguments.clear()
                self._masks.clear()
            ids = torch.zeros((hidden.shape[0], len(state.positions)), dtype=torch.int64, device=self.device)
            self._arguments[key] = self._record(ids, state.positions)[1]
        state.masks = self._masks
        _attention_state = state
        middle: list[Any] = []
        hook = between_halves(self.layers[index]).register_forward_pre_hook(lambda _, args: middle.append(args[0]))
        args, kwargs = self._arguments[key][index]
        output = self.layers[index](hidden, *args, **kwargs)
        hook.remove()
        assert state.seen is not None
        return output[0] if isinstance(output, tuple) else output, middle[0], state.seen
