"""Adapters by regression: for each surrogate the best matrix of a rank, layer by layer.

Enters: texts, a plan. Leaves: A and B per surrogate, and what error each leaves. A surrogate is linear in B·A
(surrogates.features), so the matrix that brings its output closest to the full model's is a least-squares problem,
and its best approximation of rank r is known. Layers are done in order: the inputs of a layer carry the errors of the
surrogates before it, and its target, the full model's own output, lets it mend some of them. The target of an
attention's surrogate is the stream between the halves. A run of neighbours is fitted as the one surrogate that it is:
its features are the first site's, its target is the last one's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.sites import ATTENTION, half_of, layer_of

from .dropped import DroppedLayer
from .exact import ExactLayer
from .forcing import TeacherForcing
from .layout import Layout
from .surrogates import product

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # per token, of features scaled to a mean square of 1
_HELD_OUT = 6  # every so many batches one chooses the ridge; of fewer the last one, of one the last text


@dataclass
class Batch:
    """Texts of one layout on their way through the layers; `decoded` is None before the first dropped layer."""

    ids: Any  # [B, T]
    layout: Layout
    exact: Any  # [B, T, d]
    decoded: Any = None
    begun: dict[str, Any] = field(default_factory=dict)  # of dropped.py


@dataclass
class Moments:
    """Sums over tokens, float64: XᵀX [w, w], XᵀY [w, d], mean-able ‖y‖²; X features, Y what the base lacks."""

    tokens: int = 0
    xx: Any = 0.0
    xy: Any = 0.0
    yy: float = 0.0
    y_columns: Any = 0.0  # Σ y² per dimension

    def add(self, x: Any, y: Any) -> None:
        import torch

        x, y = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
        self.tokens += len(x)
        self.xx = self.xx + (x.T @ x).to("cpu", torch.float64)
        self.xy = self.xy + (x.T @ y).to("cpu", torch.float64)
        self.y_columns = self.y_columns + y.square().sum(0).to("cpu", torch.float64)
        self.yy = float(self.y_columns.sum())

    def error(self, w: Any) -> float:
        """Σ ‖y − x W‖²."""
        return float(self.yy - 2 * (w * self.xy).sum() + ((self.xx @ w) * w).sum())

    @property
    def scale(self) -> Any:
        """Root mean square of each feature, [w]."""
        return (self.xx.diagonal() / max(1, self.tokens)).sqrt().clamp(min=1e-6)


@dataclass
class Site:
    """What was summed at one surrogate: to fit, and to choose the ridge.

    Attributes:
        examples: features [N, w] and what the base lacks [N, d], of those to fit and of the others; of gated ones.
    """

    fit: Moments = field(default_factory=Moments)
    held_out: Moments = field(default_factory=Moments)
    examples: tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]] = field(default_factory=lambda: ([], []))

    def keep(self, feature: Any, wanted: Any, count: int) -> None:
        """Of texts [B, S, …], of which the first so many are to fit."""
        for place, part in enumerate((slice(count), slice(count, None))):
            x, y = (one[part].reshape(-1, one.shape[-1]) for one in (feature, wanted))
            if len(x):
                self.examples[place].append((x, y))


Choose = Callable[[str, Site], "tuple[Any, ...] | None"]


def fitted_texts(number: int, batches: int, texts: int) -> int:
    """How many texts of a batch are fitted, from the first on; the others choose the ridge."""
    if batches == 1:
        return max(1, texts - 1)
    every = min(_HELD_OUT, batches)
    return 0 if number % every == every - 1 else texts


def _dropped_layer(
    forcing: TeacherForcing,
    batches: Sequence[Batch],
    exact: Sequence[ExactLayer],
    index: int,
    plan: DropPlan,
    policy: Policy,
    ends: Collection[str],
    choose: Choose,
    chosen: dict[str, tuple[Any, ...]],
) -> None:
    for batch in batches:
        if batch.decoded is None:
            batch.decoded = batch.exact[:, batch.layout.lora] if policy.exact_refreshes else batch.exact
    layers = [
        DroppedLayer(forcing, index, batch.decoded, layer, batch.layout, plan, policy, batch.begun)
        for batch, layer in zip(batches, exact, strict=True)
    ]
    for name in plan.sites_of(index):
        site, pairs = Site(), [layer.features(name) for layer in layers]
        pair = None
        if name in ends:
            for number, (batch, full, (feature, base)) in enumerate(zip(batches, exact, pairs, strict=True)):
                wanted = (full.middle if half_of(name) == ATTENTION else full.output)[:, batch.layout.lora] - base
                count = fitted_texts(number, len(batches), len(wanted))
                site.fit.add(feature[:count], wanted[:count])
                site.held_out.add(feature[count:], wanted[count:])
                if plan.form.gated:
                    site.keep(feature, wanted, count)
            pair = choose(name, site)
        if pair is not None:
            chosen[name] = pair
        for layer, (feature, base) in zip(layers, pairs, strict=True):
            layer.x = base + product(feature, pair)
    for batch, layer in zip(batches, layers, strict=True):
        batch.decoded = layer.output()


def walk(
    forcing: TeacherForcing,
    batches: Sequence[Batch],
    plan: DropPlan,
    policy: Policy,
    runs: Iterable[Sequence[str]],
    choose: Choose,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[Any, ...]]:
    """Send batches through all layers; at each surrogate sum features and targets up, and go on with `choose`'s answer.

    A site that does not end one of the `runs` goes on with its base, unasked: so the features of one that does are the
    input of its run. Only two hidden states per batch are held, and one layer's K and V; of gated surrogates one's
    features and targets, too.

    Returns: what `choose` answered, by the last site of the run.
    """
    import torch

    chosen: dict[str, tuple[Any, ...]] = {}
    ends = {run[-1] for run in runs}
    last = max(map(layer_of, plan.sites), default=-1)
    with torch.no_grad():
        for index in range(last + 1):
            exact = [forcing.exact_layer(index, batch.exact) for batch in batches]
            if plan.sites_of(index):
                _dropped_layer(forcing, batches, exact, index, plan, policy, ends, choose, chosen)
            for batch, layer in zip(batches, exact, strict=True):
                if not plan.sites_of(index) and batch.decoded is not None:
                    batch.decoded = forcing.kept_layer(index, batch.decoded, layer, batch.layout, policy)
                batch.exact = layer.output
            progress(index + 1, last + 1)
    return chosen


@dataclass(frozen=True)
class Solution:
    """A surrogate's matrices, A [r, w] and B [d, r], and the share of the base's squared error that they leave.

    `left` is over the tokens that chose the ridge.
    """

    a: Any
    b: Any
    ridge: float
    left: float


def solve(site: Site, rank: int) -> Solution:
    """Reduced-rank ridge regression (Izenman 1975): the matrix of rank r that leaves the least squared error.

    With M = XᵀX + λI = L Lᵀ the ridge solution is W = M⁻¹ XᵀY; the best W of rank r truncates Lᵀ W, W in whitened
    coordinates: `W V_r V_rᵀ`, V_r its leading right singular vectors, the eigenvectors of `WᵀMW = WᵀXᵀY`. y ≈ x W, so
    A = (W V_r)ᵀ and B = V_r.
    λ is the one of RIDGES that leaves the least error on held-out tokens. Features are scaled to a mean square of 1,
    since a few dimensions of a residual stream are a hundred times the others.
    """
    import torch

    fit, held_out = site.fit, site.held_out if site.held_out.tokens else site.fit
    scale = fit.scale
    xx, xy = fit.xx / scale[:, None] / scale, fit.xy / scale[:, None]
    best: Solution | None = None
    for ridge in RIDGES:
        lower = torch.linalg.cholesky(xx + ridge * fit.tokens * torch.eye(len(xx), dtype=xx.dtype))
        w = torch.cholesky_solve(xy, lower)
        v = torch.linalg.eigh(w.T @ xy).eigenvectors.flip(1)[:, :rank]  # [d, r]
        w_r = (w @ v) / scale[:, None]  # [d, r]
        left = held_out.error(w_r @ v.T) / max(held_out.yy, 1e-30)
        if best is None or left < best.left:
            best = Solution(w_r.T.float(), v.float(), ridge, left)
    assert best is not None
    if best.left >= 1:  # no help on other tokens: leave the base
        return Solution(best.a, torch.zeros_like(best.b), best.ridge, 1.0)
    return best


def balanced(a: Any, b: Any, feature_scale: Any) -> tuple[Any, Any]:
    """The same product, with each direction's size shared between A (in units of its features) and B."""
    size_a = (a * feature_scale).norm(dim=1).clamp(min=1e-12)
    share = (b.norm(dim=0).clamp(min=1e-12) / size_a).sqrt()
    return a * share[:, None], b / share


def batches_of(forcing: TeacherForcing, texts: Iterable[tuple[Any, Layout]]) -> list[Batch]:
    """Texts [B, T] at the first layer."""
    return [Batch(ids, layout, forcing.embed(ids)) for ids, layout in texts]
