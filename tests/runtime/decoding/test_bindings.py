"""What a session binds to the engine's graphs: names, buffers, and which side of the state a step reads."""

from __future__ import annotations

import numpy as np
import pytest
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind

from tests.support.decoding import HALVES, LORA, PLAN, PLANS, RAGGED, RECURRENT, REFRESH, WINDOWS, padded
from tests.support.fake_engine import HIDDEN, VOCAB, open_session

# ── bindings ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_bound_by_each_step(plan: DropPlan) -> None:
    session, engine = open_session(plan, k=2)
    session.generate(RAGGED, 7)
    everywhere = {f"{part}.{layer}" for part in ("key", "value") for layer in range(6)}
    kept = {f"{part}.{layer}" for part in ("key", "value") for layer in range(6) if layer not in plan.dropped_layers}
    states = {f"state.{site}" for site in plan.sites} if plan.surrogate != "residual" and plan.dropped_layers else set()
    updated = states if plan.surrogate == "recurrent" and plan.rank else set()
    for binding in engine.bindings:
        if binding.kind is REFRESH:
            lengths = {"len_kept", "len_dropped"} if plan.dropped_layers else {"len_kept"}
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
    of_dropped = [
        array for name, array in refresh.inputs.items() if name.split(".")[-1] in map(str, plan.dropped_layers)
    ]
    assert len(of_dropped) == 2 * len(plan.dropped_layers)
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
    session.prefill(*padded(RAGGED), max_new_tokens=45)
    allocated = len(engine.allocated)
    for _ in range(44):
        session.step([1, 2, 3])
    assert len(engine.runs) == 45
    assert len(engine.allocated) == allocated + 2 * (len(engine.bindings) - 1)  # ids and places of each binding
    two_sides = plan.surrogate == "recurrent" and plan.rank > 0 and bool(plan.dropped_layers)
    assert len(engine.bindings) <= 3 + two_sides
    engine.forget()
    session.generate(RAGGED, 45)
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
    plan = RECURRENT if injection == "block" else HALVES
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
