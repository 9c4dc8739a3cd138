"""The inputs and outputs of the two step graphs, as one table.

Enters: model facts and a drop plan. Leaves: name, dtype, symbolic shape and alias of every graph input and output.
The exporter declares its graphs from this table and the session binds its buffers from it.

    graph    inputs                                              outputs
    refresh  input_ids len_kept [len_dropped] logits_index       logits
             past_key.i past_value.i          for every layer    present_key.i present_value.i
             past_recent.i past_recurrence.i [len_state]  r.  present_recent.i present_recurrence.i
                                                                 present_state.s  (all forms but residual)
    lora     input_ids len_kept [len_dropped]                    logits
             past_key.i past_value.i     for kept attentions,    present_key.i present_value.i
                                         for all under `fill`
             past_recent.i [len_state]                       r.  present_recent.i
             past_recurrence.i             for kept layers   r.
             past_state.s (all forms but residual)               present_state.s  (recurrent, with an adapter)

A cache belongs to the group `kept` or `dropped` by whether its layer's attention is dropped. `len_kept` and
`len_dropped` are the valid slots of each group before the step, per row; the position of the s-th new token is
`len_kept + s`. `logits_index` [batch, rows] picks the positions of a refresh whose logits are wanted; the state is
taken at the last of them. `present_x` is `past_x` updated in place (its alias).

A target's lowered graphs give float32 logits whatever their dtype. `LoweredIO` says what else is different: some give
`next_token`, the index of the largest logit; some have both steps in one graph with the inputs and outputs of both:
what a LoRA step leaves alone it gives back as it came. ONNX Runtime's engine sets what its graphs take besides: beside
each of the lengths a scalar `total_kept` or `total_dropped`, and `last_kept` or `last_dropped`; where one graph holds
both steps the scalar `lora_step`; where rows may have different numbers of new tokens, also `new_tokens` and
`packed_step`. Weights that are inputs of an engine are not in this table but in the target's own (`WeightInput` in
bundle.py).

A layer may have a recurrent state (r.) instead of K and V, or beside them; one that is an MLP alone has neither.
`past_recurrence` is the state after the first `len_state` tokens of a row, zeros after none; `past_recent` holds the
entries of the last tokens, that of position p in slot p modulo `Recurrence.recent`, zeros where no token was yet, and
one slot more for what nobody reads. Both steps write entries; the state of those tokens that are not in
`past_recurrence` they make of the entries. A refresh leaves the state after all its tokens in `present_recurrence`.
Neither that nor its `present_recent` is in place, so the same tokens can be run again. Of `len_kept` − `len_state`
tokens before it a step takes `MOST_PENDING` at most.

Rows may have different numbers of new tokens where an engine says so. The last entry of a row of `logits_index` is its
last new token, what follows it in `input_ids` is padding; −1 says that the row stands still: no cache and no state of
it changes, and its logits mean nothing. One row at least has a token, and a row that has some has room for
[sequence] of them in its caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind

Dim = str | int
# Inputs of ONNX Runtime's graphs, which its engine sets: for each cache group the valid slots of the longest row after
# the step, int32 [], and the last valid slot of each row after it, int32 [batch]; in a graph with both steps which it
# is, bool []. Where rows may have different numbers of new tokens, also these, int32 [batch], and a bool [] that says
# whether a refresh computes the tokens that there are instead of [batch, sequence]
LORA_STEP, PACKED_STEP, NEW_TOKENS = "lora_step", "packed_step", "new_tokens"
TOTALS = {"len_kept": "total_kept", "len_dropped": "total_dropped"}
LAST_SLOTS = {"len_kept": "last_kept", "len_dropped": "last_dropped"}


def beside_inputs(lengths: Iterable[str], joined: bool) -> list[str]:
    """What ONNX Runtime's engine sets in a graph.

    Args:
        lengths: those of `len_kept` and `len_dropped` that the graph takes.
        joined: it holds both steps, and rows may have different numbers of new tokens.
    """
    names = [name for length in lengths for name in (TOTALS[length], LAST_SLOTS[length])]
    return [LORA_STEP, NEW_TOKENS, PACKED_STEP, *names] if joined else names


def steps_name(outputs: Iterable[str]) -> str:
    """The name of a graph with both steps, which says what its inputs and outputs do not: the caches of its LoRA step.

    Args:
        outputs: of the LoRA step alone.
    """
    layers = sorted(int(name.rpartition(".")[2]) for name in outputs if name.startswith("present_key."))
    return f"steps; LoRA steps write the caches {','.join(map(str, layers)) or 'of no layer'}"


@dataclass(frozen=True)
class Heads:
    """Of one layer's attention: `head_dim` is how many values a head has, of queries and of K and V."""

    num_heads: int
    kv_heads: int
    head_dim: int


NO_HEADS = Heads(0, 0, 0)  # of a layer without attention

MOST_PENDING = 32  # tokens of a row that are not in a recurrent state yet
GATED_DELTA, GATED = "gated_delta", "gated"  # rules by which tokens change a recurrent state, as ONNX calls them


@dataclass(frozen=True)
class Recurrence:
    """Of a layer with a recurrent state.

    Attributes:
        channels: of q, k and v together, which a convolution over `taps` tokens mixes.
        key_heads, key_dim: of q and k.
        heads, key_dim, value_dim: of the state.
        decays: of a head, one for all of its state or one for each of `key_dim` rows.
        rule: `gated_delta` of Gated DeltaNet; `gated` of Mamba 2, whose C, B and x are q, k and v here, and Δ is β.
    """

    channels: int
    taps: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    decays: int
    rule: str

    @property
    def entry(self) -> int:
        """Values that are kept of a token until it is in the state: its channels, and decays and β of each head."""
        return self.channels + self.heads * (self.decays + 1)

    @property
    def recent(self) -> int:
        """Tokens of which that is kept: those that may not be in the state, and what the convolution mixes with
        them."""
        return MOST_PENDING + self.taps - 1

    @property
    def state_values(self) -> int:
        """Values of a row's state."""
        return self.heads * self.key_dim * self.value_dim

    def row_values(self, paged: bool) -> int:
        """Values of a row: its state twice, and what is kept of its last tokens, twice as well, or beside paged caches
        once."""
        entries = self.recent if paged else 2 * (self.recent + 1)
        return 2 * self.state_values + entries * self.entry


@dataclass(frozen=True)
class CacheShape:
    """What the entries of the K/V caches are: those of a layer have its `kv_heads` heads of `head_dim` values.

    `dtype` (a numpy/ONNX name) is that of activations and states, and of the entries where `kv_dtype` is None. The
    `recurrent_layers` have a `recurrence`.
    """

    heads: tuple[Heads, ...]
    dtype: str
    kv_dtype: str | None = None
    recurrence: Recurrence | None = None
    recurrent_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; symbolic sizes are names. `alias` is the input an output updates in place."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    alias: str | None = None

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with symbols replaced by numbers."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class LoweredIO:
    """In what a target's graphs differ from the neutral ones.

    Attributes:
        joined: one graph holds both steps.
        chooses_tokens: `next_token` [batch, rows] is an output.
        head_multiple: of which a head in the caches holds as many values; those beyond the model's are zeros.
    """

    joined: bool = False
    chooses_tokens: bool = False
    head_multiple: int = 1

    def padded(self, head_dim: int) -> int:
        """How many values a head takes in the caches."""
        return -(-head_dim // self.head_multiple) * self.head_multiple


@dataclass(frozen=True)
class GraphIO:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph_io(
    kind: StepKind,
    plan: DropPlan,
    cache: CacheShape,
    hidden_size: int,
    vocab_size: int,
    lowered: LoweredIO | None = None,
) -> GraphIO:
    """The table of one step graph: the neutral one, or as a target has it."""
    joined = lowered is not None and lowered.joined
    refresh = kind is StepKind.REFRESH or joined
    sequence: Dim = "sequence" if refresh else 1
    rows: Dim = "rows" if refresh else 1
    inputs = [
        TensorSpec("input_ids", "int64", ("batch", sequence)),
        TensorSpec("len_kept", "int64", ("batch",)),
    ]
    outputs = [TensorSpec("logits", "float32" if lowered else cache.dtype, ("batch", rows, vocab_size))]
    if lowered is not None and lowered.chooses_tokens:
        outputs.append(TensorSpec("next_token", "int64", ("batch", rows)))
    fills = plan.refresh_policy.fills
    if (refresh or fills) and plan.dropped_attentions:
        inputs.append(TensorSpec("len_dropped", "int64", ("batch",)))
    if refresh:
        inputs.append(TensorSpec("logits_index", "int64", ("batch", "rows")))
    dropped, entry = set(plan.dropped_attentions), cache.kv_dtype or cache.dtype
    if cache.recurrence is not None and cache.recurrent_layers:
        inputs.append(TensorSpec("len_state", "int64", ("batch",)))
    for layer in range(plan.num_layers) if refresh or fills else plan.kept_attentions:
        if cache.recurrence is not None and layer in cache.recurrent_layers:
            form = cache.recurrence
            recent, state = ("batch", form.recent + 1, form.entry), ("batch", form.heads, form.key_dim, form.value_dim)
            inputs.append(TensorSpec(f"past_recent.{layer}", cache.dtype, recent))
            in_place = None if refresh else f"past_recent.{layer}"
            outputs.append(TensorSpec(f"present_recent.{layer}", cache.dtype, recent, in_place))
            if refresh or layer not in dropped:
                inputs.append(TensorSpec(f"past_recurrence.{layer}", "float32", state))
            if refresh:
                outputs.append(TensorSpec(f"present_recurrence.{layer}", "float32", state))
        heads = cache.heads[layer]
        if heads == NO_HEADS:
            continue
        slots = "slots_dropped" if layer in dropped else "slots_kept"
        head_dim = heads.head_dim if lowered is None else lowered.padded(heads.head_dim)
        shape = ("batch", heads.kv_heads, slots, head_dim)
        for part in ("key", "value"):
            inputs.append(TensorSpec(f"past_{part}.{layer}", entry, shape))
            outputs.append(TensorSpec(f"present_{part}.{layer}", entry, shape, f"past_{part}.{layer}"))
    for site in plan.states:
        row: tuple[Dim, ...] = ("batch", hidden_size)
        if not refresh or joined:
            inputs.append(TensorSpec(f"past_state.{site}", cache.dtype, row))
        if refresh or site in plan.updated_states:
            outputs.append(TensorSpec(f"present_state.{site}", cache.dtype, row, f"past_state.{site}"))
    return GraphIO(tuple(inputs), tuple(outputs))
