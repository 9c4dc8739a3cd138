"""Batches on target openvino: each row's tokens are its own, and K/V never take more than they may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Batch, Event, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.paged_slots import PagedSlots
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine
from lora_drop_runtime.errors import InputError

from tests.runtime.decoding.test_batch import Request, check_ends, decoded, requests
from tests.support.bundles import make_bundle, traced_family
from tests.support.decoding import assert_refused, padded, ticked_through
from tests.support.models import FAMILIES

from .test_engine import FOUR, NEAR, TARGETS, VOCAB, assert_near, with_layers

pytestmark = pytest.mark.usefixtures("models_stay_compiled")


def alone(session: Session, request: Request) -> tuple[list[int], int | None]:
    """The tokens of a row in a session of its own; and the place of the first that is a near-tie there: its two best
    logits within NEAR of the largest |logit|."""
    k = 0 if request.policy == "lossless" else request.k
    logits = session.prefill(np.array([request.prompt]), max_new_tokens=request.new_tokens, k=k)
    tokens: list[int] = []
    near = None
    while True:
        second, first = np.sort(logits[0])[-2:]
        if near is None and first - second < NEAR * np.abs(logits).max():
            near = len(tokens)
        token = int(logits[0].argmax())
        if token in request.stops:
            return tokens, near
        tokens.append(token)
        if len(tokens) == request.new_tokens:
            return tokens, near
        logits = session.step([token])


def greedy(request: Request) -> Request:
    return Request(**{**vars(request), "temperature": 0.0, "counted": False, "adaptive": False})


@pytest.mark.parametrize("join_early", [False, True])
def test_tokens_are_those_of_each_row_alone(
    served: tuple[Bundle, dict[str, Session]], join_early: bool, capsys
) -> None:
    """Whenever rows come and go, whatever k, policy and drafts the others have; up to a row's first near-tie.

    A row that joined early has a first cycle of another length; only its lossless ones are those of a row alone.
    """
    bundle, sessions = served
    policies = tuple(sessions)
    if join_early:
        policies = tuple(policy for policy in policies if policy == "lossless") or policies
    compared = cut_short = 0

    @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(requests(VOCAB, 40, policies), min_size=2, max_size=8).map(lambda s: [*map(greedy, s)]),
           st.integers(1, 4))  # fmt: skip
    def check(script: list[Request], count: int) -> None:
        nonlocal compared, cut_short
        if join_early and "fill" in policies:
            script = [Request(**{**vars(one), "k": 0}) for one in script]
        with Batch.open(bundle.root, slots=count, policy=policies[0], join_early=join_early, threads=1) as batch:
            found = decoded(batch, script, patient=not join_early)
            assert [pool.in_use for pool in batch._engine.pools] == [0, 0]
        for request, events in zip(script, found, strict=True):
            tokens, (wanted, near) = check_ends(request, events), alone(sessions[request.policy], request)
            sure = len(wanted) if near is None else near
            assert tokens[:sure] == wanted[: min(sure, len(tokens))], f"{request}: {tokens}, alone {wanted}"
            assert near is not None or request.cancel is not None or tokens == wanted
            compared += min(sure, len(tokens))
            cut_short += sure < len(wanted)

    check()
    assert compared > 60
    assert cut_short <= 6, "near-ties are rare in these models"  # of about 20 rows; which ones, Hypothesis draws


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # the second has attention in plain operators
def test_a_row_of_no_numbers_spoils_no_other(name: str, tmp_path: Path) -> None:
    """Neither while it runs, nor where its blocks are another row's later. Target ort has caches for each row."""
    bad, clean, beside = 9, list(range(10, 50)), list(range(60, 75))
    model = FAMILIES[name]()
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    bundle = make_bundle(traced_family(name, model, "float32"), tmp_path / "b", targets=TARGETS)
    steps = np.array([[43 + n, 55 + n] for n in range(4)])

    def logits(session: Session, first: list[int]) -> np.ndarray:
        found = [session.prefill(*padded([first, beside]), max_new_tokens=5, k=1).copy()]
        found += [session.step(column).copy() for column in steps]
        return np.delete(found, bad, axis=2)  # Gemma's head is the embedding

    ours, theirs = (Session.open(bundle.root, target=target, threads=1) for target in TARGETS)
    with ours, theirs:
        wanted = logits(theirs, clean)
        spoilt = logits(ours, [bad] * len(clean))
        assert np.isnan(spoilt[:, 0]).all()
        for step, found in enumerate(spoilt):
            assert_near(found[1:], wanted[step, 1:], f"beside it, step {step}")
        for step, found in enumerate(logits(ours, clean)):
            assert_near(found, wanted[step], f"after it, step {step}")


# ── the most bytes of K/V ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """4 layers of which one is dropped; K and V of 2 heads of 32 float32."""
    return make_bundle(with_layers(4), tmp_path_factory.mktemp("bytes") / "b", targets=TARGETS, max_batch=8, **FOUR)


BLOCK_BYTES = 32 * 2 * 2 * 32 * 4  # of one layer
KEPT, DROPPED = 3, 1


def bytes_of(kept: int, dropped: int) -> int:
    """Of so many blocks of kept and of dropped layers."""
    return (kept * KEPT + dropped * DROPPED) * BLOCK_BYTES


def watched(batch: Batch) -> list[int]:
    """The bytes in use after each time that blocks were taken."""
    pools, found = batch._engine.pools, []

    def watch(take: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
        def taken(count: int) -> list[int]:
            blocks = take(count)
            found.append(sum(pool.in_use * pool.block_bytes for pool in pools))
            return blocks

        return taken

    for pool in pools:
        pool.take = watch(pool.take)
    return found


def test_rows_wait_until_their_blocks_are_free(bundle: Bundle, capsys) -> None:
    """Each needs two blocks of kept layers and two of dropped ones: two rows run at a time, though there are four
    slots."""
    row = bytes_of(2, 2)
    prompts = [list(range(start, start + 40)) for start in range(5)]
    options = {"policy": "backfill", "k": 2, "threads": 1}
    with Batch.open(bundle.root, slots=4, kv_cache_bytes=2 * row + row - 1, **options) as batch:
        assert f"at most {(3 * row - 1) / 2**20:,.1f} MiB" in batch.describe()
        seen = watched(batch)
        numbers = [batch.add(prompt, 10, stop_token_ids=[]) for prompt in prompts]
        first: dict[int, int] = {}
        events: list[Event] = []
        tick = 0
        assert batch.row_bytes == bytes_of(4, 4)
        while batch.rows:
            waiting = batch.waiting
            assert waiting == max(0, len(batch._rows) + len(batch._waiting) - 2)  # of the tick that comes
            assert len(batch._rows) <= 2
            assert batch.kv_bytes()["allocated"] <= 2 * row
            for event in batch.tick():
                events.append(event)
                first.setdefault(event.row, tick)
            assert len(batch._waiting) == waiting
            tick += 1
    assert max(seen) == 2 * row
    assert list(first) == numbers  # in the order in which they came
    assert first[0] == first[1] < first[2] == first[3] < first[4]
    with Session.open(bundle.root, target="ort", **options) as session:
        for number, prompt in zip(numbers, prompts, strict=True):
            wanted = session.generate([prompt], 10, stop_token_ids=())[0].tolist()
            assert [event.token for event in events if event.row == number] == wanted


def test_a_cancelled_row_makes_room(bundle: Bundle, capsys) -> None:
    with Batch.open(bundle.root, slots=4, kv_cache_bytes=bytes_of(2, 2), policy="backfill", threads=1) as batch:
        numbers = [batch.add(list(range(40)), 10, stop_token_ids=[]) for _ in range(2)]
        for _ in range(3):
            assert {event.row for event in batch.tick()} == {numbers[0]}
        batch.cancel(numbers[0])
        told = [(event.row, event.finished) for event in batch.tick()]
        assert told == [(numbers[0], "cancelled"), (numbers[1], None)]


def test_a_row_that_moved_before_an_interrupt_goes_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It has taken the slot of one that is over when Ctrl-C comes, and the batch does not know so yet."""
    move = PagedSlots.move

    def interrupted(slots: PagedSlots, *where: int) -> None:
        monkeypatch.setattr(PagedSlots, "move", move)
        move(slots, *where)
        raise KeyboardInterrupt

    monkeypatch.setattr(PagedSlots, "move", interrupted)
    options = {"policy": "backfill", "k": 2, "threads": 1}
    with Batch.open(bundle.root, slots=2, **options) as batch:
        batch.add([1, 2], 2, stop_token_ids=[])
        stays = batch.add([3, 4, 5], 9, stop_token_ids=[])
        events, interrupts = ticked_through(batch)
        assert interrupts == 1
        assert [pool.in_use for pool in batch._engine.pools] == [0, 0]
    with Session.open(bundle.root, target="ort", **options) as session:
        wanted = session.generate([[3, 4, 5]], 9, stop_token_ids=())[0].tolist()
    assert [event.token for event in events if event.row == stays] == wanted


def test_a_row_that_gets_only_some_of_its_blocks_gives_them_back(bundle: Bundle, capsys) -> None:
    """Memory is out for those of dropped layers; the error is held, as an interpreter holds the latest."""
    with Batch.open(bundle.root, slots=2, policy="backfill", k=2, threads=1) as batch:
        pools = batch._engine.pools
        take, calls = pools[1].take, 0

        def refused(count: int) -> list[int]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise MemoryError
            return take(count)

        pools[1].take = refused
        batch.add([1, 2], 3, stop_token_ids=[])
        with pytest.raises(MemoryError):
            batch.tick()
        assert [pool.in_use for pool in pools] == [0, 0]
        assert sum(event.token is not None for _ in range(3) for event in batch.tick()) == 3
        assert [pool.in_use for pool in pools] == [0, 0]


def test_an_interrupt_as_blocks_are_given_back_keeps_none(bundle: Bundle, capsys) -> None:
    with Batch.open(bundle.root, slots=2, policy="backfill", k=2, threads=1) as batch:
        pools = batch._engine.pools
        give_back, calls = pools[0].give_back, 0

        def interrupted(blocks: list[int]) -> None:
            nonlocal calls
            calls += 1
            give_back(blocks)
            if calls == 1:
                raise KeyboardInterrupt

        pools[0].give_back = interrupted
        row = batch.add(list(range(40)), 30, stop_token_ids=[])
        batch.tick()
        with pytest.raises(KeyboardInterrupt):
            batch.cancel(row)
        while batch.rows:
            batch.tick()
        assert [pool.in_use for pool in pools] == [0, 0]


@settings(max_examples=7, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(requests(VOCAB, 70, ("skip", "backfill", "lossless")), min_size=2, max_size=8),
    st.integers(bytes_of(3, 3), bytes_of(9, 9)),
    st.booleans(),
)
def test_never_more_than_the_limit(bundle: Bundle, script: list[Request], most: int, join_early: bool) -> None:
    """Whatever rows come, and all of them end."""
    engine = OpenVinoEngine(bundle, threads=1)
    batch = Batch(bundle, engine, 2, "skip", slots=4, kv_cache_bytes=most, join_early=join_early)
    seen = watched(batch)
    for request, events in zip(script, decoded(batch, script, patient=False), strict=True):
        check_ends(request, events)
    assert max(seen, default=0) <= most
    assert batch.kv_bytes() == {"kept": 0, "dropped": 0, "allocated": 0}
    assert [pool.in_use for pool in engine.pools] == [0, 0]
    batch.close()


def test_a_row_that_can_never_fit_is_refused(bundle: Bundle, capsys) -> None:
    """40 + 69 slots are four blocks; dropped layers have as many, or with holes 40 + 23 slots in two."""
    most = bytes_of(4, 2)
    with Batch.open(bundle.root, slots=4, kv_cache_bytes=most, policy="skip", k=2, threads=1) as batch:
        prompt = list(range(40))
        words = "can never fit", str(bytes_of(4, 4)), str(most)
        assert_refused(lambda: batch.add(prompt, 70, policy="backfill"), *words)
        assert_refused(lambda: batch.add(prompt, 70, k=0), *words)
        assert batch.rows == 0
        batch.add(prompt, 70, stop_token_ids=[])
        tokens = 0
        while batch.rows:
            tokens += sum(event.token is not None for event in batch.tick())
        assert tokens == 70


def test_caches_of_less_than_a_block_are_refused(bundle: Bundle) -> None:
    block, row = bytes_of(1, 1), bytes_of(2, 2)
    call = lambda most: Batch.open(bundle.root, max_seq_len=64, kv_cache_bytes=most, threads=1)  # noqa: E731
    said = f"kv_cache_bytes is {block - 1}; a block of all layers takes {block}, and a row up to {row}."
    assert_refused(lambda: call(block - 1), "no room for a block", said)
    with call(block) as batch:
        assert batch.row_bytes == row


@pytest.mark.parametrize("wrong", [0, -1])
def test_sizes_out_of_range(bundle: Bundle, wrong: int) -> None:
    call = lambda: Batch.open(bundle.root, kv_cache_bytes=wrong, threads=1)  # noqa: E731
    assert_refused(call, "The size of the K/V caches is out of range.", str(wrong), "above 0")


@pytest.mark.parametrize("wrong", [1.5, "x", True, np.array([1]), [1]], ids=str)
def test_sizes_that_are_no_numbers(bundle: Bundle, wrong: Any) -> None:
    assert_refused(lambda: Batch.open(bundle.root, kv_cache_bytes=wrong, threads=1), "The size of the K/V caches")


def test_threads_of_any_kind_of_number(bundle: Bundle) -> None:
    for threads in (np.array(1), np.int64(1)):
        with Batch.open(bundle.root, slots=1, threads=threads) as batch:
            batch.add([5, 6], 3)
            assert len(ticked_through(batch)[0]) == 3


def test_caches_that_are_not_paged_have_no_size(bundle: Bundle) -> None:
    call = lambda: Batch.open(bundle.root, kv_cache_bytes=2**20, target="ort", threads=1)  # noqa: E731
    assert_refused(call, "The target's caches are allocated in advance.", str(2**20), "openvino")


def test_what_all_slots_can_need_is_what_is_said(bundle: Bundle, capsys) -> None:
    """Without a limit: rows of other policies than the batch's may have more in their dropped layers."""
    with Batch.open(bundle.root, slots=2, max_prompt_len=8, policy="skip", k=3, threads=1) as batch:
        said = float(batch.describe().partition("at most ")[2].split(" ")[0].replace(",", ""))
        seen = watched(batch)
        for _ in range(2):
            batch.add([7], 127, policy="backfill", stop_token_ids=[])
        batch.tick()
    assert max(seen) == bytes_of(4 + 4, 4 + 4)
    assert said == round(max(seen) / 2**20, 1)


def test_a_row_that_joins_early_has_no_more_dropped_entries_than_kept_ones(bundle: Bundle, capsys) -> None:
    """Room for a refresh that comes sooner is none where every step is a refresh."""
    for target in TARGETS:
        options = {"policy": "skip", "k": 0, "join_early": True, "target": target, "threads": 1}
        with Batch.open(bundle.root, slots=1, max_seq_len=33, **options) as batch:
            batch.add([7], 32, stop_token_ids=[])
            assert batch._waiting[0].options.slots == {"slots_kept": 32, "slots_dropped": 32}


def test_refused_rows_leave_nothing(bundle: Bundle, capsys) -> None:
    with Batch.open(bundle.root, slots=2, policy="skip", threads=1) as batch:
        with pytest.raises(InputError):
            batch.add([1], 500)
        assert batch.tick() == []
        assert [pool.in_use for pool in batch._engine.pools] == [0, 0]
