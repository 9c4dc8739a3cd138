"""One trace of the unmodified transformers model, shapes only.

Enters: a checkpoint, of which only the config is used. Leaves: a `TracedModel`: an onnx-ir graph of the decoder where
  - each attention is one `lora_drop::CacheAttention(query, key, value[, sinks])` node, heads split and RoPE applied,
    query [B, H, S, D], key and value [B, Hkv, S, D], sinks [H] → [B, S, H, D], attributes layer, scale, sliding_window,
    softcap; each short convolution one `lora_drop::CacheConvolution(x, gate, taps[, bias])`, x and gate [B, S, d],
    taps [d, 1, K] → [B, S, d], attribute layer; each recurrent state one
    `lora_drop::CacheRecurrence(x, decay, beta, taps[, bias][, skip])`, x [B, S, W], decay [B, S, H], or [B, S, H·Dk],
    beta [B, S, H], taps [W, 1, K], skip [H] of Mamba → [B, S, H·Dv], attribute layer (recurrences.py);
  - each mixture of experts is one `lora_drop::Experts` node (experts.py);
  - the residual stream carries the names `hidden_states.0` … `hidden_states.n` (layer i reads i and makes i+1);
  - parameters are initializers with their Hugging Face names, external and without data;
  - inputs are `input_ids` [B, S], `len_kept` [B], `logits_index` [B, R], the output is `logits` [B, R, V].
The model is built on fake tensors, so neither memory nor time depends on its weights. Knows no drop list and no target.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import NO_HEADS, CacheShape, Heads, Recurrence
from lora_drop_runtime.errors import ModelError, first_line

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.experts import TURNED
from lora_drop_export.checkpoint.foreign import refused
from lora_drop_export.weights.resolve import resolve_tensors

from .anatomy import buffer_values, decoder_layers, first_output, kv_sources, name_of, tied_names
from .attention_interface import DOMAIN, AttentionCall, register_attention
from .build import build_model
from .context import is_mlp
from .convolutions import ConvolutionCall
from .experts import name_experts, register_experts
from .norms import spell_reciprocal_roots, widen_normed
from .parameters import bind_initializers, leave_places, looked_up, narrow_parameters
from .products import spell_products
from .recurrences import RecurrenceCall, shifted_window
from .refusals import refuse_by_config, refuse_by_modules, unsupported
from .repeats import LayerCalls, alike, argument_name, expand, stand_ins
from .rotary import fuse_rotary_embedding
from .sizes import spell_known_sizes

ATTENTION_NAME = EXPERTS_NAME = "lora_drop_trace"


@dataclass
class TracedModel:
    """The plan-independent graph, and what was seen while tracing.

    Attributes:
        graph: see the module docstring.
        parameters: name → shape of the weights that a checkpoint has to give.
        windows: sliding window of each layer in positions, 0 for none; of a convolution the positions that it mixes,
            also of that before a recurrent state.
        heads: of each layer's attention, `NO_HEADS` where it has none; of a convolution one, as wide as a half of its
            channels.
        recurrence: of the `recurrent_layers`.
        kv_sources: layers whose K and V others take.
        layers_prefix: name of the list of decoder layers, e.g. `model.layers`.
        embedding_only: parameters that are only looked up row by row.
        expert_shares: of parameters that are experts', the share that one token reads.
        tied: parameter names that are another parameter under a second name.
    """

    graph: ir.Model
    parameters: dict[str, tuple[int, ...]]
    hidden_size: int
    vocab_size: int
    windows: tuple[int, ...]
    heads: tuple[Heads, ...]
    kv_sources: tuple[int, ...]
    layers_prefix: str
    embedding_only: frozenset[str]
    expert_shares: dict[str, Fraction]
    tied: dict[str, str]
    recurrence: Recurrence | None = None
    recurrent_layers: tuple[int, ...] = ()

    def cache(self, dtype: str, kv_dtype: str | None) -> CacheShape:
        """Of activations of this dtype, and entries of that one."""
        return CacheShape(self.heads, dtype, kv_dtype, self.recurrence, self.recurrent_layers)


@dataclass
class _Calls:
    """What the attention function saw, by layer."""

    layers: list[int] = field(default_factory=list)  # of each call, in order
    windows: dict[int, int] = field(default_factory=dict)
    heads: dict[int, Heads] = field(default_factory=dict)
    scales: dict[int, tuple[float, float]] = field(default_factory=dict)  # and softcaps
    keys: dict[int, Any] = field(default_factory=dict)
    recurrences: dict[int, Recurrence] = field(default_factory=dict)

    def _note(self, call: AttentionCall | ConvolutionCall | RecurrenceCall, noted: Mapping[int, Any]) -> int:
        """One call; returns its layer."""
        layer = int(call.module.layer_idx)
        if layer in noted:
            raise unsupported("decoder layers with more than one attention", getattr(call.module, "config", None))
        self.layers.append(layer)
        self.windows[layer] = max(shifted_window(call), self.windows.get(layer, 0))
        return layer

    def note(self, call: AttentionCall | ConvolutionCall, heads: Heads, scale: tuple[float, float], key: Any) -> int:
        """One call of an attention or a convolution; returns its layer."""
        layer = self._note(call, self.heads)
        self.heads[layer], self.scales[layer], self.keys[layer] = heads, scale, key
        return layer

    def note_recurrence(self, call: RecurrenceCall) -> int:
        """One call of what changes a state; returns its layer."""
        layer = self._note(call, self.recurrences)
        self.recurrences[layer] = call.form
        return layer

    @property
    def kv_sources(self) -> tuple[int, ...]:
        """Layers whose K another layer was called with."""
        first: dict[int, int] = {}
        owners = {layer: first.setdefault(id(key), layer) for layer, key in self.keys.items()}
        return tuple(sorted({owner for layer, owner in owners.items() if owner != layer}))

    def of(self, layer: int) -> tuple[object, ...]:
        """What tells one layer from another."""
        found = (self.windows, self.heads, self.scales, self.recurrences)
        return tuple(one.get(layer) for one in found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about its own internals; errors still come as exceptions."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "transformers")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _not_initialised() -> Iterator[None]:
    """Let transformers draw no weights: fake tensors have none, and ModernBERT's way to draw them reads them."""
    from transformers import PreTrainedModel

    initialize = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = lambda *_, **__: None
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = initialize


def _emit_convolution(call: ConvolutionCall, calls: _Calls) -> Any:
    """One CacheConvolution node in place of a convolution, and a note of it in `calls`."""
    import torch

    layer = calls.note(call, Heads(1, 1, call.key.shape[3]), (1.0, 0.0), call.x)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::CacheConvolution",
        (call.x, call.gate, call.taps, *(() if call.bias is None else (call.bias,))),
        {"layer": layer},
        dtype=call.x.dtype,
        shape=call.x.shape,
        version=1,
    )


def _emit_recurrence(call: RecurrenceCall, calls: _Calls) -> Any:
    """One CacheRecurrence node in place of what changes a state, and a note of it in `calls`."""
    import torch

    form, layer = call.form, calls.note_recurrence(call)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::CacheRecurrence",
        (call.x, call.decay, call.beta, call.taps, *(one for one in (call.bias, call.skip) if one is not None)),
        {"layer": layer},
        dtype=call.x.dtype,
        shape=(*call.x.shape[:2], form.heads * form.value_dim),
        version=1,
    )


def _emit_attention(call: AttentionCall | ConvolutionCall | RecurrenceCall, calls: _Calls) -> Any:
    """One CacheAttention node in place of an attention, and a note of it in `calls`."""
    import torch

    if isinstance(call, RecurrenceCall):
        return _emit_recurrence(call, calls)
    if isinstance(call, ConvolutionCall):
        return _emit_convolution(call, calls)
    batch, heads, sequence, head_dim = call.query.shape
    layer = calls.note(call, Heads(heads, call.key.shape[1], head_dim), (call.scale, call.softcap), call.key)
    (output,) = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::CacheAttention",
        (call.query, call.key, call.value, *(() if call.sinks is None else (call.sinks,))),
        attrs={"layer": layer, "scale": call.scale, "sliding_window": call.window, "softcap": call.softcap},
        dtypes=(call.query.dtype,),
        shapes=((batch, sequence, heads, head_dim),),
        version=1,
    )
    return output


@contextlib.contextmanager
def _frequencies_kept(model: Any) -> Iterator[None]:
    """Let RoPE keep the frequencies that its module is made with.

    `longrope` and `dynamic` change theirs with the longest position of a call, behind what `context_length` says.
    """
    rotaries = [module for module in model.modules() if isinstance(getattr(module, "rope_type", None), str | dict)]
    kinds = [module.rope_type for module in rotaries]  # one for all layers, or one for each type of them
    for module, kind in zip(rotaries, kinds, strict=True):
        module.rope_type = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")
    try:
        yield
    finally:
        for module, kind in zip(rotaries, kinds, strict=True):
            module.rope_type = kind


def _complex_unsqueezed() -> Any:
    """A mode in which complex numbers, in which DeepSeek-V2 rotates, get a new axis as pairs of real ones.

    torch.onnx has all that models do to them but this. The mode makes a trace a sixth slower.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Unsqueezed(TorchFunctionMode):  # type: ignore[misc]  # torch is not type-checked here
        def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is not torch.Tensor.unsqueeze or not args[0].is_complex():
                return function(*args, **(kwargs or {}))
            x, axis = args
            return torch.view_as_complex(torch.view_as_real(x).unsqueeze(axis if axis >= 0 else axis - 1))

    return Unsqueezed()


def _step_module(model: Any, layers: Any) -> Any:
    """A module whose forward is one step; marks the residual stream and gathers the rows that want logits."""
    import torch

    def mark(tensor: Any, name: str) -> Any:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Mark", (tensor,), {"name": name}, dtype=tensor.dtype, shape=tensor.shape, version=1
        )

    def mark_input(index: int, own: Collection[int]) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            rest = [mark(one, argument_name(index, n)) if n in own else one for n, one in enumerate(args[1:], 1)]
            return (mark(args[0], f"hidden_states.{index}"), *rest), kwargs

        return hook

    def mark_output(_: Any, __: Any, output: Any) -> Any:
        name = f"hidden_states.{len(layers)}"
        return (mark(output[0], name), *output[1:]) if isinstance(output, tuple) else mark(output, name)

    class Step(torch.nn.Module):  # type: ignore[misc]  # torch is not type-checked here
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.unmarked: frozenset[int] = frozenset()  # layers whose input has no name
            self.own: Mapping[int, Collection[int]] = {}  # of layers, the places of arguments that get one

        def forward(self, input_ids: Any, len_kept: Any, logits_index: Any) -> Any:
            def gather_rows(_: Any, args: Any) -> Any:
                hidden = args[0]
                rows = torch.onnx.ops.symbolic(
                    "GatherND",
                    (hidden, logits_index.unsqueeze(-1)),
                    {"batch_dims": 1},
                    dtype=hidden.dtype,
                    shape=(hidden.shape[0], logits_index.shape[1], hidden.shape[2]),
                    version=13,
                )
                return (rows,)

            marked = [(i, layer) for i, layer in enumerate(layers) if i not in self.unmarked]
            hooks = [
                layer.register_forward_pre_hook(mark_input(i, self.own.get(i, ())), with_kwargs=True)
                for i, layer in marked
            ]
            hooks.append(layers[-1].register_forward_hook(mark_output))
            hooks.append(model.get_output_embeddings().register_forward_pre_hook(gather_rows))
            try:
                position_ids = len_kept[:, None] + torch.arange(input_ids.shape[1])[None, :]
                return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            finally:
                for hook in hooks:
                    hook.remove()

    return Step().eval()


def _example_inputs() -> tuple[Any, ...]:
    import torch

    def zeros(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.int64)

    return zeros(3, 5), zeros(3), zeros(3, 2)


def _dry_run(wrapper: Any, layers: Any) -> tuple[_Calls, LayerCalls]:
    """Run once on fake tensors to see that the decoder has the usual shape, with errors that name what is not."""
    calls, seen = _Calls(), LayerCalls()
    register_attention(ATTENTION_NAME, lambda call: _emit_attention(call, calls))
    try:
        with seen.noted(layers):
            wrapper(*_example_inputs())
    except IndexError:
        raise unsupported("decoder layers that do not take the hidden states as first argument", None) from None
    except ModelError:
        raise
    except Exception as error:  # whatever a model of another shape stumbles over
        raise ModelError(
            "The model cannot be run step by step.",
            note=f"Model type {wrapper.model.config.model_type!r}: {first_line(error)}",
            hint="Check the sizes in config.json. A decoder is needed whose layers are attention through transformers' "
            "attention interface and MLP.",
        ) from error
    config = wrapper.model.config
    if len(seen.outputs) != len(layers):
        raise unsupported("decoder layers that are not called once each, in order", config)
    if any(args[0].dim() != 3 for args, _ in seen.arguments):
        raise unsupported("several residual streams beside each other", config)
    if any(args[0].shape != first_output(y).shape for (args, _), y in zip(seen.arguments, seen.outputs, strict=True)):
        raise unsupported("decoder layers that change the shape of the hidden states", config)
    mixing = [layer for layer in range(len(layers)) if not is_mlp(config, layer)]
    if list(dict.fromkeys(calls.layers)) != mixing:
        raise unsupported(
            "decoder layers without exactly one attention through transformers' attention interface", config
        )
    if len(set(calls.recurrences.values())) > 1:
        raise unsupported("recurrent states of several shapes", config)
    if not calls.heads:
        raise unsupported("no attention", config)
    if calls.kv_sources != kv_sources(config):
        raise unsupported("layers that take the K and V of others", config)
    return calls, seen


def _export(wrapper: Any) -> Any:
    import torch

    register_attention(ATTENTION_NAME, lambda call: _emit_attention(call, _Calls()))  # what it calls is known by now
    batch, sequence, rows = (torch.export.Dim(name) for name in ("batch", "sequence", "rows"))
    try:
        return torch.onnx.export(
            wrapper,
            _example_inputs(),
            dynamo=True,
            opset_version=23,  # the newest for which onnxscript fuses RMSNormalization
            input_names=["input_ids", "len_kept", "logits_index"],
            output_names=["logits"],
            dynamic_shapes=({0: batch, 1: sequence}, {0: batch}, {0: batch, 1: rows}),
            optimize=False,
            verbose=False,
        )
    except Exception as error:  # torch wraps what its tracer stumbles over in classes of its own
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ModelError(
            "The model cannot be traced into one graph.",
            note=f"Model type {wrapper.model.config.model_type!r}: {first_line(reason)}",
            hint="Choose a decoder whose operations ONNX has, in real numbers, and without control flow that depends on"
            " its data.",
        ) from error


def _name_residual_stream(model: ir.Model) -> None:
    """Replace Mark nodes by names: the value a mark read takes the mark's name."""
    for node in [n for n in model.graph if n.domain == DOMAIN and n.op_type == "Mark"]:
        source, mark = node.inputs[0], node.outputs[0]
        assert source is not None
        mark.replace_all_uses_with(source)
        source.name = node.attributes["name"].as_string()
        model.graph.remove(node, safe=True)


def _graph(wrapper: Any, layers: Any, calls: _Calls, seen: LayerCalls, tied: dict[str, str], fake: Any) -> ir.Model:
    """The graph of a dry run: layers that are alike are traced once."""
    model = wrapper.model
    prefix, stored = name_of(model, layers), model.state_dict().keys()
    with refused("The model's config cannot be used.", "config.json"):
        buffers = buffer_values(model)
    shared = any(name.startswith(f"{prefix}.") for names in tied.items() for name in names)
    attentions = [calls.of(layer) for layer in range(len(layers))]
    kinds = [] if shared else alike(layers, seen, attentions, prefix, buffers)
    wrapper.own = {kind[0]: seen.own(kind[0]) for kind in kinds}
    turned = _complex_unsqueezed() if seen.is_complex else contextlib.nullcontext()
    with fake, _frequencies_kept(model), turned, stand_ins(layers, kinds, seen) as wrapper.unmarked:
        program = _export(wrapper)
    bind_initializers(program.model, buffers, stored)
    spell_reciprocal_roots(program.model)
    spell_known_sizes(program.model)
    program.optimize()
    spell_products(program.model)
    _name_residual_stream(program.model)
    fuse_rotary_embedding(program.model)
    widen_normed(program.model)
    expand(program.model, kinds, seen, prefix, stored)
    graph: ir.Model = program.model
    return graph


def trace(checkpoint: Checkpoint, dtype: str) -> TracedModel:
    """Trace the model that the checkpoint's config describes; its weights are not read.

    Args:
        checkpoint: of a causal language model.
        dtype: `float32`, `float16` or `bfloat16`, the dtype of weights and activations.

    Raises:
        ModelError: the model has a feature that a step graph cannot hold; the message names it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = checkpoint.config
    refuse_by_config(config)
    register_attention(ATTENTION_NAME, lambda call: _emit_attention(call, _Calls()))  # transformers looks for the name
    register_experts(EXPERTS_NAME)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _quiet():
        with _not_initialised():
            model = build_model(checkpoint, dtype, ATTENTION_NAME, EXPERTS_NAME)
        layers = decoder_layers(model)
        refuse_by_modules(model, layers)
        wrapper = _step_module(model, layers)
        with _frequencies_kept(model):
            calls, seen = _dry_run(wrapper, layers)
        tied = tied_names(model)
        resolve_tensors(checkpoint, {name: tuple(p.shape) for name, p in model.named_parameters()}, tied)
    with _quiet():
        graph = _graph(wrapper, layers, calls, seen, tied, fake)
    expert_shares = name_experts(graph.graph, config.model_type in TURNED)
    narrow_parameters(graph.graph, dtype)
    parameters = leave_places(graph)
    return TracedModel(
        graph=graph,
        parameters=parameters,
        hidden_size=int(config.hidden_size),
        vocab_size=model.get_output_embeddings().weight.shape[0],
        windows=tuple(calls.windows.get(layer, 0) for layer in range(len(layers))),
        heads=tuple(calls.heads.get(layer, NO_HEADS) for layer in range(len(layers))),
        kv_sources=calls.kv_sources,
        layers_prefix=name_of(model, layers),
        embedding_only=looked_up(graph, parameters),
        expert_shares=expert_shares,
        tied=tied,
        recurrence=next(iter(calls.recurrences.values()), None),
        recurrent_layers=tuple(sorted(calls.recurrences)),
    )
