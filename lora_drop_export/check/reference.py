"""The algorithm in eager PyTorch, straight from docs/algorithm.md.

Enters: the bundle's weights and config, a plan, prompts, and the tokens and kinds of all steps. Leaves: the
logits of every step. Because the tokens are given, layer i needs only layer i − 1: the run goes layer by layer over all
steps, so one decoder layer's weights are in memory at a time. Knows no graph and no engine; float32 throughout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.adapters import Matrices
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES, Policy
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.decoder.anatomy import (
    Recorder,
    between_halves,
    buffer_values,
    decoder_layers,
    head_replaced,
    name_of,
    tied_names,
)
from lora_drop_export.quantize.dequantized import DequantizedRef
from lora_drop_export.weights.resolve import resolve_tensors

Array = npt.NDArray[Any]
ATTENTION_NAME = "lora_drop_reference"
_HEAD_ROWS = 8192  # of the vocabulary, in memory at once
_ROWS = 128  # tokens whose logits are


@dataclass
class _Cache:
    """One layer's K and V per row, compact: row → [slots, Hkv, D]; and the rows' real tokens in this step."""

    keys: list[Any]
    values: list[Any]
    new_tokens: Sequence[int] = ()
    scales: tuple[Any, Any] | None = None  # of K and V entries that are int8, [Hkv, 1, D]
    largest: tuple[Any, Any] | None = None  # |K| and |V| of the last call, [Hkv, 1, D]


_cache: _Cache  # of the layer that is running; the attention interface passes no user data


def _tokens_again(kinds: Sequence[StepKind], policy: Policy) -> list[int]:
    """For each decode step how many tokens before its own it runs once more."""
    again, since = [], 0
    for kind in kinds:
        refresh = kind is StepKind.REFRESH
        again.append(policy.steps_taken_back(since) if refresh else 0)
        since = 0 if refresh else since + 1
    return again


def _tensor(array: Array) -> Any:
    import torch

    values = np.asarray(array, np.float32)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def rounded_activations(x: Any, block_size: int) -> Any:
    """What the engine's kernels for quantized weights make of their input: int8 with a scale per block.

    ONNX Runtime's MatMulNBits with accuracy_level 4: scale = max |x| / 127 over a block of the weight's size, and the
    nearest integer. x [.., K], K a multiple of block_size.
    """
    blocks = x.unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / scale.clamp(min=1e-30)).round().mul(scale).flatten(-2)


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Softmax attention of each row's real new tokens over the layer's own cache, which they join first."""
    import torch

    if attention_mask is not None:
        raise ModelError("The model brings an attention mask of its own.")
    batch, heads, sequence, head_dim = query.shape
    output = torch.zeros(batch, sequence, heads, value.shape[3])
    group = heads // key.shape[1]
    _cache.largest = tuple(tensor.abs().amax((0, 2)).unsqueeze(1) for tensor in (key, value))
    if _cache.scales is not None:
        key, value = (
            (tensor / scale).round().clamp(-128, 127) * scale
            for tensor, scale in zip((key, value), _cache.scales, strict=True)
        )
    for row, new in enumerate(_cache.new_tokens):
        for store, tensor in ((_cache.keys, key), (_cache.values, value)):
            added = tensor[row, :, :new].transpose(0, 1)  # [new, Hkv, D]
            store[row] = added if store[row] is None else torch.cat([store[row], added])
        keys = _cache.keys[row].repeat_interleave(group, dim=1)  # [slots, H, D]
        values = _cache.values[row].repeat_interleave(group, dim=1)
        slots = len(keys)
        scores = torch.einsum("hsd,chd->hsc", query[row, :, :new], keys)
        scores = scores * (head_dim**-0.5 if scaling is None else scaling)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        own = torch.arange(slots - new, slots)[:, None]  # the slot of each new token
        seen = torch.arange(slots)[None] <= own
        if sliding_window:
            seen &= torch.arange(slots)[None] > own - sliding_window
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        output[row, :new] = torch.einsum("hsc,chd->shd", weights, values)
    return output, None


def _rounded_linear(linear: Any, block_size: int, x: Any) -> Any:
    import torch

    return torch.nn.functional.linear(rounded_activations(x, block_size), linear.weight, linear.bias)


@dataclass
class Reference:
    """Eager PyTorch under a drop plan.

    Args:
        plan: the drop plan.
        matrices: site → (A [r, d], s·B [d, r]); missing sites have no adapter.
        checkpoint: the bundle's own weight files, looked up by tensor name.
        kv_scales: `kv_scales.<layer>.key` and `.value` [Hkv, 1, D] of int8 caches.
        round_activations: round what enters quantized weights to 8 bits, as an engine's kernels do.
    """

    checkpoint: Checkpoint
    plan: DropPlan
    matrices: Matrices
    round_activations: bool = False
    kv_scales: Mapping[str, Array] = field(default_factory=dict)
    _states: dict[str, Any] = field(default_factory=dict)
    _tied: dict[str, str] = field(default_factory=dict)

    def run(
        self,
        prompts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        kinds: Sequence[StepKind],
        progress: Callable[[int, int], None] = lambda done, total: None,
        policy: Policy = POLICIES[DEFAULT_POLICY],
    ) -> list[npt.NDArray[np.float32]]:
        """Teacher-forced run.

        Args:
            prompts: int64 [B, T], right-padded to T = max(lengths).
            lengths: int64 [B].
            tokens: int64 [N, B], appended one per decode step.
            kinds: kind of each decode step, N of them.
            policy: tells which tokens of the LoRA steps before it a refresh runs once more.

        Returns:
            N + 1 arrays float32 [B, V]: after the prompts, then after each step.
        """
        import torch

        with torch.no_grad():
            model = self._skeleton(np.concatenate([prompts.reshape(-1), tokens.reshape(-1)]))
            batch = len(prompts)
            again = _tokens_again(kinds, policy)
            steps = [torch.tensor(prompts)]
            steps += [torch.tensor(tokens[j - more : j + 1].T) for j, more in enumerate(again)]  # [B, 1 + more]
            real = torch.tensor(lengths)[:, None]
            positions = [torch.arange(prompts.shape[1]).expand(batch, -1)]
            positions += [real + torch.arange(j - more, j + 1) for j, more in enumerate(again)]
            step_kinds = [StepKind.REFRESH, *kinds]
            counts = [lengths.tolist(), *([1 + more] * batch for more in again)]

            hidden = self._run_layers(model, steps, positions, step_kinds, counts, progress, [0, *again])
            last = [
                x[torch.arange(batch), torch.tensor(count) - 1][:, None]
                for x, count in zip(hidden, counts, strict=True)
            ]
            return [part.numpy() for part in self._logits(model, torch.cat(last, dim=1)).unbind(1)]

    def perplexity(
        self,
        ids: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> float:
        """exp of the mean negative log likelihood of each token but the first, all layers in full.

        Args:
            ids: int64 [T], one text.
        """
        import torch

        with torch.no_grad():
            model = self._skeleton(ids)
            steps, positions = [torch.tensor(ids)[None]], [torch.arange(len(ids))[None]]
            (hidden,) = self._run_layers(model, steps, positions, [StepKind.REFRESH], [[len(ids)]], progress)
            nats = 0.0
            for begin in range(0, len(ids) - 1, _ROWS):
                logits = self._logits(model, hidden[:, begin : begin + _ROWS])[0]  # [rows, V]
                targets = torch.tensor(ids[begin + 1 : begin + 1 + _ROWS])
                loss = torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum")
                nats += float(loss)
            return float(np.exp(nats / (len(ids) - 1)))

    def largest_kv(
        self, ids: npt.NDArray[np.int64], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Array]:
        """Largest magnitude of each channel of K (after RoPE) and V over a text, as `kv_scales` are named and shaped.

        Args:
            ids: int64 [T], one text.
        """
        import torch

        found: dict[str, Array] = {}

        def note(done: int, total: int) -> None:
            assert _cache.largest is not None
            for part, largest in zip(("key", "value"), _cache.largest, strict=True):
                found[f"kv_scales.{done - 1}.{part}"] = largest.numpy()
            progress(done, total)

        with torch.no_grad():
            steps, positions = [torch.tensor(ids)[None]], [torch.arange(len(ids))[None]]
            self._run_layers(self._skeleton(ids), steps, positions, [StepKind.REFRESH], [[len(ids)]], note)
        return found

    def _run_layers(
        self,
        model: Any,
        steps: Sequence[Any],
        positions: Sequence[Any],
        kinds: Sequence[StepKind],
        counts: Sequence[Sequence[int]],
        progress: Callable[[int, int], None],
        again: Sequence[int] = (0,),
    ) -> list[Any]:
        """The last layer's output [B, S, d] of each step; one layer after the other.

        `again` says how many tokens of a step were in steps before, whose cache entries it replaces.
        """
        layers = decoder_layers(model)
        hidden, calls = [], []
        for ids, position in zip(steps, positions, strict=True):
            recorded = Recorder(layers)
            with head_replaced(model, lambda x: x[..., :1]):
                model(input_ids=ids, position_ids=position, use_cache=False)
            hidden.append(recorded.inputs[0])
            calls.append(recorded.arguments)
            recorded.restore()
        for index, layer in enumerate(layers):
            self._load(layer, f"{name_of(model, layers)}.{index}")
            hidden = self._run_layer(index, layer, hidden, calls, kinds, counts, again)
            layer.to("meta")
            progress(index + 1, len(layers))
        return hidden

    def _logits(self, model: Any, hidden: Any) -> Any:
        """float32 logits [B, S, V] of the last layer's output: what the model does after its layers, its head by parts.

        The model is run twice: to see what reaches the head, and with what the head makes of it.
        """
        import torch

        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        recorded = Recorder(decoder_layers(model), hidden)
        seen = []
        with head_replaced(model, lambda x: seen.append(x) or x[..., :1]):  # type: ignore[func-returns-value]
            model(input_ids=ids, use_cache=False)
        logits = self._head(model, seen[0])
        with head_replaced(model, lambda _: logits):
            result = model(input_ids=ids, use_cache=False).logits
        recorded.restore()
        return result.to(torch.float32)

    def _head(self, model: Any, x: Any) -> Any:
        """`x Wᵀ + b`, W read a few thousand rows at a time; x [B, S, d] → [B, S, V]."""
        import torch

        head = model.get_output_embeddings()
        name = name_of(model, head)
        weight = self._tensor(f"{name}.weight", head.weight)
        bias = None if head.bias is None else _tensor(self._tensor(f"{name}.bias", head.bias).read())
        result = torch.empty(*x.shape[:2], weight.shape[0])
        if self.round_activations and isinstance(weight, DequantizedRef):
            x = rounded_activations(x, weight.form.block_size)
        for begin in range(0, weight.shape[0], _HEAD_ROWS):
            rows = _tensor(weight.rows(begin, begin + _HEAD_ROWS))
            result[..., begin : begin + len(rows)] = x @ rows.T
        return result if bias is None else result + bias

    def _run_layer(
        self,
        index: int,
        layer: Any,
        hidden: list[Any],
        calls: list[list[tuple[Any, Any]]],
        kinds: Sequence[StepKind],
        counts: Sequence[Sequence[int]],
        again: Sequence[int],
    ) -> list[Any]:
        """One layer over all steps: in full, or by its surrogate on LoRA steps if it is dropped."""
        import torch

        global _cache
        batch = hidden[0].shape[0]
        _cache = _Cache([None] * batch, [None] * batch)
        if self.kv_scales:
            _cache.scales = tuple(_tensor(self.kv_scales[f"kv_scales.{index}.{part}"]) for part in ("key", "value"))
        self._states = {}
        middle: list[Any] = []  # the residual stream between the halves, of the last full run
        hook = between_halves(layer).register_forward_pre_hook(lambda _, args: middle.append(args[0]))
        outputs = []
        for x, call, kind, count, stale in zip(hidden, calls, kinds, counts, again, strict=True):
            if kind is StepKind.LORA and index in self.plan.drop_layers:
                outputs.append(self._surrogate(index, x))
                continue
            _cache.new_tokens = count
            if stale and index not in self.plan.drop_layers:  # a dropped layer has not written them
                _cache.keys = [keys[:-stale] for keys in _cache.keys]
                _cache.values = [values[:-stale] for values in _cache.values]
            args, kwargs = call[index]
            y = layer(x, *args, **kwargs)
            if isinstance(y, tuple):
                y = y[0]
            last = torch.tensor(count) - 1
            rows = torch.arange(batch)
            self._states = {"mlp": y[rows, last][:, None], "attn": middle[-1][rows, last][:, None]}  # [B, 1, d]
            middle.clear()
            outputs.append(y)
        hook.remove()
        return outputs

    def _surrogate(self, index: int, x: Any) -> Any:
        """`y = base + s·B·A·x`, for the block or for each half."""
        form = self.plan.form
        halves = (("", "mlp"),) if self.plan.injection == "block" else ((".attn", "attn"), (".mlp", "mlp"))
        for suffix, state in halves:
            base = self._states[state] if form.has_state else x
            pair = self.matrices.get(f"{index}{suffix}")
            x = base if pair is None else base + x @ _tensor(pair[0]).T @ _tensor(pair[1]).T
            if form.updates_state:
                self._states[state] = x
        return x

    def _skeleton(self, ids: npt.NDArray[np.int64]) -> Any:
        """The model without layers and head: final norm and the embedding of `ids` are real, other rows of it zero."""
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION_NAME, _attention)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                self.checkpoint.config,
                attn_implementation=ATTENTION_NAME,
                dtype=torch.float32,
                trust_remote_code=self.checkpoint.trust_remote_code,
            ).eval()
        self._tied = tied_names(model)
        for name, value in buffer_values(model).items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = value
        inside = f"{name_of(model, decoder_layers(model))}."
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for name, module in model.named_modules():
            if not f"{name}.".startswith(inside) and module is not embedding and module is not head:
                self._load(module, name, recurse=False)
        ref = self._tensor(f"{name_of(model, embedding)}.weight", embedding.weight)
        table = np.zeros(ref.shape, np.float32)  # pages that are not written to take no memory
        for token in np.unique(np.append(ids, 0)):
            table[token] = ref.rows(token, token + 1)[0]
        embedding._parameters["weight"] = torch.nn.Parameter(torch.from_numpy(table), False)
        return model

    def _tensor(self, name: str, parameter: Any) -> TensorSource:
        """Where a parameter's values are."""
        (ref,) = resolve_tensors(self.checkpoint, {name: tuple(parameter.shape)}, self._tied).values()
        return ref

    def _load(self, module: Any, prefix: str, recurse: bool = True) -> None:
        import torch

        for name, parameter in list(module.named_parameters(recurse=recurse)):
            owner, _, leaf = name.rpartition(".")
            ref = self._tensor(f"{prefix}.{name}" if prefix else name, parameter)
            target = module.get_submodule(owner)
            target._parameters[leaf] = torch.nn.Parameter(_tensor(ref.read()), False)
            if self.round_activations and isinstance(ref, DequantizedRef) and isinstance(target, torch.nn.Linear):
                block_size = ref.form.block_size
                target.forward = functools.partial(_rounded_linear, target, block_size)


def adapter_matrices(plan: DropPlan, read: Mapping[str, Array]) -> Matrices:
    """The bundle's own adapters (s already in B) from `weights/adapters.safetensors`."""
    return {
        site: (read[f"surrogate.{site}.lora_A"], read[f"surrogate.{site}.lora_B"]) for site in plan.sites if plan.rank
    }
