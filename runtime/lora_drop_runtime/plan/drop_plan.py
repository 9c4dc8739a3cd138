"""The drop list and the schedule: the one place that knows which layers are dropped and when.

Enters: layer counts, ρ, k, names typed by a user. Leaves: a validated `DropPlan` and the kind of each step.
Knows nothing of graphs, weights, caches or tokens. Words and formulas: docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_drop_runtime.bounds import SHARE
from lora_drop_runtime.errors import InputError, PlanError

from .policy import DEFAULT_POLICY, POLICIES, Policy
from .schedule import PeriodicSchedule
from .surrogate import DEFAULT_SURROGATE, SURROGATES, SurrogateForm

INJECTIONS = ("block", "attn_mlp")


def eligible_layers(
    num_layers: int, always_first: int = 3, always_last: int = 1, windowed: Iterable[int] = ()
) -> tuple[int, ...]:
    """Layers that may be dropped: all but the first, the last, and those with a sliding window.

    A window counts positions while a compact cache counts slots, so a windowed layer cannot have holes.
    """
    if always_first < 0 or always_last < 0:
        raise PlanError(
            "The number of layers that are always kept cannot be negative.",
            note=f"--always-first is {always_first}, --always-last is {always_last}.",
            hint="Use 0 or more.",
        )
    blocked = set(windowed)
    return tuple(i for i in range(always_first, num_layers - always_last) if i not in blocked)


def spread_layers(eligible: Sequence[int], drop_ratio: float) -> tuple[int, ...]:
    """`m = floor(ρ·|eligible| + 0.5)` layers spread evenly over the eligible ones (docs/algorithm.md)."""
    drop_ratio = SHARE.real("--drop-ratio", drop_ratio, error=PlanError)
    count = math.floor(drop_ratio * len(eligible) + 0.5)
    return tuple(eligible[math.floor((j + 0.5) * len(eligible) / count)] for j in range(count))


@dataclass(frozen=True)
class DropPlan:
    """What is baked into the two graphs, and the default window and policy.

    Attributes:
        num_layers: `n`, the decoder blocks of the model.
        drop_layers: the drop list, sorted.
        k: default number of LoRA steps between two refreshes.
        surrogate: name of the surrogates' form, one of SURROGATES; `form` is the object.
        injection: `block` (one surrogate per layer) or `attn_mlp` (one per half).
        rank: `r` of the adapters, 0 for none.
        policy: name of the refreshes' default policy, one of POLICIES; `refresh_policy` is the object.
    """

    num_layers: int
    drop_layers: tuple[int, ...]
    k: int = 3
    surrogate: str = DEFAULT_SURROGATE
    injection: str = "block"
    rank: int = 0
    always_first: int = 3
    always_last: int = 1
    windowed_layers: tuple[int, ...] = ()
    policy: str = DEFAULT_POLICY

    def __post_init__(self) -> None:
        PeriodicSchedule(self.k)
        for option, value, known in (
            ("--surrogate", self.surrogate, tuple(SURROGATES)),
            ("--injection", self.injection, INJECTIONS),
            ("--policy", self.policy, tuple(POLICIES)),
        ):
            if value not in known:
                raise PlanError(
                    f"Unknown value for {option}.",
                    note=f"{value!r} was given, {', '.join(known)} are known.",
                    hint=f"Use {option} {known[0]}.",
                )
        if self.rank < 0:
            raise PlanError(
                "The adapter rank cannot be negative.",
                note=f"--rank is {self.rank}.",
                hint="Use 0 for no adapters.",
            )
        object.__setattr__(self, "drop_layers", tuple(sorted(self.drop_layers)))
        drop_list = ", ".join(map(str, self.drop_layers))
        if len(set(self.drop_layers)) != len(self.drop_layers):
            raise PlanError(
                "The drop list names a layer twice.",
                note=f"It is {drop_list}.",
                hint="Name each layer once.",
            )
        outside = [i for i in self.drop_layers if not 0 <= i < self.num_layers]
        if outside:
            raise PlanError(
                "The drop list names layers that the model does not have.",
                note=f"Layer {outside[0]} is named, the model has layers 0 to {self.num_layers - 1}.",
                hint="Layers are counted from 0.",
            )
        always_kept = [i for i in self.drop_layers if i not in self.eligible_layers]
        if always_kept:
            windowed = [i for i in always_kept if i in self.windowed_layers]
            reason = (
                "it attends to a sliding window"
                if windowed
                else f"the first {self.always_first} and the last {self.always_last} layers are always kept"
            )
            raise PlanError(
                "The drop list contains a layer that is always kept.",
                note=f"Layer {(windowed or always_kept)[0]} is named, but {reason}.",
                hint="Leave it out." if windowed else "Leave it out, or lower --always-first or --always-last.",
            )

    @property
    def eligible_layers(self) -> tuple[int, ...]:
        return eligible_layers(self.num_layers, self.always_first, self.always_last, self.windowed_layers)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        dropped = set(self.drop_layers)
        return tuple(i for i in range(self.num_layers) if i not in dropped)

    @property
    def rho(self) -> float:
        """Dropped fraction of the eligible layers (ρ)."""
        return len(self.drop_layers) / max(1, len(self.eligible_layers))

    @property
    def rho_eff(self) -> float:
        """Dropped fraction of all layers, the ρ of the paper's Eqs. 7–10."""
        return len(self.drop_layers) / self.num_layers

    @property
    def form(self) -> SurrogateForm:
        """What the surrogates start from."""
        return SURROGATES[self.surrogate]

    @property
    def refresh_policy(self) -> Policy:
        """What refreshes do about the LoRA steps before them, unless a request asks for another policy."""
        return POLICIES[self.policy]

    @property
    def has_state(self) -> bool:
        """Whether dropped layers keep a `[B, d]` state between steps."""
        return self.form.has_state

    @property
    def updates_state(self) -> bool:
        """Whether LoRA steps change the state; without adapters a form that would keeps repeating y at the anchor."""
        return self.form.updates_state and self.rank > 0

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the surrogates: `"4"` for layer 4, or `"4.attn"` and `"4.mlp"` for its halves."""
        halves = ("",) if self.injection == "block" else (".attn", ".mlp")
        return tuple(f"{layer}{half}" for layer in self.drop_layers for half in halves)


def parse_layers(text: str) -> tuple[int, ...]:
    """`"4,6,9"` as layer indices."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            "The drop list is not a list of layer numbers.",
            note=f"{text!r} was given.",
            hint="Write it as --drop-layers 4,6,9.",
        ) from None
