"""What `lora-drop profile` measures, one window of a text after the other.

Enters: a model under teacher forcing, windows of token ids, a window k. Leaves: figures of each layer, or of each half.
Knows no files and no rankings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.sites import ATTENTION, MLP
from lora_drop_runtime.plan.surrogate import SURROGATES, Base

from .scoring import Tick

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing

DELTAS = (1, 2, 3, 5, 10)  # of Eq. 17
LEADING = 4  # first tokens of a window that no figure counts: many models park attention there


@dataclass(frozen=True)
class SiteFigures:
    """Of one layer or half with input x and output y (residual stream, [T, d] a window), means over tokens and windows.

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


def _window_means(x: Any, y: Any, k: int) -> Any:
    """Means over the tokens of a window, in the order that `_figures` reads; x, y [T, d]."""
    import torch

    centred = y - y.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity
    distances = [(y[offset:] - y[:-offset]).norm(dim=-1).mean() for offset in range(1, k + 1)]
    means = [cosine(h[:-delta], h[delta:], dim=-1).mean() for h in (y, centred) for delta in DELTAS]
    means += [cosine(x, y, dim=-1).mean(), (y - x).norm(dim=-1).mean(), distances[0], torch.stack(distances).mean()]
    return torch.stack([*means, centred.norm(dim=-1).mean(), y.norm(dim=-1).mean()]).double()


def _figures(site: str, means: list[float]) -> SiteFigures:
    count = len(DELTAS)
    cosine, residual, recurrent, anchor, spread, norm = means[2 * count :]
    if not spread:
        raise InputError(
            "The outputs of a layer are the same for all tokens.",
            note=f"Those of {site} do not differ from their mean in any window, so nothing can be held against it.",
            hint="Give --text of different tokens; if it is, look at the weights of the checkpoint.",
        )
    of_base = {Base.INPUT: residual, Base.PREVIOUS: recurrent, Base.ANCHOR: anchor}
    distances = {name: of_base[form.base] for name, form in SURROGATES.items() if not form.of_runs}
    return SiteFigures(
        similarity=dict(zip(DELTAS, means[:count], strict=True)),
        centred_similarity=dict(zip(DELTAS, means[count : 2 * count], strict=True)),
        influence_cosine=cosine,
        base_errors={form: distance / spread for form, distance in distances.items()},
        base_errors_of_norm={form: distance / norm for form, distance in distances.items()},
    )


def site_figures(
    forcing: TeacherForcing, windows: Any, k: int, tick: Tick, halves: bool = False
) -> dict[str, SiteFigures]:
    """Figures of every layer, or half, over windows of token ids [N, T]; `tick` is called after each window.

    Raises:
        InputError: a layer's outputs are all the same.
    """
    import torch

    sums: dict[str, Any] = {}
    with torch.no_grad():
        for ids in windows:
            hidden = forcing.embed(ids[None])
            for index, layer in enumerate(forcing.exact(ids[None])):
                ends = {f"{index}": (hidden, layer.output)}
                if halves:
                    ends = {
                        f"{index}.{ATTENTION}": (hidden, layer.middle),
                        f"{index}.{MLP}": (layer.middle, layer.output),
                    }
                for site, (x, y) in ends.items():
                    means = _window_means(x[0, LEADING:].float(), y[0, LEADING:].float(), k)
                    sums[site] = sums.get(site, 0.0) + means
                hidden = layer.output
            tick()
    return {site: _figures(site, (means / len(windows)).tolist()) for site, means in sums.items()}
