"""Calibrated rounding of a whole model: quantize/gptq.py on the inputs that its linear layers have over a text.

Enters: a checkpoint, the block formats of its weights, token ids. Leaves: the weights with integers, scales and zero
points, on disk. One decoder layer at a time has weights. Within it the linear layers are rounded in the order in which
they run, each on inputs that the rounded ones before it make: a layer is run over the text until the next one is
reached, then again from its beginning. Linear layers that read one tensor (q, k, v; gate, up) share its moments. So do
the experts of a mixture: gate and up of each are rounded by the inputs of all tokens, since few are sent to any one;
down by those that an expert itself makes of the tokens that are.

The checkpoint's own layer runs beside, on what its own predecessors make: each linear layer is to give on the inputs
that it will have what the checkpoint's gives on its own (`corrected`), so errors do not add up over the layers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.checkpoint.experts import DOWN, GATE_UP, ROWS, from_rows, gate_up_of, to_rows
from lora_drop_export.decoder.anatomy import first_output, name_of, put_tensor
from lora_drop_export.decoder.attention_interface import AttentionCall
from lora_drop_export.decoder.convolutions import ConvolutionCall
from lora_drop_export.decoder.recurrences import RecurrenceCall
from lora_drop_export.decoder.refusals import is_of_experts
from lora_drop_export.decoder.streamed import StreamedModel
from lora_drop_export.quantize.formats import Blocked, BlockFormat, Floats, dequantize
from lora_drop_export.quantize.gptq import (
    DAMPING,
    TIED_DAMPING,
    corrected,
    correction,
    gptq_rows,
    share_that_holds,
    triangle,
)
from lora_drop_export.quantize.rounding import finite, has_native, quantize_rows
from lora_drop_export.weights.rounded import RoundedTensor, store_rounded

_CHUNK_TOKENS = 2048  # that run through a layer at once
_SIGNS = np.array([-1, 1], np.float32)
_PROBES = 256  # rows by which the share of a correction is found that holds
_HEAD_ROWS = 8192  # of the vocabulary, in memory at once
_MOMENTS_BYTES = 1 << 31  # of experts, in memory at once


def _attend(call: AttentionCall | ConvolutionCall | RecurrenceCall) -> Any:
    """Causal attention over whole windows, [B, S, H, D]; or what a convolution makes of them."""
    import torch

    key, value = call.key, call.value
    if isinstance(call, AttentionCall) and not call.window and call.is_plain:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(call.query, key, value, is_causal=True, scale=call.scale, enable_gqa=True).transpose(1, 2)
    own = torch.arange(key.shape[2])[:, None]
    seen = own >= own.T
    if call.window:
        seen &= own - call.window < own.T
    return call.mixed(key, value, seen)


class _Moments:
    """Second moments of a layer's inputs x, and those of x with what the checkpoint's own inputs have more, [K, K]:
    of the text's first half and of its second one.
    """

    def __init__(self) -> None:
        self._own: list[Any] = [0, 0]
        self._missing: list[Any] = [0, 0]

    def add(self, x: Any, exact: Any, half: int) -> None:
        """Add inputs [..., K] of half 0 or 1; `exact` are the checkpoint's own."""
        rows = x.reshape(-1, x.shape[-1])
        self._own[half] += rows.T @ rows
        self._missing[half] += rows.T @ (exact.reshape(rows.shape) - rows)

    def triangle(self, damping: float = DAMPING) -> tuple[Any, Any] | None:
        """The layer's; None where an input is infinite or not a number."""
        return triangle(sum(self._own).numpy(), damping)

    def correction(self, factor: tuple[Any, Any], rows: Floats | None = None) -> Floats | None:
        """The layer's, or of its weights `rows`, by its `triangle`: as much of it as holds from the first half of the
        text to the second.
        """
        found = correction(*factor, sum(self._missing).numpy(), rows)
        if found is None:
            return None
        first = triangle(self._own[0].numpy())
        assert first is not None
        size = len(self._own[0])
        # The share is a ratio of two traces, of which random signs give estimates without bias (Hutchinson 1990)
        signs = np.random.default_rng(0).choice(_SIGNS, (_PROBES, size)) if size > _PROBES else None
        half = correction(*first, self._missing[0].numpy(), signs)
        if half is None:
            return None
        return found * np.float32(share_that_holds(half, self._own[1].numpy(), self._missing[1].numpy(), signs))

    def corrected(self, factor: tuple[Any, Any], rows: Floats) -> Floats:
        """Weights [n, K] with their correction."""
        if len(rows) >= rows.shape[1]:
            return corrected(rows, self.correction(factor))
        change = self.correction(factor, rows)
        return rows if change is None else rows + change


class _Reached(Exception):
    """The inputs that were wanted are there; the rest of the layer is not run."""


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a linear layer: its input; or of experts: tokens [T, d], the experts of each [T, K], weights."""
    return [*args, *kwargs.values()]


@dataclasses.dataclass
class _Stage:
    """The next linear layers to be rounded: the first that is reached, and all that read the same tensor before the
    next one that reads another; and their inputs.
    """

    members: list[Any] = dataclasses.field(default_factory=list)
    moments: _Moments = dataclasses.field(default_factory=_Moments)
    x: Any = None  # of this chunk
    _known: bool = False  # the chunk before has shown the members

    def begin_chunk(self) -> None:
        self._known, self.x = bool(self.members), None

    def look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, *_ = _given(args, kwargs)
        if self.x is None:
            self.x = x
            if self._known:
                raise _Reached
        elif self.x is not x:
            raise _Reached
        if module not in self.members:
            self.members.append(module)


def _inputs_of(module: Any, run: Callable[[], Any], to_end: bool = False) -> tuple[list[Any], Any]:
    """What a module is given when `run` reaches it, and what `run` returns where it goes on to its end."""
    seen: list[list[Any]] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_given(args, kwargs))
        if not to_end:
            raise _Reached

    hook, returned = module.register_forward_pre_hook(look, with_kwargs=True), None
    with contextlib.suppress(_Reached):
        returned = run()
    hook.remove()
    return seen[0], returned


def _rows_name(name: str, formats: Collection[str]) -> str:
    """The parameter that a linear layer's weight is, or that gate and up of experts are."""
    return name if name in formats else gate_up_of(name, formats)


def _inner(experts: Any, expert: int, x: Any) -> Any:
    """What an expert makes of tokens [T, d] before its last product, [T, I]."""
    import torch

    weight = experts.gate_up_proj[expert]
    bias = experts.gate_up_proj_bias[expert] if experts.has_bias else None
    both = torch.nn.functional.linear(x, weight.T if experts.is_transposed else weight, bias)
    return experts._apply_gate(both)


@dataclasses.dataclass
class _Rounder:
    """Rounds weights and keeps what they became.

    Args:
        refs: parameter name → tensor of the checkpoint.
        formats: of those that are to be rounded.
        directory: for what was found.
    """

    refs: Mapping[str, TensorSource]
    formats: Mapping[str, BlockFormat]
    directory: Path
    found: dict[str, RoundedTensor] = dataclasses.field(default_factory=dict)

    def layer(
        self,
        layer: Any,
        prefix: str,
        streams: tuple[list[Any], list[Any]],
        calls: tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]],
    ) -> tuple[list[Any], list[Any]]:
        """Round a decoder layer's weights.

        Args:
            streams: its inputs and what the checkpoint's own layer is given, [B, S, d] of each chunk.
            calls: the other arguments of each chunk, of both: layers may leave K and V for others in them.

        Returns:
            The outputs of both.
        """
        import torch

        exact = copy.deepcopy(layer)
        same = dict(zip(layer.modules(), exact.modules(), strict=True))
        names = {
            module: f"{prefix}.{name}.weight"
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        pending = {module: name for module, name in names.items() if name in self.formats}
        for name, module in layer.named_modules():
            if is_of_experts(module) and gate_up_of(f"{prefix}.{name}", self.formats) in self.formats:
                pending[module] = f"{prefix}.{name}"
        exact_outputs: list[Any] = []
        while True:
            stage, outputs = _Stage(), []
            hooks = [module.register_forward_pre_hook(stage.look, with_kwargs=True) for module in pending]
            for place, (x, own, (args, kwargs), theirs) in enumerate(zip(*streams, *calls, strict=True)):
                stage.begin_chunk()
                with contextlib.suppress(_Reached):
                    outputs.append(first_output(layer(x, *args, **kwargs)))
                if stage.members:
                    first, last = same[stage.members[0]], len(stage.members) == len(pending)
                    given, whole = _inputs_of(first, lambda: exact(own, *theirs[0], **theirs[1]), last)  # noqa: B023 - runs at once
                    stage.moments.add(stage.x, given[0], 2 * place // len(calls[0]))
                    if last:
                        exact_outputs.append(first_output(whole))
            for hook in hooks:
                hook.remove()
            if not stage.members:
                if len(exact_outputs) < len(calls[1]):  # nothing of this layer is rounded
                    exact_outputs = [
                        first_output(exact(own, *args, **kwargs))
                        for own, (args, kwargs) in zip(streams[1], calls[1], strict=True)
                    ]
                return outputs, exact_outputs
            members = {pending.pop(module): module for module in stage.members}
            factor = stage.moments.triangle()
            if factor is not None:
                self._stage(members, stage.moments, factor)
                for name, module in members.items():
                    if f"{name}.{DOWN}{ROWS}" in self.formats:  # not that of experts that have integers already
                        self._down(f"{name}.{DOWN}{ROWS}", (module, same[module]), (layer, exact), streams, calls)

    def _stage(self, members: Mapping[str, Any], moments: _Moments, factor: tuple[Any, Any]) -> None:
        """Round linear layers, parameter name → module, that read one tensor; and gate and up of experts that do."""
        import torch

        parts = []
        for name, module in members.items():
            if name in self.formats:
                weight = module.weight.numpy()
            else:
                full = _rows_name(name, self.formats)
                weight = to_rows(module.gate_up_proj.numpy(), full, module.is_transposed)
            parts.append(finite(weight, self.refs[_rows_name(name, self.formats)].name))
        rows = moments.corrected(factor, np.concatenate(parts))
        for (name, module), part in zip(members.items(), parts, strict=True):
            full = _rows_name(name, self.formats)
            form, own, rows = self.formats[full], rows[: len(part)], rows[len(part) :]
            blocks = gptq_rows(own, *factor, form)
            values = dequantize(*blocks)
            if full == name:
                put_tensor(module, "weight", torch.from_numpy(values))
            else:
                stack = from_rows(values, len(module.gate_up_proj), full, module.is_transposed)
                put_tensor(module, GATE_UP, torch.from_numpy(stack))
            self.found[full] = store_rounded(self.refs[full], form, [blocks], self.directory)

    def _down(
        self,
        name: str,
        mixtures: tuple[Any, Any],
        layers: tuple[Any, Any],
        streams: tuple[list[Any], list[Any]],
        calls: tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]],
    ) -> None:
        """Round the last matrices of a mixture's experts, each by what it makes of the tokens that it is sent.

        Args:
            mixtures, layers: that are rounded, and the checkpoint's own; `streams` and `calls` as `layer` has them.
        """
        import torch

        (experts, theirs), (layer, exact) = mixtures, layers
        turned = experts.is_transposed
        count, columns = len(experts.down_proj), experts.down_proj.shape[1 if turned else 2]
        at_once = max(1, _MOMENTS_BYTES // (16 * columns * columns))
        blocks: list[Blocked] = []
        for first in range(0, count, at_once):
            moments = {expert: _Moments() for expert in range(first, min(count, first + at_once))}
            for place, (x, own, call, their_call) in enumerate(zip(*streams, *calls, strict=True)):
                (given, index, *_), _ = _inputs_of(experts, lambda: layer(x, *call[0], **call[1]))  # noqa: B023 - runs at once
                (full, *_), _ = _inputs_of(theirs, lambda: exact(own, *their_call[0], **their_call[1]))  # noqa: B023
                for expert, found in moments.items():
                    sent = (index == expert).any(-1).nonzero().squeeze(-1)
                    inner, full_inner = _inner(experts, expert, given[sent]), _inner(theirs, expert, full[sent])
                    found.add(inner, full_inner, 2 * place // len(calls[0]))
            for expert, found in moments.items():
                own = experts.down_proj[expert]
                weight = finite((own.T if turned else own).numpy(), self.refs[name].name)
                factor = found.triangle()
                if factor is None:
                    return
                blocks.append(gptq_rows(found.corrected(factor, weight), *factor, self.formats[name]))
        values = np.concatenate([dequantize(*one) for one in blocks])
        put_tensor(experts, DOWN, torch.from_numpy(from_rows(values, count, DOWN, turned)))
        self.found[name] = store_rounded(self.refs[name], self.formats[name], blocks, self.directory)

    def head(self, name: str, streams: Sequence[tuple[Any, Any]], tied: bool) -> None:
        """Round the head by what reaches it, [B, S, d] of each chunk, and what reaches the checkpoint's own.

        `tied`: it is the embedding, too, whose rows have to stay what they are.
        """
        moments, ref = _Moments(), self.refs[name]
        for place, (x, exact) in enumerate(streams):
            moments.add(x, exact, 2 * place // len(streams))
        factor = moments.triangle(TIED_DAMPING if tied else DAMPING)
        if factor is None:
            return
        change = None if tied else moments.correction(factor)

        def chunks() -> Iterator[Blocked]:
            for begin in range(0, ref.shape[0], _HEAD_ROWS):
                rows = finite(np.array(ref.rows(begin, begin + _HEAD_ROWS), np.float32), ref.name)
                yield gptq_rows(corrected(rows, change), *factor, self.formats[name])

        self.found[name] = store_rounded(ref, self.formats[name], chunks(), self.directory)


def _round_lookups(model: StreamedModel, ids: npt.NDArray[np.int64], form: BlockFormat, name: str) -> None:
    """The embedding's rows as the bundle will have them; `name` is the checkpoint's for it."""
    import torch

    table = model.model.get_input_embeddings().weight
    used = np.unique(ids)
    blocks = quantize_rows(finite(table[used].numpy(), name), form, "search")
    table.data[used] = torch.from_numpy(dequantize(*blocks))


def round_model(
    checkpoint: Checkpoint,
    refs: Mapping[str, TensorSource],
    formats: Mapping[str, BlockFormat],
    windows: npt.NDArray[np.int64],
    directory: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, RoundedTensor]:
    """Round the weights of linear layers by their inputs over a text.

    Args:
        refs: parameter name → tensor of the checkpoint.
        formats: parameter name → block format of those that are quantized.
        windows: int64 [N, S], token ids; two at least.
        directory: empty, for integers, scales and zero points.

    Returns:
        Parameter name → tensor of each weight that was rounded. Others that have a format are no linear layer's, have
        their integers already, or had no finite inputs.

    Raises:
        InputError: a weight is infinite or not a number.
    """
    import torch

    wanted = {name: form for name, form in formats.items() if not has_native(refs[name], form)}
    rounder = _Rounder(refs, wanted, directory)
    with torch.no_grad():
        model = StreamedModel(checkpoint, windows, _attend)
        inner = model.model
        table, head = (
            f"{name_of(inner, module)}.weight"
            for module in (inner.get_input_embeddings(), inner.get_output_embeddings())
        )
        count, length = windows.shape
        chunks = torch.from_numpy(windows).split(max(1, min(_CHUNK_TOKENS // length, count // 2)))  # of both halves

        def embed() -> list[tuple[Any, Any]]:
            return [model.embed(ids, torch.arange(ids.shape[1]).expand(len(ids), -1)) for ids in chunks]

        exact, exact_calls = map(list, zip(*embed(), strict=True))
        if table in wanted:
            _round_lookups(model, windows, wanted[table], refs[table].name)
        hidden, hidden_calls = map(list, zip(*embed(), strict=True))
        streams = hidden, exact
        prefix, total = name_of(inner, model.layers), len(model.layers) + 1
        for index, layer in enumerate(model.loaded_layers()):
            calls = [call[index] for call in hidden_calls], [call[index] for call in exact_calls]
            streams = rounder.layer(layer, f"{prefix}.{index}", streams, calls)
            progress(index + 1, total)
        if head in wanted:
            inputs = (map(model.head_input, stream) for stream in streams)
            tied = table not in refs or refs[table].name == refs[head].name
            rounder.head(head, [*zip(*inputs, strict=True)], tied)
        progress(total, total)
    return rounder.found
