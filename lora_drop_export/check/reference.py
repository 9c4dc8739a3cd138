"""The algorithm in eager PyTorch, straight from docs/algorithm.md.

Enters: the bundle's weights and config, a plan, prompts, and the tokens and kinds of all steps. Leaves: the
logits of every step. Because the tokens are given, layer i needs only layer i − 1: the run goes layer by layer over all
steps, so one decoder layer's weights are in memory at a time. Knows no graph and no engine; float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.adapters import gate_name, weight_names
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import ADAPTERS_NAME, KV_SCALES_NAME
from lora_drop_runtime.errors import ModelError, VerificationError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES, Policy
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_runtime.plan.sites import ATTENTION, MLP, half_of
from lora_drop_runtime.plan.surrogate import GATE_EPSILON

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.decoder.anatomy import between_halves, first_output
from lora_drop_export.decoder.attention_interface import AttentionCall
from lora_drop_export.decoder.convolutions import ConvolutionCall
from lora_drop_export.decoder.recurrences import RecurrenceCall
from lora_drop_export.decoder.streamed import StreamedModel, as_tensor
from lora_drop_export.weights.arrays import read_arrays

Array = npt.NDArray[Any]
_ROWS = 128  # tokens whose logits are


@dataclass
class _Cache:
    """What one layer keeps of each row, K and V of its attention or entries of its state; and the rows' real tokens in
    this step."""

    kept: dict[type, tuple[list[Any], list[Any]]] = field(default_factory=dict)  # of calls: row → [slots, Hkv, D]
    new_tokens: Sequence[int] = ()
    scales: tuple[Any, Any] | None = None  # of K and V entries of 8 bits, [Hkv, 1, D or 1]
    dtype: str | None = None  # of these entries
    largest: tuple[Any, Any] | None = None  # |K| and |V| of the last call, [Hkv, 1, D]
    writes: bool = True  # whether new tokens join it; where they do not, nothing is attended to

    def take_back(self, tokens: int) -> None:
        """Forget so many of the last ones of each row."""
        for stores in self.kept.values():
            for store in stores:
                store[:] = [rows[:-tokens] for rows in store]


def _tokens_again(kinds: Sequence[StepKind], policy: Policy) -> list[int]:
    """For each decode step how many tokens before its own it runs once more."""
    again, since = [], 0
    for kind in kinds:
        refresh = kind is StepKind.REFRESH
        again.append(policy.steps_taken_back(since) if refresh else 0)
        since = 0 if refresh else since + 1
    return again


def _entries(steps: Any, dtype: str | None) -> Any:
    """The nearest values that caches of 8 bits hold."""
    import torch

    if dtype == "int8":
        return steps.round().clamp(-128, 127)
    return steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _attend(cache: _Cache, call: AttentionCall | ConvolutionCall | RecurrenceCall) -> Any:
    """What each row's real new tokens make of the layer's own cache, which they join first."""
    import torch

    key, value = call.key, call.value
    if not cache.writes:
        return call.mixed(key[:, :, :0], value[:, :, :0], torch.zeros(key.shape[2], 0, dtype=torch.bool))
    cache.largest = tuple(tensor.abs().amax((0, 2)).unsqueeze(1) for tensor in (key, value))
    if cache.scales is not None:
        key, value = (
            _entries(tensor / scale, cache.dtype) * scale
            for tensor, scale in zip((key, value), cache.scales, strict=True)
        )
    rows, batch = [], len(cache.new_tokens)
    stores = cache.kept.setdefault(type(call), ([None] * batch, [None] * batch))
    for row, new in enumerate(cache.new_tokens):
        for store, tensor in zip(stores, (key, value), strict=True):
            added = tensor[row, :, :new].transpose(0, 1)  # [new, Hkv, D]
            store[row] = added if store[row] is None else torch.cat([store[row], added])
        keys, values = (store[row].transpose(0, 1)[None] for store in stores)  # [1, Hkv, slots, D]
        slots = keys.shape[2]
        own = torch.arange(slots - new, slots)[:, None]  # the slot of each new token
        seen = torch.arange(slots)[None] <= own
        if call.window:
            seen &= torch.arange(slots)[None] > own - call.window
        rows.append(call.only(row, new).mixed(keys, values, seen)[0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # as many as the longest row has


def _run(layer: Any, x: Any, call: tuple[Any, Any], middle: Any = None) -> tuple[Any, Any]:
    """A layer's residual stream between its halves, and its output; with `middle`, of a second half that begins there.

    Its own attention then runs for nothing: the stream itself is overwritten, whatever the layer does to it later.
    """
    seen: list[Any] = []

    def begin(_: Any, args: tuple[Any, ...]) -> None:
        seen.append(args[0] if middle is None else args[0].copy_(middle))

    hook = between_halves(layer).register_forward_pre_hook(begin)
    args, kwargs = call
    y = layer(x, *args, **kwargs)
    hook.remove()
    return seen[0], first_output(y)


@dataclass
class Reference:
    """Eager PyTorch under a drop plan.

    Args:
        plan: the drop plan.
        weights: of the surrogates, by name (adapters.weight_shapes); a site without any leaves only the base.
        checkpoint: the bundle's own weight files, looked up by tensor name.
        kv_scales: `kv_scales.<layer>.key` and `.value` [Hkv, 1, D or 1] of 8-bit caches.
        kv_dtype: of these.
        dtype: of the bundle's model.
    """

    checkpoint: Checkpoint
    plan: DropPlan
    weights: Mapping[str, Array]
    kv_scales: Mapping[str, Array] = field(default_factory=dict)
    kv_dtype: str | None = None
    dtype: str = "float32"
    _states: dict[str, Any] = field(default_factory=dict)  # of the running layer's sites, [B, 1, d]
    _begun: dict[tuple[str, int], Any] = field(default_factory=dict)  # first site of a run, step → what it was given
    _cache: _Cache = field(default_factory=_Cache)  # of the layer that is running

    def _model(self, ids: npt.NDArray[np.int64]) -> StreamedModel:
        """`ids`: all that will be looked up."""
        return StreamedModel(self.checkpoint, ids, lambda call: _attend(self._cache, call), self.dtype)

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

        Raises:
            ModelError: the plan drops halves of a layer, and they are not found in it.
        """
        import torch

        with torch.no_grad():
            model = self._model(np.concatenate([prompts.reshape(-1), tokens.reshape(-1)]))
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
            return [part.numpy() for part in model.logits(torch.cat(last, dim=1)).unbind(1)]

    def on_text(
        self,
        ids: npt.NDArray[np.int64],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[float, npt.NDArray[np.int64]]:
        """A text with all layers in full.

        Args:
            ids: int64 [T], one text, or [B, T], windows of one.

        Returns:
            The perplexity, exp of the mean negative log likelihood of each token but a window's first; and the most
            likely tokens in their place, int64 [B · (T − 1)].

        Raises:
            VerificationError: the perplexity is not finite.
        """
        import torch

        with torch.no_grad():
            model, rows = self._model(ids), torch.tensor(np.atleast_2d(ids))
            batch, length = rows.shape
            positions = torch.arange(length).expand(batch, -1)
            lengths = [[length] * batch]
            (hidden,) = self._run_layers(model, [rows], [positions], [StepKind.REFRESH], lengths, progress)
            nats, likeliest = 0.0, []
            for x, own in zip(hidden, rows, strict=True):
                for begin in range(0, length - 1, _ROWS):
                    logits = model.logits(x[None, begin : begin + _ROWS])[0]  # [rows, V]
                    targets = own[begin + 1 : begin + 1 + _ROWS]
                    loss = torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum")
                    nats += float(loss)
                    likeliest.append(logits[: len(targets)].argmax(dim=-1).numpy())
            with np.errstate(over="ignore"):
                perplexity = float(np.exp(nats / (batch * (length - 1))))
            if not np.isfinite(perplexity):
                raise VerificationError(
                    "The checkpoint computes logits that are not numbers, or far from the text.",
                    note=f"Its perplexity on {ids.size} tokens of a text is {perplexity}, in PyTorch.",
                    hint="Look for NaN, infinity or far too large values in the checkpoint.",
                )
            return perplexity, np.concatenate(likeliest)

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
            assert self._cache.largest is not None
            for part, largest in zip(("key", "value"), self._cache.largest, strict=True):
                found[f"kv_scales.{done - 1}.{part}"] = largest.numpy()
            progress(done, total)

        with torch.no_grad():
            steps, positions = [torch.tensor(ids)[None]], [torch.arange(len(ids))[None]]
            self._run_layers(self._model(ids), steps, positions, [StepKind.REFRESH], [[len(ids)]], note)
        return found

    def _run_layers(
        self,
        model: StreamedModel,
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
        hidden, calls = [], []
        for ids, position in zip(steps, positions, strict=True):
            x, arguments = model.embed(ids, position)
            hidden.append(x)
            calls.append(arguments)
        for index, layer in enumerate(model.loaded_layers()):
            hidden = self._run_layer(index, layer, hidden, calls, kinds, counts, again)
            progress(index + 1, len(model.layers))
        return hidden

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

        batch = hidden[0].shape[0]
        cache = self._cache = _Cache()
        if self.kv_scales:
            cache.dtype = self.kv_dtype
            cache.scales = tuple(as_tensor(self.kv_scales[f"kv_scales.{index}.{part}"]) for part in ("key", "value"))
        self._states = {}
        sites, rows = self.plan.sites_of(index), torch.arange(batch)
        outputs = []
        for step, (x, call, kind, count, stale) in enumerate(zip(hidden, calls, kinds, counts, again, strict=True)):
            cache.new_tokens = count
            if kind is StepKind.LORA and sites:
                outputs.append(self._lora_layer(index, layer, x, call[index]))
                continue
            if stale and index not in self.plan.dropped_attentions:  # which have not written them
                cache.take_back(stale)
            middle, y = _run(layer, x, call[index])
            if step == 0 and StepKind.LORA in kinds and self._needs_middle(index):
                self._check_middle(index, layer, x, call[index], middle, y)
            self._keep_states(index, step, (rows, torch.tensor(count) - 1), x, middle, y)
            outputs.append(y)
        return outputs

    def _needs_middle(self, index: int) -> bool:
        """Whether LoRA steps begin or end anything between a layer's halves, or look back to it."""
        alone = (index in self.plan.dropped_attentions) != (index in self.plan.dropped_mlps)
        form, halves = self.plan.form, any(half_of(site) for site in self.plan.sites_of(index))
        return alone or (halves and (form.base_is_state or form.with_change))

    def _check_middle(self, index: int, layer: Any, x: Any, call: tuple[Any, Any], middle: Any, y: Any) -> None:
        """Refuse a layer whose second half, begun at `middle`, does not end where the layer did: it lies elsewhere."""
        self._cache.writes = False
        again = _run(layer, x, call, middle)[1]
        self._cache.writes = True
        if float((again - y).abs().max()) > 1e-5 * float(y.abs().max()):  # not so where any of them is no number
            raise ModelError(
                "The reference does not find the halves of the model's layers.",
                note=f"What lies between the attention and the MLP of layer {index}, a {type(layer).__name__}, has a "
                "name that is not known.",
                hint="Use --injection block, and drop whole layers.",
            )

    def _keep_states(self, index: int, step: int, last: tuple[Any, Any], x: Any, middle: Any, y: Any) -> None:
        """After a refresh: the streams before a layer, between its halves and behind it, of the tokens at `last`.

        Where no half is dropped, `middle` may have no rows: OPT puts the tokens of all of them behind each other there.
        """
        states, owners, with_change = self.plan.states, self.plan.states_behind, self.plan.form.with_change
        for site in self.plan.sites_of(index):
            half = half_of(site)
            if with_change and site in states:
                self._begun[site, step] = (middle if half == MLP else x)[last][:, None]
            if site in owners:
                state = (middle if half == ATTENTION else y)[last][:, None]
                self._states[site] = state - self._begun.pop((owners[site], step)) if with_change else state

    def _lora_layer(self, index: int, layer: Any, x: Any, call: tuple[Any, Any]) -> Any:
        """A layer with dropped sites on a LoRA step: [B, 1, d]."""
        no_attention, no_mlp = index in self.plan.dropped_attentions, index in self.plan.dropped_mlps
        first, *second = self.plan.sites_of(index)
        self._cache.writes = not no_attention or self.plan.refresh_policy.fills
        made = self._surrogate(first, x) if no_attention else None  # in the place of the attention, or of the layer
        middle, y = made, made
        if self._cache.writes or not no_mlp:
            middle, y = _run(layer, x, call, None if no_mlp else made)
        self._cache.writes = True
        if not no_mlp:
            return y
        if not no_attention:
            return self._surrogate(first, middle)
        return self._surrogate(second[0], made) if second else made

    def _surrogate(self, site: str, x: Any) -> Any:
        """`y = base + s·B·A·feature`, what A makes gated or not; of a run with a change the last site has it all: no
        refresh reached it before."""
        import torch

        form = self.plan.form
        owner = self.plan.states_behind.get(site, "") if form.with_change else site
        base = self._states[site] if form.base_is_state else x
        y, names, gate = base, weight_names(owner, self.weights), gate_name(owner, self.weights)
        if names:
            feature = torch.cat([x, self._states[site]], dim=-1) if form.with_change else x
            for name in names:
                feature = feature @ as_tensor(self.weights[name]).T
                if gate is not None and name == names[0]:
                    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=GATE_EPSILON)
                    feature = feature * (1 + torch.nn.functional.silu(normed @ as_tensor(self.weights[gate]).T))
            y = base + feature
        if form.updates_state:
            self._states[site] = y
        return y


def reference_of(bundle: Bundle, trust_remote_code: bool = False, *, rounds_caches: bool = False) -> Reference:
    """The reference over a bundle's own weight files, looked up by tensor name.

    Args:
        rounds_caches: as 8-bit caches do, where the bundle has their scales.
    """
    checkpoint = open_checkpoint(
        str(bundle.root / "weights"), bundle.root / "scratch", trust_remote_code=trust_remote_code
    )
    plan = bundle.manifest.plan
    weights = read_arrays(bundle.root, ADAPTERS_NAME)
    scales = read_arrays(bundle.root, KV_SCALES_NAME) if rounds_caches else {}
    model = bundle.manifest.model
    return Reference(checkpoint, plan, weights, kv_scales=scales, kv_dtype=model.kv_dtype, dtype=model.dtype)
