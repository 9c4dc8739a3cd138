"""Layers with a sliding window forget what they do not see any more: the same tokens in fewer blocks.

A block that is given back is overwritten, so that nobody reads one that was forgotten too early unnoticed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Batch, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding import batch as batch_module
from lora_drop_runtime.decoding import request as request_module
from lora_drop_runtime.decoding.paged_slots import PagedSlots
from lora_drop_runtime.decoding.request import Request
from lora_drop_runtime.decoding.row_blocks import GONE
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine
from lora_drop_runtime.engines.openvino.pool import BlockPool
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_tools.generate import ChatSettings, GenerateSettings
from lora_drop_tools.inspect import describe
from lora_drop_tools.shared import costs
from transformers import MistralConfig, MistralForCausalLM

from tests.runtime.decoding.test_batch import Request as Asked
from tests.runtime.decoding.test_batch import check_ends, decoded
from tests.support.bundles import make_bundle, traced_family
from tests.support.decoding import assert_refused, padded, ticked_through
from tests.support.models import build, gemma3

from .test_batch import alone, watched
from .test_engine import TARGETS, assert_near
from .test_kept_prefixes import answered, check_nothing_leaks, in_use, sharing, text

pytestmark = pytest.mark.usefixtures("models_stay_compiled", "quick_to_collect")

WINDOW, CHUNK = 40, 16  # tokens
BLOCK = 32 * 2 * 2 * 16 * 4  # bytes of one layer's


def ring(k: int) -> int:
    """Blocks that a row has of a layer with a window."""
    return -(-(WINDOW + k + CHUNK) // 32) + 1


POLICIES = ("backfill", "lossless")
SIZES = {"max_batch": 8, "max_seq_len": 320, "max_prompt_len": 300, "always_first": 0, "always_last": 0}


@pytest.fixture(autouse=True)
def overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has is not what it was; and runs are short, for which a row has blocks beside its window."""
    plain = BlockPool.give_back

    def give_back(pool: BlockPool, blocks: Iterable[int]) -> None:
        numbers = list(blocks)
        plain(pool, numbers)
        for block in numbers:
            if not pool._owners[block]:
                for cache in pool.caches.values():
                    cache[block] = 1e4

    monkeypatch.setattr(BlockPool, "give_back", give_back)
    monkeypatch.setattr(batch_module, "CHUNK", CHUNK)
    monkeypatch.setattr(request_module, "PREFILL_CHUNK", CHUNK)


def made(root: Any, policy: str, dropped: tuple[int, ...]) -> Bundle:
    """Of the layers 0, 2 and 3 with a window, and 1 without."""
    windowed, full = "sliding_attention", "full_attention"
    options = {"num_hidden_layers": 4, "layer_types": [windowed, full, windowed, windowed], "sliding_window": WINDOW}
    options |= {"max_position_embeddings": 320}
    source = traced_family("gemma3.forgets", gemma3(**options), "float32")
    return make_bundle(source, root, targets=TARGETS, drop_layers=dropped, policy=policy, **SIZES)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """By the policy; `skip` drops the layer that has no window."""
    root = tmp_path_factory.mktemp("forgetting")
    bundles = {"skip": made(root / "skip", "skip", (1,)), "fill": made(root / "fill", "fill", (2,))}
    return bundles | dict.fromkeys(POLICIES, made(root / "backfill", "backfill", (2,)))


@pytest.fixture
def engine(bundles: dict[str, Bundle]) -> Iterator[OpenVinoEngine]:
    engine = OpenVinoEngine(bundles["backfill"], threads=1)
    yield engine
    if engine.pools:
        engine.close()


# ── sessions ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("policy", "k"), [("skip", 2), ("fill", 2), ("backfill", 2), ("backfill", 45), ("lossless", 2)]
)
def test_sessions_have_the_same_logits_in_fewer_blocks(bundles: dict[str, Bundle], policy: str, k: int) -> None:
    """Of a ragged batch, bit by bit those of a session that keeps all, and near target ort's; blocks of windowed layers
    stay as many however long the text becomes."""
    prompts, count = padded([text(70), text(3, 1)]), 190
    options = {"policy": policy, "k": k, "threads": 1}
    sessions = [
        Session.open(bundles[policy].root, target=TARGETS[0], forget=forget, **options) for forget in (True, False)
    ]
    sessions.append(Session.open(bundles[policy].root, target="ort", forget=True, **options))
    ours, whole, _ = sessions
    assert ours._engine is not None
    engine, other = ours._engine, whole._engine
    logits = [session.prefill(*prompts, max_new_tokens=count).copy() for session in sessions]
    for step in range(count - 1):
        assert np.array_equal(*logits[:2]), step
        assert_near(logits[0], logits[2], f"step {step}")
        tokens = logits[0].argmax(axis=1)
        logits = [session.step(tokens).copy() for session in sessions]
    groups = dict(zip(engine.table_groups, zip(engine.pools, other.pools, strict=True), strict=True))  # type: ignore[union-attr, attr-defined]
    for (_, window), (pool, all_of_it) in groups.items():
        assert pool.in_use <= 2 * ring(k) if window else pool.in_use == all_of_it.in_use
        assert not window or all_of_it.in_use > 2 * ring(k)
    ends = [session.kv_bytes() for session in sessions]
    layer = 4 * 2 * 2 * 16  # bytes of an entry: K and V of two heads of 16 float32
    forgotten = sum(blocks.count(GONE) for row in ours._running().slots._rows for blocks in row.blocks)  # type: ignore[union-attr]
    assert forgotten > 8
    layers = 3 if policy == "skip" else 2
    gone = {"kept": forgotten * 32 * layers * layer, "dropped": 0}
    if policy != "skip":  # half of those of kept layers, whose pool has two layers
        dropped = sum(row.blocks[-1].count(GONE) for row in ours._running().slots._rows)  # type: ignore[union-attr]
        gone = {"kept": (forgotten - dropped) * 32 * 2 * layer, "dropped": dropped * 32 * layer}
    for name, less in gone.items():
        assert ends[0][name] == ends[1][name] - less
    assert ends[0]["allocated"] < ends[1]["allocated"]
    for session in sessions:
        session.close()


def test_drafts_go_back_no_farther(bundles: dict[str, Bundle]) -> None:
    """`lossless` with as many drafts as there may be, taken from the text and from LoRA steps: the tokens of k = 0."""
    prompt = [*text(20), *text(20), *text(20)]
    for draft in ("lora", "ngram", "both"):
        with Session.open(
            bundles["lossless"].root, policy="lossless", k="auto", draft=draft, forget=True, threads=1
        ) as one:
            found = one.generate([prompt], 150, stop_token_ids=())[0]
            with Session.open(bundles["lossless"].root, policy="lossless", k=0, threads=1) as full:
                assert found.tolist() == full.generate([prompt], 150, stop_token_ids=())[0].tolist()


def test_how_far_a_session_goes_back(engine: OpenVinoEngine) -> None:
    """Just as far as all is there that the layers see; one that keeps all goes back anywhere."""
    bundle, prompt = engine.bundle, text(200)
    with Session(bundle, engine, PeriodicSchedule(2), "backfill", forget=True) as session:
        session.prefill(np.array([prompt]), max_new_tokens=60)
        for token in text(9, 1):
            session.step([token])
        assert_refused(lambda: session.truncate(20), "forgotten", "Row 0 has 209 tokens, of which 20 would stay.")
        tables = session._running().slots._rows[0].blocks  # type: ignore[union-attr]
        first = next(place for place, block in enumerate(tables[1]) if block != GONE)
        least = 32 * first + WINDOW
        assert_refused(lambda: session.truncate(least - 1), "forgotten")
        assert session._running().tokens[0] == [*prompt, *text(9, 1)]  # nothing has happened
        session.truncate(least)
        found = [session.step([token]).copy() for token in text(5, 2)]
    with Session.open(bundle.root, policy="backfill", k=2, threads=1) as session:
        session.prefill(np.array([prompt[:least]]), max_new_tokens=40)
        session.truncate(least)
        for logits, token in zip(found, text(5, 2), strict=True):
            assert_near(logits, session.step([token]))


def test_what_another_request_takes_over(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still there, where it reaches as far as layers see; else nothing, with the same tokens."""
    prompt, taken = text(150), []
    plain = Request.take_over

    def take_over(request: Request, other: Request, row: int, tokens: Any) -> None:
        plain(request, other, row, tokens)
        taken.append(request.kept[row])

    monkeypatch.setattr(Request, "take_over", take_over)
    with (
        Session(engine.bundle, engine, PeriodicSchedule(2), "backfill", forget=True) as session,
        Session.open(engine.bundle.root, policy="backfill", k=2, threads=1) as other,
    ):
        for one in (prompt, [*prompt, *text(9, 1)], [*prompt[:30], *text(40, 2)]):
            found = session.generate([one], 8, reuse_prefix=True, stop_token_ids=())[0]
            assert found.tolist() == other.generate([one], 8, stop_token_ids=())[0].tolist()
    assert taken == [150, 0]


def test_a_fork_has_what_is_there(engine: OpenVinoEngine) -> None:
    """Of blocks that both have none is written to again before the other has forgotten it, too."""
    with Session(engine.bundle, engine, PeriodicSchedule(2), "backfill", forget=True) as session:
        session.prefill(np.array([text(150)]), max_new_tokens=130)
        found = []
        with session.fork() as other:
            for token, others in zip(text(120, 1), text(120, 2), strict=True):
                found.append((session.step([token]).copy(), other.step([others]).copy()))
        assert [pool.in_use for pool in engine.pools][1:] == [ring(2)] * 2
    for number, seed in enumerate((1, 2)):
        with Session.open(engine.bundle.root, policy="backfill", k=2, threads=1) as alone:
            alone.prefill(np.array([text(150)]), max_new_tokens=130)
            for logits, token in zip(found, text(120, seed), strict=True):
                assert np.array_equal(logits[number], alone.step([token]))


# ── batches ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_more_rows_run_at_once(bundles: dict[str, Bundle], capsys) -> None:
    """Rows of 10 blocks of a layer: with four layers' worth of them for one row three others fit beside it."""
    bundle = bundles["backfill"]
    row = (10 + 3 * ring(2)) * BLOCK
    with Batch.open(bundle.root, slots=8, k=2, kv_cache_bytes=3 * row, threads=1) as batch:
        seen = watched(batch)
        numbers = [batch.add(text(100, seed), 205, stop_token_ids=()) for seed in range(4)]
        batch.tick()
        assert [len(batch._rows), batch.waiting] == [3, 1]
        events = []
        while batch.rows:
            events += batch.tick()
        assert in_use(batch) == [0, 0, 0]
    assert max(seen) <= 3 * row < 40 * BLOCK * 4
    with Session.open(bundle.root, k=2, threads=1) as session:
        for seed, number in enumerate(numbers):
            wanted = session.generate([text(100, seed)], 205, stop_token_ids=())[0].tolist()
            assert [event.token for event in events if event.row == number] == wanted


def test_rows_that_share_need_as_much_once_they_have_gone_on(bundles: dict[str, Bundle], capsys) -> None:
    """Four rows begin with the same 96 tokens; there is room for three, of which each will have blocks of its own."""
    bundle, prompt = bundles["backfill"], text(96)
    # 3 blocks of the layer without a window, and of the others the two that tokens behind the prompt see, are common
    own = 6 + 3 * ring(2)
    most = (3 + 3 * 2 + 3 * own + own - 1) * BLOCK
    with Batch.open(bundle.root, slots=8, k=2, kv_cache_bytes=most, keep_prefixes=True, threads=1) as batch:
        answered(batch, prompt)
        seen = watched(batch)
        numbers = [batch.add([*prompt, seed, seed], 190, stop_token_ids=()) for seed in range(4)]
        events = batch.tick()
        assert [len(batch._rows), batch.waiting] == [3, 1]
        while batch.rows:
            events += batch.tick()
        assert most - own * BLOCK < max(seen) <= most
    assert all(event.reused == 96 for event in events if event.row in numbers)
    with Session.open(bundle.root, k=2, threads=1) as session:
        for seed, number in enumerate(numbers):
            wanted = session.generate([[*prompt, seed, seed]], 190, stop_token_ids=())[0].tolist()
            assert [event.token for event in events if event.row == number] == wanted


def test_what_rows_begin_with_counts_as_long_as_they_see_it(bundles: dict[str, Bundle], capsys) -> None:
    """Two rows begin with a prompt each that was run before; a third one, with another, waits for a byte."""
    own = 6 + 3 * ring(2)
    most = (2 * (3 + 3 * 2 + own) + 9 + 3 * ring(2) - 1) * BLOCK
    with Batch.open(
        bundles["backfill"].root, slots=8, k=2, kv_cache_bytes=most, keep_prefixes=True, threads=1
    ) as batch:
        for seed in (0, 1):
            answered(batch, text(96, seed))
        for seed in (0, 1):
            batch.add([*text(96, seed), 7, 7], 190, stop_token_ids=())
        batch.tick()
        batch.add(text(98, 2), 190, stop_token_ids=())
        assert [len(batch._rows), batch.waiting] == [2, 1]


def test_what_a_row_has_is_what_inspect_says(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """At most, and not much less."""
    monkeypatch.setattr(batch_module, "CHUNK", costs.CHUNK)
    bundle, layer = bundles["backfill"], 4 * 2 * 2 * 16
    most = 3 * 32 * 8 * layer  # 8 blocks: 40 + 128 + 32 tokens, which begin anywhere in the first
    said = f"layers with a window have {most / 2**20:.1f} MiB of K/V at most, of {320 * 3 * layer / 2**20:.1f}"
    assert f"openvino forgets: behind 320 tokens {said}" in "\n".join(describe(bundle))
    assert "forgets" not in "\n".join(describe(make_bundle("llama", bundle.root.parent / "no window", targets=TARGETS)))
    with Batch.open(bundle.root, slots=1, k=32, policy="backfill", threads=1) as batch:
        batch.add(text(200), 119, stop_token_ids=())
        while batch.rows:
            batch.tick()
            found = sum(pool.in_use * pool.block_bytes for pool in batch._engine.pools[1:])  # type: ignore[attr-defined]
            assert found <= most
            assert found > most * 3 // 4 or not batch.rows


def test_a_row_in_all_of_the_memory_reads_what_it_took_over(bundles: dict[str, Bundle], capsys) -> None:
    """There is no block to copy the 72nd token's into: the row begins with 64, of which it sees more than of 72."""
    bundle, prompt = bundles["backfill"], text(74)
    with Batch.open(bundle.root, slots=1, k=2, kv_cache_bytes=12 * BLOCK, keep_prefixes=True, threads=1) as batch:
        answered(batch, prompt)
        seen = watched(batch)
        number = batch.add(prompt, 20, stop_token_ids=())
        events, _ = ticked_through(batch)
        assert events[0].reused == 64
        assert max(seen) <= 12 * BLOCK
    with Session.open(bundle.root, k=2, threads=1) as session:
        wanted = session.generate([prompt], 20, stop_token_ids=())[0].tolist()
    assert [event.token for event in events if event.row == number] == wanted


def test_a_row_that_fits_alone_begins_whatever_is_kept(bundles: dict[str, Bundle], capsys) -> None:
    """With what its windows see of a kept prompt it would need more than there is."""
    bundle, prompt = bundles["backfill"], text(96)
    most = (10 + 3 * ring(2)) * BLOCK
    with Batch.open(bundle.root, slots=1, k=2, kv_cache_bytes=most, keep_prefixes=True, threads=1) as batch:
        answered(batch, prompt)
        seen = watched(batch)
        number = batch.add([*prompt, 7, 7], 210, stop_token_ids=())
        assert batch.waiting == 0
        events = batch.tick()
        assert len(batch._rows) == 1
        events += ticked_through(batch)[0]
        assert max(seen) <= most
    with Session.open(bundle.root, k=2, threads=1) as session:
        wanted = session.generate([[*prompt, 7, 7]], 210, stop_token_ids=())[0].tolist()
    assert [event.token for event in events if event.row == number] == wanted


def test_what_is_kept_gives_way_to_a_row_that_goes_on(bundles: dict[str, Bundle], capsys) -> None:
    """A row begins with what another one runs, and is over; the other may not write into what is kept of it."""
    bundle, prompt = bundles["backfill"], text(64)
    most = 2 * (8 + 3 * ring(2)) * BLOCK
    with Batch.open(bundle.root, slots=3, k=2, kv_cache_bytes=most, keep_prefixes=True, threads=1) as batch:
        seen = watched(batch)
        batch.add(prompt, 190, stop_token_ids=())
        for _ in range(6):
            batch.tick()
        batch.add([*prompt, 7, 7], 1, stop_token_ids=())
        for _ in range(4):
            batch.tick()
        batch.add(text(64, 1), 190, stop_token_ids=())
        batch.tick()
        assert len(batch._rows) == 2
        ticked_through(batch)
        assert max(seen) <= most
        check_nothing_leaks(batch)


def test_what_nobody_could_go_on_behind_is_not_kept(bundles: dict[str, Bundle], capsys) -> None:
    """Of a row under `skip` its prompt alone, whose end layers with a window have forgotten."""
    for new_tokens, kept in ((9, [60]), (200, [])):
        most = (10 + 3 * ring(0)) * BLOCK
        options = {"slots": 1, "k": 2, "keep_prefixes": True, "kv_cache_bytes": most, "threads": 1}
        with Batch.open(bundles["skip"].root, **options) as batch:
            batch.add(text(60), new_tokens, stop_token_ids=())
            ticked_through(batch)
            assert batch._prefixes is not None
            assert [len(one.tokens) for one in batch._prefixes._kept] == kept


def test_an_interrupt_as_a_row_moves(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Nothing is taken over from where it was; the next tick goes on."""
    plain, prompt, told = PagedSlots.move, text(64), []

    def move(slots: PagedSlots, *places: int) -> None:
        plain(slots, *places)
        if not told:
            told.append(places)
            raise KeyboardInterrupt

    monkeypatch.setattr(PagedSlots, "move", move)
    options = {"slots": 3, "k": 2, "keep_prefixes": True, "kv_cache_bytes": 2**30, "threads": 1}
    with Batch.open(bundles["backfill"].root, **options) as batch:
        batch.add(text(20, 1), 12, stop_token_ids=())
        numbers = [batch.add(prompt, 40, stop_token_ids=())]
        events = []
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                events += batch.tick()
        numbers.append(batch.add(prompt, 40, stop_token_ids=()))
        assert batch.waiting == 0
        events += ticked_through(batch)[0]
    with Session.open(bundles["backfill"].root, k=2, threads=1) as session:
        wanted = session.generate([prompt], 40, stop_token_ids=())[0].tolist()
    for number in numbers:
        assert [event.token for event in events if event.row == number] == wanted


class Always:
    """A schedule of one's own, whose refreshes come when nobody knows."""

    def kind(self, step: int, last: Any = None) -> Any:
        return PeriodicSchedule(3).kind(step)

    def most_refreshes(self, steps: int) -> int:
        return steps


def test_a_schedule_of_ones_own_forgets_nothing(bundles: dict[str, Bundle], capsys) -> None:
    with Batch.open(bundles["backfill"].root, slots=1, k=2, threads=1) as batch:
        batch.add(text(200), 100, k=Always(), stop_token_ids=())
        for _ in range(90):
            batch.tick()
        assert all(GONE not in blocks for blocks in batch._slots.blocks(0))  # type: ignore[union-attr]


@pytest.mark.parametrize("keep", [False, True])
def test_rows_are_as_alone(bundles: dict[str, Bundle], keep: bool, capsys) -> None:
    """Whenever they come and go, with prompts in common, in little memory, two turns each; and no byte too many."""
    bundle = bundles["backfill"]
    compared = reused = 0
    sessions = {policy: Session.open(bundle.root, policy=policy, threads=1) for policy in POLICIES}

    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(sharing(POLICIES), st.integers(1, 4), st.sampled_from((None, 35, 50, 80)), st.integers(0, 90))
    def check(script: Any, count: int, blocks: int | None, longer: int) -> None:
        nonlocal compared, reused
        script = [type(one)(**{**vars(one), "new_tokens": one.new_tokens + longer}) for one in script]
        most = None if blocks is None else blocks * BLOCK
        options = {"slots": count, "kv_cache_bytes": most, "policy": "backfill", "threads": 1}
        with Batch.open(bundle.root, keep_prefixes=keep, **options) as batch:
            seen = watched(batch)
            for turn in range(2):
                found = decoded(batch, script)
                for request, events in zip(script, found, strict=True):
                    tokens, (wanted, near) = check_ends(request, events), alone(sessions[request.policy], request)
                    sure = len(wanted) if near is None else near
                    assert tokens[:sure] == wanted[: len(tokens)][:sure]
                    compared += len(tokens[:sure])
                    reused += events[0].reused
                turns = [(*one.prompt, *[e.token for e in events if e.token is not None], 1, 2)[:290]
                         for one, events in zip(script, found, strict=True)]  # fmt: skip
                script = [type(one)(**{**vars(one), "prompt": turn, "new_tokens": min(one.new_tokens, 300 - len(turn))})
                          for one, turn in zip(script, turns, strict=True)]  # fmt: skip
            assert most is None or max(seen) <= most
            if keep:
                check_nothing_leaks(batch)
            assert in_use(batch) == [0, 0, 0]

    check()
    for session in sessions.values():
        session.close()
    assert compared > 400
    assert (reused > 200) == keep


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of layers that all have a window."""
    own = {"num_hidden_layers": 4, "sliding_window": WINDOW, "max_position_embeddings": 320}
    model = build(MistralForCausalLM, MistralConfig, seed=11, **own)
    source = traced_family("mistral.forgets", model, "float32")
    root = tmp_path_factory.mktemp("windowed") / "b"
    return make_bundle(source, root, targets=TARGETS, drop_layers=(1, 3), policy="backfill", **SIZES)


@pytest.mark.parametrize("seed", range(7, 11))
def test_long_rows_in_little_memory(windowed: Bundle, seed: int, capsys) -> None:
    """Chats that go on, with beginnings in common, some of them cancelled: tokens as alone, and no byte too many."""
    random, texts = Random(seed), [text(280, 1), [*text(100, 1), *text(180, 2)]]
    with Batch.open(windowed.root, slots=1, threads=1) as batch:
        blocks = sum(pool.block_bytes for pool in batch._engine.pools)  # type: ignore[attr-defined]
        most = batch.row_bytes + random.choice((0, 1, 3, 6, 12)) * blocks
    asked, found = dict[int, tuple[list[int], int, int]](), dict[int, list[int]]()
    options = {"slots": random.choice((2, 3, 5)), "kv_cache_bytes": most, "policy": "backfill", "threads": 1}
    with Batch.open(windowed.root, keep_prefixes=True, **options) as batch:
        seen = watched(batch)

        def tick() -> None:
            for event in batch.tick():
                found[event.row] += [] if event.token is None else [event.token]
                if event.finished == "length":
                    texts.append([*asked[event.row][0], *found[event.row]])

        for _ in range(8):
            for _ in range(random.choice((1, 2, 4))):
                begin, count, k = random.choice(texts), random.choice((1, 5, 20, 120)), random.choice((0, 1, 3, 30))
                begin = begin[: random.choice((len(begin), random.randint(1, len(begin)), 96))]
                prompt = [*begin, *text(random.choice((1, 9, 40)), random.randint(5, 9))][: 300 - count]
                number = batch.add(prompt, count, k=k, stop_token_ids=())
                asked[number], found[number] = (prompt, count, k), []
            for _ in range(random.choice((3, 60, 200))):
                tick()
            batch.cancel(random.choice([*asked]))
        while batch.rows:
            tick()
    assert max(seen) <= most
    with Session.open(windowed.root, policy="backfill", threads=1) as session:
        for number, (prompt, count, k) in asked.items():
            one = Asked(tuple(prompt), count, k, "backfill", adaptive=False, temperature=0.0, seed=0, arrives=0)
            wanted, near = alone(session, one)
            sure = len(wanted) if near is None else near
            assert found[number][:sure] == wanted[: len(found[number])][:sure]


def test_commands(bundles: dict[str, Bundle]) -> None:
    """`generate` forgets; `chat` keeps what its next turn begins with."""
    for command, forgets in ((GenerateSettings(threads=1), True), (ChatSettings(threads=1), False)):
        with command.open(bundles["backfill"].root) as session:
            session.prefill(np.array([text(200)]), max_new_tokens=60)
            for token in text(50, 1):
                session.step([token])
            blocks = session._running().slots._rows[0].blocks  # type: ignore[union-attr]
            assert (GONE in blocks[1]) == forgets
