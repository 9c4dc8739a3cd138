"""The inputs and outputs of a graph with both steps over paged caches, and the nodes that its engine builds itself.

Enters: a drop plan. Leaves: names. The exporter declares the graph by them and the engine binds its memory by them.

    input_ids, positions      int64 [1, T]       the new tokens of all rows of a call, one row after the other
    logits_index              int64 [R]          places among them whose logits are wanted
    last_tokens               int64 [b]          places of each row's last one (where there are states)
    lora_step                 bool []            which step it is
    past_states               [states, b, d]     in the order of the plan's states (all forms but residual)
    <group>.past_lens         int32 [b]          valid slots before the step, of `kept` or `dropped` layers
    <group>.begins            int32 [b + 1]      where each row's tokens begin among those that the group gets
    <group>.blocks            int32 [n]          the blocks of all rows, a row's in the order of its slots
    <group>.block_begins      int32 [b + 1]      where each row's blocks begin
    <group>.longest           int32 []           slots of the longest row after the step
    <group>.<window>.<table>                     the same for layers with a sliding window, or a convolution as wide: of
                                                 the last blocks alone, those that a row's new tokens can see into
    key_cache.i value_cache.i [blocks, H, 32, D] written in place; float32 here, what the engine computes in at run time
    recurrence.<table>                           where layers have recurrent states: of each row the tokens
                                                 that are in none yet and the new ones run, N in all, with padding of
                                                 which nothing comes; by the delta rule N = b · L
    recurrence.before         int64 [M]          the entries that the tokens before the new ones have in `recent.i`
    recurrence.mixed          int64 [K, N]       those that each of the N mixes, among these M and then the T new ones
    recurrence.new            int64 [T]          places of the new ones among the N
    recurrence.held           int64 [n]          new tokens whose entries are wanted
    by the delta rule:
    recurrence.grid           int64 [2]          b and L
    recurrence.dropped_grid   int64 [2]          the same for dropped layers, zeros in a LoRA step
    by that of Mamba 2:
    recurrence.begins         int32 [b + 1]      where each row's begin among the N
    recurrence.dropped_begins int32 [b + 1]      the same for dropped layers: none in a LoRA step
    recurrence.states         int32 [2 b]        places of a row's states in `state.i`: that it reads, that it writes
    recurrence.places         int32 [b + 1]      where those begin, 0, 2, ..
    recurrence.past, recurrence.interval         int32 [b], zeros, and more than any row's tokens
    recent.i                  [slots, E]         entries of each row's last tokens; read
    state.i                   [b, H, Dk, Dv]     read, by the delta rule; of dropped layers of no row in a LoRA step
                              [states, H, Dv, Dk] written in place, but for rows without tokens, by that of Mamba 2

    logits                    float32 [1, R, V]
    present_states            [states, b, d]
    present_recent.i          [1, n, E]          the new tokens' entries; of dropped layers in a refresh
    present_recurrence.i      [b, H, Dk, Dv]     by the delta rule: what the N tokens make of the states

A LoRA step has one token a row; dropped layers get none then, but under `fill`.
"""

from __future__ import annotations

from collections.abc import Iterable

from .graph_io import GATED, GATED_DELTA

DOMAIN = "lora_drop"
# Its nodes: inputs, attributes
#   Linear          x, weight [, scales][, zero_points][, bias]; quantized: 0, 1 symmetric, 2; bias: 0, 1; gated: 0,
#                   or 1 where x is a product, as of an activation and a second linear layer
#   Experts         x, index, weights, gate and up, down (decoder/experts.py), and what Linear has of quantized ones [,
#                   their biases]; experts, quantized, quantized_down, activation, alpha, added, limit
#   Lookup          ids, table [, scales][, zero_points]; quantized
#   RMSNorm         x, weight; epsilon
#   Rotary          x [1, T, H, D], cos, sin [1, T, R / 2]; interleaved; rotary_dim R
#   PagedAttention  query, key, value [T, H·D], key_cache, value_cache, a group's tables [, sinks [H]]; scale,
#                   window, heads
#   Capped          query, key, value, the blocks of a call [n, H, 32, D] ×2, past_lens, begins, block_begins, the
#                   output of PagedAttention, which writes the caches; softcap, scale, window, heads
#   Before          a group's tables; count: gives of each new token where those before it are, the farthest first:
#                   places [T, count] among the new ones, −1 in the caches, −2 nowhere; and blocks, heads and slots in
#                   the caches [T, count, 3], of any token where it is not there
#   Earlier         key_cache, value_cache [blocks, 1, 32, d/2], those slots: gives [T, count, d]
#   Convolution     gate [T, d], the halves of x [T, d/2] ×2, the output of PagedAttention, which writes the caches,
#                   earlier [T, K − 1, d], those places, taps [d, 1, K] [, bias [d]]
#   Directions      entries [1, T, E], those before [M, E], mixed [K, N], taps [W, 1, K] [, bias [W]]; rule, heads,
#                   key_heads, key_dim, value_dim (bundle/graph_io.py): gives q, k [N, Hk, Dk], v [N, H, Dv], decays
#                   [N, H] or of each row of a state [N, H·Dk], and β [N, H]
#   DeltaRule       those five, states, grid: gives [N, H, Dv] and what becomes of the states
#   SelectiveRule   those five, states, the tables behind `begins`, A [H], of which decays are the multiple β: gives
#                   [N, H, Dv]
BLOCK = 32  # slots of a block; the operator's own
GROUPS = ("kept", "dropped")
TABLES = ("past_lens", "begins", "blocks", "block_begins", "longest")
LORA_STEP, POSITIONS, LAST_TOKENS = "lora_step", "positions", "last_tokens"
_OF_ENTRIES = {"before": ("int64", 1), "mixed": ("int64", 2), "new": ("int64", 1), "held": ("int64", 1)}
RECURRENCE_TABLES = {  # by the rule → dtype, dimensions
    GATED_DELTA: _OF_ENTRIES | dict.fromkeys(("grid", "dropped_grid"), ("int64", 1)),
    GATED: _OF_ENTRIES
    | dict.fromkeys(("begins", "dropped_begins", "states", "places", "past", "interval"), ("int32", 1)),
}
DROPPED_TABLE = "dropped_"  # begins the names of those that dropped layers read in the place of others
PAST_STATES, PRESENT_STATES = "past_states", "present_states"


def paged_steps_name(sites: Iterable[str], surrogate: str, fills: bool) -> str:
    """The name of such a graph, which says what its inputs and outputs do not: what its LoRA step does."""
    return f"steps; LoRA steps replace {','.join(sites) or 'nothing'} by {surrogate}{', and fill' if fills else ''}"


def table_names(group: str, window: int = 0) -> list[str]:
    """The inputs with a group's tables, in the order of PagedAttention's inputs.

    Args:
        window: of the layers that read them, in positions; 0 for none.
    """
    return [f"{group}.{window}.{table}" if window else f"{group}.{table}" for table in TABLES]


def cache_names(layers: Iterable[int]) -> list[str]:
    return [f"{part}_cache.{layer}" for layer in layers for part in ("key", "value")]


def recurrence_tables(rule: str, kept: bool, dropped: bool) -> dict[str, str]:
    """Those of `RECURRENCE_TABLES` that a graph reads → its inputs.

    Args:
        kept, dropped: whether it has such layers with a recurrent state.
    """
    every = RECURRENCE_TABLES[rule]
    of_dropped = {name for name in every if name.startswith(DROPPED_TABLE)}
    unread = (set() if dropped else of_dropped) | (set() if kept else {one[len(DROPPED_TABLE) :] for one in of_dropped})
    return {name: f"recurrence.{name}" for name in every if name not in unread}


def recurrence_names(layer: int) -> tuple[str, str, str, str]:
    """Of a layer's recurrent state: the inputs with entries and states, and the outputs with new ones."""
    return f"recent.{layer}", f"state.{layer}", f"present_recent.{layer}", f"present_recurrence.{layer}"
