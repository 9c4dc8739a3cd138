"""Calibrated rounding of one matrix, against a plain GPTQ in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lora_drop_export.quantize.formats import BlockFormat, dequantize
from lora_drop_export.quantize.gptq import (
    DAMPING,
    TIED_DAMPING,
    corrected,
    correction,
    gptq_rows,
    share_that_holds,
    triangle,
)
from lora_drop_export.quantize.rounding import quantize_rows
from tests.support.quantized import FORMATS

K = 256


def inputs(count: int = 2048, seed: int = 1) -> np.ndarray:
    """[count, K], correlated, channels of very different sizes."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((count, 32)) @ generator.standard_normal((32, K))
    x = mixed + generator.standard_normal((count, K))
    return (x * np.exp(generator.standard_normal(K))).astype(np.float32)


def matrix(rows: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, K)).astype(np.float32)


def textbook(w: np.ndarray, h: np.ndarray, scales: np.ndarray, zeros: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Algorithm 1 of the paper, column by column: H inverted, its upper factor, all later columns updated."""
    h = h + DAMPING * np.diag(h).mean() * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w, levels = w.copy(), np.empty(w.shape)
    for i in range(K):
        scale, zero = scales[:, i // form.block_size], zeros[:, i // form.block_size]
        levels[:, i] = np.clip(np.rint(w[:, i] / scale) + zero, 0, 2**form.bits - 1)
        error = (w[:, i] - (levels[:, i] - zero) * scale) / upper[i, i]
        w[:, i:] -= np.outer(error, upper[i, i:])
    return levels


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_against_the_textbook(form: BlockFormat) -> None:
    """Given the same scales the integers are the same, but where float32 puts a value on the other side of a tie."""
    x, w = inputs(), matrix(40)
    q, scales, zeros = gptq_rows(w, *triangle(x.T @ x), form)
    assert q.dtype == zeros.dtype == np.uint8
    assert scales.dtype == np.float32
    assert scales.shape == zeros.shape == (40, K // form.block_size)
    assert not form.symmetric or (zeros == form.middle).all()
    h = x.T.astype(np.float64) @ x.astype(np.float64)
    theirs = textbook(w.astype(np.float64), h, scales.astype(np.float64), zeros.astype(np.float64), form)
    assert (q == theirs).mean() > (0.999 if form.bits == 4 else 0.98)
    assert np.abs(q - theirs).max() <= (1 if form.bits == 4 else 3)


@pytest.mark.parametrize("form", [form for form in FORMATS if form.bits == 4], ids=str)
def test_outputs_change_less_than_by_search(form: BlockFormat) -> None:
    """On inputs that it was not calibrated on, though the weights themselves lie farther."""
    (x, fresh), w = np.split(inputs(4096), 2), matrix(40)
    ours = dequantize(*gptq_rows(w, *triangle(x.T @ x), form))
    theirs = dequantize(*quantize_rows(w, form, "search"))
    errors = [np.square((q - w) @ fresh.T).sum(1) for q in (ours, theirs)]
    assert errors[0].sum() < 0.6 * errors[1].sum()
    assert np.square(ours - w).sum() > np.square(theirs - w).sum()


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs(), matrix(40)
    solved, form = triangle(x.T @ x), BlockFormat(4, 32, False)
    whole = gptq_rows(w, *solved, form)
    monkeypatch.setattr("lora_drop_export.quantize.gptq._ROWS", 16)
    for one, other in zip(whole, gptq_rows(w, *solved, form), strict=True):
        assert one.shape == other.shape
        assert np.isclose(one, other, rtol=1e-5).mean() > 0.99  # but where a tie falls the other way


def test_without_correlations_it_is_the_search() -> None:
    """Inputs that are independent and alike ask nothing of later columns."""
    w, form = matrix(8), BlockFormat(4, 32, False)
    q, scales, zeros = gptq_rows(w, *triangle(np.eye(K, dtype=np.float32)), form)
    near = np.clip(np.rint(w / np.repeat(scales, 32, 1)) + np.repeat(zeros, 32, 1), 0, 15)
    assert np.array_equal(q, near)


def test_inputs_that_are_always_zero() -> None:
    """They weigh nothing and break nothing; their weights are rounded to the nearest."""
    x, w, form = inputs(), matrix(8), BlockFormat(4, 32, True)
    x[:, 32:64] = 0
    q, scales, _ = gptq_rows(w, *triangle(x.T @ x), form)
    near = np.clip(np.rint(w[:, 32:64] / scales[:, 1:2]) + 8, 0, 15)
    assert np.array_equal(q[:, 32:64], near)
    q, scales, _ = gptq_rows(w * 0, *triangle(x.T @ x * 0), form)
    assert not scales.any()
    assert (q == 8).all()


def test_moments_that_are_no_numbers() -> None:
    moments = np.eye(K, dtype=np.float32)
    moments[3, 4] = np.inf
    assert triangle(moments) is None


def test_moments_without_a_factor_are_damped_more() -> None:
    """Rounding may leave them with a negative eigenvalue."""
    moments = np.ones((K, K), np.float32)
    moments[0, 1] = moments[1, 0] = 1.5
    solved = triangle(moments)
    assert solved is not None
    unit, own = (part.numpy().astype(np.float64) for part in solved)
    factor = unit * own
    damped = factor @ factor.T - moments
    np.testing.assert_allclose(damped, np.diag(np.diag(damped)), atol=1e-4)
    assert damped[0, 0] >= 0.5


def test_corrected_weights_are_those_of_a_ridge_regression() -> None:
    random = np.random.default_rng(0)
    x = (random.standard_normal((300, 24)) @ random.standard_normal((24, 24))).astype(np.float32)
    rounding = (0.1 * x + random.standard_normal(x.shape)).astype(np.float32)  # errors go along with inputs
    rows = random.standard_normal((5, 24)).astype(np.float32)
    moments = x.T @ x
    root = np.sqrt(DAMPING * moments.diagonal().mean())
    a = np.concatenate([x, root * np.eye(24)])
    b = np.concatenate([(x + rounding) @ rows.T, root * rows.T])
    wanted = np.linalg.lstsq(a, b, rcond=None)[0].T
    found = corrected(rows, correction(*triangle(moments), x.T @ rounding))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - rows).max() > 0.1
    own = correction(*triangle(moments), x.T @ rounding, rows)
    assert own is not None
    np.testing.assert_allclose(rows + own, wanted, atol=1e-5)
    assert corrected(rows, correction(*triangle(moments), np.full_like(moments, np.inf))) is rows


def halves(errors: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Of [512, 24] inputs and what each lacks: the correction found on the first half; moments of both."""
    x = np.random.default_rng(0).standard_normal((512, 24)).astype(np.float32)
    parts = [(x[:256], errors[:256]), (x[256:], errors[256:])]
    own, missing = ([a.T @ b for a, b in pairs] for pairs in ([(p[0], p[0]) for p in parts], parts))
    change = correction(*triangle(own[0]), missing[0])
    assert change is not None
    return change, own, missing


def test_of_a_correction_as_much_as_holds() -> None:
    """It is the α of the least squares on the other half, looked for among many; errors of chance leave next to none,
    errors that come again leave all.
    """
    random = np.random.default_rng(0)
    x = random.standard_normal((512, 24)).astype(np.float32)
    again = (0.1 * x @ random.standard_normal((24, 24))).astype(np.float32)
    chance = random.standard_normal((512, 24)).astype(np.float32)
    for errors, least, most in ((again, 0.99, 1), (chance, 0, 0.2), (again + chance, 0.2, 0.9), (-again, 0.99, 1)):
        change, own, missing = halves(errors)
        found = share_that_holds(change, own[1], missing[1])
        made, lacks = x[256:] @ change.T, errors[256:]
        rows = random.standard_normal((5, 24)).astype(np.float32)
        weighed = share_that_holds(rows @ change, own[1], missing[1], rows)
        for share, of in ((found, np.eye(24)), (weighed, rows.T)):
            losses = [np.square((alpha * made - lacks) @ of).sum() for alpha in np.linspace(0, 1, 1001)]
            assert share == pytest.approx(np.argmin(losses) / 1000, abs=1e-3)
            assert least <= share <= most
    change, own, missing = halves(np.concatenate([again[:256], -again[256:]]))
    assert share_that_holds(change, own[1], missing[1]) == 0
    assert share_that_holds(0 * change, own[1], missing[1]) == 0


def test_a_correction_of_chance_makes_nothing_worse() -> None:
    """Errors of single tokens, as an embedding's rounding makes: in full it adds its own to those of other inputs."""
    chance = np.random.default_rng(3).standard_normal((512, 24)).astype(np.float32)
    change, own, missing = halves(chance)
    x, lacks = np.random.default_rng(0).standard_normal((512, 24)).astype(np.float32)[256:], chance[256:]
    rest = [
        np.square(lacks - share * x @ change.T).sum() for share in (0, share_that_holds(change, own[1], missing[1]), 1)
    ]
    assert rest[1] <= rest[0] * 1.0001
    assert rest[2] > 1.02 * rest[0]


def test_a_head_that_is_looked_up_stays_closer() -> None:
    """More damping takes its rows nearer to what they are, and its outputs still change less than by the search."""
    (x, fresh), w, form = np.split(inputs(4096), 2), matrix(40), BlockFormat(4, 32, False)
    free, tied = (dequantize(*gptq_rows(w, *triangle(x.T @ x, damping), form)) for damping in (DAMPING, TIED_DAMPING))
    found = dequantize(*quantize_rows(w, form, "search"))
    assert np.square(tied - w).sum() < 0.95 * np.square(free - w).sum()
    assert np.square((tied - w) @ fresh.T).sum() < 0.7 * np.square((found - w) @ fresh.T).sum()
