"""Plans and prompts of the session's tests, and what the fake model (fake_engine.py) answers to them."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import Batch, Event, Session
from lora_drop_runtime.errors import InputError, LoraDropError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_runtime.plan.sites import in_halves

from tests.support.fake_engine import next_token

REFRESH, LORA = StepKind.REFRESH, StepKind.LORA
WINDOWS = (0, 1, 2, 3, 5, 19)
PLAN = DropPlan(num_layers=6, sites=(3, 4))
RECURRENT = dataclasses.replace(PLAN, surrogate="recurrent", rank=2)
HALVES = dataclasses.replace(RECURRENT, sites=in_halves(RECURRENT.sites))
PLANS = {
    "residual": PLAN,
    "recurrent": RECURRENT,
    "recurrent, rank 0": dataclasses.replace(PLAN, surrogate="recurrent"),
    "anchor": dataclasses.replace(PLAN, surrogate="anchor"),
    "anchor, rank 2": dataclasses.replace(RECURRENT, surrogate="anchor"),
    "recurrent, attn_mlp": HALVES,
    "anchor, attn_mlp": dataclasses.replace(HALVES, surrogate="anchor"),
    "nothing dropped": dataclasses.replace(PLAN, sites=()),
}
RAGGED = [[7, 3, 11, 19, 2], [5], [23, 29, 31]]


@functools.cache
def kept_session(root: Path, policy: str) -> Session:
    """A session that stays open for the next test: opening one takes longer than most of what is asked of it."""
    return Session.open(root, policy=policy, threads=1)


def kinds_after_prefill(k: int, steps: int) -> list[StepKind]:
    """k LoRA steps, then a refresh, and so on."""
    return (([LORA] * k + [REFRESH]) * (steps + 1))[:steps]


def ticked_through(batch: Batch) -> tuple[list[Event], int]:
    """Events of ticks until no row is left, and how many of them Ctrl-C came into; the next one goes on."""
    events: list[Event] = []
    interrupts = 0
    while batch.rows:
        try:
            events += batch.tick()
        except KeyboardInterrupt:
            interrupts += 1
    return events, interrupts


def prompts_run(batch: Batch) -> dict[int, int]:
    """Tokens of each row's prompt that the engine runs from now on."""
    ran: dict[int, int] = defaultdict(int)
    plain = batch._slots.run

    def run(kind: Any, runs: Any, due: Any, **options: Any) -> None:
        for slot in due:
            if batch._rows[slot].is_new:
                ran[batch._rows[slot].number] += len(runs[slot].tokens)
        plain(kind, runs, due, **options)

    batch._slots.run = run  # type: ignore[method-assign]
    return ran


def padded(prompts: list[list[int]], fill: int = 0, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids int64 [B, T] and lengths int64 [B]."""
    ids = np.full((len(prompts), width or max(map(len, prompts))), fill, np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, np.array([len(prompt) for prompt in prompts])


def continued(prompt: list[int], count: int) -> list[int]:
    """What the fake model generates after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_token(tokens[-1], len(tokens) - 1)))
    return tokens[len(prompt) :]


def slots(cache: np.ndarray, row: int, length: int) -> list[int]:
    """The tokens in the valid slots of one row of a cache."""
    assert (cache[row] == cache[row, :1, :, :1]).all()
    return (cache[row, 0, :length, 0] - 1).astype(int).tolist()


def assert_refused(call, fact: str, *note: str, error: type[LoraDropError] = InputError) -> None:
    """The call raises the error, with a fact, a note that has both values, and a hint."""
    with pytest.raises(error) as caught:
        call()
    assert fact in caught.value.fact
    for value in note:
        assert value in caught.value.note
    assert caught.value.note
    assert caught.value.hint
    assert f"{caught.value.fact}\nNote: {caught.value.note}\nHint: {caught.value.hint}" == str(caught.value)
