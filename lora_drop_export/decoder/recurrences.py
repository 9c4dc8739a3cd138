"""Recurrent states, as Qwen3.5's and Mamba 2's: in the place of an attention a layer has one that each token changes.

Enters: transformers' model, whose attention is one of ours (attention_interface.py). Leaves: the same model, whose
recurrent layers call that function, too, with a `RecurrenceCall`, and which gives their result [B, S, H·Dv] back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from lora_drop_runtime.bundle.graph_io import GATED, GATED_DELTA, Recurrence
from lora_drop_runtime.errors import ModelError

from .attention_interface import AttentionCall, attention_function
from .convolutions import ConvolutionCall

NORM_EPS = 1e-6  # of q and k, in all families


@dataclass(frozen=True)
class RecurrenceCall:
    """One call of what changes a layer's state. Of each head, with a state S [Dk, Dv] that begins at 0,

        q, k, v = silu(Σ_j taps_j · x_{t − K + 1 + j} + bias), cut in three

    by the gated delta rule (Yang et al. 2024, arXiv:2412.06464, Eq. 10), whose q and k are normed to length 1

        S_t = e^g S_{t−1};   S_t = S_t + β k (v − S_tᵀ k)ᵀ;   out = S_tᵀ q / √Dk

    with a g of its own for each row of S in Kimi Linear (Zhang et al. 2025, arXiv:2510.26692, Eq. 1); and by that of
    Mamba 2 (Dao and Gu 2024, arXiv:2405.21060, Eq. 1; C, B, x and Δ are q, k, v and β, g is Δ A)

        S_t = e^g S_{t−1} + β k vᵀ;   out = S_tᵀ q + skip v

    What is kept of a token until it is in the state is x, g and β, its entry.

    Attributes:
        module: the mixer; its `layer_idx` is the layer.
        x: [B, S, W], q, k and v of all heads before the convolution.
        decay: g, [B, S, H], or [B, S, H·Dk].
        beta: β, [B, S, H].
        taps: [W, 1, K].
        bias: [W]; None for none.
        form: its sizes, and the rule.
        skip: Mamba's D, [H]; None for none.
    """

    module: Any
    x: Any
    decay: Any
    beta: Any
    taps: Any
    bias: Any
    form: Recurrence
    skip: Any = None
    window: int = 0  # of what it sees: all

    @property
    def key(self) -> Any:
        """The tokens' entries, [B, 1, S, E]."""
        import torch

        return torch.cat([self.x, self.decay, self.beta], dim=2).unsqueeze(1)

    @property
    def value(self) -> Any:
        """Nothing: [B, 1, S, 0]."""
        return self.x[:, None, :, :0]

    def only(self, row: int, tokens: int) -> RecurrenceCall:
        """The first tokens of a row."""
        x, decay, beta = (tensor[row : row + 1, :tokens] for tensor in (self.x, self.decay, self.beta))
        return replace(self, x=x, decay=decay, beta=beta)

    def _heads(self, entries: Any, places: Any) -> tuple[Any, Any, Any]:
        """q, k [B, N, H, Dk] and v [B, N, H, Dv] of tokens.

        Args:
            entries: [B, C, E].
            places: of each token the entries that its convolution mixes, [N, K], the last one its own; −1 for none.
        """
        import torch

        form = self.form
        x = entries[:, places.clamp(min=0), : form.channels] * (places >= 0)[None, :, :, None]  # [B, N, K, W]
        y = (x * self.taps[:, 0].T).sum(dim=2)
        y = torch.nn.functional.silu(y if self.bias is None else y + self.bias)
        width = form.key_heads * form.key_dim
        if form.rule == GATED:
            v, k, q = y.split([form.heads * form.value_dim, width, width], dim=2)
        else:
            q, k, v = y.split([width, width, form.heads * form.value_dim], dim=2)
        q, k = (part.reshape(*part.shape[:2], form.key_heads, form.key_dim) for part in (q, k))
        if form.rule == GATED_DELTA:
            q, k = (part * torch.rsqrt((part * part).sum(dim=3, keepdim=True) + NORM_EPS) for part in (q, k))
            q = q * form.key_dim**-0.5
        q, k = (part.repeat_interleave(form.heads // form.key_heads, dim=2) for part in (q, k))
        return q, k, v.reshape(*v.shape[:2], form.heads, form.value_dim)

    def _moved(self, state: Any, entry: Any, k: Any, v: Any) -> Any:
        """States [.., H, Dk, Dv] after a token each, whose entry is [.., E]."""
        form = self.form
        decay, beta = entry[..., form.channels :].split([form.heads * form.decays, form.heads], dim=-1)
        state = state * decay.exp().unflatten(-1, (form.heads, form.decays))[..., None]
        known = (state * k[..., None]).sum(dim=-2) if self.form.rule == GATED_DELTA else 0
        change = beta[..., None] * (v - known)
        return state + k[..., None] * change[..., None, :]

    def mixed(self, key: Any, value: Any, seen: Any) -> Any:
        """[B, S, H·Dv] in the dtype of `x`, of entries.

        Args:
            key: [B, 1, C, E].
            value: nothing.
            seen: bool [S, C], of each token the entries that it sees, in their order; the last one is its own. Those
                before that one are what an earlier token sees, or the first so many. Of no entries nothing comes: 0.
        """
        import torch

        entries = key[:, 0]
        batch, size = len(entries), self.taps.shape[2]
        if not entries.shape[1]:
            return self.x.new_zeros((batch, len(seen), self.form.heads * self.form.value_dim))
        counts = seen.sum(dim=1).tolist()
        places = seen.new_full((len(seen), size), -1, dtype=torch.int64)
        for token, row in enumerate(seen):
            last = row.nonzero()[-size:, 0]
            places[token, size - len(last) :] = last
        q, k, v = self._heads(entries, places)
        own = places[:, -1]
        sights = {row.numpy().tobytes(): token for token, row in enumerate(seen.cpu())}
        before = seen.clone()
        before[torch.arange(len(seen)), own] = False
        behind = [sights.get(row.numpy().tobytes()) for row in before.cpu()]  # whose state each token begins with
        begins = {counts[token] - 1 for token, other in enumerate(behind) if other is None}  # or that of so many
        states = self._first_states(entries, begins)
        result: list[Any] = [None] * len(seen)
        after: dict[int, Any] = {}
        todo = list(range(len(seen)))
        while todo:  # all tokens whose state before is known, at once
            ready = [token for token in todo if behind[token] is None or behind[token] in after]
            start = torch.stack(
                [states[counts[n] - 1] if (m := behind[n]) is None else after[m] for n in ready], dim=1
            )  # [B, N, H, Dk, Dv]
            moved = self._moved(start, entries[:, own[ready]], k[:, ready], v[:, ready])
            out = (moved * q[:, ready, :, :, None]).sum(dim=3)  # [B, N, H, Dv]
            if self.skip is not None:
                out = out + self.skip[:, None] * v[:, ready]
            for n, token in enumerate(ready):
                after[token], result[token] = moved[:, n], out[:, n]
            gone = set(ready)
            todo = [token for token in todo if token not in gone]
        return torch.stack(result, dim=1).reshape(batch, len(seen), -1).to(self.x.dtype)

    def _first_states(self, entries: Any, counts: set[int]) -> dict[int, Any]:
        """The states [B, H, Dk, Dv] that the first so many entries leave."""
        import torch

        form, most, size = self.form, max(counts, default=0), self.taps.shape[2]
        state = entries.new_zeros((len(entries), form.heads, form.key_dim, form.value_dim))
        found = {0: state}
        if most:
            numbers = torch.arange(most, device=entries.device)[:, None]
            places = numbers - torch.arange(size - 1, -1, -1, device=entries.device)
            _, k, v = self._heads(entries, places.clamp(min=-1))
        for n in range(most):
            state = self._moved(state, entries[:, n], k[:, n], v[:, n])
            if n + 1 in counts:
                found[n + 1] = state
        return found


_MAMBA = ("GraniteMoeHybridMambaLayer", "BambaMixer", "NemotronHMamba2Mixer", "FalconH1Mixer")


def _is_mamba(module: Any) -> bool:
    """Whether it has a state by the rule of Mamba 2."""
    return type(module).__name__ in _MAMBA


def _is_kimi(module: Any) -> bool:
    """Whether its delta rule is that of Kimi Linear."""
    return type(module).__name__.endswith("DeltaAttention") and hasattr(module, "forget_gate")


def shifted_window(call: AttentionCall | ConvolutionCall | RecurrenceCall) -> int:
    """Positions that a hole in what a layer keeps would shift; 0 where it shifts none."""
    return call.form.taps if isinstance(call, RecurrenceCall) else call.window


def _form(mixer: Any) -> Recurrence:
    channels, _, taps = mixer.conv1d.weight.shape
    if _is_mamba(mixer):
        sizes = mixer.n_groups, mixer.num_heads, mixer.ssm_state_size, mixer.head_dim
        return Recurrence(channels, taps, *sizes, 1, GATED)
    if _is_kimi(mixer):
        heads, width = mixer.num_heads, mixer.head_dim
        return Recurrence(channels, taps, heads, heads, width, width, width, GATED_DELTA)
    heads = mixer.num_k_heads, mixer.num_v_heads
    return Recurrence(channels, taps, *heads, mixer.head_k_dim, mixer.head_v_dim, 1, GATED_DELTA)


def _decay(mixer: Any, a: Any) -> Any:
    """g [B, S, H] of what a product gives."""
    import torch

    return -mixer.A_log.float().exp() * torch.nn.functional.softplus(a.float() + mixer.dt_bias)


def _projected(mixer: Any, hidden: Any) -> tuple[Any, Any, Any, Any]:
    """x [B, S, W], the gate of the output, what becomes β [B, S, H], and g; whatever the family calls them."""
    import torch

    if hasattr(mixer, "in_proj_qkvz"):  # Qwen3-Next
        *parts, gate, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(hidden), mixer.in_proj_ba(hidden))
        return torch.cat([part.flatten(2) for part in parts], dim=2), gate, b, _decay(mixer, a)
    if hasattr(mixer, "in_proj_qkv"):  # Qwen3.5
        decay = _decay(mixer, mixer.in_proj_a(hidden))
        return mixer.in_proj_qkv(hidden), mixer.in_proj_z(hidden), mixer.in_proj_b(hidden), decay
    x = torch.cat([project(hidden) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)], dim=2)
    gate = mixer.g_proj(hidden) if hasattr(mixer, "g_proj") else mixer.g_b_proj(mixer.g_a_proj(hidden))
    if hasattr(mixer, "forget_gate"):  # Kimi Linear
        return x, gate, mixer.b_proj(hidden), mixer.forget_gate(hidden).flatten(2)
    return x, gate, mixer.b_proj(hidden), _decay(mixer, mixer.a_proj(hidden))  # OLMo hybrid


def _scaled(mixer: Any, hidden: Any) -> Any:
    """What Mamba's first product gives; Falcon H1 has numbers of its own for what goes into it and for its parts."""
    import torch

    if not hasattr(mixer, "ssm_in_multiplier"):
        return mixer.in_proj(hidden)
    inner, group = mixer.intermediate_size, mixer.groups_time_state_size
    parts = zip(mixer.config.ssm_multipliers, (inner, inner, group, group, mixer.num_heads), strict=True)
    numbers = torch.cat([torch.full((width,), number, dtype=hidden.dtype) for number, width in parts])
    return mixer.in_proj(hidden * mixer.ssm_in_multiplier) * numbers.to(hidden.device)


@functools.cache
def _through_interface(mixer: type[Any]) -> Any:
    """The class of a mixer whose state goes through the attention function that its config names."""

    class OfMamba(mixer):  # type: ignore[misc]
        def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
            import torch

            widths = [self.intermediate_size, self.conv_dim, self.num_heads]
            gate, x, step = _scaled(self, hidden_states).split(widths, dim=2)
            step = torch.nn.functional.softplus(step.float() + self.dt_bias)
            least, most = self.time_step_limit
            if (least, most) != (0, float("inf")):
                step = step.clamp(least, most)
            decay, convolution = step * -self.A_log.float().exp(), self.conv1d
            call = RecurrenceCall(self, x, decay, step, convolution.weight, convolution.bias, _form(self), self.D)
            mixed = attention_function(self.config._attn_implementation)(call)
            norm = getattr(self, "norm", None)
            if norm is None or isinstance(norm, torch.nn.Identity):  # of a Falcon H1 without
                return self.out_proj(mixed * torch.nn.functional.silu(gate))
            return self.out_proj(norm(mixed, gate))

    class OfDeltaRule(mixer):  # type: ignore[misc]
        def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
            x, gate, b, decay = _projected(self, hidden_states)
            beta, form = b.sigmoid() * (2.0 if getattr(self, "allow_neg_eigval", False) else 1.0), _form(self)
            call = RecurrenceCall(self, x, decay, beta, self.conv1d.weight, self.conv1d.bias, form)
            mixed = attention_function(self.config._attn_implementation)(call)
            heads = (*mixed.shape[:2], form.heads, form.value_dim)
            norm, project = (self.norm, self.out_proj) if hasattr(self, "out_proj") else (self.o_norm, self.o_proj)
            return project(norm(mixed.reshape(heads), gate.reshape(heads)).flatten(2))

    through: Any = OfMamba if mixer.__name__ in _MAMBA else OfDeltaRule
    through.__name__ = mixer.__name__  # by which other parts know what it is
    return through


def exchange_recurrences(model: Any) -> None:
    """Let a model's layers with a recurrent state call its attention function, for good.

    Raises:
        ModelError: they are of another kind than those that are known.
    """
    for module in model.modules():
        if type(module).__name__.endswith("GatedDeltaNet") or _is_mamba(module) or _is_kimi(module):
            module.config = model.config.get_text_config()
            try:
                form = _form(module)
            except AttributeError as error:
                raise ModelError(
                    "The model's recurrent states have a form that is not known.",
                    note=f"Model type {module.config.model_type!r:.80}: {error}",
                    hint="Use a newer transformers.",
                ) from None
            cut = 2 * form.key_heads * form.key_dim + form.heads * form.value_dim
            grouped = min(form.key_heads, form.heads) > 0 and form.heads % form.key_heads == 0
            if form.channels != cut or not grouped or form.taps < 2 or module.activation != "silu":
                raise ModelError(
                    "The model's recurrent states are of another kind than Qwen3.5's and Mamba 2's.",
                    note=f"Its convolution has {form.channels} channels and {form.taps} taps, and behind it is "
                    f"{module.activation!r:.40}; q, k and v have {cut} channels, in {form.key_heads} heads and "
                    f"{form.heads} of values. Needed are as many channels, 2 taps at least, silu, and a multiple of "
                    "the first heads.",
                    hint="Check config.json.",
                )
            kind: Any = type(module)
            module.__class__ = _through_interface(kind)
