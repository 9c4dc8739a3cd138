"""What `lora-drop profile` measures, one window of a text after the other.

Enters: a model under teacher forcing, windows of token ids, a window k and a policy. Leaves: figures of each layer, the
KL of drop lists, the greedy order. Knows no files and no other rankings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.forcing import ExactLayer, Layout, TeacherForcing

DELTAS = (1, 2, 3, 5, 10)  # of Eq. 17
LEADING = 4  # first tokens of a window that no figure of a layer counts: many models park attention there
HEAD_ROWS = 128  # tokens whose logits are in memory at once, beside those of one window in full
SURVIVORS = 4  # layers that are compared on all of the text when a drop list grows
Tick = Callable[[], None]


@dataclass(frozen=True)
class LayerFigures:
    """Of one layer with input x and output y (residual stream, [T, d] a window), means over tokens and windows.

    Attributes:
        similarity: Δ → cosine of y_t and y_{t+Δ} (Eq. 17).
        centred_similarity: the same less the mean of y over its window.
        influence_cosine: cosine of x_t and y_t; 1 − it is ShortGPT's block influence.
        base_errors: surrogate → mean ‖y_t − base‖ / mean ‖y_t − ȳ‖, ȳ the mean of y over its window. Above 1 the base
            is worse than that mean. `residual` is x_t, `recurrent` y_{t−1}, `anchor` y_{t−o} averaged over o = 1 … k.
        base_errors_of_norm: the same over mean ‖y_t‖.
    """

    similarity: Mapping[int, float]
    centred_similarity: Mapping[int, float]
    influence_cosine: float
    base_errors: Mapping[str, float]
    base_errors_of_norm: Mapping[str, float]


def layer_figures(forcing: TeacherForcing, windows: Any, k: int, tick: Tick) -> list[LayerFigures]:
    """Figures of every layer over windows of token ids [N, T]; `tick` is called after each window."""
    import torch

    sums: Any = 0.0
    with torch.no_grad():
        for ids in windows:
            hidden, rows = forcing.embed(ids[None]), []
            for layer in forcing.exact(ids[None]):
                rows.append(_window_means(hidden[0, LEADING:].float(), layer.output[0, LEADING:].float(), k))
                hidden = layer.output
            sums = sums + torch.stack(rows)
            tick()
    return [_figures((row / len(windows)).tolist()) for row in sums]


def _window_means(x: Any, y: Any, k: int) -> Any:
    """Means over the tokens of a window, in the order that `_figures` reads; x, y [T, d]."""
    import torch

    centred = y - y.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity
    distances = [(y[offset:] - y[:-offset]).norm(dim=-1).mean() for offset in range(1, k + 1)]
    means = [cosine(h[:-delta], h[delta:], dim=-1).mean() for h in (y, centred) for delta in DELTAS]
    means += [cosine(x, y, dim=-1).mean(), (y - x).norm(dim=-1).mean(), distances[0], torch.stack(distances).mean()]
    return torch.stack([*means, centred.norm(dim=-1).mean(), y.norm(dim=-1).mean()]).double()


def _figures(means: list[float]) -> LayerFigures:
    count = len(DELTAS)
    cosine, residual, recurrent, anchor, spread, norm = means[2 * count :]
    distances = {"residual": residual, "recurrent": recurrent, "anchor": anchor}
    return LayerFigures(
        similarity=dict(zip(DELTAS, means[:count], strict=True)),
        centred_similarity=dict(zip(DELTAS, means[count : 2 * count], strict=True)),
        influence_cosine=cosine,
        base_errors={base: distance / spread for base, distance in distances.items()},
        base_errors_of_norm={base: distance / norm for base, distance in distances.items()},
    )


@dataclass(frozen=True)
class Scoring:
    """How drop lists are scored: KL(full model ‖ LoRA step) in nats, `residual` without adapters, mean over LoRA steps.

    Attributes:
        plan: without dropped layers.
        layout: of every window.
    """

    forcing: TeacherForcing
    plan: DropPlan
    layout: Layout
    policy: str

    def decoded(
        self, hidden: Any, exact: Sequence[ExactLayer], drop_layers: Sequence[int], first: int
    ) -> Iterator[Any]:
        """The decoded stream after each layer from `first` on, whose input `hidden` is."""
        plan = dataclasses.replace(self.plan, drop_layers=tuple(drop_layers))
        for index in range(first, len(exact)):
            hidden = self.forcing.decoded_layer(index, hidden, exact[index], self.layout, plan, {}, self.policy)
            yield hidden

    def reference(self, exact: Sequence[ExactLayer]) -> Any:
        """The full model's log probabilities at the LoRA steps of a window, [S, V]."""
        import torch

        return torch.cat([self._log_probs(rows) for rows in exact[-1].output[:, self.layout.lora].split(HEAD_ROWS, 1)])

    def kl(self, reference: Any, hidden: Any) -> float:
        """Sum over the LoRA steps of a window, from the last layer's output in the decoded stream."""
        import torch

        lora = hidden if self.policy == "backfill" else hidden[:, self.layout.lora]
        total = 0.0
        for rows, expected in zip(lora.split(HEAD_ROWS, 1), reference.split(HEAD_ROWS), strict=True):
            found = self._log_probs(rows)
            total += float(torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
        if not math.isfinite(total):
            raise ModelError(
                "The model's logits are not finite.",
                note=f"Some overflow in {lora.dtype}.",
                hint="Use --dtype fp32.",
            )
        return total

    def of_lists(self, windows: Any, lists: Sequence[Sequence[int]], tick: Tick) -> list[float]:
        """Of each drop list over windows of token ids [N, T], one window in memory; `tick` after each window."""
        import torch

        sums = [0.0] * len(lists)
        with torch.no_grad():
            for ids in windows:
                exact = self.forcing.exact(ids[None])
                reference = self.reference(exact)
                for index, drop_layers in enumerate(lists):
                    plan = dataclasses.replace(self.plan, drop_layers=tuple(drop_layers))
                    hidden = self.forcing.decode(exact, ids[None], self.layout, plan, {}, self.policy)
                    sums[index] += self.kl(reference, hidden)
                tick()
        return [total / (len(windows) * len(self.layout.lora)) for total in sums]

    def _log_probs(self, hidden: Any) -> Any:
        """[1, S, d] → [S, V]."""
        return self.forcing.logits(hidden)[0].float().log_softmax(dim=-1)


class Greedy:
    """A drop list that grows by the layer that costs least given those in it, measured again whenever it has grown.

    Of every window the exact layers are kept, and the decoded stream of the current list at each layer's input: another
    layer's drop changes nothing before it.

    Args:
        windows: token ids [N, T].
        tick: called `ticks(…)` times in all.
    """

    def __init__(self, scoring: Scoring, windows: Any, tick: Tick = lambda: None) -> None:
        import torch

        self.scoring, self.tick = scoring, tick
        self.dropped: list[int] = []
        self.windows: list[tuple[list[ExactLayer], list[Any]]] = []
        with torch.no_grad():
            for ids in windows:
                # Halves of a block are not scored: what lies between them is not kept
                exact = [dataclasses.replace(e, middle=e.output) for e in scoring.forcing.exact(ids[None])]
                stream = [scoring.forcing.embed(ids[None]), *(layer.output for layer in exact)]
                if scoring.policy == "backfill":
                    stream = [hidden[:, scoring.layout.lora] for hidden in stream]
                self.windows.append((exact, stream))

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept; proportional to windows, layers and width."""
        kept = [t for exact, stream in self.windows for t in (*stream, *(t for e in exact for t in vars(e).values()))]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    def costs(self, layers: Sequence[int], survivors: int | None = None) -> dict[int, float]:
        """KL of the current list with each of these layers added.

        Args:
            survivors: the costlier half of the layers is given up after each window, until so many are left; only those
                are returned. None gives up none.
        """
        import torch

        found = dict.fromkeys(layers, 0.0)
        with torch.no_grad():
            for exact, stream in self.windows:
                reference = self.scoring.reference(exact)
                for layer in found:
                    *_, hidden = self.scoring.decoded(stream[layer], exact, [*self.dropped, layer], layer)
                    found[layer] += self.scoring.kl(reference, hidden)
                    self.tick()
                found = _cheapest(found, _left(len(found), survivors))
        steps = len(self.windows) * len(self.scoring.layout.lora)
        return {layer: total / steps for layer, total in found.items()}

    def drop(self, layer: int) -> None:
        """Add a layer to the current list."""
        import torch

        self.dropped.append(layer)
        with torch.no_grad():
            for exact, stream in self.windows:
                stream[layer + 1 :] = self.scoring.decoded(stream[layer], exact, self.dropped, layer)

    def order(
        self, eligible: Sequence[int], count: int, report: Callable[[int, float], None]
    ) -> tuple[dict[int, float], list[tuple[int, float]]]:
        """The first `count` layers of the greedy order, each with the KL of the list that it completes.

        A layer that is among the costlier half on the first windows is not measured on the others, which may lose it
        where costs are nearly the same.

        Args:
            report: called with each of them as it is found.

        Returns:
            The KL of each eligible layer dropped alone, and the order.
        """
        alone = self.costs(eligible)
        found, order = alone, list[tuple[int, float]]()
        while len(order) < count:
            if order:
                found = self.costs([layer for layer in eligible if layer not in self.dropped], SURVIVORS)
            ((best, kl),) = _cheapest(found, 1).items()
            self.drop(best)
            order.append((best, kl))
            report(best, kl)
        return alone, order


def ticks(eligible: int, count: int, windows: int) -> int:
    """How often `Greedy.order` ticks."""
    total = eligible * windows
    for candidates in range(eligible - 1, eligible - count, -1):
        left = candidates
        for _ in range(windows):
            total, left = total + left, _left(left, SURVIVORS)
    return total


def _left(count: int, survivors: int | None) -> int:
    """How many layers go on to the next window."""
    return count if survivors is None else max(count // 2, min(count, survivors))


def _cheapest(costs: Mapping[int, float], count: int) -> dict[int, float]:
    """The `count` layers of least cost, in ascending order of it."""
    return {layer: costs[layer] for layer in sorted(costs, key=lambda layer: (costs[layer], layer))[:count]}
