"""A text as a bundle would decode it token by token, but all tokens of a layer at once; for fitting and profiling.

Enters: a transformers model, token ids, which tokens are LoRA steps, surrogates. Leaves: hidden states and logits, with
gradients for the surrogates. Knows no optimizer and no files. Any decoder family runs, through its own layers and
transformers' attention interface.

Because the tokens are given, layer i needs only layer i − 1. What a token attends to is what it finds in the caches at
deployment (docs/algorithm.md), so there are two streams through the layers:

    exact      [B, T, d]   every token through the full model
    decoded    what a bundle computes. If refreshes are exact [B, S, d], the S tokens of LoRA steps: in kept
               attentions they attend to exact K/V up to the last refresh and to this stream's own since.
               If refreshes take nothing back [B, T, d]: in a kept attention every token attends to all before it; in
               a dropped one only prompt and refresh tokens run. They see only each other (holes), or all tokens
               before them, where LoRA steps write K/V of what they are given (the policy fills).
               Other policies have no such stream (layout.check_policy)

A half that is kept runs alone: the first one is left at what lies between them, the second one begins there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.sites import layer_of

from lora_drop_export.decoder.anatomy import (
    Recorder,
    between_halves,
    decoder_layers,
    first_output,
    head_replaced,
    kv_sources,
)
from lora_drop_export.decoder.recurrences import RecurrenceCall
from lora_drop_export.decoder.refusals import is_of_experts

from . import attention
from .attention import Attention
from .dropped import DroppedLayer
from .exact import ExactLayer
from .layout import Layout
from .surrogates import Surrogates, product

_LAYOUTS = 16  # arguments and masks of so many are kept


@dataclass(frozen=True)
class LayerParameters:
    """Of one layer.

    Attributes:
        first_half: parameters that its first half computes with.
        kept: of these, that K and V, or a state's entries, are made with.
        kv_values: of K and V, a token.
        state_values: of its recurrent state, a row.
    """

    first_half: list[Any]
    kept: list[Any]
    kv_values: int
    state_values: int


class _Between(Exception):
    """A layer has come to what lies between its halves."""


def _without_halves(index: int) -> ModelError:
    return ModelError(
        "The model's layers have no halves.",
        note=f"Attention and MLP of layer {index} run beside each other, or what lies between them was not found.",
        hint="Name whole layers.",
    )


def _near(a: Any, b: Any) -> bool:
    """Equal as far as the dtype's sums in another order are."""
    import torch

    eps = 32 * torch.finfo(b.dtype).eps
    return bool(torch.allclose(a, b, rtol=eps, atol=eps * float(b.abs().mean())))


def _needs_more(what: str) -> ModelError:
    return ModelError(
        "The model's layers cannot be run one by one over a text.",
        note=f"Some of them take {what}, as in the smaller models of Gemma 4.",
        hint="Export it without adapters; --policy lossless with --draft ngram needs none.",
    )


def check_config(config: Any) -> None:
    """Refuse a model whose config says that layers take the K and V of others, before its weights are read.

    Raises:
        ModelError: it says so.
    """
    if kv_sources(config):
        raise _needs_more("the K and V of other layers")


class TeacherForcing:
    """Runs the layers of one model over given texts.

    Args:
        model: transformers' causal language model in eval mode; its attention is exchanged for good.
        recompute: `decode` keeps layers' inputs alone for the gradients, and runs the layers again for them.

    Raises:
        ModelError: a layer needs more than the residual stream and positions.
    """

    def __init__(self, model: Any, recompute: bool = False) -> None:
        attention.exchange_attention(model)
        self._recompute = recompute
        self.model = model
        self.layers = decoder_layers(model)
        self.device = model.get_input_embeddings().weight.device
        self._arguments: dict[Any, list[tuple[Any, Any]]] = {}
        self._masks: dict[Any, Any] = {}
        self._check_arguments()

    def __len__(self) -> int:
        return len(self.layers)

    def embed(self, ids: Any) -> Any:
        """The first layer's input [B, T, d] of token ids [B, T]."""
        import torch

        return self._record(ids, torch.arange(ids.shape[1], device=self.device))[0]

    def windows(self) -> tuple[int, ...]:
        """Each layer's sliding window in positions, or its convolution's, 0 for none; as its attention is told."""
        import torch

        ids = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            hidden, found = self.embed(ids), []
            for index in range(len(self)):
                state = Attention(torch.arange(2, device=self.device))
                hidden = self._run(index, hidden, state)[0]
                found.append(state.shifted_window)
        return tuple(found)

    def exact_layer(self, index: int, hidden: Any) -> ExactLayer:
        """A layer in full over whole texts [B, T, d]."""
        import torch

        positions = torch.arange(hidden.shape[1], device=self.device)
        state = Attention(positions)
        output, middle = self._run(index, hidden, state)
        return ExactLayer(state.seen, output, middle, hidden)

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
        begun: dict[str, Any] | None = None,
    ) -> Any:
        """A layer of the decoded stream, with or without sites: [B, S, d] if refreshes are exact, else [B, T, d].

        Args:
            begun: the same for all layers of a text where the surrogates have a change (dropped.py).
        """
        if not plan.sites_of(index):
            return self.kept_layer(index, hidden, exact, layout, policy)
        layer = DroppedLayer(self, index, hidden, exact, layout, plan, policy, {} if begun is None else begun)
        for site in layer.sites:
            feature, base = layer.features(site)
            layer.x = base + product(feature, surrogates.get(site))
        return layer.output()

    def sight(self, hidden: Any, exact: ExactLayer, layout: Layout, policy: Policy) -> Attention:
        """What the tokens of the decoded stream see in a kept attention."""
        import torch

        if not policy.exact_refreshes:
            return Attention(torch.arange(hidden.shape[1], device=self.device))
        return Attention(
            layout.lora,
            memory=exact.entries,
            memory_positions=torch.arange(exact.output.shape[1], device=self.device),
            last_visible=layout.anchor,
        )

    def kept_layer(self, index: int, hidden: Any, exact: ExactLayer, layout: Layout, policy: Policy) -> Any:
        """A kept layer over the decoded stream."""
        return self._run(index, hidden, self.sight(hidden, exact, layout, policy))[0]

    def full_tokens(self, index: int, hidden: Any, layout: Layout, policy: Policy) -> tuple[Any, Any]:
        """Output and middle of prompt and refresh tokens, [B, T − S, d] each, in a layer whose attention is dropped.

        Requires: refreshes take nothing back.
        """
        import torch

        if not policy.fills:
            return self._run(index, hidden[:, layout.full], Attention(layout.full))
        output, middle = self._run(index, hidden, Attention(torch.arange(hidden.shape[1], device=self.device)))
        return output[:, layout.full], middle[:, layout.full]

    def first_half(self, index: int, hidden: Any, state: Attention) -> Any:
        """The residual stream after a layer's attention [B, S, d]; its MLP is not run."""
        reached: list[Any] = []

        def leave(_: Any, args: tuple[Any, ...]) -> None:
            reached.append(args[0])
            raise _Between

        with contextlib.suppress(_Between):
            self._call(index, hidden, state, leave)
        return reached[0]

    def second_half(self, index: int, middle: Any) -> Any:
        """A layer's output [B, S, d] of the residual stream after its attention.

        A layer has one forward: its attention runs over a single token of zeros, and the stream is put in the place of
        what that gives. There, and not as an argument, since a layer adds to it, and Gemma 4's router reads it, too.
        """
        import torch

        with_gradients = torch.is_grad_enabled()

        def begin(_: Any, args: tuple[Any, ...]) -> None:
            torch.set_grad_enabled(with_gradients)  # until the layer has run
            args[0].resize_(middle.shape).copy_(middle)

        nothing = torch.zeros_like(middle[:1, :1])
        with torch.no_grad():  # what is resized may have none
            return self._call(index, nothing, Attention(torch.arange(1, device=self.device)), begin)

    def check_halves(self, plan: DropPlan) -> None:
        """Refuse halves of layers that have none, since attention and MLP run beside each other.

        Raises:
            ModelError: they do in a layer of the plan.
        """
        import torch

        halved = {layer_of(site) for site in plan.sites if not site.isdecimal()}
        with torch.no_grad():
            hidden = self.embed(torch.tensor([[0, 1]], device=self.device))
            for index in range(max(halved, default=-1) + 1):
                layer = self.exact_layer(index, hidden)
                if index in halved and (
                    between_halves(self.layers[index]) is self.layers[index]
                    or layer.middle.shape != hidden.shape  # of OPT, all rows in one line
                    or not _near(self.second_half(index, layer.middle), layer.output)
                ):
                    raise _without_halves(index)
                hidden = layer.output

    def decode(
        self,
        exact: Sequence[ExactLayer],
        ids: Any,
        layout: Layout,
        plan: DropPlan,
        surrogates: Surrogates,
        policy: Policy,
    ) -> Any:
        """The last layer's output of the decoded stream; with gradients for the surrogates.

        Args:
            surrogates: where they have a change, a run's last site has all of its map.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        run: Callable[..., Any] = self.decoded_layer
        if self._recompute and torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False)
        first = min(map(layer_of, plan.sites), default=len(exact))
        before = exact[first - 1].output if first else self.embed(ids)  # nothing differs before the first dropped layer
        hidden = before[:, layout.lora] if policy.exact_refreshes else before
        begun: dict[str, Any] = {}
        for index in range(first, len(exact)):
            hidden = run(index, hidden, exact[index], layout, plan, surrogates, policy, begun)
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

    def _check_arguments(self) -> None:
        """Refuse layers that are given K and V of others, or anything of the tokens: each is run here by itself."""
        import torch

        def of_tokens(value: Any) -> bool:
            if isinstance(value, tuple | list):
                return any(map(of_tokens, value))
            rows = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == 2
            return bool(rows and not torch.equal(value[0], value[1]))

        check_config(self.model.config)
        arguments = self._record(torch.tensor([[0], [1]], device=self.device), torch.arange(1, device=self.device))[1]
        if of_tokens([[args, list(kwargs.values())] for args, kwargs in arguments]):
            raise _needs_more("an input of their own per token")

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

    def _call(self, index: int, hidden: Any, state: Attention, between: Callable[..., Any]) -> Any:
        """One layer's output; `between` is called as a hook before what follows its attention."""
        import torch

        key = (hidden.shape[0], tuple(state.positions.tolist()))
        if key not in self._arguments:
            if len(self._arguments) >= _LAYOUTS:
                self._arguments.clear()
                self._masks.clear()
            ids = torch.zeros((hidden.shape[0], len(state.positions)), dtype=torch.int64, device=self.device)
            self._arguments[key] = self._record(ids, state.positions)[1]
        state.masks = self._masks
        attention.begin(state)
        hook = between_halves(self.layers[index]).register_forward_pre_hook(between)
        args, kwargs = self._arguments[key][index]
        try:
            output = self.layers[index](hidden, *args, **kwargs)
        finally:
            hook.remove()
        return first_output(output)

    def _run(self, index: int, hidden: Any, state: Attention) -> tuple[Any, Any]:
        """One layer; its output, and the stream between its halves."""
        middle: list[Any] = []
        output = self._call(index, hidden, state, lambda _, args: middle.append(args[0]))
        return output, middle[0]

    def parameters_of(self, index: int) -> LayerParameters:
        """What a layer's parts compute with and keep; found by what has a gradient."""
        import torch

        parameters, positions = list(self.layers[index].parameters()), torch.arange(2, device=self.device)
        first_half: list[Any] = []
        kept: list[Any] = []
        learned = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                hidden = self.embed(torch.tensor([[0, 1]], device=self.device))
                _, middle = self._run(index, hidden, state := Attention(positions))
                ends = [middle], [end for pair in state.seen.values() for end in pair]
                for group, found in zip(ends, (first_half, kept), strict=True):
                    sums = [end.sum() for end in group if end.requires_grad]
                    grads = torch.autograd.grad(sums, parameters, retain_graph=True, allow_unused=True) if sums else ()
                    found += [p for p, grad in zip(parameters, grads, strict=False) if grad is not None]
        finally:
            for parameter, before in zip(parameters, learned, strict=True):
                parameter.requires_grad_(before)
        caches = [part for kind, pair in state.seen.items() if kind is not RecurrenceCall for part in pair]
        values = sum(part.shape[1] * part.shape[3] for part in caches)
        return LayerParameters(first_half, kept, values, state.state_values)

    def experts_of(self, index: int) -> tuple[list[Any], float]:
        """Parameters of a layer's experts, and the share of them that one token reads; none where it has none."""
        import torch

        experts = [module for module in self.layers[index].modules() if is_of_experts(module)]
        shares: list[float] = []

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, chosen, _ = [*args, *kwargs.values()]
            shares.append(chosen.shape[1] / len(module.down_proj))

        hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in experts]
        if experts:
            with torch.no_grad():
                hidden = self.embed(torch.tensor([[0, 1]], device=self.device))
                self._run(index, hidden, Attention(torch.arange(2, device=self.device)))
        for hook in hooks:
            hook.remove()
        return [p for module in experts for p in module.parameters()], max(shares, default=1.0)
