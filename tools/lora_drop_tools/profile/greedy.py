"""A drop list by greedy sensitivity: the layer that costs least goes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .scoring import Scoring, Tick

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.forcing import ExactLayer

SURVIVORS = 4  # layers that are compared on all of the text when a drop list grows


def _cheapest(costs: Mapping[int, float], count: int) -> dict[int, float]:
    """The `count` layers of least cost, in ascending order of it."""
    return {layer: costs[layer] for layer in sorted(costs, key=lambda layer: (costs[layer], layer))[:count]}


def _left(count: int, survivors: int | None) -> int:
    """How many layers go on to the next window."""
    return count if survivors is None else max(count // 2, min(count, survivors))


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
                if scoring.policy.exact_refreshes:
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
