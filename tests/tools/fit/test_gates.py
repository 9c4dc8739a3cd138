"""Gates by regression, on what a gated surrogate can be, and on what none can."""

from __future__ import annotations

import pytest
import torch
from lora_drop_tools.fit.gates import gated, widened
from lora_drop_tools.teacher_forcing.closed_form import Site, balanced, solve
from lora_drop_tools.teacher_forcing.surrogates import product

WIDTH, RANK = 12, 6


def a_gated_map(x: torch.Tensor, g: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """What is to be found, written by itself."""
    made = []
    for row in x:
        opened = g @ (row / row.square().mean().sqrt())
        made.append(down @ ((up @ row) * (1 + opened / (1 + torch.exp(-opened)))))
    return torch.stack(made)


def site_of(x: torch.Tensor, y: torch.Tensor) -> Site:
    """Of texts of 64 tokens, the last eighth of which choose."""
    x, y = x.reshape(-1, 64, x.shape[1]), y.reshape(-1, 64, y.shape[1])
    site, count = Site(), len(x) - len(x) // 8
    site.fit.add(x[:count], y[:count])
    site.held_out.add(x[count:], y[count:])
    site.keep(x, y, count)
    return site


def fitted(x: torch.Tensor, y: torch.Tensor, rank: int = RANK) -> tuple[tuple[torch.Tensor, ...], float, list[int]]:
    site, steps = site_of(x, y), list[int]()
    solution, scale = solve(site, RANK), site.fit.scale.float()
    start = widened(*balanced(solution.a, solution.b, scale), rank, scale, 0)
    matrices, left = gated(site, start, scale, 0, lambda done, total: steps.append(total - done))
    return matrices, left, steps


def test_a_gated_map_is_found() -> None:
    """Of what a linear map leaves, on tokens of other texts, the gates leave a small part."""
    random = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-0.5, 0.5, WIDTH)  # those of a residual stream differ, too
    true = [torch.randn(shape, generator=random) for shape in ((RANK, WIDTH), (RANK, WIDTH), (WIDTH, RANK))]
    x, new = (torch.randn(count, WIDTH, generator=random) * sizes for count in (32768, 512))
    matrices, left, steps = fitted(x, a_gated_map(x, *true), rank=4 * RANK)
    assert [tuple(matrix.shape) for matrix in matrices] == [(4 * RANK, WIDTH), (WIDTH, 4 * RANK), (4 * RANK, WIDTH)]
    assert steps == [*range(len(steps))][::-1]
    wanted = a_gated_map(new, *true)
    solution = solve(site_of(x, a_gated_map(x, *true)), WIDTH)
    linear = (wanted - new @ solution.a.T @ solution.b.T).square().mean() / wanted.square().mean()
    found = (wanted - product(new, matrices)).square().mean() / wanted.square().mean()
    assert linear > 0.1
    assert found < 0.2 * linear
    assert left < 0.2


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_of_noise_the_closed_form_is_kept(scale: float) -> None:
    """What is learned of it says nothing of other tokens."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(512, WIDTH, generator=random)
    up, down = (torch.randn(shape, generator=random) for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    y = (x @ up.T @ down.T + 30 * torch.randn(512, WIDTH, generator=random)) * scale
    site = site_of(x, y)
    solution, sizes = solve(site, RANK), site.fit.scale.float()
    start = widened(*balanced(solution.a, solution.b, sizes), RANK, sizes, 0)
    matrices, left, _ = fitted(x, y)
    torch.testing.assert_close(product(x, matrices), product(x, start), rtol=1e-3, atol=1e-3 * scale)
    assert left == 1
