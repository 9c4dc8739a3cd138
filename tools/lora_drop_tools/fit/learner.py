"""Adapters as the parameters that distillation learns, and back.

Enters: adapters of a plan. Leaves: adapters of like form. Between them a run of dropped neighbours is the one map that
it is (docs/algorithm.md), and is learned as one: a step that moves n adapters, one behind the other, moves the map n
times as far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lora_drop_runtime.bundle.adapters import beside, stacked

from lora_drop_tools.teacher_forcing.surrogates import Surrogates

_LEAST_SIZE = 1e-6
_BLANK_SIZE = 0.1  # of a map that does nothing yet: what it may add to a feature, as a share of it
_GATE_SIZE = 0.5  # of what is gated by, where the values of a gate are 1 in their units


def _array(matrix: Any) -> Any:
    return matrix.detach().cpu().double().numpy()


def _one_behind_the_other(u: Any, v: Any, rank: int) -> tuple[list[tuple[Any, Any]], float]:
    """The adapters of `unfolded` for one order of the map's parts, and what float32 loses of the map."""
    width = len(u)
    u = np.vstack([u, np.zeros((v.shape[1] - width, u.shape[1]))])  # features that are not the stream stay as they are
    before, rounded, pairs = np.eye(len(u)), np.eye(len(u)), list[tuple[Any, Any]]()
    for begin in range(0, len(v), rank):
        block = slice(begin, begin + rank)
        try:
            a = np.linalg.solve(before.T, v[block].T).T
        except np.linalg.LinAlgError:  # the blocks before map something to 0
            a = np.linalg.lstsq(before.T, v[block].T, rcond=None)[0].T
        pairs.append((a, u[:width, block]))
        before = before + u[:, block] @ v[block]
        low_a, low_b = (matrix.astype(np.float32).astype(np.float64) for matrix in (a, u[:, block]))
        rounded = rounded + low_b @ (low_a @ rounded)
    return pairs, float(np.linalg.norm(rounded - before))


def unfolded(a: Any, b: Any, count: int, rank: int) -> list[tuple[Any, Any]]:
    """Adapters A [r, w] and B [d, r] of `count` sites that one behind the other are the map I + B A.

    With `B A = Σ UᵢVᵢ`, in blocks of r of its singular values, `Bᵢ = Uᵢ` and `Aᵢ = Vᵢ (I + Σ UⱼVⱼ)⁻¹`, the sum over the
    blocks before. The smallest come first, which keeps what is inverted near I, or the largest where that is better.
    Of w features the first d are the stream, to which B adds.

    Args:
        a, b: [R, w] and [d, R], float64; of their product count · r singular values at most are kept.
    """
    width, room = len(b), count * rank
    if count == 1 and len(a) == rank:
        return [(a, b)]
    left, upper = np.linalg.qr(b)
    right, lower = np.linalg.qr(a.T)
    u, sizes, v = np.linalg.svd(upper @ lower.T)
    u, v = ((left @ u) * np.sqrt(sizes))[:, :room], (np.sqrt(sizes)[:, None] * (v @ right.T))[:room]
    u = np.hstack([u, np.zeros((width, room - u.shape[1]))])  # the smallest are none
    v = np.vstack([v, np.zeros((room - len(v), v.shape[1]))])
    return min((_one_behind_the_other(u[:, ::o], v[::o], rank) for o in (-1, 1)), key=lambda found: found[1])[0]


def apart(surrogates: Surrogates, runs: Sequence[Sequence[str]], rank: int) -> Surrogates:
    """An adapter of the rank for each site of the runs, of what stands for each run under its last site."""
    import torch

    found: dict[str, tuple[Any, ...]] = {}
    for run in runs:
        a, b, *gates = surrogates[run[-1]]
        if gates:
            parts = (matrix.split(rank, dim) for matrix, dim in ((a, 0), (b, 1), (gates[0], 0)))
            found |= {site: tuple(one.clone() for one in own) for site, *own in zip(run, *parts, strict=True)}
            continue
        for site, pair in zip(run, unfolded(_array(a), _array(b), len(run), rank), strict=True):
            found[site] = tuple(torch.tensor(matrix.copy(), dtype=torch.float32, device=a.device) for matrix in pair)
    return found


def together(pairs: Surrogates, runs: Sequence[Sequence[str]]) -> Surrogates:
    """The adapters of each run as the one map that they are, under its last site."""
    import torch

    found = {}
    for run in runs:
        arrays = {site: tuple(map(_array, pairs[site])) for site in run}
        matrices = beside(arrays, run) if len(arrays[run[0]]) > 2 else stacked(arrays, run)
        found[run[-1]] = tuple(torch.from_numpy(matrix).to(pairs[run[0]][0]) for matrix in matrices)
    return found


def cosine(share: float) -> float:
    """The learning rate as a share of the highest, after a share of the steps: from 1 down to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def drawn(rank: int, scale: Any, random: Any) -> Any:
    """Rows of an A that says something of features of these sizes [w], at random: [rank, w]."""
    import torch

    return torch.randn(rank, len(scale), generator=random) / len(scale) ** 0.5 / scale


def _gate_units(scale: Any, gate: Any) -> Any:
    """What the values of G [R, d] that multiply each value of a stream are measured in, [d]."""
    stream = scale[: gate.shape[1]]
    return _GATE_SIZE * stream.square().mean().sqrt() / stream / len(stream) ** 0.5


class Learner:
    """The surrogates of a plan as parameters of like size, those of a run as one under its last site.

    Of w features they are A [R, w] and B [d, R], where the ranks of the run sum up to R < d, else their product [d, w].
    A and the product are in units of the features. Gated ones are A, B and G [R, d] whatever R is, G in units of the
    stream over its root mean square.

    Args:
        scales: the root mean square of each run's features [w], by its last site.
        runs: the adapted sites, neighbours that are learned as one together.
    """

    def __init__(
        self, pairs: Surrogates, scales: Mapping[str, Any], runs: Sequence[Sequence[str]], device: Any
    ) -> None:
        import torch

        self.runs = runs
        self.scales, self.sizes, self.parameters = dict[str, Any](), dict[str, Any](), dict[str, tuple[Any, ...]]()
        self.rank = len(pairs[runs[0][0]][0])
        for end, (a, b, *gates) in together(pairs, runs).items():
            scale, a, b, *gates = (one.float().to(device) for one in (scales[end], a, b, *gates))
            if len(a) < len(b) or gates:
                parts = [a * scale, b]
                size = sum(part.square().mean() for part in parts).sqrt()
            else:
                parts = [b @ a * scale]
                blank = _BLANK_SIZE * scale.median() / len(scale) ** 0.5
                size = parts[0].square().mean().sqrt() if parts[0].any() else blank
            self.scales[end], self.sizes[end] = scale, size.clamp(min=_LEAST_SIZE)
            parts = [part / self.sizes[end] for part in parts] + [gate / _gate_units(scale, gate) for gate in gates]
            self.parameters[end] = tuple(torch.nn.Parameter(part.contiguous()) for part in parts)

    def surrogates(self) -> Surrogates:
        """What stands for the plan's sites while it is learned: a run's last site has all of its map."""
        import torch

        found = {}
        for site, (first, *others) in self.parameters.items():
            size, scale = self.sizes[site], self.scales[site]
            left = others[0] * size if others else torch.eye(len(first), device=scale.device)
            found[site] = (first * size / scale, left, *(gate * _gate_units(scale, gate) for gate in others[1:]))
        return found

    def pairs(self) -> Surrogates:
        """An adapter for each adapted site, of the rank that they had."""
        return apart(self.surrogates(), self.runs, self.rank)

    def all(self) -> list[Any]:
        return [parameter for parameters in self.parameters.values() for parameter in parameters]
