"""Batches on target openvino whose rows take over what others have run: tokens, logprobs and blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Batch, Event, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.paged_slots import PagedSlots
from lora_drop_runtime.decoding.row_blocks import GONE
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.runtime.decoding.test_batch import Request, decoded, requests
from tests.runtime.decoding.test_kept_prefixes import check_row
from tests.support.bundles import make_adapted_bundle, make_bundle
from tests.support.decoding import prompts_run, ticked_through

from .test_batch import bytes_of, greedy, watched
from .test_engine import FOUR, TARGETS, VOCAB, with_layers

pytestmark = pytest.mark.usefixtures("models_stay_compiled")


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def tokens_of(events: list[Event], row: int) -> list[int]:
    return [event.token for event in events if event.row == row and event.token is not None]


def in_use(batch: Batch) -> list[int]:
    return [pool.in_use for pool in batch._engine.pools]  # type: ignore[attr-defined]


def check_nothing_leaks(batch: Batch) -> None:
    """Once no row is left only kept prefixes have blocks, and none has when they are gone."""
    prefixes = batch._prefixes
    assert prefixes is not None
    pools = range(len(in_use(batch)))
    kept = [{block for one in prefixes._kept for block in one.place.blocks[number]} - {GONE} for number in pools]
    assert in_use(batch) == [len(own) for own in kept]
    assert batch.kv_bytes()["allocated"] == batch._slots.bytes_in_use
    for one in prefixes._kept:
        assert [len(own) for own in one.place.blocks] == [-(-len(one.tokens) // 32)] * len(pools)
        prefixes._drop(one)
    assert in_use(batch) == [0 for _ in pools]


TEXTS = [text(90, seed) for seed in (1, 2)]
BEGINNINGS = st.tuples(st.sampled_from(TEXTS), st.integers(0, 90) | st.sampled_from((31, 32, 33, 64))).map(
    lambda one: one[0][: one[1]]
)


def sharing(policies: tuple[str, ...]) -> st.SearchStrategy[list[Request]]:
    """Requests whose prompts begin with parts of few texts."""
    one = st.builds(
        lambda request, begin: Request(**{**vars(greedy(request)), "prompt": (*begin, *request.prompt)}),
        requests(VOCAB, 12, policies),
        BEGINNINGS,
    )
    return st.lists(one, min_size=2, max_size=8)


def test_rows_are_as_alone(served: tuple[Bundle, dict[str, Session]], capsys) -> None:
    """Whenever they come and go, whatever was run before; then a second turn of each, which begins with the first."""
    bundle, sessions = served
    policies = tuple(sessions)
    compared = reused = 0

    @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(sharing(policies), st.integers(1, 4), st.none() | st.integers(10, 30))
    def check(script: list[Request], count: int, blocks: int | None) -> None:
        nonlocal compared, reused
        layers = bundle.manifest.plan.num_layers * 3 // 4
        most = None if blocks is None else blocks * layers * 32 * 2 * 2 * 32 * 4
        options = {"slots": count, "kv_cache_bytes": most, "policy": policies[0], "threads": 1}
        with Batch.open(bundle.root, keep_prefixes=True, **options) as batch:
            seen, ran = watched(batch), prompts_run(batch)
            for turn in range(2):
                before = batch._added
                found = decoded(batch, script, logprobs=0)
                numbers = {events[0].row: request for request, events in zip(script, found, strict=True)}
                assert min(numbers) >= before
                for request, events in zip(script, found, strict=True):
                    compared += check_row(sessions[request.policy], request, events)
                    row, taken = events[0].row, events[0].reused
                    assert taken < len(request.prompt)
                    if events[0].token is not None:
                        assert ran[row] == len(request.prompt) - taken
                        reused += taken
                if turn == 0:
                    told = [tokens_of(events, events[0].row) for events in found]
                    turns = [(*one.prompt, *reply, 1, 2) for one, reply in zip(script, told, strict=True)]
                    script = [Request(**{**vars(one), "prompt": turn}) for one, turn in zip(script, turns, strict=True)]
            assert most is None or max(seen) <= most
            check_nothing_leaks(batch)

    check()
    assert compared > 100
    assert reused > 200


# ── what is taken over, token by token ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """4 layers of which one is dropped; K and V of 2 heads of 32 float32."""
    sizes = {"max_batch": 8, "max_seq_len": 256, "max_prompt_len": 240}
    return make_bundle(with_layers(4), tmp_path_factory.mktemp("kept") / "b", targets=TARGETS, **FOUR, **sizes)


def opened(bundle: Bundle, policy: str = "backfill", k: int = 2, slots: int = 4, **options: Any) -> Batch:
    return Batch.open(bundle.root, slots=slots, policy=policy, k=k, threads=1, keep_prefixes=True, **options)


def answered(batch: Batch, prompt: list[int], new_tokens: int = 6, **options: Any) -> tuple[list[int], int]:
    """A row's tokens, and how many of its prompt were not run."""
    row = batch.add(prompt, new_tokens, stop_token_ids=[], **options)
    events: list[Event] = []
    while batch.rows:
        events += batch.tick()
    assert len({event.reused for event in events if event.row == row}) == 1
    return tokens_of(events, row), next(event.reused for event in events if event.row == row)


@pytest.mark.parametrize(
    ("policy", "k", "told", "exact"),
    [
        ("skip", 2, 9, 0),  # LoRA steps come first: nothing behind them is the full model's
        ("skip", 0, 9, 8),  # the last token is not fed
        ("backfill", 2, 9, 6),  # up to the last refresh, every third step
        ("lossless", 2, 9, 8),
    ],
)
def test_what_a_second_turn_takes_over(bundle: Bundle, policy: str, k: int, told: int, exact: int, capsys) -> None:
    with opened(bundle, policy, k) as batch:
        first = text(40)
        reply, reused = answered(batch, first, told)
        assert reused == 0
        turn = [*first, *reply, *text(5, 1)]
        assert answered(batch, turn)[1] == 40 + exact
        assert answered(batch, turn)[1] == len(turn) - 2  # the last one has to give logits, and does not run alone
        assert answered(batch, [*first[:35], *text(9, 2)])[1] == 35
        assert answered(batch, turn, logprobs=0, prompt_logprobs=True)[1] == 0
        check_nothing_leaks(batch)


def test_another_policy_and_k_take_over_a_prompt(bundle: Bundle, capsys) -> None:
    """And a scored prompt leaves its K/V as well, where all of it ran in full."""
    prompt = text(50)
    with opened(bundle, "skip", 3) as batch:
        answered(batch, prompt, 4, logprobs=0, prompt_logprobs=True, context_tokens=20)
        assert answered(batch, prompt, 9)[1] == 20
        for policy, k in (("backfill", 1), ("lossless", 2), ("skip", 0)):
            found, reused = answered(batch, prompt, 9, policy=policy, k=k)
            assert reused == 48
            with Session.open(bundle.root, policy=policy, k=k, threads=1) as session:
                assert found == session.generate([prompt], 9, stop_token_ids=())[0].tolist()


def test_rows_of_one_prompt_run_it_once(bundle: Bundle, capsys) -> None:
    """Those that come together wait for the first, and others overtake them."""
    prompt, other = text(200), text(20, 5)
    with opened(bundle, k=0) as batch:
        ran = prompts_run(batch)
        rows = [batch.add([*prompt, token], 3, stop_token_ids=[]) for token in range(3)]
        overtakes = batch.add(other, 3, stop_token_ids=[])
        events = batch.tick()
        assert [event.row for event in events] == [overtakes]
        assert [row.number for row in batch._rows] == [rows[0], overtakes]
        while batch.rows:
            events += batch.tick()
    assert ran == {rows[0]: 201, rows[1]: 2, rows[2]: 2, overtakes: 20}
    with Session.open(bundle.root, k=0, threads=1) as session:
        for token, row in enumerate(rows):
            wanted = session.generate([[*prompt, token]], 3, stop_token_ids=())[0].tolist()
            assert tokens_of(events, row) == wanted


def test_who_waits_for_a_row_that_is_cancelled_runs_the_rest(bundle: Bundle, capsys) -> None:
    prompt = text(200)
    with opened(bundle, k=0) as batch:
        ran = prompts_run(batch)
        first, second = (batch.add(prompt, 3, stop_token_ids=[]) for _ in range(2))
        batch.tick()
        batch.cancel(first)
        events, _ = ticked_through(batch)
        assert ran == {first: 128, second: 72}
        assert {event.reused for event in events if event.row == second} == {128}


# ── blocks ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_blocks_are_shared_and_the_last_is_copied(bundle: Bundle, capsys) -> None:
    with opened(bundle) as batch:
        answered(batch, text(70), 3)
        (kept,) = batch._prefixes._kept  # type: ignore[union-attr]
        own = [list(blocks) for blocks in kept.place.blocks]
        assert [len(blocks) for blocks in own] == [3, 3]
        batch.add([*text(70)[:66], 1, 2], 20)
        batch.add([*text(70)[:66], 3, 4], 20)
        batch.tick()
        tables = [batch._slots.blocks(slot) for slot in (0, 1)]  # type: ignore[union-attr]
        for number in (0, 1):
            assert tables[0][number][:2] == tables[1][number][:2] == own[number][:2]
            assert len({tables[0][number][2], tables[1][number][2], own[number][2]}) == 3
        assert in_use(batch) == [5, 5]


def test_the_end_of_the_text_that_was_used_least_recently_goes_first(bundle: Bundle, capsys) -> None:
    """Three texts of three blocks fill the memory; then one of two blocks comes, whose prompt is another."""
    with opened(bundle, kv_cache_bytes=bytes_of(9, 9)) as batch:
        texts = [text(90, seed) for seed in range(3)]
        for one in texts:
            answered(batch, one, 2)
        assert in_use(batch) == [9, 9]
        assert answered(batch, [*texts[0][:64], 7, 7], 2)[1] == 64  # used again: its end, and two blocks beside it
        assert in_use(batch) == [9, 9]
        answered(batch, text(40, 9), 2)
        assert in_use(batch) == [9, 9]
        kept = [(len(one.tokens), one.tokens[:30].tolist()) for one in batch._prefixes._kept]  # type: ignore[union-attr]
        assert all((90, one[:30]) in kept for one in (texts[0], texts[2]))
        assert all(count <= 64 or begin != texts[1][:30] for count, begin in kept)
        assert batch.kv_bytes()["allocated"] == bytes_of(9, 9)
        check_nothing_leaks(batch)


def test_shared_blocks_count_once(bundle: Bundle, capsys) -> None:
    """Four rows of 3 blocks, of which two are the same, run at once in the memory of six."""
    prompt = text(64)
    with opened(bundle, kv_cache_bytes=bytes_of(6, 6)) as batch:
        answered(batch, prompt, 2)
        seen = watched(batch)
        for token in range(4):
            batch.add([*prompt, token, 1], 8, stop_token_ids=[])
        assert batch.waiting == 0
        batch.tick()
        assert len(batch._rows) == 4
        ticked_through(batch)
        assert max(seen) == bytes_of(6, 6)
        check_nothing_leaks(batch)


def test_a_part_of_a_block_that_finds_no_room_runs_again(bundle: Bundle, capsys) -> None:
    """The row needs all blocks; what it would copy lies in one of them."""
    with opened(bundle, kv_cache_bytes=bytes_of(3, 3)) as batch:
        first = text(40)
        answered(batch, first, 2)
        assert answered(batch, [*first, 1, 2], 50)[1] == 32
        check_nothing_leaks(batch)


def test_the_block_of_padding_takes_no_room_of_rows(bundle: Bundle) -> None:
    """As in bfloat16, where small calls have one width: a row and what it begins with fill the memory."""
    engine, most = OpenVinoEngine(bundle, threads=1), bytes_of(3, 3)
    engine.pads_tokens = True
    with Batch(bundle, engine, PeriodicSchedule(2), "backfill", keep_prefixes=True, kv_cache_bytes=most) as batch:
        answered(batch, text(40))
        assert in_use(batch) == [3, 3]  # a text of two blocks, and padding
        batch.add([*text(40), 1, 2], 6, stop_token_ids=[])
        (event,) = batch.tick()
        assert event.reused == 40
        assert len(batch._prefixes._kept) == 1  # type: ignore[union-attr]
        assert batch.kv_bytes()["allocated"] == most


INTERRUPTED = [[*text(40), *text(5 * (1 + seed), seed)] for seed in range(4)]


@pytest.fixture(scope="module")
def undisturbed(bundle: Bundle) -> list[list[int]]:
    """What each of these prompts becomes in a session."""
    with Session.open(bundle.root, policy="backfill", k=2, threads=1) as session:
        return [session.generate([prompt], 6, stop_token_ids=())[0].tolist() for prompt in INTERRUPTED]


@pytest.mark.parametrize("place", range(1, 4))
@pytest.mark.parametrize("method", ["admit", "copy_block", "shared", "move", "release"])
def test_interrupts_spoil_nothing(
    bundle: Bundle,
    undisturbed: list[list[int]],
    method: str,
    place: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """Behind the n-th call of what admits rows and takes them out."""
    plain, calls = getattr(PagedSlots, method), 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        found = plain(*arguments)
        if calls == place:
            raise KeyboardInterrupt
        return found

    with opened(bundle, slots=2, kv_cache_bytes=bytes_of(5, 5)) as batch:
        monkeypatch.setattr(PagedSlots, method, interrupted)
        rows = [batch.add(prompt, 6, stop_token_ids=[]) for prompt in INTERRUPTED]
        events, _ = ticked_through(batch)
        monkeypatch.undo()
        ends = {event.row: event.finished for event in events if event.finished}
        assert set(ends) == set(rows)
        for wanted, row in zip(undisturbed, rows, strict=True):
            if ends[row] == "length":
                assert tokens_of(events, row) == wanted
        check_nothing_leaks(batch)


def test_nothing_is_kept_unless_asked_for(bundle: Bundle, capsys) -> None:
    with Batch.open(bundle.root, slots=2, policy="backfill", k=2, threads=1) as batch:
        for _ in range(2):
            assert answered(batch, text(40))[1] == 0
        assert in_use(batch) == [0, 0]


def test_the_batch_says_that_it_keeps_them(bundle: Bundle, capsys) -> None:
    with opened(bundle) as batch:
        assert "K/V grows with the rows, and with prefixes that are kept, to at most" in batch.describe()


def test_what_is_kept_does_not_depend_on_adapters(tmp_path: Path, capsys) -> None:
    """Full steps run no surrogate, whatever LoRA steps have made between them: nothing is void with other adapters."""
    options = FOUR | {"rank": 4, "surrogate": "recurrent", "max_batch": 8}
    adapted = make_adapted_bundle(with_layers(4), tmp_path / "adapted", targets=("openvino",), **options)
    plain = make_bundle(with_layers(4), tmp_path / "plain", targets=("openvino",), **options)
    found, prompt = [], text(60)
    for bundle in (adapted, plain):
        with Batch.open(bundle.root, slots=1, policy="backfill", k=2, threads=1, keep_prefixes=True) as batch:
            tokens, _ = answered(batch, prompt, 1)
            answered(batch, [*prompt, *tokens], 9)
            (kept,) = batch._prefixes._kept  # type: ignore[union-attr]
            begun = zip(batch._engine.pools, kept.place.blocks, strict=True)  # type: ignore[attr-defined]
            found.append([cache[blocks[0]].copy() for pool, blocks in begun for cache in pool.caches.values()])
    for ours, theirs in zip(*found, strict=True):
        assert np.array_equal(ours, theirs)
