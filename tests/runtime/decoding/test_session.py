"""The session on a fake engine: schedule, lengths, capacities, bindings, cancelling, refusals, and its own time.

Expected values are worked out from docs/algorithm.md here, not with the product's functions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import weakref
from itertools import chain, islice

import numpy as np
import pytest
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.decoding.request import PREFILL_CHUNK
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError, LoraDropError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind
from safetensors.numpy import save_file

from tests.support.fake_engine import (
    HIDDEN,
    TOKEN_BYTES,
    VOCAB,
    FakeEngine,
    IdleEngine,
    make_manifest,
    next_token,
    open_session,
)

REFRESH, LORA = StepKind.REFRESH, StepKind.LORA
WINDOWS = (0, 1, 2, 3, 5, 19)
PLAN = DropPlan(num_layers=6, drop_layers=(3, 4))
RECURRENT = dataclasses.replace(PLAN, surrogate="recurrent", rank=2)
HALVES = dataclasses.replace(RECURRENT, injection="attn_mlp")
PLANS = {
    "residual": PLAN,
    "recurrent": RECURRENT,
    "recurrent, rank 0": dataclasses.replace(PLAN, surrogate="recurrent"),
    "anchor": dataclasses.replace(PLAN, surrogate="anchor"),
    "anchor, rank 2": dataclasses.replace(RECURRENT, surrogate="anchor"),
    "recurrent, attn_mlp": HALVES,
    "anchor, attn_mlp": dataclasses.replace(HALVES, surrogate="anchor"),
    "nothing dropped": dataclasses.replace(PLAN, drop_layers=()),
}
RAGGED = [[7, 3, 11, 19, 2], [5], [23, 29, 31]]


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def plan(request: pytest.FixtureRequest) -> DropPlan:
    return request.param


def kinds_after_prefill(k: int, steps: int) -> list[StepKind]:
    """k LoRA steps, then a refresh, and so on."""
    return (([LORA] * k + [REFRESH]) * (steps + 1))[:steps]


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


# ── the schedule ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize("length", [1, 4, 5])
def test_order_of_steps(k: int, length: int) -> None:
    """The count begins at the prefill, whatever the prompt's length and wherever the last request stopped."""
    session, engine = open_session(PLAN, k=k)
    for new_tokens in (2 * (k + 1) + 2, k + 2, 2 * (k + 1) + 2):
        engine.forget()
        session.generate([1] * length, new_tokens)
        assert engine.kinds == [REFRESH, *kinds_after_prefill(k, new_tokens - 1)]


@pytest.mark.parametrize("k", WINDOWS)
def test_next_step_tells_what_runs(k: int, plan: DropPlan) -> None:
    session, engine = open_session(plan, k=k)
    session.prefill(*padded(RAGGED), max_new_tokens=2 * (k + 1) + 2)
    told = []
    for _ in range(2 * (k + 1) + 1):
        told.append(session.next_step)
        assert session.next_step is told[-1]  # asking changes nothing
        session.step([1, 2, 3])
    assert told == engine.kinds[1:] == kinds_after_prefill(k, 2 * (k + 1) + 1)


@pytest.mark.parametrize("new_tokens", [1, 2, 7])
def test_n_new_tokens_take_n_minus_1_decode_steps(new_tokens: int) -> None:
    session, engine = open_session(PLAN)
    (row,) = session.generate([4, 2], new_tokens)
    assert row.dtype == np.int64
    assert row.tolist() == continued([4, 2], new_tokens)
    assert len(engine.runs) == 1 + (new_tokens - 1)
    engine.forget()
    assert list(session.stream([4, 2], new_tokens)) == row.tolist()
    assert len(engine.runs) == 1 + (new_tokens - 1)


def test_k_per_request() -> None:
    session, engine = open_session(PLAN, k=3)
    for k in (1, 0, None, 5):
        engine.forget()
        list(session.stream([1], 9, k=k))
        assert engine.kinds[1:] == kinds_after_prefill(3 if k is None else k, 8)
    engine.forget()
    session.generate(RAGGED, 9, k=2)
    assert engine.kinds[1:] == kinds_after_prefill(2, 8)
    session.prefill(np.array([[1]]), k=0)
    assert session.next_step is REFRESH


def test_a_custom_schedule_chooses_kinds_and_sizes_the_caches() -> None:
    class Squares:
        def kind(self, step: int) -> StepKind:
            return REFRESH if step in (1, 4, 9) else LORA

    session, engine = open_session(PLAN, schedule=Squares())
    session.generate([5, 6], 9)  # 8 decode steps, 2 refreshes
    assert engine.kinds[1:] == [REFRESH, LORA, LORA, REFRESH, LORA, LORA, LORA, LORA]
    assert engine.bindings[0].inputs["past_key.0"].shape[2] == 2 + 8
    assert engine.bindings[0].inputs["past_key.3"].shape[2] == 2 + 2
    engine.forget()
    session.generate([5, 6], 9, k=0)
    assert engine.kinds == [REFRESH] * 9
    session, engine = open_session(PLAN, k=1)
    session.generate([5, 6], 9, k=Squares())  # of one request
    assert engine.kinds[1:] == [REFRESH, LORA, LORA, REFRESH, LORA, LORA, LORA, LORA]


# ── tokens, lengths and slots ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", WINDOWS)
def test_what_the_engine_sees_at_every_step(k: int, plan: DropPlan) -> None:
    """Ids, len_kept = all tokens, len_dropped = prompt + refreshes, per row of a ragged batch."""
    count = 2 * (k + 1) + 2
    session, engine = open_session(plan, k=k)
    rows = session.generate(RAGGED, count)
    expected = [continued(prompt, count) for prompt in RAGGED]
    assert [row.tolist() for row in rows] == expected
    lengths = np.array([5, 1, 3])
    refreshes = 0
    for j, run in enumerate(engine.runs):
        if j == 0:
            for row, prompt in enumerate(RAGGED):
                assert run.input_ids[row, : len(prompt)].tolist() == prompt
            assert run.len_kept.tolist() == [0, 0, 0]
        else:
            assert run.input_ids.tolist() == [[tokens[j - 1]] for tokens in expected]
            assert run.len_kept.tolist() == (lengths + j - 1).tolist()
        if run.kind is REFRESH:
            assert run.logits_index.tolist() == ([[4], [0], [2]] if j == 0 else [[0], [0], [0]])
            if plan.drop_layers:
                assert run.len_dropped.tolist() == ([0, 0, 0] if j == 0 else (lengths + refreshes).tolist())
            refreshes += j > 0
        else:
            assert run.len_dropped is None
            assert run.logits_index is None


@pytest.mark.parametrize("k", WINDOWS)
def test_caches_hold_what_each_layer_has_seen(k: int) -> None:
    """A kept layer every token, a dropped one the prompt and the refreshes' tokens, without gaps."""
    count = 2 * (k + 1) + 2
    session, engine = open_session(PLAN, k=k)
    session.generate(RAGGED, count)
    caches = engine.bindings[-1].inputs | engine.bindings[0].inputs
    for row, prompt in enumerate(RAGGED):
        tokens = continued(prompt, count)[:-1]  # the last one is never fed
        seen = prompt + tokens
        seen_by_dropped = prompt + [t for j, t in enumerate(tokens, 1) if j % (k + 1) == 0]
        for layer in range(6):
            expected = seen_by_dropped if layer in (3, 4) else seen
            for part in ("key", "value"):
                assert slots(caches[f"past_{part}.{layer}"], row, len(expected)) == expected


@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize(
    "ends",
    [(12, 12, 12), (0, 12, 12), (12, 0, 5), (1, 2, 3), (4, 12, 0), (3, 3, 3), (0, 0, 0), (0, 0, 12), (7, 4, 8)],
    ids=str,
)
def test_finished_rows_do_not_advance(k: int, ends: tuple[int, ...]) -> None:
    """Row i stops at its token number `ends[i]` (12: never). The engine itself refuses to write past a capacity."""
    stop, count = 9, 12
    script = [[stop if j == ends[row] else 20 + 10 * row + j % 10 for row in range(3)] for j in range(count)]
    engine = FakeEngine(PLAN, script)
    session, _ = open_session(PLAN, k=k, engine=engine)
    rows = session.generate(RAGGED, count, stop_token_ids=[stop])
    assert [row.tolist() for row in rows] == [[script[j][row] for j in range(ends[row])] for row in range(3)]
    # A run per token until all rows have stopped, and no step whose token nobody wants.
    assert len(engine.runs) == min(max(ends) + 1, count)
    for j, run in enumerate(engine.runs[1:], 1):
        for row, prompt in enumerate(RAGGED):
            fed = min(j - 1, ends[row])  # tokens of this row in the cache before step j
            assert run.len_kept[row] == len(prompt) + fed
            if run.kind is REFRESH:
                assert run.len_dropped[row] == len(prompt) + fed // (k + 1)
            if j <= ends[row]:
                assert run.input_ids[row, 0] == script[j - 1][row]


@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize("new_tokens", [1, 2, 4, 5, 21, 22])
def test_capacities(k: int, new_tokens: int, plan: DropPlan) -> None:
    """Kept T_max + N − 1 slots, dropped T_max + ⌊(N − 1)/(k+1)⌋."""
    session, engine = open_session(plan, k=k)
    session.generate(RAGGED, new_tokens)
    for binding in engine.bindings:
        for name, array in (binding.inputs | binding.outputs).items():
            if "_key." in name or "_value." in name:
                dropped = int(name.split(".")[1]) in plan.drop_layers
                tokens = 5 + ((new_tokens - 1) // (k + 1) if dropped else new_tokens - 1)
                assert array.shape == (3, 2, tokens, 4), name


def backfilling(engine: FakeEngine, k: int, together: bool) -> Session:
    engine.batched_chunks = together
    return Session(open_session(PLAN, engine=engine)[0].bundle, engine, PeriodicSchedule(k), policy="backfill")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("k", WINDOWS)
def test_a_backfill_runs_the_tokens_since_the_last_refresh(k: int, chunk: int | None, together: bool) -> None:
    """At their positions, in every layer; afterwards all caches hold all tokens, as under the full schedule."""
    count = 2 * (k + 1) + 2
    engine = FakeEngine(PLAN)
    engine.prefill_chunk = chunk
    session = backfilling(engine, k, together)
    tokens = [continued(prompt, count) for prompt in RAGGED]
    lengths = [len(prompt) for prompt in RAGGED]
    session.prefill(*padded(RAGGED), max_new_tokens=count)
    capacity = 5 + count - 1
    for j in range(1, count):
        engine.runs.clear()
        session.step([row[j - 1] for row in tokens])
        if kinds_after_prefill(k, j)[-1] is LORA:
            assert [run.kind for run in engine.runs] == [LORA]
            continue
        exact = j - k - 1  # tokens after the prompt that were exact before
        fed = {row: [] for row in range(3)}
        for number, run in enumerate(engine.runs):
            rows = range(3) if len(run.input_ids) == 3 else [number % 3]
            for at, row in enumerate(rows):
                assert run.kind is REFRESH
                assert run.len_kept[at] == run.len_dropped[at] == lengths[row] + exact + len(fed[row])
                assert run.logits_index[at, 0] == run.input_ids.shape[1] - 1
                fed[row] += run.input_ids[at].tolist()
        assert fed == {row: tokens[row][exact:j] for row in range(3)}
        runs = -(-(k + 1) // (chunk or k + 1))
        assert len(engine.runs) == runs * (1 if together or k == 0 else 3)
        caches = session._running().caches
        for row, prompt in enumerate(RAGGED):
            for name in caches:
                assert caches[name].shape[2] == capacity
                assert slots(caches[name], row, lengths[row] + j) == prompt + tokens[row][:j]
        kv = session.kv_bytes()
        assert (kv["kept"], kv["dropped"]) == (4 * (9 + 3 * j) * TOKEN_BYTES, 2 * (9 + 3 * j) * TOKEN_BYTES)
        assert kv["allocated"] == 6 * 3 * capacity * TOKEN_BYTES


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("k", WINDOWS)
@pytest.mark.parametrize("ends", [(12, 12, 12), (0, 12, 12), (12, 0, 5), (1, 2, 3), (7, 4, 8)], ids=str)
def test_rows_that_are_over_do_not_disturb_a_backfill(k: int, ends: tuple[int, ...], together: bool) -> None:
    stop, count = 9, 12
    script = [[stop if j == ends[row] else 20 + 10 * row + j % 10 for row in range(3)] for j in range(count)]
    engine = FakeEngine(PLAN)
    session = backfilling(engine, k, together)

    def scripted(run) -> None:
        logits = run.binding.outputs["logits"]
        logits[...] = 0
        first = 0 if len(logits) == 3 else (run.binding.address("logits") - base) // (VOCAB * 4)
        step = session._running().steps_done + 1 if session._request else 0
        for at in range(len(logits)):
            logits[at, 0, script[step][first + at]] = 1

    base = 0

    def begun(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        nonlocal base
        buffer = np.full(shape, -7, dtype)
        base = buffer.ctypes.data if name == "logits" else base
        return buffer

    engine._predict = scripted
    engine.allocate_resident = begun
    rows = session.generate(RAGGED, count, stop_token_ids=[stop])
    assert [row.tolist() for row in rows] == [[script[j][row] for j in range(ends[row])] for row in range(3)]
    request = session._running()
    done = request.steps_done
    for row, prompt in enumerate(RAGGED):
        fed = min(done, ends[row])
        assert request.len_kept[row] == len(prompt) + fed
        exact = min(done // (k + 1) * (k + 1), fed // (k + 1) * (k + 1))
        assert request.len_dropped[row] == len(prompt) + exact
        caches = session._running().caches
        seen = prompt + [script[j][row] for j in range(fed)]
        if ends[row] >= done:  # a row that was over may lose its inexact tokens, which nobody reads again
            assert slots(caches["past_key.0"], row, len(seen)) == seen
        assert slots(caches["past_key.3"], row, len(prompt) + exact) == seen[: len(prompt) + exact]


def test_a_backfill_that_was_interrupted_can_be_taken_again() -> None:
    engine = FakeEngine(PLAN)
    engine.prefill_chunk = 2
    session = backfilling(engine, 3, True)
    session.prefill([[1, 2]], max_new_tokens=9)
    for token in (3, 4, 5):
        session.step([token])
    engine.interrupt_at = len(engine.runs) + 2  # in the second of two runs
    with pytest.raises(KeyboardInterrupt):
        session.step([6])
    session.step([6])
    assert slots(session._running().caches["past_key.3"], 0, 6) == [1, 2, 3, 4, 5, 6]
    assert session.next_step is LORA
    for token in (7, 8, 9, 10):
        session.step([token])
    assert slots(session._running().caches["past_value.4"], 0, 10) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_without_max_new_tokens_the_caches_have_room_for_what_the_bundle_allows() -> None:
    session, engine = open_session(PLAN, k=3, limits=Limits(max_seq_len=24, max_prompt_len=20, max_batch=2))
    session.prefill(np.array([[1, 2, 3]]))
    assert engine.bindings[0].inputs["past_key.0"].shape[2] == 23  # 21 new tokens take 20 steps
    assert engine.bindings[0].inputs["past_key.3"].shape[2] == 3 + 5
    for _ in range(20):
        session.step([1])
    with pytest.raises(InputError, match="full"):
        session.step([1])


def test_padding_beyond_the_longest_prompt_is_not_computed() -> None:
    """Caches are sized by the longest prompt, so a wider padding must not reach the engine."""
    session, engine = open_session(PLAN)
    for width in (5, 6, PREFILL_CHUNK, PREFILL_CHUNK + 1, 3 * PREFILL_CHUNK):
        engine.forget()
        session.prefill(*padded(RAGGED, width=width), max_new_tokens=1)
        assert [run.input_ids.shape for run in engine.runs] == [(3, 5)]


def test_padding_may_hold_anything_and_prompts_are_left_as_they_were() -> None:
    session, engine = open_session(PLAN)
    for fill in (-1, VOCAB, 10**9):
        ids, lengths = padded(RAGGED, fill)
        ids.flags.writeable = False
        before = ids.copy(), lengths.copy()
        logits = session.prefill(ids, lengths, max_new_tokens=3)
        assert logits.argmax(1).tolist() == [continued(prompt, 1)[0] for prompt in RAGGED]
        assert (engine.runs[-1].input_ids >= 0).all()
        assert (engine.runs[-1].input_ids < VOCAB).all()
        session.step([1, 2, 3])
        ids.flags.writeable = True  # and now without protection
        session.prefill(ids, lengths, max_new_tokens=3)
        assert (ids == before[0]).all()
        assert (lengths == before[1]).all()


def test_prompts_may_be_lists_or_arrays_of_any_integers() -> None:
    session, _ = open_session(PLAN)
    expected = [continued(prompt, 3) for prompt in RAGGED]
    for prompts in (RAGGED, [np.array(prompt, np.int32) for prompt in RAGGED], tuple(map(tuple, RAGGED))):
        assert [row.tolist() for row in session.generate(prompts, 3)] == expected
    one = continued([4, 8, 15], 3)
    for prompt in ([4, 8, 15], (4, 8, 15), np.array([4, 8, 15], np.uint8), np.array([[4, 8, 15]]), [[4, 8, 15]]):
        assert [row.tolist() for row in session.generate(prompt, 3)] == [one]
        assert list(session.stream(prompt, 3)) == one
    transposed = np.array([[4, 1], [8, 2], [15, 3]]).T
    assert session.prefill(transposed).argmax(1).tolist() == [one[0], continued([1, 2, 3], 1)[0]]


# ── bindings ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_bound_by_each_step(plan: DropPlan) -> None:
    session, engine = open_session(plan, k=2)
    session.generate(RAGGED, 7)
    everywhere = {f"{part}.{layer}" for part in ("key", "value") for layer in range(6)}
    kept = {f"{part}.{layer}" for part in ("key", "value") for layer in range(6) if layer not in plan.drop_layers}
    sites = {"block": ["3", "4"], "attn_mlp": ["3.attn", "3.mlp", "4.attn", "4.mlp"]}[plan.injection]
    states = {f"state.{site}" for site in sites} if plan.surrogate != "residual" and plan.drop_layers else set()
    updated = states if plan.surrogate == "recurrent" and plan.rank else set()
    for binding in engine.bindings:
        if binding.kind is REFRESH:
            lengths = {"len_kept", "len_dropped"} if plan.drop_layers else {"len_kept"}
            assert set(binding.inputs) == {"input_ids", "logits_index"} | lengths | {f"past_{n}" for n in everywhere}
            assert set(binding.outputs) == {"logits"} | {f"present_{n}" for n in everywhere | states}
        else:
            assert set(binding.inputs) == {"input_ids", "len_kept"} | {f"past_{n}" for n in kept | states}
            assert set(binding.outputs) == {"logits"} | {f"present_{n}" for n in kept | updated}
        for name, array in (binding.inputs | binding.outputs).items():
            integers = name in ("input_ids", "len_kept", "len_dropped", "logits_index")
            assert array.dtype == (np.int64 if integers else np.float32), name
        for name in states & {n.removeprefix("present_") for n in binding.outputs}:
            assert binding.outputs[f"present_{name}"].shape == (3, HIDDEN)


def test_a_lora_step_binds_no_buffer_of_a_dropped_layer(plan: DropPlan) -> None:
    session, engine = open_session(plan, k=2)
    session.generate(RAGGED, 7)
    refresh = next(b for b in engine.bindings if b.kind is REFRESH)
    of_dropped = [array for name, array in refresh.inputs.items() if name.split(".")[-1] in map(str, plan.drop_layers)]
    assert len(of_dropped) == 2 * len(plan.drop_layers)
    lora = [b for b in engine.bindings if b.kind is LORA]
    assert lora
    for binding in lora:
        for array in (*binding.inputs.values(), *binding.outputs.values()):
            assert not any(np.shares_memory(array, other) for other in of_dropped)


def test_caches_are_one_buffer_for_past_and_present_and_both_steps(plan: DropPlan) -> None:
    session, engine = open_session(plan, k=2)
    session.generate(RAGGED, 7)
    assert {b.kind for b in engine.bindings} == {REFRESH, LORA}
    addresses: dict[str, set[int]] = {}
    for binding in engine.bindings:
        for name in (*binding.inputs, *binding.outputs):
            if "_key." in name or "_value." in name:
                addresses.setdefault(name.split("_", 1)[1], set()).add(binding.address(name))
    assert len(addresses) == 12
    assert all(len(found) == 1 for found in addresses.values())
    assert len(set.union(*addresses.values())) == 12  # and no two caches are the same


def test_every_bound_buffer_came_from_the_engine() -> None:
    """Decode steps: an engine on a device could not bind anything else."""
    session, engine = open_session(RECURRENT, k=2)
    session.generate(RAGGED, 7)
    for binding in engine.bindings[1:]:
        for name, array in (binding.inputs | binding.outputs).items():
            assert any(np.shares_memory(array, buffer) for buffer in engine.allocated), name


@pytest.mark.parametrize("k", WINDOWS)
def test_nothing_is_allocated_or_prepared_per_step(k: int, plan: DropPlan) -> None:
    """At most three bindings per request (prefill, refresh, LoRA step), and one more where the state has two sides."""
    session, engine = open_session(plan, k=k)
    session.prefill(*padded(RAGGED), max_new_tokens=100)
    allocated = len(engine.allocated)
    for _ in range(99):
        session.step([1, 2, 3])
    assert len(engine.runs) == 100
    assert len(engine.allocated) == allocated
    two_sides = plan.surrogate == "recurrent" and plan.rank > 0 and bool(plan.drop_layers)
    assert len(engine.bindings) <= 3 + two_sides
    engine.forget()
    session.generate(RAGGED, 100)
    assert len(engine.bindings) <= 3 + two_sides


def test_logits_are_the_bound_buffer_not_a_copy() -> None:
    session, engine = open_session(PLAN, k=2)
    logits = session.prefill(*padded(RAGGED), max_new_tokens=8)
    assert logits.shape == (3, VOCAB)
    assert logits.dtype == np.float32
    for _ in range(7):
        assert np.shares_memory(logits, engine.runs[-1].binding.outputs["logits"])
        logits = session.step([1, 2, 3])
        assert logits.shape == (3, VOCAB)
    assert len({binding.address("logits") for binding in engine.bindings}) == 1


# ── state ──────────────────────────────────────────────────────────────────────────────────────────────────────


def states_read(plan: DropPlan, k: int, steps: int) -> tuple[list[StepKind], list[dict[str, np.ndarray]]]:
    """Kinds of all runs, and the states that each of them read (the number of the run that wrote them)."""
    session, engine = open_session(plan, k=k)
    session.prefill(*padded(RAGGED), max_new_tokens=steps + 1)
    for _ in range(steps):
        session.step([1, 2, 3])
    return engine.kinds, [run.past_states for run in engine.runs]


@pytest.mark.parametrize("k", [k for k in WINDOWS if k])
@pytest.mark.parametrize("injection", ["block", "attn_mlp"])
def test_recurrent_state_is_what_the_step_before_wrote(k: int, injection: str) -> None:
    plan = dataclasses.replace(RECURRENT, injection=injection)
    kinds, states = states_read(plan, k, 3 * (k + 1) + 2)
    for number, (kind, read) in enumerate(zip(kinds, states, strict=True), 1):
        if kind is LORA:
            assert len(read) == (2 if injection == "block" else 4)
            for name, values in read.items():
                assert (values == number - 1).all(), f"run {number}, {name}"
        else:
            assert not read


@pytest.mark.parametrize("name", ["anchor", "anchor, rank 2", "anchor, attn_mlp", "recurrent, rank 0"])
@pytest.mark.parametrize("k", [k for k in WINDOWS if k])
def test_anchor_state_is_what_the_last_refresh_wrote(name: str, k: int) -> None:
    """Without adapters `recurrent` repeats y of the anchor, so it is the same."""
    kinds, states = states_read(PLANS[name], k, 3 * (k + 1) + 2)
    refresh = 0
    for number, (kind, read) in enumerate(zip(kinds, states, strict=True), 1):
        if kind is REFRESH:
            refresh = number
        else:
            assert read
            assert all((values == refresh).all() for values in read.values()), f"run {number}"


def test_a_step_never_reads_and_writes_the_same_state() -> None:
    """The surrogate's base is read after its output may have been written, so the two are different memory."""
    session, engine = open_session(HALVES, k=3)
    session.generate(RAGGED, 12)
    lora = [b for b in engine.bindings if b.kind is LORA]
    assert len(lora) == 2
    for binding in lora:
        for site in ("3.attn", "3.mlp", "4.attn", "4.mlp"):
            read, written = binding.inputs[f"past_state.{site}"], binding.outputs[f"present_state.{site}"]
            assert not np.shares_memory(read, written)


def test_a_second_request_reads_its_own_prefill() -> None:
    session, engine = open_session(RECURRENT, k=3)
    for steps in (1, 2, 3, 4, 1):  # stops on either side
        session.prefill(*padded(RAGGED), max_new_tokens=9)
        prefill = len(engine.runs)
        for _ in range(steps):
            session.step([1, 2, 3])
        first = engine.runs[prefill].past_states
        assert all((values == prefill).all() for values in first.values())


# ── long prompts ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_of_one_chunk_runs_at_once() -> None:
    session, engine = open_session(PLAN)
    session.generate([[1] * PREFILL_CHUNK, [2]], 2)
    assert [run.input_ids.shape for run in engine.runs] == [(2, PREFILL_CHUNK), (2, 1)]


@pytest.mark.parametrize("surrogate", ["residual", "recurrent", "anchor"])
def test_long_prompts_go_row_by_row_in_chunks(surrogate: str) -> None:
    plan = dataclasses.replace(RECURRENT, surrogate=surrogate)
    session, engine = open_session(plan, k=1)
    lengths = [2 * PREFILL_CHUNK + 3, 5, PREFILL_CHUNK, PREFILL_CHUNK + 1, 1]
    prompts = [[(7 * i + row) % VOCAB for i in range(length)] for row, length in enumerate(lengths)]
    logits = session.prefill(*padded(prompts), max_new_tokens=6)
    assert logits.argmax(1).tolist() == [continued(prompt, 1)[0] for prompt in prompts]

    expected = [
        (row, begin, min(PREFILL_CHUNK, length - begin))
        for row, length in enumerate(lengths)
        for begin in range(0, length, PREFILL_CHUNK)
    ]
    full = PREFILL_CHUNK
    assert [count for _, _, count in expected] == [full, full, 3, 5, full, full, 1, 1]
    assert engine.kinds == [REFRESH] * len(expected)
    last_run_of_row = {}
    for number, (run, (row, begin, count)) in enumerate(zip(engine.runs, expected, strict=True), 1):
        assert run.input_ids.tolist() == [prompts[row][begin : begin + count]]
        assert run.len_kept.tolist() == run.len_dropped.tolist() == [begin]
        assert run.logits_index.tolist() == [[count - 1]]
        last_run_of_row[row] = number
    # The steps after it take all rows, with their own lengths and the state of their own last chunk.
    session.step([1, 2, 3, 4, 5])
    session.step([6, 7, 8, 9, 10])
    lora, refresh = engine.runs[-2:]
    assert (lora.kind, refresh.kind) == (LORA, REFRESH)
    assert lora.len_kept.tolist() == lengths
    assert refresh.len_kept.tolist() == [length + 1 for length in lengths]
    assert refresh.len_dropped.tolist() == lengths
    assert refresh.logits_index.tolist() == [[0]] * 5
    assert len(lora.past_states) == (0 if surrogate == "residual" else 2)
    for state in lora.past_states.values():
        assert state.tolist() == [[last_run_of_row[row]] * HIDDEN for row in range(5)]
    for row, prompt in enumerate(prompts):
        for name, fed in (("past_key.0", [row + 1, row + 6]), ("past_value.4", [row + 6])):
            assert slots(refresh.binding.inputs[name], row, len(prompt) + len(fed)) == prompt + fed
    assert len({binding.address("past_key.0") for binding in engine.bindings[-2:]}) == 1


def test_a_long_prompt_alone() -> None:
    session, engine = open_session(RECURRENT, k=2)
    prompt = [i % VOCAB for i in range(PREFILL_CHUNK + 2)]
    assert list(session.stream(prompt, 7)) == continued(prompt, 7)
    assert engine.kinds == [REFRESH, REFRESH, LORA, LORA, REFRESH, LORA, LORA, REFRESH]


def test_long_prompts_of_an_engine_that_takes_rows_together(plan: DropPlan) -> None:
    """Chunks are counted from each row's end: the last run is every row's last, and leaves all logits and states."""
    engine = FakeEngine(plan)
    engine.batched_chunks, engine.prefill_chunk = True, 4
    session, _ = open_session(plan, k=1, engine=engine)
    lengths = [11, 1, 4, 5, 8]
    prompts = [[(7 * i + row) % VOCAB for i in range(length)] for row, length in enumerate(lengths)]
    logits = session.prefill(*padded(prompts), max_new_tokens=6)
    assert logits.argmax(1).tolist() == [continued(prompt, 1)[0] for prompt in prompts]
    assert [run.input_ids.shape for run in engine.runs] == [(5, 3), (5, 4), (5, 4)]
    for run, begins, counts in zip(
        engine.runs,
        ([0, 0, 0, 0, 0], [3, 0, 0, 0, 0], [7, 0, 0, 1, 4]),
        ([3, 0, 0, 0, 0], [4, 0, 0, 1, 4], [4, 1, 4, 4, 4]),
        strict=True,
    ):
        assert run.len_kept.tolist() == begins
        if plan.drop_layers:
            assert run.len_dropped.tolist() == begins
        assert run.logits_index.tolist() == [[max(count - 1, 0)] for count in counts]
        for row, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            assert run.input_ids[row, :count].tolist() == prompts[row][begin : begin + count]
    session.step([1, 2, 3, 4, 5])
    session.step([6, 7, 8, 9, 10])
    lora, refresh = engine.runs[-2:]
    assert lora.len_kept.tolist() == lengths
    assert all((state == 3).all() for state in lora.past_states.values())
    for row, prompt in enumerate(prompts):
        assert slots(refresh.binding.inputs["past_key.0"], row, len(prompt) + 2) == [*prompt, row + 1, row + 6]


class ChoosingEngine(FakeEngine):
    """Its graphs have an output for the largest logit, which is NaN from run `broken_at` on."""

    target = "tensorrt-rtx"
    chooses_tokens = True
    broken_at = 10**9

    def read(self, buffer: np.ndarray) -> np.ndarray:
        raise AssertionError("greedy decoding read the logits")

    def _predict(self, run) -> None:
        super()._predict(run)
        tokens = run.binding.outputs["logits"].argmax(-1)
        run.binding.outputs["next_token"][...] = -1 if len(self.runs) >= self.broken_at else tokens


def test_an_engine_that_chooses_tokens() -> None:
    session, engine = open_session(RECURRENT, k=2, engine=ChoosingEngine(RECURRENT))
    rows = session.generate(RAGGED, 9)
    assert [row.tolist() for row in rows] == [continued(prompt, 9) for prompt in RAGGED]
    assert all("next_token" in binding.outputs for binding in engine.bindings)
    with pytest.raises(AssertionError, match="read the logits"):
        session.generate(RAGGED, 9, sampling=SamplingOptions(repetition_penalty=1.1))
    engine.forget()
    engine.broken_at = 4
    stream = session.stream([4, 2], 9)
    assert list(islice(stream, 3)) == continued([4, 2], 3)
    assert_refused(lambda: next(stream), "not numbers", "row 0", error=BundleError)


# ── K/V bytes ──────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── stopping ───────────────────────────────────────────────────────────────────────────────────────────────────


def scripted(tokens: list[int], **manifest: object) -> tuple[Session, FakeEngine]:
    return open_session(PLAN, engine=FakeEngine(PLAN, [[token] for token in tokens]), **manifest)


def test_stop_tokens_of_the_model() -> None:
    for eos, expected in (((), [5, 6, 7, 8]), ((7,), [5, 6]), ((8, 6), [5]), ((5,), [])):
        session, engine = scripted([5, 6, 7, 8], eos=eos)
        assert list(session.stream([1], 4)) == expected
        assert len(engine.runs) == min(len(expected) + 1, 4)  # the run that made the stop token is the last
        session, _ = scripted([5, 6, 7, 8], eos=eos)
        assert [row.tolist() for row in session.generate([1], 4)] == [expected]


def test_given_stop_tokens_replace_the_models() -> None:
    for given, expected in (((), [5, 6, 7, 8]), ([7], [5, 6]), ((8, 30), [5, 6, 7]), (None, [5])):
        session, _ = scripted([5, 6, 7, 8], eos=(6,))
        assert list(session.stream([1], 4, stop_token_ids=given)) == expected


def test_token_0_of_finished_rows_is_no_output() -> None:
    """Finished rows are fed token 0; it must not come out, nor count as a stop."""
    script = [[9, 0], [0, 0], [0, 0], [0, 9]]
    session, _ = open_session(PLAN, engine=FakeEngine(PLAN, script))
    assert [row.tolist() for row in session.generate([[1], [2]], 9, stop_token_ids=[9])] == [[], [0, 0, 0]]


def test_a_stop_token_in_a_prompt_is_an_ordinary_token() -> None:
    session, engine = scripted([5, 6], eos=(7,))
    assert list(session.stream([7, 1, 7], 2)) == [5, 6]
    assert engine.runs[0].input_ids.tolist() == [[7, 1, 7]]


def test_sampling_options_reach_the_sampler() -> None:
    """Token 5 comes first and would come again; a penalty above 1 makes another token likeliest."""
    engine = FakeEngine(PLAN, [[5]] * 3)
    session, _ = open_session(PLAN, engine=engine)
    assert list(session.stream([1], 3)) == [5, 5, 5]
    engine.forget()
    options = SamplingOptions(temperature=5.0, seed=3)
    drawn = [row.tolist() for row in session.generate([1], 3, sampling=options)]
    engine.forget()
    assert drawn == [list(session.stream([1], 3, sampling=options))]
    assert drawn != [[5, 5, 5]]


# ── cancelling ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("taken", range(6))
def test_closing_a_stream_cancels(taken: int) -> None:
    session, engine = open_session(RECURRENT, k=2)
    stream = session.stream([4, 2], 40)
    assert list(islice(stream, taken)) == continued([4, 2], taken)
    stream.close()
    assert len(engine.runs) == taken  # nothing runs ahead
    assert list(stream) == []
    engine.forget()
    assert [row.tolist() for row in session.generate(RAGGED, 8)] == [continued(prompt, 8) for prompt in RAGGED]
    assert engine.kinds == [REFRESH, *kinds_after_prefill(2, 7)]


@pytest.mark.parametrize("number", range(1, 8))
def test_the_session_is_usable_after_ctrl_c(number: int) -> None:
    """Ctrl-C in the prefill, in LoRA steps of either side, in refreshes."""
    engine = FakeEngine(RECURRENT, interrupt_at=number)
    session, _ = open_session(RECURRENT, k=2, engine=engine)
    stream = session.stream([4, 2], 40)
    taken = []
    with pytest.raises(KeyboardInterrupt):
        taken.extend(stream)
    assert list(stream) == []
    engine.forget()
    engine.interrupt_at = None
    assert list(session.stream([4, 2], 9)) == continued([4, 2], 9)
    assert engine.kinds == [REFRESH, *kinds_after_prefill(2, 8)]
    assert engine.runs[0].len_kept.tolist() == [0]


@pytest.mark.parametrize("chunks", [1, 3])
def test_ctrl_c_in_the_prefill_leaves_no_half_request(chunks: int) -> None:
    engine = FakeEngine(PLAN, interrupt_at=chunks)
    session, _ = open_session(PLAN, engine=engine)
    prompt = [1] * (5 if chunks == 1 else 3 * PREFILL_CHUNK)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(np.array([prompt]))
    with pytest.raises(InputError, match="no running request"):
        session.step([1])


@pytest.mark.parametrize("number", range(2, 8))
def test_an_interrupted_step_can_be_repeated(number: int) -> None:
    """Nothing is counted before the engine has run, so the same step runs again on the same state."""
    engine = FakeEngine(RECURRENT, interrupt_at=number)
    session, _ = open_session(RECURRENT, k=2, engine=engine)
    session.prefill(*padded(RAGGED), max_new_tokens=9)
    for step in range(1, 9):
        kind = session.next_step
        try:
            session.step([step] * 3)
        except KeyboardInterrupt:
            assert session.next_step is kind
            session.step([step] * 3)
            again, first = engine.runs[-1], engine.runs[-2]
            assert again.kind is first.kind is kind
            assert again.len_kept.tolist() == first.len_kept.tolist()
            assert all((again.past_states[name] == state).all() for name, state in first.past_states.items())
    assert len(engine.runs) == 10
    assert slots(engine.runs[0].binding.inputs["past_key.0"], 1, 9) == [5, *range(1, 9)]
    assert slots(engine.runs[0].binding.inputs["past_key.3"], 1, 3) == [5, 3, 6]


def test_a_new_request_ends_an_open_stream() -> None:
    """Its next step would run on the other request's caches."""
    session, engine = open_session(PLAN)
    first = session.stream([4, 2], 9)
    assert next(first) == continued([4, 2], 1)[0]
    second = session.stream([1, 2, 3], 9)
    tokens = [next(second)]
    runs = len(engine.runs)
    assert_refused(lambda: next(first), "over")
    assert len(engine.runs) == runs
    tokens += second
    assert tokens == continued([1, 2, 3], 9)


# ── opening and closing ────────────────────────────────────────────────────────────────────────────────────────


def test_closing_frees_the_engine_once() -> None:
    with open_session(PLAN)[0] as session:
        engine = session._engine
        session.generate([1], 3)
    session.close()
    assert engine.times_closed == 1


def test_caches_are_freed_by_close_and_before_the_next_request_allocates() -> None:
    """An open stream does not keep them."""
    caches: list[list[weakref.ref[np.ndarray]]] = [[]]  # per request

    class Engine(FakeEngine):
        def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
            assert not any(ref() is not None for ref in chain.from_iterable(caches[:-1]))
            buffer = np.zeros(shape, dtype)
            if name.startswith("past_"):
                caches[-1].append(weakref.ref(buffer))
            return buffer

    session, engine = open_session(RECURRENT, engine=Engine(RECURRENT))
    streams = []
    for _ in range(2):
        streams.append(session.stream([4, 2], 9))
        list(islice(streams[-1], 6))
        engine.forget()
        assert [ref() is not None for ref in caches[-1]] == [True] * 12
        caches.append([])
    session.close()
    assert not any(ref() is not None for ref in chain.from_iterable(caches))


def test_two_sessions_do_not_touch_each_other() -> None:
    engine = FakeEngine(PLAN)
    one, _ = open_session(PLAN, k=2, engine=engine)
    two, _ = open_session(PLAN, k=0, engine=engine)
    streams = one.stream([4, 2], 9), two.stream([1, 2, 3], 9)
    tokens = list(zip(*streams, strict=True))
    assert [a for a, _ in tokens] == continued([4, 2], 9)
    assert [b for _, b in tokens] == continued([1, 2, 3], 9)


def test_load_adapters_replaces_them_and_ends_the_request(tmp_path) -> None:
    a, b = np.ones((2, HIDDEN), np.float32), np.full((HIDDEN, 2), 3, np.float32)
    tensors = {f"model.layers.{i}.lora_{part}.weight": x for i in (3, 4) for part, x in (("A", a * i), ("B", b * i))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    session, engine = open_session(RECURRENT)
    session.prefill(np.array([[1, 2]]), max_new_tokens=9)
    session.step([1])
    session.load_adapters(tmp_path)
    (matrices,) = engine.adapters
    assert set(matrices) == {"3", "4"}
    for layer in (3, 4):
        np.testing.assert_array_equal(matrices[str(layer)][0], a * layer)
        np.testing.assert_array_equal(matrices[str(layer)][1], b * layer * 4)  # s = alpha / r = 4
    assert_refused(lambda: session.step([1]), "no running request")
    assert list(session.stream([4, 2], 9)) == continued([4, 2], 9)
    plain, _ = open_session(PLAN)
    assert_refused(lambda: plain.load_adapters(tmp_path), "no room for adapters", "rank 0")
    session.close()
    assert_refused(lambda: session.load_adapters(tmp_path), "closed")


def test_open_refuses_before_it_loads_an_engine(tmp_path) -> None:
    """The bundle's graphs are missing, so loading them would fail with another error."""
    manifest = make_manifest(PLAN)
    ort = {"ort": {"refresh": "r.onnx", "lora": "l.onnx"}}
    for name, targets in (("ort", ort), ("none", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lora_drop.json").write_text(dataclasses.replace(manifest, targets=targets).to_json())
    assert_refused(lambda: Session.open(tmp_path / "ort", policy="backfil"), "policy", "'backfil'", "skip")
    assert_refused(lambda: Session.open(tmp_path / "ort", threads=0), "threads", "0")
    assert_refused(lambda: Session.open(tmp_path / "ort", k=-1), "k must be", "-1", error=PlanError)
    for name, options, fact, *note in (
        ("ort", {"provider": "npu"}, "provider", "'npu'", "cpu"),
        ("none", {}, "no target", "none"),
        ("ort", {"target": "rtx"}, "target", "'rtx'", "ort"),
        ("nowhere", {}, "no bundle", "nowhere"),
    ):
        call = functools.partial(Session.open, tmp_path / name, **options)
        assert_refused(call, fact, *note, error=BundleError)
    with pytest.raises(InputError, match="policy"):
        Session(open_session(PLAN)[0].bundle, FakeEngine(PLAN), PeriodicSchedule(3), policy="lossless")


# ── refusals ───────────────────────────────────────────────────────────────────────────────────────────────────


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


LIMITS = Limits(max_seq_len=12, max_prompt_len=8, max_batch=2)
REFUSED_PROMPTS = {
    "no rows": ((np.zeros((0, 3), np.int64),), {}, "prompt is empty", "(0, 3)"),
    "no tokens": ((np.zeros((2, 0), np.int64),), {}, "prompt is empty", "(2, 0)"),
    "a row without batch": ((np.array([1, 2, 3]),), {}, "prompt is empty", "(3,)", "[batch, tokens]"),
    "three axes": ((np.ones((1, 1, 2), np.int64),), {}, "prompt is empty", "(1, 1, 2)"),
    "an empty row": ((np.ones((2, 3), np.int64), [3, 0]), {}, "A prompt is empty", "[3, 0]", "(2, 3)"),
    "a negative length": ((np.ones((2, 3), np.int64), [-1, 3]), {}, "A prompt is empty", "[-1, 3]", "(2, 3)"),
    "too large a length": ((np.ones((2, 3), np.int64), [3, 4]), {}, "lengths do not fit", "[3, 4]", "(2, 3)"),
    "too few lengths": ((np.ones((2, 3), np.int64), [3]), {}, "lengths do not fit", "[3]", "(2, 3)"),
    "lengths with two axes": ((np.ones((2, 3), np.int64), [[3], [3]]), {}, "lengths do not fit", "[[3], [3]]"),
    "a single length": ((np.ones((2, 3), np.int64), 3), {}, "lengths do not fit", "3", "(2, 3)"),
    "too many rows": ((np.ones((3, 3), np.int64),), {}, "batch is larger", "3 rows", "allows 2"),
    "too long a prompt": ((np.ones((1, 9), np.int64),), {}, "prompt is longer", "9 tokens", "allows 8"),
    "too long a sequence": ((np.ones((1, 8), np.int64),), {"max_new_tokens": 5}, "longer", "8 + 5", "allows 12"),
    "no new token": ((np.ones((1, 8), np.int64),), {"max_new_tokens": 0}, "Nothing to generate", "is 0", "1"),
    "negative new tokens": ((np.ones((1, 8), np.int64),), {"max_new_tokens": -3}, "Nothing to generate", "is -3", "1"),
    "a negative id": ((np.array([[1, -1]]),), {}, "outside the vocabulary", "-1", "0 to 49"),
    "an id past the vocabulary": ((np.array([[1, 2], [50, 3]]),), {}, "outside the vocabulary", "50", "0 to 49"),
    "a negative k": ((np.array([[1, 2]]),), {"k": -1}, "k must be", "-1", "0"),
    "half a k": ((np.array([[1, 2]]),), {"k": 1.5}, "k must be", "1.5", "0"),
}


@pytest.mark.parametrize("case", REFUSED_PROMPTS.values(), ids=REFUSED_PROMPTS.keys())
def test_prefill_refuses(case: tuple) -> None:
    arguments, options, fact, *note = case
    session, engine = open_session(PLAN, limits=LIMITS)
    assert_refused(lambda: session.prefill(*arguments, **options), fact, *note)
    # A refusal changes nothing: a running request goes on.
    session.prefill(np.array([[4, 2]]), max_new_tokens=3)
    session.step([1])
    assert_refused(lambda: session.prefill(*arguments, **options), fact, *note)
    assert session.step([1]).argmax() == next_token(1, 3)
    assert len(engine.runs) == 3


def test_the_longest_request_is_served() -> None:
    session, _ = open_session(PLAN, limits=LIMITS)
    rows = session.generate([[1] * 8, [2]], 4)
    assert [row.tolist() for row in rows] == [continued([1] * 8, 4), continued([2], 4)]
    session, _ = open_session(PLAN, limits=Limits(max_seq_len=8, max_prompt_len=8, max_batch=1))
    assert_refused(lambda: session.prefill(np.ones((1, 8), np.int64)), "longer", "8 + 1", "allows 8")


def test_requests_refuse_what_prefill_refuses() -> None:
    session, engine = open_session(PLAN, limits=LIMITS)
    for prompts, count, fact in (
        ([], 3, "prompt is empty"),
        ([[]], 3, "prompt is empty"),
        ([[1], []], 3, "prompt is empty"),
        ([[1], [2], [3]], 3, "batch is larger"),
        ([1] * 9, 1, "prompt is longer"),
        ([1] * 8, 5, "longer than the bundle allows"),
        ([1, 50], 3, "outside the vocabulary"),
        ([1, 2], 0, "Nothing to generate"),
        ([1, 2], -2, "Nothing to generate"),
    ):
        assert_refused(lambda prompts=prompts, count=count: session.generate(prompts, count), fact)
        if len(prompts) != 3 and prompts != [[1], []]:
            assert_refused(lambda prompts=prompts, count=count: next(session.stream(prompts, count)), fact)
    assert_refused(lambda: session.generate([1], 3, k=-1), "k must be", error=PlanError)
    assert_refused(lambda: next(session.stream([[1], [2]], 3)), "one prompt", "2")
    assert not engine.runs


def test_step_refuses() -> None:
    session, engine = open_session(PLAN, limits=LIMITS)
    for call in (lambda: session.step([1, 2]), lambda: session.next_step):
        assert_refused(call, "no running request", "after prefill")
    session.prefill(np.array([[4, 2], [1, 1]]), max_new_tokens=3)
    for tokens, shape in (([1], "(1,)"), ([1, 2, 3], "(3,)"), ([[1], [2]], "(2, 1)"), (1, "()")):
        assert_refused(lambda tokens=tokens: session.step(tokens), "another batch", shape, "2 rows")
    for tokens, wrong in (([1, 50], "50"), ([-1, 2], "-1")):
        assert_refused(lambda tokens=tokens: session.step(tokens), "outside the vocabulary", wrong, "0 to 49")
    assert len(engine.runs) == 1
    session.step([1, 2])
    session.step(np.array([3, 4], np.int32))
    assert_refused(lambda: session.step([1, 2]), "caches are full", "2 decode steps")
    assert len(engine.runs) == 3
    session.prefill(np.array([[4, 2]]), max_new_tokens=1)
    assert_refused(lambda: session.step([1]), "caches are full", "0 decode steps")


def test_a_closed_session_refuses() -> None:
    session, _ = open_session(PLAN)
    stream = session.stream([1], 9)
    next(stream)
    session.close()
    for call in (
        lambda: session.prefill(np.array([[1]])),
        lambda: session.step([1]),
        lambda: session.next_step,
        lambda: session.generate([1], 3),
        lambda: next(session.stream([1], 3)),
    ):
        assert_refused(call, "session is closed")
    assert_refused(lambda: next(stream), "")


# ── the session's own time ─────────────────────────────────────────────────────────────────────────────────────

DEEP = DropPlan(num_layers=30, drop_layers=tuple(range(3, 29, 2)))


@pytest.mark.parametrize(
    "plan", [DEEP, dataclasses.replace(DEEP, surrogate="recurrent", rank=16)], ids=["residual", "recurrent"]
)
def test_a_step_costs_at_most_100_us_of_python(plan: DropPlan, record_property) -> None:
    """Beside an engine whose runs do nothing; the median, since other processes run too."""
    session, _ = open_session(plan, engine=IdleEngine(plan), vocab_size=1000)

    def median_us(next_one) -> float:
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            next_one()
            times.append(time.perf_counter() - begin)
        return 1e6 * sorted(times)[150]

    stream = session.stream([1, 2, 3], 302)
    next(stream)
    streamed = median_us(lambda: next(stream))
    session.prefill(np.array([[1, 2, 3]]), max_new_tokens=302)
    token = np.array([5])
    stepped = median_us(lambda: session.step(token))
    record_property("stream_us", streamed)
    record_property("step_us", stepped)
    print(f"stream {streamed:.1f} µs, step {stepped:.1f} µs")
    assert streamed < 100
    assert stepped < 100
