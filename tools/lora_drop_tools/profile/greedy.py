"""A drop list by greedy sensitivity: the site that costs least for what it saves goes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.plan.sites import layer_of

from .scoring import Scoring, Tick

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.exact import ExactLayer

SURVIVORS = 4  # sites that are compared on all of the text when a drop list grows
SCREENED = 12  # halves that are measured when a list of halves grows: those that were cheapest when last measured
Saved = Callable[[str], float]  # bytes that a site saves


def _cheapest(costs: Mapping[str, float], count: int | None = None) -> list[str]:
    """The `count` sites of least cost, in ascending order of it; of equal ones the earlier site."""
    return sorted(costs, key=lambda site: (costs[site], layer_of(site), site))[:count]


def _left(count: int, survivors: int | None) -> int:
    """How many sites go on to the next window."""
    return count if survivors is None else max(count // 2, min(count, survivors))


class Greedy:
    """A drop list that grows by the site that adds least KL for each byte it saves, measured again when it has grown.

    Of every window the exact layers are kept, and the decoded stream of the current list at each layer's input: another
    layer's drop changes nothing before it.

    Args:
        windows: token ids [N, T].
        saved: bytes of a site; whole layers of one size are compared by their KL alone.
        tick: called `ticks(…)` times at most.
    """

    def __init__(
        self, scoring: Scoring, windows: Any, saved: Saved = lambda site: 1.0, tick: Tick = lambda: None
    ) -> None:
        import torch

        self.scoring, self.saved, self.tick = scoring, saved, tick
        self.dropped: list[str] = []
        self.prices: dict[str, float] = {}  # of each site when it was last measured
        self.windows: list[tuple[list[ExactLayer], list[Any]]] = []
        self._reached = [0.0] * len(windows)  # sum of KL over each window, of the current list
        with torch.no_grad():
            for ids in windows:
                exact = scoring.forcing.exact(ids[None])
                if not scoring.plan.form.base_is_state:  # then no base is the stream between the halves: it is not kept
                    exact = [dataclasses.replace(e, middle=e.output) for e in exact]
                stream = [scoring.forcing.embed(ids[None]), *(layer.output for layer in exact)]
                if scoring.policy.exact_refreshes:
                    stream = [hidden[:, scoring.layout.lora] for hidden in stream]
                self.windows.append((exact, stream))

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept; proportional to windows, layers and width."""
        kept = [t for exact, stream in self.windows for t in (*stream, *(t for e in exact for t in e.tensors))]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    def _price(self, site: str, kl: float, windows: int) -> float:
        """What a site adds to the current list's KL for each byte, per window of the first ones, of which `kl` is."""
        return (kl - sum(self._reached[:windows])) / windows / self.saved(site)

    def costs(self, sites: Sequence[str], survivors: int | None = None) -> dict[str, float]:
        """KL of the current list with each of these sites added, the cheapest for its bytes first.

        Args:
            survivors: the dearer half of the sites is given up after each window, until so many are left; only those
                are returned. None gives up none.
        """
        import torch

        found = dict.fromkeys(sites, 0.0)
        with torch.no_grad():
            for number, (exact, stream) in enumerate(self.windows, start=1):
                reference = self.scoring.reference(exact)
                for site in found:
                    first = layer_of(site)
                    *_, hidden = self.scoring.decoded(stream[first], exact, [*self.dropped, site], first)
                    found[site] += self.scoring.kl(reference, hidden)
                    self.tick()
                prices = {site: self._price(site, kl, number) for site, kl in found.items()}
                self.prices |= prices
                found = {site: found[site] for site in _cheapest(prices, _left(len(found), survivors))}
        steps = len(self.windows) * len(self.scoring.layout.lora)
        return {site: total / steps for site, total in found.items()}

    def drop(self, site: str) -> None:
        """Add a site to the current list."""
        import torch

        self.dropped.append(site)
        first = layer_of(site)
        with torch.no_grad():
            for number, (exact, stream) in enumerate(self.windows):
                stream[first + 1 :] = self.scoring.decoded(stream[first], exact, self.dropped, first)
                self._reached[number] = self.scoring.kl(self.scoring.reference(exact), stream[-1])

    def order(
        self,
        candidates: Sequence[str],
        enough: Callable[[Sequence[str]], bool],
        report: Callable[[str, float], None],
        screened: int | None = None,
    ) -> tuple[dict[str, float], list[tuple[str, float]]]:
        """The greedy order until a list is long enough, each site with the KL of the list that it completes.

        A site that is among the dearer half on the first windows is not measured on the others, which may lose it
        where prices are nearly the same.

        Args:
            enough: told the sites of the order so far.
            report: called with each of them as it is found.
            screened: only so many candidates are measured when the list grows, those whose last price was the lowest.
                A price mostly grows with the list, so that one that was not measured comes up in its turn.

        Returns:
            The KL of each candidate dropped alone, and the order.
        """
        found = alone = self.costs(candidates)
        order = list[tuple[str, float]]()
        while len(order) < len(candidates) and not enough(self.dropped):
            if order:
                left = {site: self.prices[site] for site in candidates if site not in self.dropped}
                found = self.costs([site for site in left if site in _cheapest(left, screened)], SURVIVORS)
            best, kl = next(iter(found.items()))
            self.drop(best)
            order.append((best, kl))
            report(best, kl)
        return alone, order


def ticks(candidates: int, rounds: int, windows: int, screened: int | None = None) -> int:
    """How often `Greedy.order` ticks in so many rounds."""
    total = candidates * windows
    for unlisted in range(candidates - 1, candidates - rounds, -1):
        left = unlisted if screened is None else min(screened, unlisted)
        for _ in range(windows):
            total, left = total + left, _left(left, SURVIVORS)
    return total
