"""The drop list and the schedule: the one place that knows which sites are dropped and when.

Enters: layer counts, ρ, k, names typed by a user. Leaves: a validated `DropPlan` and the kind of each step.
Knows nothing of graphs, weights, caches or tokens. Words and formulas: docs/algorithm.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_drop_runtime.bounds import SHARE
from lora_drop_runtime.errors import PlanError

from .policy import DEFAULT_POLICY, POLICIES, Policy
from .schedule import PeriodicSchedule
from .sites import ATTENTION, MLP, half_of, layer_of, listed, sorted_sites
from .surrogate import DEFAULT_SURROGATE, SURROGATES, SurrogateForm


def eligible_layers(
    num_layers: int,
    always_first: int = 3,
    always_last: int = 1,
    windowed: Iterable[int] = (),
    policy: str = DEFAULT_POLICY,
    kv_sources: Iterable[int] = (),
) -> tuple[int, ...]:
    """Layers that may be dropped whole: all but the first, the last, those with a sliding window, and those whose K and
    V other layers take.

    A window counts positions while a compact cache counts slots, so a windowed layer cannot have holes. Where the
    policy leaves none, it may be dropped.
    """
    if always_first < 0 or always_last < 0:
        raise PlanError(
            "The number of layers that are always kept cannot be negative.",
            note=f"--always-first is {always_first}, --always-last is {always_last}.",
            hint="Use 0 or more.",
        )
    blocked = set(kv_sources) | (set(windowed) if POLICIES[policy].leaves_holes else set())
    return tuple(i for i in range(always_first, num_layers - always_last) if i not in blocked)


def spread_layers(eligible: Sequence[int], drop_ratio: float) -> tuple[int, ...]:
    """`m = floor(ρ·|eligible| + 0.5)` layers spread evenly over the eligible ones (docs/algorithm.md)."""
    drop_ratio = SHARE.real("--drop-ratio", drop_ratio, error=PlanError)
    count = math.floor(drop_ratio * len(eligible) + 0.5)
    return tuple(eligible[math.floor((j + 0.5) * len(eligible) / count)] for j in range(count))


def _without_holes() -> str:
    *others, last = (policy.name for policy in POLICIES.values() if not policy.leaves_holes)
    return f"{', '.join(others)} or {last}"


@dataclass(frozen=True)
class DropPlan:
    """What is baked into the two graphs, and the default window and policy.

    Attributes:
        num_layers: `n`, the decoder blocks of the model.
        sites: the drop list, sorted: `4` for a whole layer (the number is taken, too), `9.attn` and `9.mlp` for its
            halves.
        k: default number of LoRA steps between two refreshes.
        surrogate: name of the surrogates' form, one of SURROGATES; `form` is the object.
        rank: `r` of the adapters, 0 for none.
        bare_sites: those that have no adapter although others have one.
        policy: name of the refreshes' default policy, one of POLICIES; `refresh_policy` is the object.
        kv_sources: layers whose K and V other layers take, and so those of each token.
    """

    num_layers: int
    sites: tuple[str, ...]
    k: int = 3
    surrogate: str = DEFAULT_SURROGATE
    rank: int = 0
    bare_sites: tuple[str, ...] = ()
    always_first: int = 3
    always_last: int = 1
    windowed_layers: tuple[int, ...] = ()
    policy: str = DEFAULT_POLICY
    kv_sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        PeriodicSchedule(self.k)
        for option, value, known in (
            ("--surrogate", self.surrogate, tuple(SURROGATES)),
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
        object.__setattr__(self, "sites", sorted_sites(self.sites))
        object.__setattr__(self, "bare_sites", sorted_sites(self.bare_sites))
        self._check_sites()
        dropped = set(self.sites)
        odd = [site for site in self.bare_sites if site not in dropped]
        if odd:
            raise PlanError(
                "A site without an adapter is not in the drop list.",
                note=f"It is {odd[0]}, the drop list is {listed(self.sites)}.",
                hint="Leave it out.",
            )
        if not self.rank:
            object.__setattr__(self, "bare_sites", ())

    def _check_sites(self) -> None:
        sites = set(self.sites)
        if len(sites) != len(self.sites):
            raise PlanError(
                "The drop list names a layer twice.",
                note=f"It is {listed(self.sites)}.",
                hint="Name each layer once.",
            )
        both = [site for site in self.sites if half_of(site) and str(layer_of(site)) in sites]
        if both:
            raise PlanError(
                "The drop list names a layer and a half of it.",
                note=f"It names {layer_of(both[0])} and {both[0]}.",
                hint="Name the whole layer, or its halves.",
            )
        outside = [layer_of(site) for site in self.sites if layer_of(site) >= self.num_layers]
        if outside:
            raise PlanError(
                "The drop list names layers that the model does not have.",
                note=f"Layer {outside[0]} is named, the model has layers 0 to {self.num_layers - 1}.",
                hint="Layers are counted from 0.",
            )
        always_kept = [site for site in self.sites if not self.may_drop(site)]
        inner = [layer for layer in map(layer_of, always_kept) if self.may_drop(f"{layer}.{MLP}")]  # not first or last
        sources = [layer for layer in inner if layer in self.kv_sources]
        if sources:
            raise PlanError(
                "The drop list contains a layer that is always kept.",
                note=f"Layer {sources[0]} is named, but other layers take its K and V.",
                hint=f"Leave it out, or name {sources[0]}.{MLP}.",
            )
        if inner:
            raise PlanError(
                "The drop list contains a layer that is always kept.",
                note=f"Layer {inner[0]} is named, but it has a sliding window, a short convolution or a "
                f"recurrent state, and policy {self.policy} leaves holes in its cache.",
                hint=f"Leave it out, name {inner[0]}.{MLP}, or use --policy {_without_holes()}.",
            )
        if always_kept:
            raise PlanError(
                "The drop list contains a layer that is always kept.",
                note=f"Layer {always_kept[0]} is named, but the first {self.always_first} and the last "
                f"{self.always_last} layers are always kept.",
                hint="Leave it out, or lower --always-first or --always-last.",
            )

    def may_drop(self, site: str) -> bool:
        """Whether a site of the model is eligible under the plan's policy."""
        outer = eligible_layers(self.num_layers, self.always_first, self.always_last)
        return layer_of(site) in (outer if half_of(site) == MLP else self.eligible_layers)

    @property
    def eligible_layers(self) -> tuple[int, ...]:
        """Layers that may be dropped whole, and so may their attentions."""
        first, last = self.always_first, self.always_last
        return eligible_layers(self.num_layers, first, last, self.windowed_layers, self.policy, self.kv_sources)

    @property
    def counted_layers(self) -> tuple[int, ...]:
        """Layers that shares count: the eligible ones, or where only MLPs may be dropped those of the MLPs."""
        return self.eligible_layers or eligible_layers(self.num_layers, self.always_first, self.always_last)

    @property
    def dropped_attentions(self) -> tuple[int, ...]:
        """Layers whose attention is dropped, with the layer or alone: those whose K/V LoRA steps leave out."""
        return tuple(layer_of(site) for site in self.sites if half_of(site) != MLP)

    @property
    def dropped_mlps(self) -> tuple[int, ...]:
        """Layers whose MLP is dropped, with the layer or alone."""
        return tuple(layer_of(site) for site in self.sites if half_of(site) != ATTENTION)

    @property
    def kept_attentions(self) -> tuple[int, ...]:
        """All other layers: their caches get every token."""
        dropped = set(self.dropped_attentions)
        return tuple(i for i in range(self.num_layers) if i not in dropped)

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """Layers of which nothing is left: dropped whole, or both of their halves."""
        mlps = set(self.dropped_mlps)
        return tuple(i for i in self.dropped_attentions if i in mlps)

    @property
    def halves_alone(self) -> tuple[str, ...]:
        """Dropped halves whose other half is kept."""
        gone = set(self.dropped_layers)
        return tuple(site for site in self.sites if layer_of(site) not in gone)

    def sites_of(self, layer: int) -> tuple[str, ...]:
        """What is dropped of a layer, in the order of its computation."""
        return tuple(site for site in self.sites if layer_of(site) == layer)

    @property
    def rho(self) -> float:
        """Dropped fraction of the eligible layers (ρ); it counts whole layers."""
        return len(self.dropped_layers) / max(1, len(self.eligible_layers))

    @property
    def rho_eff(self) -> float:
        """Dropped fraction of all layers, the ρ of the paper's Eqs. 7–10."""
        return len(self.dropped_layers) / self.num_layers

    @property
    def attention_share(self) -> float:
        """Share of all layers whose attention is dropped: `(1 − a/n) · p` of Eqs. 13–16."""
        return len(self.dropped_attentions) / self.num_layers

    @property
    def form(self) -> SurrogateForm:
        """What the surrogates start from."""
        return SURROGATES[self.surrogate]

    @property
    def refresh_policy(self) -> Policy:
        """What refreshes do about the LoRA steps before them, unless a request asks for another policy."""
        return POLICIES[self.policy]

    def check_policy(self, policy: Policy) -> None:
        """Whether the plan's graphs can be run under a policy.

        Raises:
            PlanError: its LoRA steps write K/V of dropped attentions, or do not, and the policy wants the opposite; or
                a windowed attention is dropped and the policy leaves holes in its cache.
        """
        if policy.fills != self.refresh_policy.fills:
            does = "do" if self.refresh_policy.fills else "do not"
            raise PlanError(
                f"The bundle cannot be decoded under policy {policy.name}.",
                note=f"It was exported with --policy {self.policy}: its LoRA steps {does} write K/V of dropped layers.",
                hint=f"Use policy {self.policy}, or export the model with --policy {policy.name}.",
            )
        windowed = sorted(set(self.dropped_attentions) & set(self.windowed_layers))
        if windowed and policy.leaves_holes:
            raise PlanError(
                f"The bundle cannot be decoded under policy {policy.name}.",
                note=f"Layer {windowed[0]} is dropped; it has a sliding window, a short convolution or a "
                "recurrent state, and holes would shift that.",
                hint=f"Use policy {self.policy}.",
            )

    @property
    def has_state(self) -> bool:
        """Whether dropped sites keep `[B, d]` states between steps."""
        return bool(self.states)

    @functools.cached_property  # every step asks whether there are any
    def states(self) -> Mapping[str, str]:
        """Whose states there are → the site behind which each is taken: a site, or a run's first site and its last."""
        if self.form.with_change:
            return {run[0]: run[-1] for run in self.surrogate_runs}
        return {site: site for site in self.sites} if self.form.base_is_state else {}

    @property
    def states_behind(self) -> dict[str, str]:
        """`states` the other way round: the sites behind which a state is taken → whose it is."""
        return {after: first for first, after in self.states.items()}

    @property
    def adapted_sites(self) -> tuple[str, ...]:
        """Sites with an adapter."""
        return tuple(site for site in self.sites if site not in self.bare_sites) if self.rank else ()

    @property
    def surrogate_runs(self) -> tuple[tuple[str, ...], ...]:
        """Adapted sites in chains: within one, a site's output is the input of the next and nothing else is made of it.

        Each chain is one linear map of its first site's features (adapters.folded). A site begins a chain where its
        base is a state, or where a LoRA step makes K and V of its input (`fill`).
        """
        runs: list[list[str]] = []
        adapted = self.adapted_sites
        end = (-1, 0)  # layer, and half of it, that the site before leads to
        for site in self.sites:
            layer, half = layer_of(site), half_of(site)
            makes_kv = self.refresh_policy.fills and half != MLP
            if self.form.base_is_state or makes_kv or end != (layer, half == MLP):
                runs.append([])
            end = (layer, 1) if half == ATTENTION else (layer + 1, 0)
            if site in adapted:
                runs[-1].append(site)
        return tuple(tuple(run) for run in runs if run)

    @property
    def updated_states(self) -> tuple[str, ...]:
        """Sites whose state LoRA steps change; one without an adapter keeps repeating its output at the anchor."""
        return self.adapted_sites if self.form.updates_state else ()
