"""The TensorRT engine under a session: the very graphs that TensorRT builds from, on a fake CUDA and a fake TensorRT.

The same logits and tokens as elsewhere, up to the last slot. What the fakes stand for, and what they cannot show, is
said in tests/support/fake_cuda.py and fake_trt.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from lora_drop_runtime import Batch, InputError, SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding import drafter
from lora_drop_runtime.decoding.request import Request
from lora_drop_runtime.engines.trt.cuda_device import ALIGNMENT
from lora_drop_runtime.errors import NoDeviceError
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.support import oracle
from tests.support.bundles import family, oracle_plan
from tests.support.device_steps import FORCED, PLANS, RAGGED, assert_close, ort_steps, padded, steps
from tests.support.fake_trt import TARGET, make_device_bundle, open_device_session

# ── the same logits and tokens as elsewhere ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "k"), [*((name, k) for name in PLANS for k in (1, 2)), ("recurrent", 5), ("change", 5)]
)
def test_steps_are_those_of_onnx_runtime(bundles, name: str, k: int) -> None:
    """Against other graphs (target ort) closely; against the same graphs, run without any device, to the bit."""
    made = bundles(name)
    session, engine, _ = open_device_session(made)
    with session:
        ours = steps(session, k)
        assert engine.capture_note == ""
    assert_close(ours, ort_steps(made, k))
    with Session.open(made.root, target=TARGET, provider="cpu", threads=1) as same_graphs:
        for a, b in zip(ours, steps(same_graphs, k), strict=True):
            np.testing.assert_array_equal(a, b)


def test_weights_as_inputs_where_a_layers_attention_is_dead(tmp_path: Path) -> None:
    """Before a dropped layer that repeats its state, a LoRA step needs K and V of the kept layer and nothing more."""
    made = make_device_bundle("llama", tmp_path / "bundle", surrogate="recurrent", k=1)
    session, _, _ = open_device_session(made)
    with session:
        assert_close(steps(session, 2), ort_steps(made, 2))


@pytest.mark.parametrize(("made_from", "sharing"), [("qwen2", "inputs"), ("gemma2", "constants")])
def test_other_families(bundles, made_from: str, sharing: str) -> None:
    """Fused biases and tied embeddings; soft caps and windowed layers. Weights as inputs or inside the engines."""
    made = bundles("recurrent", made_from, sharing)
    session, engine, _ = open_device_session(made)
    with session:
        assert (engine.resident_bytes["weights"] > 0) == (sharing == "inputs")
        assert_close(steps(session, 2), ort_steps(made, 2))


def test_greedy_tokens_are_those_of_the_oracle(bundles) -> None:
    made = bundles("recurrent")
    plan = oracle_plan(made, made.root.parent / "adapters")
    session, _, _ = open_device_session(made)
    with session:
        rows = session.generate(RAGGED, 9, k=3)
        assert list(session.stream(RAGGED[2], 9, k=3)) == rows[2].tolist()
    for prompt, row in zip(RAGGED, rows, strict=True):
        expected, _ = oracle.greedy_row(family("llama").model, plan, prompt, 9, 3)
        assert row.tolist() == expected


def test_greedy_copies_one_token_and_sampling_the_logits(bundle: Bundle) -> None:
    session, engine, _ = open_device_session(bundle)
    with session, Session.open(bundle.root, target="ort", threads=1) as other:
        session.generate(RAGGED, 5, sampling=SamplingOptions(top_k=3, top_p=0.5))  # of no effect at temperature 0
        assert not any(name.startswith("read") for name in engine._memory._pinned)
        for options in (
            SamplingOptions(temperature=3.0, seed=1),
            SamplingOptions(repetition_penalty=1.3),
            SamplingOptions(),
        ):
            ours = session.generate(RAGGED, 12, sampling=options)
            theirs = other.generate(RAGGED, 12, sampling=options)
            assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]
        assert any(name.startswith("read") for name in engine._memory._pinned)


def test_finished_rows_do_not_advance(bundle: Bundle) -> None:
    session, _, _ = open_device_session(bundle)
    with session, Session.open(bundle.root, target="ort", threads=1) as other:
        free = session.generate(RAGGED, 10)
        stop = [int(free[0][4]), int(free[2][6])]
        ours = session.generate(RAGGED, 10, stop_token_ids=stop)
        lengths = session._request.len_kept.tolist()
        theirs = other.generate(RAGGED, 10, stop_token_ids=stop)
        assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]
        assert len({len(row) for row in ours}) > 1
        assert lengths == other._request.len_kept.tolist()


def test_requests_after_each_other_are_as_if_alone(bundles) -> None:
    """Other batches and lengths in the same memory, which still holds what the requests before left."""
    made = bundles("recurrent, attn_mlp")
    session, _, _ = open_device_session(made)
    with session:
        for prompts, k in ((RAGGED, 2), (RAGGED[1:2], 1), (RAGGED[:2], 5), ([*RAGGED, [1, 2]][::-1], 2), (RAGGED, 1)):
            ours = [row.tolist() for row in session.generate(prompts, 9, k=k)]
            fresh, _, _ = open_device_session(made)
            with fresh:
                assert ours == [row.tolist() for row in fresh.generate(prompts, 9, k=k)]


@pytest.mark.parametrize("cycles", [False, True])
@pytest.mark.parametrize("name", ["residual", "recurrent"])
def test_a_prefix_is_taken_where_it_lies(bundles, name: str, cycles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of a chat, exact under `backfill`: a turn runs what is new, and at most k tokens before it again."""
    fed: list[int] = []
    prefill = Request.prefill

    def counted(self: Request, ids: np.ndarray, lengths: np.ndarray) -> None:
        fed.append(int(lengths[0]) - self.kept[0])
        prefill(self, ids, lengths)

    monkeypatch.setattr(Request, "prefill", counted)
    (session, _, _), (fresh, _, _) = (
        open_device_session(bundles(name), policy="backfill", cycles=cycles) for _ in "12"
    )
    with session, fresh:
        text = [5, 6, 7, 8, 9]
        for turn in range(4):
            reply = list(session.stream(text, 7, k=2, reuse_prefix=True, stop_token_ids=()))
            assert fed[-1] == len(text) if turn == 0 else 3 <= fed[-1] <= 5
            assert reply == list(fresh.stream(text, 7, k=2, stop_token_ids=()))
            text = [*text, *reply, 11, 12]


def test_a_fork_has_caches_of_its_own(bundles) -> None:
    """Both go on by turns, each as a session alone that was fed the same; forked again, and closed in any order."""
    made = bundles("recurrent, attn_mlp")
    session, _, cuda = open_device_session(made, policy="backfill")
    alone = {side: open_device_session(made, policy="backfill")[0] for side in "abc"}
    with alone["a"], alone["b"], alone["c"]:
        for one in (session, *alone.values()):
            one.prefill(*padded(RAGGED), max_new_tokens=12, k=2)
            one.step(FORCED[0])
        sides = {"a": session, "b": session.fork()}
        np.testing.assert_array_equal(sides["b"]._logits(), session._logits())
        for number in range(1, 4):
            for side, one in sides.items():
                tokens = np.roll(FORCED[number], ord(side))
                np.testing.assert_array_equal(one.step(tokens), alone[side].step(tokens))
        for number in range(1, 4):
            alone["c"].step(np.roll(FORCED[number], ord("b")))
        sides["c"] = sides["b"].fork()
        held = sum(block.nbytes for block in cuda.blocks.values())
        for closed in "ab":
            for number in range(4, 7):
                for side, one in sides.items():
                    tokens = np.roll(FORCED[number], ord(side))
                    np.testing.assert_array_equal(one.step(tokens), alone[side].step(tokens))
            sides.pop(closed).close()
            before, held = held, sum(block.nbytes for block in cuda.blocks.values())
            assert held < before
        sides["c"].close()
        assert not cuda.blocks
        assert not cuda.pinned


def test_a_fork_amid_a_cycle_begins_with_the_smaller_steps(tmp_path: Path) -> None:
    """Its first refresh reads more than the LoRA step before it, which then runs again."""
    made = make_device_bundle("llama", tmp_path / "bundle", k=2, max_batch=32)
    (session, _, _), (alone, _, _) = (open_device_session(made, policy="backfill") for _ in "12")
    with session, alone:
        for one in (session, alone):
            one.prefill(*padded(RAGGED), max_new_tokens=12, k=2)
            one.step(FORCED[0])
        with session.fork() as fork:
            for tokens in FORCED[1:]:
                np.testing.assert_array_equal(fork.step(tokens), alone.step(tokens))


def test_verified_drafts_of_many_rows_give_more_tokens_than_a_step(tmp_path: Path) -> None:
    """What they choose lies where the tokens of steps did, of which more come."""
    made = make_device_bundle("llama", tmp_path / "bundle", k=3, max_batch=32)
    session, engine, _ = open_device_session(made, policy="lossless")
    assert engine.verified_tokens is not None
    assert engine.verified_tokens * 12 * 8 > ALIGNMENT
    prompts = [[7 + row, 3, 11, 7 + row, 3] for row in range(12)]
    with session:
        full = [row.tolist() for row in session.generate(prompts, 20, k=0, stop_token_ids=())]
        for draft in ("ngram", "lora", "both"):
            ours = session.generate(prompts, 20, k=3, draft=draft, stop_token_ids=())
            assert [row.tolist() for row in ours] == full


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_forks_stream_by_turns(bundles, policy: str) -> None:
    """Cycles of both are on the device at the same time."""
    session, _, _ = open_device_session(bundles("recurrent"), policy=policy, cycles=True)
    fresh, _, _ = open_device_session(bundles("recurrent"), policy=policy)
    with session, fresh:
        session.prefill([RAGGED[0]], max_new_tokens=9)
        with session.fork() as fork:
            streams = [
                one.stream(text, 15, k=2, stop_token_ids=()) for one, text in ((session, RAGGED[0]), (fork, RAGGED[2]))
            ]
            ours = list(zip(*streams, strict=True))
            for text, row in zip((RAGGED[0], RAGGED[2]), zip(*ours, strict=True), strict=True):
                assert list(row) == list(fresh.stream(text, 15, k=2, stop_token_ids=()))


def test_a_fork_that_does_not_fit_leaves_the_session_as_it_was(bundles) -> None:
    session, engine, cuda = open_device_session(bundles("recurrent"))
    with session:
        session.prefill(*padded(RAGGED), max_new_tokens=9)
        held = dict(engine.resident_bytes)
        cuda.memory_bytes = sum(block.nbytes for block in cuda.blocks.values()) + 2000
        with pytest.raises(NoDeviceError, match="out of memory"):
            session.fork()
        assert engine.resident_bytes == held
        assert sum(block.nbytes for block in cuda.blocks.values()) < cuda.memory_bytes
        session.step([1, 2, 3])


def test_forks_on_a_gpu_are_for_one_thread_at_a_time(bundles) -> None:
    session, _, _ = open_device_session(bundles("recurrent"))
    with session:
        session.prefill(*padded(RAGGED), max_new_tokens=9)
        with session.fork() as fork, ThreadPoolExecutor(1) as other:
            fork._usage.enter()
            refused = other.submit(session.step, [1, 2, 3]).exception()
            fork._usage.leave()
            assert isinstance(refused, InputError)
            assert "another thread" in str(refused)
            other.submit(session.step, [1, 2, 3]).result()


# ── capacities ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_are_the_engines_whatever_a_request_needs(bundle: Bundle) -> None:
    session, _, _ = open_device_session(bundle)
    with session:
        for new_tokens in (1, 20):
            session.prefill(*padded(RAGGED), max_new_tokens=new_tokens)
            for name, cache in session._request.caches.items():
                dropped = int(name.split(".")[1]) in bundle.manifest.plan.dropped_layers
                # max_seq_len 64, max_prompt_len 40, k = 1: 63 tokens, of which 40 + 11 in a dropped layer; 16 to spare
                assert cache.shape == (3, 2, 67 if dropped else 79, 16)
        assert session.kv_bytes()["allocated"] == 3 * 2 * 4 * 2 * 16 * (79 * 6 + 67 * 2)


@pytest.mark.parametrize("k", [1, 3])
def test_a_request_may_fill_every_slot(bundle: Bundle, k: int) -> None:
    prompt = [int(token) for token in np.random.default_rng(1).integers(0, 131, 40)]
    session, _, _ = open_device_session(bundle)
    with session, Session.open(bundle.root, target="ort", threads=1) as other:
        ours = session.generate([prompt, prompt[:3]], 24, k=k)
        assert [row.tolist() for row in ours] == [row.tolist() for row in other.generate([prompt, prompt[:3]], 24, k=k)]
        assert session._request.len_kept.max() == 63
        if k == 1:
            assert session._request.len_dropped.max() == 51


def test_a_smaller_k_than_the_slots_allow_is_refused_with_the_numbers(bundle: Bundle) -> None:
    session, _, _ = open_device_session(bundle)
    with session:
        prompt = [[1] * 40]
        with pytest.raises(InputError, match="dropped layers") as caught:
            session.generate(prompt, 24, k=0)  # every one of 23 steps a refresh
        assert "63 slots" in caught.value.note
        assert "51" in caught.value.note
        assert "max_new_tokens" in caught.value.hint
        with pytest.raises(InputError, match="no running request"):
            session.step([1])
        assert len(session.generate(prompt, 12, k=0)[0]) == 12  # 40 + 11


def test_several_tokens_of_several_rows_are_verified_in_one_run(bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits at each of a row's tokens, rows of different widths in one step; the full schedule's tokens come out."""
    monkeypatch.setattr(drafter, "CONFIDENCE", 0.0)
    made = bundles("recurrent")
    session, engine, _ = open_device_session(made, policy="lossless")
    with session:
        whole = session.generate(RAGGED, 9, k=0, stop_token_ids=())
        assert engine.verified_tokens == made.manifest.plan.k + 1
        for draft in ("lora", "ngram", "both"):
            drafted = session.generate(RAGGED, 9, k=3, draft=draft, stop_token_ids=())
            assert [row.tolist() for row in drafted] == [row.tolist() for row in whole]
            assert session.statistics().drafted or draft == "ngram"  # where nothing may be found


# ── rows that come and go ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["skip", "backfill", "lossless"])
@pytest.mark.parametrize("name", ["residual", "recurrent"])
def test_rows_of_a_batch_are_those_of_each_row_alone(bundles, name: str, policy: str) -> None:
    """They join between steps, have windows of their own and leave; what a row leaves behind, another one takes."""
    made = bundles(name)
    asked = [([7, 3, 11, 19, 2, 40], 9, 1, 0), ([5], 12, 3, 1), ([23, 29, 31], 4, 2, 2), (list(range(20)), 7, 1, 6)]
    _, engine, _ = open_device_session(made)
    with Batch(made, engine, PeriodicSchedule(1), policy, slots=3, max_seq_len=50) as batch:
        tokens: list[list[int]] = [[] for _ in asked]
        tick, added = 0, 0
        while added < len(asked) or batch.rows:
            while added < len(asked) and asked[added][3] <= tick:
                prompt, count, k, _ = asked[added]
                assert batch.add(prompt, count, k=k, stop_token_ids=()) == added
                added += 1
            for event in batch.tick():
                tokens[event.row] += [event.token]
            tick += 1
    with Session.open(made.root, target="ort", policy=policy, threads=1) as session:
        for (prompt, count, k, _), ours in zip(asked, tokens, strict=True):
            assert session.generate([prompt], count, k=k, stop_token_ids=())[0].tolist() == ours
