"""Adapters of neighbours as one surrogate: the same function of the first one's input, in no more numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
from lora_drop_runtime.bundle.adapters import Matrices, folded, weight_shapes
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan

WIDTH = 24


def matrices_of(plan: DropPlan, size: float = 0.3) -> Matrices:
    generator = np.random.default_rng(3)

    def draw(*shape: int) -> npt.NDArray[np.float32]:
        return (generator.standard_normal(shape) * size).astype(np.float32)

    return {site: (draw(plan.rank, WIDTH), draw(WIDTH, plan.rank)) for site in plan.adapted_sites}


@pytest.mark.parametrize(
    ("rank", "names"),
    [
        (1, ["3.lora_A", "3.lora_B", "7.lora_A", "7.lora_B"]),
        (3, ["3.lora_A", "3.lora_B", "7.lora_A", "7.lora_B"]),  # 2 · 3 · 3 < 24
        (4, ["3.lora_BA", "7.lora_A", "7.lora_B"]),  # 2 · 3 · 4 = 24
        (12, ["3.lora_BA", "7.lora_BA"]),
        (40, ["3.lora_BA", "7.lora_BA"]),
    ],
)
def test_one_after_the_other(rank: int, names: list[str]) -> None:
    plan = DropPlan(num_layers=10, sites=("3", "4.attn", "4.mlp", "5", "7"), bare_sites=("4.mlp",), rank=rank)
    matrices, shapes = matrices_of(plan), weight_shapes(plan, WIDTH)
    weights = folded(matrices, plan, WIDTH)
    assert [name.removeprefix("surrogate.") for name in weights] == names
    assert {name: array.shape for name, array in weights.items()} == shapes
    apart = sum(a.size + b.size for a, b in matrices.values())
    assert sum(map(math.prod, shapes.values())) <= apart
    x = np.random.default_rng(4).standard_normal((5, WIDTH))
    for first, run in (("3", ("3", "4.attn", "5")), ("7", ("7",))):
        expected = x
        for site in run:
            a, b = (matrix.astype(np.float64) for matrix in matrices[site])
            expected = expected + expected @ a.T @ b.T
        product = x
        for part in ("A", "B", "BA"):
            if (name := f"surrogate.{first}.lora_{part}") in weights:
                product = product @ weights[name].T
        np.testing.assert_allclose(x + product, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("surrogate", "width"), [("residual-gated", WIDTH), ("residual-delta-gated", 2 * WIDTH)])
def test_gated_ones_beside_each_other(surrogate: str, width: int) -> None:
    """Of what the run was given, whatever their ranks sum up to."""
    plan = DropPlan(num_layers=10, sites=("3", "4.attn", "4.mlp", "5", "7"), bare_sites=("4.mlp",), rank=9)
    plan = dataclasses.replace(plan, surrogate=surrogate)
    generator = np.random.default_rng(3)
    shapes = (9, width), (WIDTH, 9), (9, WIDTH)
    matrices: Matrices = {
        site: tuple(generator.standard_normal(shape).astype(np.float32) for shape in shapes)
        for site in plan.adapted_sites
    }
    weights = folded(matrices, plan, WIDTH)
    assert {name: array.shape for name, array in weights.items()} == weight_shapes(plan, WIDTH)
    assert math.prod(weight_shapes(plan, WIDTH)["surrogate.3.lora_G"]) == 3 * 9 * WIDTH
    x, to_gate = generator.standard_normal((5, width)), generator.standard_normal((5, WIDTH))
    for first, run in (("3", ("3", "4.attn", "5")), ("7", ("7",))):
        a, g, b = (weights[f"surrogate.{first}.lora_{part}"] for part in "AGB")
        found = ((x @ a.T) * np.tanh(to_gate @ g.T)) @ b.T
        parts = (matrices[site] for site in run)
        expected = sum(((x @ a.T) * np.tanh(to_gate @ g.T)) @ b.T for a, b, g in parts)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_a_product_that_is_too_large() -> None:
    plan = DropPlan(num_layers=10, sites=("3", "4", "7"), rank=2)
    matrices = matrices_of(plan)
    matrices["4"] = matrices["4"][0], matrices["4"][1] * np.float32(1e25)
    assert np.isfinite(folded(matrices, plan, WIDTH)["surrogate.3.lora_B"]).all()
    matrices["3"] = matrices["3"][0], matrices["3"][1] * np.float32(1e25)
    matrices["4"] = matrices["4"][0] * np.float32(1e25), matrices["4"][1]
    with pytest.raises(PlanError, match="not numbers") as caught:
        folded(matrices, plan, WIDTH)
    assert "3, 4" in caught.value.note
