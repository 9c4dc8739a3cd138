"""The test oracle: LoRA-Drop decoding (docs/algorithm.md) written a second time, as naively as possible.

In: an unmodified eager fp32 `transformers` model and a plan. Out: logits, one `[V]` tensor per step.
It runs one row, one token at a time, also in the prompt: a full step per prompt token is the prefill, done
slowly. Every token goes through the model's own `forward`, so embedding scaling, RoPE, norms and the head are
the model's; only two things are exchanged while it runs:

* each decoder layer's `forward`, so that a dropped layer's LoRA step computes the surrogate instead;
* the attention function, so that K and V lie in plain Python lists with a position beside each entry; short
  convolutions, whose inputs lie there in the place of K; and recurrent states, of which the one after each token lies
  there beside the convolution's input.

It knows nothing of the product: no graphs, no batches, no capacities, no padding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

ATTENTION_NAME = "lora_drop_oracle"
FORMS = ("residual", "recurrent", "anchor", "residual-delta", "residual-gated", "residual-delta-gated")


@dataclass
class OraclePlan:
    """Which layers and halves are dropped and what stands for them.

    `sites` are "4" for a layer, "4.attn" and "4.mlp" for its halves. `adapters` maps them to
    `(A [r, d], B [d, r], scale)`, A [r, 2d] where there is a change, and G [r, d] behind them where they are gated; a
    missing key is no adapter. `fill`: LoRA steps write K and V of dropped attentions.
    `kv_scales` maps a layer to the scales `[H_kv, D]` of its K and V, which are then int8.
    """

    sites: tuple[str, ...]
    surrogate: str = "residual"  # one of FORMS
    adapters: dict[str, tuple[Tensor | float, ...]] | None = None
    kv_scales: dict[int, tuple[Tensor, Tensor]] | None = None
    fill: bool = False

    def __post_init__(self) -> None:
        """Refuse a misspelt plan, which would silently test something else."""
        assert self.surrogate in FORMS, self.surrogate
        assert all(isinstance(site, str) for site in self.sites), self.sites
        assert set(self.adapters or {}) <= set(self.sites), self.sites


def sites_of(layers, injection: str = "block") -> tuple[str, ...]:
    """Layers as sites, or both halves of each."""
    return tuple(f"{i}{half}" for i in layers for half in (("",) if injection == "block" else (".attn", ".mlp")))


def is_refresh(j: int, k: int) -> bool:
    """Decode step `j` = 1, 2, … after the prefill; the count belongs to the request."""
    return j % (k + 1) == 0


running: Row  # the one that takes a step: not every family hands an argument of its layers on to its attention


class Row:
    """One sequence: its caches, its states and its position."""

    def __init__(self, model: PreTrainedModel, plan: OraclePlan) -> None:
        """An empty row; the model is used, never changed for good."""
        assert not model.training
        assert model.dtype == torch.float32
        self.model = model
        self.plan = plan
        self.position = 0  # of the next token
        self.is_installed = False  # whether the model is in the state of `installed`
        self.full = True  # whether the running step is a full one
        self.attends = True  # whether the running layer's attention runs and writes
        self.second_half_of: Tensor | None = None  # what the running layer's MLP reads in the place of its own h
        self.since_refresh: list[int] = []  # the tokens of the LoRA steps after the last full one
        # per layer: the position, K and V `[H_kv, D]` of every token it has written
        decoder = model.base_model
        self.layers = decoder.h if hasattr(decoder, "h") else decoder.layers
        self.slots: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in self.layers]
        # the same of layers with a recurrent state: the convolution's input, and the state after it
        self.states: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in self.layers]
        self.beside: dict[int, tuple[object, ...]] = {}  # what layer i gives in a tuple beside its output
        self.h: dict[int, Tensor] = {}  # state of dropped layer i: post-attention residual stream [1, 1, d]
        self.y: dict[int, Tensor] = {}  # state of dropped layer i: output [1, 1, d]
        self.x: dict[int, Tensor] = {}  # input of layer i in the last full step [1, 1, d]
        self.given: dict[str, Tensor] = {}  # what a site's adapter was given in the last LoRA step [d]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model's layers and attention are this row's; within it steps exchange them no more, which takes time."""
        if self.is_installed:
            yield
            return
        with ExitStack() as undo:
            undo.callback(self.model.set_attn_implementation, self.model.config._attn_implementation)
            self.model.set_attn_implementation(ATTENTION_NAME)
            for i, layer in enumerate(self.layers):
                undo.enter_context(mock.patch.object(layer, "forward", partial(self.run_layer, i, layer.forward)))
                if hasattr(layer, "conv"):
                    undo.enter_context(mock.patch.object(layer.conv, "forward", partial(convolution, layer.conv)))
                if hasattr(layer, "linear_attn"):
                    rule = layer.linear_attn
                    undo.enter_context(mock.patch.object(rule, "forward", partial(delta_rule, rule, i)))
                mixer = getattr(layer, "mamba", None) or getattr(layer, "mixer", None)
                if hasattr(mixer, "ssm_state_size"):
                    undo.enter_context(mock.patch.object(mixer, "forward", partial(mamba, mixer, i)))
                if hasattr(getattr(layer, "self_attn", None), "forget_gate"):
                    rule = layer.self_attn
                    undo.enter_context(mock.patch.object(rule, "forward", partial(kimi_rule, rule, i)))
                if hasattr(layer, "attn") and hasattr(getattr(layer.attn, "attention", None), "_attn"):
                    undo.enter_context(mock.patch.object(layer.attn.attention, "_attn", partial(gpt_neo, layer, i)))
                own = getattr(layer, "self_attention", None)
                if own is not None and not hasattr(own, "num_key_value_groups"):  # Falcon before transformers 5.25
                    own.config._attn_implementation = "sdpa"  # it stays so: of these it can be told no other
                    undo.enter_context(mock.patch.object(own, "forward", partial(falcon, i, own.forward)))
                norm = norm_after_attention(layer)
                if norm is not None:
                    undo.enter_context(norm.register_forward_pre_hook(partial(self.keep_h, i)))
            self.is_installed = True
            undo.callback(setattr, self, "is_installed", False)
            yield

    @torch.inference_mode()
    def step(self, token: int, full: bool) -> Tensor:
        """Consume one token and return the logits `[V]` after it."""
        global running
        self.full, running = full, self
        with self.installed():
            ids, position_ids = torch.tensor([[token]]), torch.tensor([[self.position]])
            out = self.model(input_ids=ids, position_ids=position_ids, use_cache=False)
        self.position += 1
        self.since_refresh = [] if full else [*self.since_refresh, token]
        return out.logits[0, 0]

    def backfill(self, token: int) -> Tensor:
        """A refresh under policy `backfill`: forget all that LoRA steps wrote, and take their tokens again in full."""
        again = [*self.since_refresh, token]
        self.position -= len(self.since_refresh)
        self.slots, self.states = (
            [[slot for slot in layer if slot[0] < self.position] for layer in kept]
            for kept in (self.slots, self.states)
        )
        return [self.step(one, full=True) for one in again][-1]

    def run_layer(self, i: int, own_forward, x: Tensor, *args, **kwargs) -> Tensor:
        """What runs in place of layer `i`, which gives its output alone or in a tuple."""

        def own() -> Tensor:
            y = own_forward(x, *args, **kwargs)
            if isinstance(y, tuple):
                y, *self.beside[i] = y
            return y

        y = self.output(i, own, x)
        return (y, *self.beside[i]) if i in self.beside else y

    def output(self, i: int, own_forward, x: Tensor) -> Tensor:
        """The output of layer `i` itself, or of its surrogate. x, y: `[1, 1, d]`."""
        layer, attn, mlp = (f"{i}{half}" in self.plan.sites for half in ("", ".attn", ".mlp"))
        if self.full or not (layer or attn or mlp):
            y = own_forward()  # fills self.slots[i] and self.h[i]
            self.y[i] = y
            if self.full:
                self.x[i] = x
            return y
        states = self.h.get(i), self.y[i]
        if layer:
            y = self.base(x, self.y[i]) + self.adapter(f"{i}", x)
        elif attn:
            h = self.base(x, self.h[i]) + self.adapter(f"{i}.attn", x)
            y = self.base(h, self.y[i]) + self.adapter(f"{i}.mlp", h) if mlp else None
        self.attends = self.plan.fill or not (layer or attn)
        if self.attends or not (layer or mlp):
            own = self.own_halves(i, own_forward, h if attn and not mlp else None)
        self.attends = True
        self.h[i], self.y[i] = states
        if attn and not mlp:
            y = own[1]
        elif mlp and not attn:
            h = own[0]
            y = self.base(h, self.y[i]) + self.adapter(f"{i}.mlp", h)
        if self.plan.surrogate == "recurrent":
            if attn:
                self.h[i] = h
            self.y[i] = y
        return y

    def own_halves(self, i: int, own_forward, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """h and y of the layer itself; with an h given, that one and the y whose MLP starts from it."""
        self.second_half_of = h
        y = own_forward()
        self.second_half_of = None
        return (self.h.get(i), y) if h is None else (h, y - self.h[i] + h)

    def base(self, value: Tensor, state: Tensor) -> Tensor:
        """What the adapter's product is added to: this step's own value, or the state."""
        return state if self.plan.surrogate in ("recurrent", "anchor") else value

    def change(self, key: str) -> Tensor:
        """What a site and its neighbours together added to the stream in the last full step, `[d]`."""
        own = self.neighbours(key)
        return (self.stream(*end_of(own[-1])) - self.stream(*begin_of(own[0])))[0, 0]

    def neighbours(self, key: str) -> list[str]:
        """Sites with adapters, one behind the other's output, a given one among them; `fill` parts them before an
        attention.
        """
        run, own = [], []
        for site in sorted(self.plan.sites, key=lambda site: (int(site.partition(".")[0]), site)):
            half = site.partition(".")[2]
            if run and (begin_of(site) != end_of(run[-1]) or (self.plan.fill and half != "mlp")):
                run = []
            run.append(site)
            if site == key:
                own = run
        return [site for site in own if site in self.plan.adapters]

    def stream(self, layer: int, half: int) -> Tensor:
        """What the last full step had between layers' halves; what layer i gives is what layer i + 1 gets."""
        if half:
            return self.h[layer]
        return self.x[layer] if layer in self.x else self.y[layer - 1]

    def adapter(self, key: str, x: Tensor) -> Tensor:
        """s · B A x, in the shape of x; gated ones are all of what the first of their neighbours was given."""
        if key not in (self.plan.adapters or {}):
            return torch.zeros_like(x)
        A, B, scale, *gates = self.plan.adapters[key]
        stream = self.given[key] = x[0, 0]
        if gates:
            stream = self.given[self.neighbours(key)[0]]
        feature = torch.cat([stream, self.change(key)]) if "delta" in self.plan.surrogate else stream
        inner = A @ feature
        for G in gates:
            opened = G @ (stream / torch.sqrt((stream**2).mean() + 1e-6))
            inner = inner + inner * opened * torch.sigmoid(opened)
        return (scale * (B @ inner)).reshape(x.shape)

    def keep_h(self, i: int, _norm, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Pre-hook of the norm after attention."""
        self.h[i] = args[0]
        return None if self.second_half_of is None else (self.second_half_of,)


def begin_of(site: str) -> tuple[int, int]:
    """The layer and the half where a site begins."""
    layer, _, half = site.partition(".")
    return int(layer), int(half == "mlp")


def end_of(site: str) -> tuple[int, int]:
    layer, _, half = site.partition(".")
    return (int(layer), 1) if half == "attn" else (int(layer) + 1, 0)


def norm_after_attention(layer: torch.nn.Module) -> torch.nn.Module | None:
    """The norm whose input is the post-attention residual stream `h`; None where attention and MLP run in parallel."""
    # Gemma 2 has both; its post_attention_layernorm comes before the residual is added
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.pre_feedforward_layernorm
    if hasattr(layer, "post_feedforward_layernorm"):  # whose norms are of what halves give
        return layer.mlp
    names = ("post_attention_layernorm", "ffn_norm", "pre_ff_layernorm")
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def attention(
    module, query, key, value, _mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_unused
) -> tuple[Tensor, None]:
    """Softmax attention of one new token over this layer's own list of slots.

    query `[1, H, 1, D]`; key, value `[1, H_kv, 1, D]`, RoPE already applied; returns `[1, 1, H, D]`.
    """
    if not running.attends:
        return query.new_zeros((1, 1, query.shape[1], value.shape[3])), None
    slots, position = running.slots[module.layer_idx], running.position
    new = key[0, :, 0], value[0, :, 0]
    if running.plan.kv_scales is not None:
        scales = running.plan.kv_scales[module.layer_idx]
        new = tuple(
            torch.clamp(torch.round(x / scale), -128, 127) * scale for x, scale in zip(new, scales, strict=True)
        )
    slots.append((position, *new))
    visible = [slot for slot in slots if sliding_window is None or position - slot[0] < sliding_window]
    group = query.shape[1] // key.shape[1]
    K = torch.stack([k for _, k, _ in visible]).repeat_interleave(group, dim=1)  # [T, H, D]
    V = torch.stack([v for _, _, v in visible]).repeat_interleave(group, dim=1)  # [T, H, D]
    scores = (query[0, :, 0] * K).sum(-1) * scaling  # [T, H]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None]])
    weights = scores.softmax(dim=0)[: len(V)]  # over the slots
    return (weights[:, :, None] * V).sum(0)[None, None], None


AttentionInterface.register(ATTENTION_NAME, attention)


def gpt_neo(layer, i: int, query, key, value, _mask=None) -> tuple[Tensor, None]:
    """GPT-Neo's own function: scores are not scaled, and some layers see no further than a window."""
    window = layer.attn.attention.config.window_size if layer.attn.attention_type == "local" else None
    module = SimpleNamespace(layer_idx=i)
    return attention(module, query, key, value, None, scaling=1.0, sliding_window=window)[0].transpose(1, 2), None


def falcon(i: int, forward, *args, **kwargs) -> tuple[Tensor, None]:
    """Falcon's own forward, which calls PyTorch's attention of the tokens of one call."""

    def attend(query, key, value, **_unused) -> Tensor:
        module = SimpleNamespace(layer_idx=i)
        return attention(module, query, key, value, None, scaling=query.shape[3] ** -0.5)[0].transpose(1, 2)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend):
        return forward(*args, **kwargs)


def convolution(module, hidden_states: Tensor, **_unused) -> Tensor:
    """LFM2's short convolution of one new token `[1, 1, d]` over this layer's own list of slots."""
    if not running.attends:
        return torch.zeros_like(hidden_states)
    gate, own_gate, x = module.in_proj(hidden_states)[0, 0].chunk(3)
    slots, position = running.slots[module.layer_idx], running.position
    slots.append((position, gate * x, torch.zeros(0)))
    mixed = torch.zeros_like(x) if module.conv.bias is None else module.conv.bias.clone()
    size = module.conv.weight.shape[2]
    for at, entry, _ in slots:
        if position - at < size:
            mixed += module.conv.weight[:, 0, size - 1 - (position - at)] * entry
    return module.out_proj(own_gate * mixed)[None, None]


def convolved(module, slots: list[tuple[int, Tensor, Tensor]], new: Tensor) -> Tensor:
    """silu of what the convolution before a state makes of a new input `[W]` and of those in the last slots."""
    taps, inputs = module.conv1d.weight[:, 0], [x for _, x, _ in slots] + [new]
    mixed = sum(taps[:, -n] * x for n, x in enumerate(inputs[: -taps.shape[1] - 1 : -1], start=1))
    return torch.nn.functional.silu(mixed if module.conv1d.bias is None else mixed + module.conv1d.bias)


def delta_rule(module, layer: int, hidden_states: Tensor, **_unused) -> Tensor:
    """A gated delta rule (arXiv:2412.06464, Eq. 10) of a new token `[1, 1, d]`, from the state after the last slot."""
    if not running.attends:
        return torch.zeros_like(hidden_states)
    heads, key_heads, key_dim, dim = module.num_v_heads, module.num_k_heads, module.head_k_dim, module.head_v_dim
    if hasattr(module, "in_proj_qkvz"):
        projected = module.in_proj_qkvz(hidden_states), module.in_proj_ba(hidden_states)
        query, key, value, gate, b, a = module.fix_query_key_value_ordering(*projected)
        new = torch.cat([query.flatten(), key.flatten(), value.flatten()])
    elif hasattr(module, "in_proj_qkv"):
        new = module.in_proj_qkv(hidden_states)[0, 0]
        gate, b, a = (project(hidden_states) for project in (module.in_proj_z, module.in_proj_b, module.in_proj_a))
    else:
        new = torch.cat([project(hidden_states)[0, 0] for project in (module.q_proj, module.k_proj, module.v_proj)])
        gate, b, a = (project(hidden_states) for project in (module.g_proj, module.b_proj, module.a_proj))
    slots, position = running.states[layer], running.position
    mixed = convolved(module, slots, new)
    query, key = (part.reshape(key_heads, key_dim) for part in mixed[: 2 * key_heads * key_dim].chunk(2))
    value = mixed[2 * key_heads * key_dim :].reshape(heads, dim)
    query, key = (x / torch.sqrt((x**2).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    state = slots[-1][2] if slots else torch.zeros(heads, key_dim, dim)
    decay = torch.exp(-torch.exp(module.A_log) * torch.nn.functional.softplus(a.flatten() + module.dt_bias))
    strength, after, out = torch.sigmoid(b.flatten()), [], []
    if getattr(module, "allow_neg_eigval", False):
        strength = 2 * strength
    for head in range(heads):
        q, k = (x[head // (heads // key_heads)] for x in (query, key))
        S = decay[head] * state[head]
        S = S + strength[head] * torch.outer(k, value[head] - S.T @ k)
        after.append(S)
        out.append(S.T @ q / key_dim**0.5)
    slots.append((position, new, torch.stack(after)))
    norm = module.norm if hasattr(module, "norm") else module.o_norm
    project = module.out_proj if hasattr(module, "out_proj") else module.o_proj
    return project(norm(torch.stack(out), gate.reshape(heads, dim)).flatten())[None, None]


def kimi_rule(module, layer: int, hidden_states: Tensor, **_unused) -> Tensor:
    """A delta rule whose state forgets each row at a pace of its own (arXiv:2510.26692, Eq. 1), of one new token."""
    if not running.attends:
        return torch.zeros_like(hidden_states)
    heads, dim = module.num_heads, module.head_dim
    new = torch.cat([project(hidden_states)[0, 0] for project in (module.q_proj, module.k_proj, module.v_proj)])
    slots, position = running.states[layer], running.position
    query, key, value = convolved(module, slots, new).reshape(3, heads, dim)
    decay, strength = (
        module.forget_gate(hidden_states).exp().reshape(heads, dim),
        module.b_proj(hidden_states).sigmoid(),
    )
    state, after, out = slots[-1][2] if slots else torch.zeros(heads, dim, dim), [], []
    for head in range(heads):
        q, k = (x[head] / torch.sqrt((x[head] ** 2).sum() + 1e-6) for x in (query, key))
        S = torch.diag(decay[head]) @ state[head]
        S = S + strength[0, 0, head] * torch.outer(k, value[head] - S.T @ k)
        after.append(S)
        out.append(S.T @ q / dim**0.5)
    slots.append((position, new, torch.stack(after)))
    gate = (
        module.g_proj(hidden_states) if hasattr(module, "g_proj") else module.g_b_proj(module.g_a_proj(hidden_states))
    )
    return module.o_proj(module.o_norm(torch.stack(out), gate.reshape(heads, dim)).flatten())[None, None]


def mamba(module, layer: int, hidden_states: Tensor, **_unused) -> Tensor:
    """Mamba 2 (arXiv:2405.21060, Eq. 1) of a new token `[1, 1, d]`, from the state `[H, N, P]` after the last slot."""
    if not running.attends:
        return torch.zeros_like(hidden_states)
    heads, dim, size, groups = module.num_heads, module.head_dim, module.ssm_state_size, module.n_groups
    given = module.in_proj(hidden_states * getattr(module, "ssm_in_multiplier", 1.0))[0, 0]
    if hasattr(module, "mup_vector"):
        given = given * module.mup_vector[0, 0]
    gate, new, step = given.split([heads * dim, module.conv_dim, heads])
    slots, position = running.states[layer], running.position
    x, B, C = convolved(module, slots, new).split([heads * dim, groups * size, groups * size])
    step, rate = torch.nn.functional.softplus(step + module.dt_bias), -torch.exp(module.A_log)
    state, after, out = slots[-1][2] if slots else torch.zeros(heads, size, dim), [], []
    for head, own in enumerate(x.reshape(heads, dim)):
        b, c = (one.reshape(groups, size)[head // (heads // groups)] for one in (B, C))
        S = torch.exp(step[head] * rate[head]) * state[head] + step[head] * torch.outer(b, own)
        after.append(S)
        out.append(c @ S + module.D[head] * own)
    slots.append((position, new, torch.stack(after)))
    out, gate = torch.cat(out)[None, None], gate[None, None]
    if isinstance(getattr(module, "norm", torch.nn.Identity()), torch.nn.Identity):
        return module.out_proj(out * torch.nn.functional.silu(gate))
    return module.out_proj(module.norm(out, gate))


def run_in_full(row: Row, tokens: Sequence[int]) -> tuple[Row, Tensor]:
    with row.installed():
        return row, [row.step(token, full=True) for token in tokens][-1]


def copy_of(kept: Row, plan: OraclePlan) -> Row:
    row = copy.copy(kept)
    row.plan, row.h, row.y, row.x = plan, {**kept.h}, {**kept.y}, {**kept.x}
    row.slots, row.states = ([[*slots] for slots in of] for of in (kept.slots, kept.states))
    return row


@functools.lru_cache(maxsize=32)
def run_once(model: PreTrainedModel, changes: int, *parts: tuple[int, ...]) -> tuple[Row, Tensor]:
    """What is dropped plays no part in full steps; the weights changed so many times before."""
    nothing, before = OraclePlan(()), parts[:-1]
    row = copy_of(run_once(model, changes, *before)[0], nothing) if before else Row(model, nothing)
    return run_in_full(row, parts[-1])


def prefill(model: PreTrainedModel, plan: OraclePlan, *parts: list[int]) -> tuple[Row, Tensor]:
    """A row after its prompt, and the logits `[V]` of the last prompt token. Each of the prompt's parts is kept."""
    if plan.kv_scales is not None:
        return run_in_full(Row(model, plan), [token for part in parts for token in part])
    kept, logits = run_once(model, sum(one._version for one in model.parameters()), *map(tuple, parts))
    return copy_of(kept, plan), logits


def decode_backfilled(
    model: PreTrainedModel, plan: OraclePlan, prompt: list[int], forced: list[int], k: int
) -> list[Tensor]:
    """`decode_row` under policy `backfill`: a refresh leaves what a prompt of all tokens so far leaves."""
    all_logits, parts = [], [prompt]
    for begin in range(0, len(forced) + 1, k + 1):
        row, logits = prefill(model, plan, *parts)
        parts.append(forced[begin : begin + k + 1])
        with row.installed():
            all_logits += [logits, *(row.step(token, full=False) for token in parts[-1][:k])]
    return all_logits


def decode_row(
    model: PreTrainedModel, plan: OraclePlan, prompt: list[int], forced: list[int], k: int, policy: str = "skip"
) -> list[Tensor]:
    """One row: len(forced) + 1 logits `[V]`, after the prompt and after each forced token.

    Decode step j = 1, 2, … consumes forced[j - 1]; it is a refresh iff j mod (k + 1) == 0.
    """
    if policy == "backfill" and plan.kv_scales is None:
        return decode_backfilled(model, plan, prompt, forced, k)
    row, logits = prefill(model, plan, prompt)
    all_logits = [logits]
    with row.installed():
        for j, token in enumerate(forced, start=1):
            if policy == "backfill" and is_refresh(j, k):
                all_logits.append(row.backfill(token))
            else:
                all_logits.append(row.step(token, full=is_refresh(j, k)))
    return all_logits


def greedy_row(
    model: PreTrainedModel, plan: OraclePlan, prompt: list[int], new_tokens: int, k: int
) -> tuple[list[int], list[Tensor]]:
    """Greedy decoding without a stop token: `new_tokens` tokens and the logits each was chosen from."""
    row, logits = prefill(model, plan, prompt)
    tokens, all_logits = [int(logits.argmax())], [logits]
    with row.installed():
        for j in range(1, new_tokens):  # N new tokens take N - 1 decode steps
            all_logits.append(row.step(tokens[-1], full=is_refresh(j, k)))
            tokens.append(int(all_logits[-1].argmax()))
    return tokens, all_logits


def run_batch(
    model: PreTrainedModel, plan: OraclePlan, prompts: list[list[int]], forced: list[list[int]], k: int
) -> list[list[Tensor]]:
    """`decode_row` for one row after another: batching must change nothing."""
    return [decode_row(model, plan, *row, k) for row in zip(prompts, forced, strict=True)]
