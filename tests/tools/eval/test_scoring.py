"""`lora-drop eval`: what is scored at which step, against naive loops and PyTorch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_tools.eval import scoring as eval_scoring
from lora_drop_tools.eval.result import text_figures
from lora_drop_tools.eval.scoring import (
    Row,
    Window,
    batches,
    decode,
    log_softmax,
    phase_of,
    prompt_length,
    score,
    score_windows,
    windows_at_once,
)

from tests.support.bundles import family
from tests.support.fake_engine import VOCAB, FakeEngine, Run, open_session

PLAN = DropPlan(num_layers=8, sites=(4, 6))


class LogitsEngine(FakeEngine):
    """Logits that depend on the position alone, and on the kind of the step."""

    def __init__(self, positions: int = 200) -> None:
        super().__init__(PLAN)
        generator = np.random.default_rng(3)
        self.full = generator.standard_normal((positions, VOCAB)).astype(np.float32) * 2
        self.lora = self.full + generator.standard_normal((positions, VOCAB)).astype(np.float32)

    def _predict(self, run: Run) -> None:
        index = np.zeros(len(run.len_kept), np.int64) if run.logits_index is None else run.logits_index[:, 0]
        table = self.full if run.kind is StepKind.REFRESH else self.lora
        run.binding.outputs["logits"][:, 0] = table[run.len_kept + index]


def log_probs(logits: Any) -> Any:
    """In float64, the plain way."""
    exact = np.asarray(logits, np.float64)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("k", [0, 1, 3])
def test_every_place_of_the_cycle_comes_as_often(k: int) -> None:
    """c = ⌊u (k+1)⌋ is uniform in 0 … k; at least one token stays in the prefill."""
    phases = [phase_of(7, "task", item) for item in range(4000)]
    assert all(0 <= phase < 1 for phase in phases)
    decoded = [20 - prompt_length(20, phase, k) for phase in phases]
    assert sorted(set(decoded)) == list(range(k + 1))
    assert all(abs(decoded.count(c) / 4000 - 1 / (k + 1)) < 0.03 for c in range(k + 1))
    assert {prompt_length(1, phase, k) for phase in phases} == {1}
    assert phase_of(7, "task", 1) != phase_of(8, "task", 1)


def test_a_ragged_batch_reads_each_row_at_its_own_positions() -> None:
    """Rows differ in prompt, in the first position read and in length; the offset is the step's, not the position's."""
    session, engine = open_session(PLAN, engine=LogitsEngine())
    assert isinstance(engine, LogitsEngine)
    generator = np.random.default_rng(0)
    rows = [
        Row(generator.integers(0, VOCAB, length), prompt, first)
        for length, prompt, first in ((9, 3, 4), (14, 8, 7), (5, 1, 3), (7, 6, 5))
    ]
    seen: dict[tuple[int, int], int] = {}
    for read in decode(session, rows, 2):
        for row, position, target, own in zip(read.rows, read.positions, read.targets, read.log_probs, strict=True):
            seen[int(row), int(position)] = read.offset
            assert target == rows[row].ids[position + 1]
            table = engine.lora if read.offset else engine.full
            np.testing.assert_allclose(own, log_probs(table[position]), atol=1e-5)
    expected = {}
    for index, row in enumerate(rows):
        for position in range(row.first, len(row.ids) - 1):
            expected[index, position] = (position - (row.prompt - 1)) % 3
    assert seen == expected
    # What each row was fed, over the steps: its own tokens, then padding
    fed = np.stack([run.input_ids[:, 0] for run in engine.runs[1:]], axis=1)
    for index, row in enumerate(rows):
        rest = row.ids[row.prompt :]
        assert fed[index, : len(rest)].tolist() == rest[: fed.shape[1]].tolist()
        assert not fed[index, len(rest) :].any()


def test_scores_of_a_batch() -> None:
    session, engine = open_session(PLAN, engine=LogitsEngine())
    assert isinstance(engine, LogitsEngine)
    likeliest = engine.full[4:7].argmax(axis=1)
    rows = [
        Row(np.array([1, 2, 3, 4, 5, *likeliest]), 5, 4),  # position 4 by the prefill, then two refreshes
        Row(np.array([1, 2, 3, 4, 5, 6]), 3, 4),
        Row(np.array([2, 2, 3, 4, 5, (likeliest[0] + 1) % VOCAB, *likeliest[1:]]), 5, 4),
    ]
    first, second, third = score(session, rows, 0)
    full = log_probs(engine.full)
    assert first.greedy
    assert first.log_prob == pytest.approx(sum(full[4 + i, token] for i, token in enumerate(likeliest)), abs=1e-5)
    assert not second.greedy
    assert not third.greedy  # its first token is not the likeliest, all later ones are
    assert second.log_prob == pytest.approx(full[4, 6], abs=1e-5)
    (under_lora,) = score(session, rows[1:2], 3)
    assert under_lora.log_prob == pytest.approx(log_probs(engine.lora)[4, 6], abs=1e-5)


def test_batches_hold_what_the_bundle_allows() -> None:
    from lora_drop_runtime.bundle.manifest import Limits

    session, _ = open_session(PLAN, limits=Limits(max_seq_len=20, max_prompt_len=19, max_batch=3))
    lengths = ((10, 5), (20, 19), (20, 2), (6, 5), (7, 6), (8, 7), (9, 8))
    rows = [Row(np.full(length, index, np.int64), prompt, prompt - 1) for index, (length, prompt) in enumerate(lengths)]
    found = list(batches(session, rows))
    assert sorted(index for batch in found for index in batch) == list(range(len(rows)))
    for batch in found:
        assert len(batch) <= 3
        assert max(rows[i].prompt for i in batch) + max(rows[i].steps for i in batch) + 1 <= 20
    assert len(found) == 4  # 20 tokens of which 2 are a prompt do not go with a prompt of 19
    options = [Row(np.array([1, 2, prompt, index]), 3, 2) for prompt in range(4) for index in range(5)]
    found = list(batches(session, options))
    assert [len(batch) for batch in found] == [15, 5]  # rows of three prompts, then of one
    assert sorted(index for batch in found for index in batch) == list(range(20))
    uneven = [Row(np.full(length, length > 13), prompt, prompt - 1) for length, prompt in ((6, 5), (13, 5), (14, 13))]
    assert list(batches(session, uneven)) == [[2], [1, 0]]  # the longer option's 7 steps, a prompt of 13: 21 tokens
    whole = [Row(np.array([1, 2, 3, index]), 1, 0) for index in range(5)]
    assert [len(batch) for batch in batches(session, whole)] == [3, 2]  # side by side, though all begin alike


def test_log_softmax_of_large_and_of_no_numbers() -> None:
    logits = np.array([[1e4, 1e4 - 1, 0], [-3e38, 0, 1]], np.float32)
    found = log_softmax(logits)
    assert found[0, :2] == pytest.approx([-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1))], rel=1e-6)
    assert np.exp(found).sum(axis=1) == pytest.approx([1, 1])
    with pytest.raises(BundleError, match="not numbers"):
        log_softmax(np.array([[0, np.nan]], np.float32))


@pytest.mark.parametrize("k", [1, 3])
def test_sums_of_windows(k: int) -> None:
    """Against a loop over positions in float64: tokens, −log p, the full schedule's, agreement, KL, for each offset."""
    session, engine = open_session(PLAN, engine=LogitsEngine())
    assert isinstance(engine, LogitsEngine)
    generator = np.random.default_rng(1)
    windows = [Window(generator.integers(0, VOCAB, 30), 6, phase) for phase in (0.0, 0.4, 0.99)]
    found: dict[int, list[Any]] = {}
    score_windows(session, windows, [0, k], lambda k, sums: found.update({k: sums}))
    full, lora = log_probs(engine.full), log_probs(engine.lora)
    for window, own, own_full in zip(windows, found[k], found[0], strict=True):
        expected = np.zeros((k + 1, 5))
        prompt = 6 - int(window.phase * (k + 1))
        for position in range(6, 29):
            step = position - (prompt - 1)
            assert step >= 1  # never the prefill
            here = full[position] if step % (k + 1) == 0 else lora[position]
            token = window.ids[position + 1]
            expected[step % (k + 1)] += (
                1,
                -here[token],
                -full[position][token],
                here.argmax() == full[position].argmax(),
                (np.exp(full[position]) * (full[position] - here)).sum(),
            )
        np.testing.assert_allclose(own, expected, atol=1e-4)
        assert own[0, 3] == own[0, 0]
        assert own[0, 4] == pytest.approx(0, abs=1e-9)  # this engine's refresh is exact
        np.testing.assert_allclose(own_full, [[23, expected[:, 2].sum(), expected[:, 2].sum(), 23, 0]], atol=1e-4)
    # Perplexities and means from the sums
    figures = text_figures(found[k], seed=0)
    total = np.sum(found[k], axis=(0, 1))
    assert figures.tokens == 69
    assert figures.perplexity.value == pytest.approx(math.exp(total[1] / 69))
    assert figures.ratio.value == pytest.approx(math.exp((total[1] - total[2]) / 69))
    assert figures.agreement.value == total[3] / 69
    lora_sums = np.sum([sums[1:] for sums in found[k]], axis=(0, 1))
    assert figures.lora_agreement is not None
    assert figures.lora_kl is not None
    assert figures.lora_agreement.value == lora_sums[3] / lora_sums[0]
    assert figures.lora_kl.value == pytest.approx(lora_sums[4] / lora_sums[0])
    assert [one.offset for one in figures.offsets] == list(range(k + 1))
    assert figures.offsets[0].ratio == pytest.approx(1)
    tokens, nll, nll_full, same, kl = np.sum([sums[1] for sums in found[k]], axis=0)
    of_place = tokens, math.exp(nll / tokens), math.exp((nll - nll_full) / tokens), same / tokens, kl / tokens
    assert dataclasses.astuple(figures.offsets[1])[1:] == pytest.approx(of_place)
    assert figures.refresh_share.value == pytest.approx(sum(sums[0, 0] for sums in found[k]) / 69)


def test_windows_at_once_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = open_session(PLAN)
    window = Window(np.zeros(30, np.int64), 6, 0.0)
    assert windows_at_once(session, window) == 8  # the bundle's
    monkeypatch.setattr(eval_scoring, "KEPT_BYTES", 2 * 23 * VOCAB * 4)
    assert windows_at_once(session, window) == 2
    monkeypatch.setattr(eval_scoring, "KEPT_BYTES", 1)
    assert windows_at_once(session, window) == 1


def test_the_full_schedule_scores_what_pytorch_does(bundle: Path) -> None:
    """Continuations of ragged rows under k = 0, whatever part of the context is decoded, against one forward pass."""
    generator = np.random.default_rng(2)
    rows, expected = [], []
    for context, continuation, decoded in ((7, 4, 0), (12, 1, 3), (3, 9, 2), (20, 2, 1)):
        ids = generator.integers(0, 131, context + continuation)
        with torch.no_grad():
            logits = family("llama").model(torch.tensor(ids[None])).logits[0].double()
        by_torch = torch.log_softmax(logits, -1)[context - 1 : -1].gather(1, torch.tensor(ids[context:, None]))
        rows.append(Row(ids, context - decoded, context - 1))
        expected.append(float(by_torch.sum()))
    with Session.open(bundle, threads=1) as session:
        assert [one.log_prob for one in score(session, rows, 0)] == pytest.approx(expected, abs=1e-3)
        under_lora = score(session, rows, 3)
        assert under_lora[0].log_prob != pytest.approx(expected[0], abs=1e-3)


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_options_of_a_question_share_its_prefill(bundle: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of several lengths behind shared contexts, whatever part of these is decoded: scored as each alone."""
    generator = np.random.default_rng(5)
    rows = []
    for context, decoded, options in ((9, 0, (1, 1, 1)), (14, 2, (3, 1, 5, 2)), (6, 1, (4,))):
        given = generator.integers(0, 131, context)
        for length in options:
            ids = np.concatenate([given, generator.integers(0, 131, length)])
            rows.append(Row(ids, context - decoded, context - 1))
    prefilled: list[int] = []
    original = Session.prefill

    def prefill(self: Session, ids: Any, *rest: Any, **named: Any) -> Any:
        prefilled.append(len(ids))
        return original(self, ids, *rest, **named)

    with Session.open(bundle, threads=1, policy=policy) as session:
        alone = [score(session, [row], 3)[0] for row in rows]
        monkeypatch.setattr(Session, "prefill", prefill)
        order = [index for batch in batches(session, rows) for index in batch]
        assert sorted(order) == list(range(len(rows)))
        together = score(session, rows, 3)
    assert prefilled == [3]
    assert [one.log_prob for one in together] == pytest.approx([one.log_prob for one in alone], abs=1e-4)
    assert [one.greedy for one in together] == [one.greedy for one in alone]
