"""Bytes of K and V that a session reports, against Eq. 13."""

from __future__ import annotations

import pytest

from tests.support.decoding import PLAN, RAGGED, WINDOWS, padded
from tests.support.fake_engine import TOKEN_BYTES, FakeEngine, open_session


@pytest.mark.parametrize("k", WINDOWS)
def test_kv_bytes_is_equation_13_with_the_prompts_entries(k: int) -> None:
    """docs/algorithm.md: a kept layer holds T + m entries, a dropped one T + ⌊m/(k+1)⌋; each 2 h_kv d_head b bytes."""
    session, _ = open_session(PLAN, k=k)
    session.prefill(*padded(RAGGED), max_new_tokens=2 * (k + 1) + 2)
    entry_bytes = 2 * 2 * 4 * 4
    assert entry_bytes == TOKEN_BYTES
    kept_layers, dropped_layers, rows, prompt_tokens = 4, 2, 3, 9
    steps = 2 * (k + 1) + 1
    refreshes = 2 if k else 3
    allocated = 3 * entry_bytes * (kept_layers * (5 + steps) + dropped_layers * (5 + refreshes))
    for m in range(steps + 1):
        assert session.kv_bytes() == {
            "kept": kept_layers * (prompt_tokens + rows * m) * entry_bytes,
            "dropped": dropped_layers * (prompt_tokens + rows * (m // (k + 1))) * entry_bytes,
            "allocated": allocated,
        }
        if m < steps:
            session.step([1, 2, 3])
    # What two whole cycles add is Eq. 13 itself: B · 2 h d b · [a N + (1 − p) S N + p S N / w].
    n, a, p, w = 6, 3, 2 / 3, k + 1  # three layers always on, two of the three eligible ones dropped
    s, tokens = n - a, 2 * w
    session.prefill(*padded(RAGGED), max_new_tokens=tokens + 1)
    before = session.kv_bytes()
    for _ in range(tokens):
        session.step([1, 2, 3])
    after = session.kv_bytes()
    grown = sum(after[group] - before[group] for group in ("kept", "dropped"))
    assert grown == pytest.approx(rows * entry_bytes * (a * tokens + (1 - p) * s * tokens + p * s * tokens / w))


def test_kv_bytes_of_finished_rows_do_not_grow() -> None:
    script = [[9, 1, 2]] + [[0, 3, 4]] * 5
    session, _ = open_session(PLAN, k=1, engine=FakeEngine(PLAN, script))
    session.generate(RAGGED, 6, stop_token_ids=[9])
    assert session.kv_bytes()["kept"] == 4 * (5 + (1 + 5) + (3 + 5)) * TOKEN_BYTES
    assert session.kv_bytes()["dropped"] == 2 * (5 + (1 + 2) + (3 + 2)) * TOKEN_BYTES


def test_without_a_request_there_are_no_kv_bytes() -> None:
    """So that a command can print them also after Ctrl-C in the prefill."""
    session, _ = open_session(PLAN, engine=FakeEngine(PLAN, interrupt_at=1))
    assert session.kv_bytes() == {"kept": 0, "dropped": 0, "allocated": 0}
    with pytest.raises(KeyboardInterrupt):
        session.generate([1, 2], 4)
    assert session.kv_bytes() == {"kept": 0, "dropped": 0, "allocated": 0}
