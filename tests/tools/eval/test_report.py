"""The tables of a text: a column for each offset of a short cycle, and for stretches of a long one the means."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from lora_drop_tools.eval.intervals import Figure
from lora_drop_tools.eval.report import _aims, _columns, _offset_table, _text_table, value
from lora_drop_tools.eval.result import task_figures, text_figures
from lora_drop_tools.eval.tasks.metrics import Aggregate, Measured

from tests.support.eval_rows import eval_row


@pytest.mark.parametrize(
    ("k", "begins"), [(1, [0, 1]), (8, [*range(9)]), (9, [0, 1, 2, 3, 5, 9]), (63, [0, 1, 2, 3, 5, 9, 17, 33])]
)
def test_columns_cover_each_offset_once(k: int, begins: list[int]) -> None:
    columns = _columns(k)
    assert [offset for column in columns for offset in column] == [*range(k + 1)]
    assert [column[0] for column in columns] == begins


def test_a_stretch_has_the_mean_over_its_steps() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 9, 12)
    sums = np.stack([tokens, *(random.uniform(0.5, 1, (4, 12)) * tokens)], axis=-1)  # [k + 1, 5], see scoring.py
    row = SimpleNamespace(text=text_figures([sums], 0), k=11, label="a", policy="skip", schedule="periodic")
    headings, *lines = _offset_table([row])  # type: ignore[list-item]
    assert headings.split()[-6:] == ["LoRA", "3–4", "LoRA", "5–8", "LoRA", "9–11"]
    count, own, full, same, kl = sums[9:].sum(axis=0)
    expected = [f"{math.exp((own - full) / count):.3f}", f"{100 * same / count:.1f}", f"{kl / count:.3f}"]
    assert [line.split()[-1] for line in lines] == expected


def test_a_divergence_of_equal_logits_has_no_sign() -> None:
    """Rounding makes it a little less than 0."""
    sums = np.array([[10, 30, 30, 10, -1e-6], [10, 30, 30, 9, 2.0]])
    row = eval_row(1, None, text=text_figures([sums[:1]], 0))
    assert _text_table([row])[1].split()[-3:] == ["–", "0.000", "–"]
    row = eval_row(1, None, text=text_figures([sums], 0))
    assert _offset_table([row])[-1].split()[-3:] == ["KL", "0.000", "0.200"]


@pytest.mark.parametrize(("stderr", "written"), [(0.05, "1.400 ±0.098"), (None, "1.400")])
def test_a_figure_without_an_error_has_no_interval(stderr: float | None, written: str) -> None:
    """lm-eval gives none for bits per byte: ±0.000 would say that they are known exactly."""
    aggregates = {"bits_per_byte": Aggregate(1.4, stderr, 9)}
    measured = Measured({0: {}}, "bits_per_byte", rises=False, aggregates=aggregates)
    assert value(task_figures(measured, None, seed=0)) == written


def test_an_aim_that_nothing_tells_of_is_not_passed_over() -> None:
    average = Figure(0.5, 0.4, 0.6, 2)
    row = eval_row(3, None, aim=0.02, average=average, average_difference=Figure(-0.01, -0.03, 0.01, 2))
    begin = "aim        b k=3 skip within 2 pp of the full model: "
    unknown = dataclasses.replace(row, average_difference=None)
    assert _aims([row, unknown, dataclasses.replace(unknown, average=None), dataclasses.replace(row, aim=None)]) == [
        f"{begin}reached, -1.0 [-3.0, +1.0] pp",
        f"{begin}not known, some of the average has no difference to full",
        f"{begin}not known, there is no average",
    ]
