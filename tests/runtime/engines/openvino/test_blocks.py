"""Blocks of cache slots: the pool against a plain model of it, and what forks, prefixes and truncations share."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.openvino import pool as module
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine, Steps
from lora_drop_runtime.engines.openvino.pool import BlockPool
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

from tests.support.bundles import first_layers, make_bundle
from tests.support.decoding import padded
from tests.support.models import GEMMA2_WINDOW

from .test_engine import FOUR, MINUTES, MODEL, TARGETS, VOCAB, assert_near, both, follow, with_layers

pytestmark = pytest.mark.usefixtures("models_stay_compiled", "quick_to_collect")

SHAPES = {"key_cache.3": (2, 4, 3), "value_cache.3": (2, 4, 5)}

# ── the pool ───────────────────────────────────────────────────────────────────────────────────────────────────


class Rows:
    """What the pool should hold: each row's blocks, and what each row has written into them."""

    def __init__(self) -> None:
        self.pool = BlockPool(SHAPES, np.float32, threading.RLock())
        self.blocks: list[list[int]] = []
        self.values: list[list[float]] = []
        self._written = 0.0

    def _write(self, block: int) -> float:
        self._written += 1
        self.pool.will_write([block])
        for cache in self.pool.caches.values():
            cache[block] = self._written
        return self._written

    def begin(self, count: int) -> None:
        before, version = dict(self.pool.caches), self.pool.version
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        for own in self.blocks:
            assert not set(taken) & set(own)
        is_same = all(self.pool.caches[name] is cache for name, cache in before.items())
        assert is_same == (self.pool.version == version)
        self.blocks.append(taken)
        self.values.append([self._write(block) for block in taken])

    def branch(self, row: int, count: int) -> None:
        """Another row begins with some of a row's blocks."""
        self.pool.share(self.blocks[row][:count])
        self.blocks.append(self.blocks[row][:count])
        self.values.append(self.values[row][:count])

    def write(self, row: int, place: int) -> None:
        """As a step writes: into a block of one's own, which has what was in the shared one."""
        block = self.blocks[row][place]
        if self.pool.is_shared(block):
            (new,) = self.pool.take(1)
            self.pool.copy(block, new)
            for cache in self.pool.caches.values():
                assert (cache[new] == self.values[row][place]).all()
            self.pool.give_back([block])
            self.blocks[row][place] = new
        self.values[row][place] = self._write(self.blocks[row][place])

    def end(self, row: int) -> None:
        self.pool.give_back(self.blocks.pop(row))
        del self.values[row]

    def check(self) -> None:
        owners = Counter(block for own in self.blocks for block in own)
        assert self.pool.in_use == len(owners)
        for name, shape in SHAPES.items():
            assert self.pool.caches[name].shape[1:] == shape
            assert self.pool.caches[name].dtype == np.float32
        for own, values in zip(self.blocks, self.values, strict=True):
            for block, value in zip(own, values, strict=True):
                assert self.pool.is_shared(block) == (owners[block] > 1)
                for cache in self.pool.caches.values():
                    assert (cache[block] == value).all()


ACTS = st.lists(
    st.tuples(st.sampled_from(("begin", "branch", "write", "end")), st.integers(0, 20), st.integers(0, 12)),
    max_size=40,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ACTS)
def test_the_pool_is_that_of_a_plain_model(acts: list[tuple[str, int, int]]) -> None:
    """Nothing is taken twice, what a row wrote stays its own while the pool grows, and all is given back."""
    rows = Rows()
    for act, first, second in acts:
        row = first % len(rows.blocks) if rows.blocks else None
        if act == "begin":
            rows.begin(second)
        elif row is not None and act == "branch":
            rows.branch(row, second % (len(rows.blocks[row]) + 1))
        elif row is not None and act == "write" and rows.blocks[row]:
            rows.write(row, second % len(rows.blocks[row]))
        elif row is not None and act == "end":
            rows.end(row)
        rows.check()
    while rows.blocks:
        rows.end(0)
    rows.check()
    assert rows.pool.in_use == 0
    size = len(rows.pool.caches["key_cache.3"])
    assert sorted(rows.pool.take(size)) == list(range(size))  # all of them are there again
    assert len(rows.pool.caches["key_cache.3"]) == size


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("place", range(1, 5))
def test_a_pool_that_does_not_come_to_grow_goes_on(
    place: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or a lack of memory comes at the n-th cache of two layers. What calls have bound is bound again where it
    has gone."""
    rows, calls, plain = Rows(), 0, module._untouched
    more = {"key_cache.4": (2, 4, 3), "value_cache.4": (2, 4, 5)}
    rows.pool = BlockPool(SHAPES | more, np.float32, threading.RLock())
    rows.begin(3)
    bound, version = dict(rows.pool.caches), rows.pool.version

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == place:
            raise error
        return plain(*arguments)

    monkeypatch.setattr(module, "_untouched", fails)
    with pytest.raises(error):
        rows.pool.take(30)
    for layer in (3, 4):
        key, value = (rows.pool.caches[f"{kind}_cache.{layer}"] for kind in ("key", "value"))
        assert len(key) == len(value)
    assert rows.pool.caches.keys() == bound.keys()
    is_same = all(rows.pool.caches[name] is cache for name, cache in bound.items())
    assert is_same or rows.pool.version != version
    rows.check()
    rows.write(0, 1)
    rows.begin(40)
    rows.check()


def test_what_was_copied_stays_while_the_pool_grows() -> None:
    """Before a step has written beside it: a row that begins with another's entries, and one more that comes."""
    rows = Rows()
    rows.begin(1)
    (new,) = rows.pool.take(1)
    rows.pool.copy(rows.blocks[0][0], new)
    before = len(rows.pool.caches["key_cache.3"])
    rows.begin(before)
    assert len(rows.pool.caches["key_cache.3"]) > before
    assert all((cache[new] == rows.values[0][0]).all() for cache in rows.pool.caches.values())


def test_bytes_of_a_block() -> None:
    """Of both caches of all layers."""
    for dtype, size in ((np.float32, 4), (np.uint16, 2), (np.uint8, 1)):
        pool = BlockPool(SHAPES, dtype, threading.RLock())
        assert pool.block_bytes == (2 * 4 * 3 + 2 * 4 * 5) * size


def test_a_pool_of_no_layers_gives_blocks_all_the_same() -> None:
    """A plan may drop all layers, or none."""
    pool = BlockPool({}, np.float32, threading.RLock())
    assert len(set(pool.take(3) + pool.take(2))) == 5
    assert (pool.in_use, pool.block_bytes) == (5, 0)


def test_too_little_memory_is_said_to_be_that_and_the_pool_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BlockPool(SHAPES, np.float32, threading.RLock())
    taken = pool.take(2)
    with monkeypatch.context() as patch:

        def refused(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        patch.setattr("mmap.mmap", refused)
        with pytest.raises(MemoryError, match="bytes of K/V: Cannot allocate memory"):
            pool.take(3)
    assert pool.in_use == 2
    assert not {*taken} & {*pool.take(3)}


def test_what_nobody_has_written_takes_no_memory() -> None:
    """Rows reserve 64 blocks of a MiB each and write one; the pool grows with each row, and copies that one alone."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pool = BlockPool({"key_cache.0": (1 << 18,)}, np.float32, threading.RLock())
    before = resident()
    for row in range(8):
        taken = pool.take(64)
        pool.will_write(taken[:1])
        pool.caches["key_cache.0"][taken[0]] = row + 1
    cache = pool.caches["key_cache.0"]
    assert len(cache) >= 512
    written = [64 * row for row in range(8)]
    assert [cache[block, -1] for block in written] == list(range(1, 9))
    assert resident() - before < 32 << 20
    pool.give_back(written)
    pool.take(1 + len(cache))  # no block of a row is written now
    assert not pool.caches["key_cache.0"][written].any()


def test_threads_take_and_give_back() -> None:
    """No block is in two threads at once, and all are free at the end."""
    pool = BlockPool(SHAPES, np.float32, threading.RLock())
    wrong: list[int] = []

    def work(number: float) -> None:
        for turn in range(60):
            taken = pool.take(1 + turn % 5)
            pool.will_write(taken)
            with pool._lock:
                for block in taken:
                    pool.caches["key_cache.3"][block] = number
            pool.share(taken)
            pool.give_back(taken)
            with pool._lock:
                wrong.extend(block for block in taken if not (pool.caches["key_cache.3"][block] == number).all())
            pool.give_back(taken)

    workers = [threading.Thread(target=work, args=(number,)) for number in (1.0, 2.0, 3.0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(MINUTES)
    assert not wrong
    assert pool.in_use == 0


# ── rows of sessions ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = FOUR | {"surrogate": "recurrent", "rank": 2, "max_batch": 8}
    return make_bundle(with_layers(4), tmp_path_factory.mktemp("blocks") / "b", targets=TARGETS, **options)


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[OpenVinoEngine]:
    engine = OpenVinoEngine(bundle, threads=1)
    yield engine
    if engine.pools:  # a fork's last session may have closed it
        engine.close()


def opened(engine: OpenVinoEngine, policy: str = "skip", k: int = 2) -> Session:
    return Session(engine.bundle, engine, PeriodicSchedule(k), policy)


def in_use(engine: OpenVinoEngine) -> list[int]:
    """Blocks of kept and of dropped layers."""
    return [pool.in_use for pool in engine.pools]


def table(session: Session, group: int = 0, row: int = 0) -> list[int]:
    return session._running().slots._rows[row].blocks[group]


def contents(engine: OpenVinoEngine, session: Session) -> list[np.ndarray]:
    """What is in all blocks of the first row."""
    found = []
    for group, pool in enumerate(engine.pools):
        found += [cache[table(session, group)].copy() for cache in pool.caches.values()]
    return found


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def reference(bundle: Bundle, policy: str, k: int = 2) -> Any:
    return Session.open(bundle.root, target="ort", policy=policy, k=k, threads=1)


def interrupted(steps: Steps) -> None:
    raise KeyboardInterrupt


def test_blocks_are_given_back_when_a_session_goes(engine: OpenVinoEngine) -> None:
    """When its request is over, when it is closed, and when nobody holds it any more."""
    session = opened(engine)
    session.prefill(*padded([text(40), text(3)]), max_new_tokens=30)
    # Two rows of 40 + 29 kept slots, and of 40 prompt tokens and 9 refreshes
    assert in_use(engine) == [2 * 3, 2 * 2]
    session.prefill(np.array([text(3)]), max_new_tokens=2)
    assert in_use(engine) == [1, 1]
    session.fork()
    gc.collect()
    assert in_use(engine) == [1, 1]
    session.own_ring = session  # only the garbage collector finds it
    del session
    gc.collect()
    assert in_use(engine) == [0, 0]
    other = opened(engine)
    stream = other.stream(text(5), 20, stop_token_ids=())
    next(stream)
    assert in_use(engine) == [1, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.prefill(np.array([text(50)]))
    del stream
    gc.collect()
    assert in_use(engine) == [0, 0]


def test_an_interrupt_within_a_copy_leaks_no_block(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(engine)
    session.prefill(np.array([text(40)]), max_new_tokens=5)
    fork = session.fork()
    plain = BlockPool.copy

    def copied(*arguments: Any) -> None:
        plain(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockPool, "copy", copied)
    with pytest.raises(KeyboardInterrupt):
        fork.step([1])
    monkeypatch.undo()
    assert_near(fork.step([1]), session.step([1]))
    del fork, session
    gc.collect()
    assert in_use(engine) == [0, 0]


@pytest.mark.parametrize("policy", ["skip", "backfill", "lossless"])
def test_a_fork_copies_a_block_when_one_writes_into_it(engine: OpenVinoEngine, policy: str) -> None:
    """50 tokens are one full block and one that is not; 70 more fit into four blocks."""
    session = opened(engine, policy)
    session.prefill(np.array([text(50)]), max_new_tokens=70)
    needed = [len(table(session, group)) for group in (0, 1)]
    # 50 + 69 kept slots; dropped ones as many, or with holes 50 + 23
    assert needed == [4, 3 if policy == "skip" else 4]
    assert in_use(engine) == needed
    fork = session.fork()
    rest = [count - 2 for count in needed]  # the fork's own: what neither has written yet
    assert in_use(engine) == [count + more for count, more in zip(needed, rest, strict=True)]
    assert table(fork)[:2] == table(session)[:2]
    assert not set(table(fork)[2:]) & set(table(session)[2:])
    begun, before = in_use(engine), contents(engine, session)
    fork.step([5])
    # A LoRA step writes into kept layers alone; under lossless a single step is a refresh
    writes_dropped = policy == "lossless"
    assert in_use(engine) == [begun[0] + 1, begun[1] + int(writes_dropped)]
    assert table(fork)[0] == table(session)[0]
    assert table(fork)[1] != table(session)[1]
    assert (table(fork, 1)[1] != table(session, 1)[1]) == writes_dropped
    for ours, theirs in zip(contents(engine, session), before, strict=True):
        assert np.array_equal(ours, theirs)
    session.step([6])  # nobody else has its block now
    assert in_use(engine) == [begun[0] + 1, begun[1] + int(writes_dropped)]
    for token in range(7, 20):
        for one in (session, fork):
            one.step([token])
    assert in_use(engine) == [begun[0] + 1, begun[1] + 1]
    assert table(fork)[0] == table(session)[0]
    session.close()
    fork.step([1])
    assert in_use(engine) == needed
    fork.close()


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_forks_go_on_as_sessions_that_ran_alone(bundle: Bundle, policy: str) -> None:
    """Three of them, also a fork of a fork, step by step in turn; rows have different lengths."""
    prompts = [text(31, 1), text(64, 2), text(1, 3)]
    columns = {name: np.array(text(36, seed)).reshape(12, 3) for name, seed in (("a", 4), ("b", 5), ("c", 6))}
    common = np.array(text(12, 7)).reshape(4, 3)
    ours = {"a": Session.open(bundle.root, policy=policy, k=2, threads=1)}
    theirs = {name: reference(bundle, policy) for name in columns}
    for session in (*ours.values(), *theirs.values()):
        session.prefill(*padded(prompts), max_new_tokens=30)
        for column in common:
            session.step(column)
    ours["b"] = ours["a"].fork()
    for step in range(12):
        if step == 3:
            ours["c"] = ours["b"].fork()
            theirs["c"] = theirs["b"].fork()
        for name, session in ours.items():
            column = columns[name][step]
            assert_near(session.step(column), theirs[name].step(column), f"{name}, step {step}")
    for session in (*ours.values(), *theirs.values()):
        session.close()


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_a_request_shares_the_blocks_of_the_one_before(engine: OpenVinoEngine, policy: str) -> None:
    """Full blocks of the common prefix stay where they are; the last one, in which both differ, is copied."""
    session, other = opened(engine, policy), reference(engine.bundle, policy)
    first = text(70)
    for one in (session, other):
        one.prefill(np.array([first]), max_new_tokens=20)
    before = table(session)[:]
    second = [*first[:68], *text(9, 1)]
    taken: list[int] = []
    plain = engine.pools[0].take
    engine.pools[0].take = lambda count: taken.append(count) or plain(count)
    logits = session.prefill(np.array([second]), max_new_tokens=20, reuse_prefix=True)
    assert_near(logits, other.prefill(np.array([second]), max_new_tokens=20), "the second request")
    assert table(session)[:2] == before[:2]
    assert taken == [3]  # 77 + 19 slots: the third block is the first request's, whose only owner is the second now
    assert table(session)[2] == before[2]
    assert in_use(engine) == [3, len(table(session, 1))]
    for token in text(12, 2):
        assert_near(session.step([token]), other.step([token]))
    other.close()


def test_two_rows_take_over_one(engine: OpenVinoEngine) -> None:
    """Both begin with its blocks; the one that is not full is copied for whoever writes first."""
    session, other = opened(engine, "backfill"), reference(engine.bundle, "backfill")
    first = text(40)
    prompts = [[*first, 1, 2, 3], [*first, 4], [9]]
    session.prefill(np.array([first]), max_new_tokens=8)
    own = table(session)[:]
    ours = session.prefill(*padded(prompts), max_new_tokens=8, reuse_prefix=True)
    assert_near(ours, other.prefill(*padded(prompts), max_new_tokens=8))
    tables = [table(session, 0, row) for row in range(3)]
    assert tables[0][0] == tables[1][0] == own[0]
    assert tables[0][1] != tables[1][1]
    assert own[1] in (tables[0][1], tables[1][1])
    assert in_use(engine)[0] == 2 + 1 + 2  # blocks of 43 + 7 slots, of which two rows share the first
    for _ in range(5):
        assert_near(session.step([1, 2, 3]), other.step([1, 2, 3]))
    other.close()


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_truncated_rows_and_their_forks(engine: OpenVinoEngine, policy: str) -> None:
    """Cut back into an earlier block, which a fork still needs as it was."""
    session, other = opened(engine, policy), reference(engine.bundle, policy)
    for one in (session, other):
        one.prefill(*padded([text(60), text(33, 1)]), max_new_tokens=30)
        for token in range(8):
            one.step([token, token + 1])
    fork, other_fork = session.fork(), other.fork()
    blocks = in_use(engine)
    for one in (session, other):
        one.truncate([20, 35])
    assert in_use(engine) == blocks
    for token in range(9):
        assert_near(session.step([token, 7]), other.step([token, 7]), f"truncated, step {token}")
        assert_near(fork.step([9, token]), other_fork.step([9, token]), f"its fork, step {token}")
    for one in (fork, other, other_fork):
        one.close()


def test_a_pool_grows_while_another_session_is_in_the_middle(engine: OpenVinoEngine) -> None:
    """Its caches are others then; what was in them came along, and its next step finds it."""
    session, other = opened(engine), reference(engine.bundle, "skip")
    crowd: list[Session] = []
    for one in (session, other):
        one.prefill(np.array([text(50)]), max_new_tokens=60)
    versions = [pool.version for pool in engine.pools]
    for number, token in enumerate(text(24, 3)):
        if number % 4 == 0:
            crowd.append(opened(engine))
            crowd[-1].prefill(*padded([text(90, number), text(10, number)]), max_new_tokens=30)
        assert_near(session.step([token]), other.step([token]), f"step {number}")
    assert all(pool.version > version + 1 for pool, version in zip(engine.pools, versions, strict=True))
    del crowd[::2]
    gc.collect()
    assert_near(session.step([1]), other.step([1]), "after some are gone")
    crowd.append(opened(engine))
    crowd[-1].prefill(*padded([text(90, 1), text(90, 2)]), max_new_tokens=30)
    assert_near(session.step([2]), other.step([2]), "after their blocks are another's")
    other.close()


@pytest.mark.parametrize("name", [MODEL, "gemma2"])  # the second has softcap and windows
def test_a_lora_step_that_fills_sees_the_block_that_it_writes_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads what dropped attentions make there. Refreshes read all that was filled, over three blocks, as on
    target ort."""
    bundle = make_bundle(first_layers(name, 4), tmp_path / "b", targets=TARGETS, policy="fill", max_batch=8, **FOUR)
    tables: list[tuple[StepKind, dict[tuple[int, int], int]]] = []  # step, blocks of each group
    plain = Steps.feed

    def feed(self: Steps, kind: StepKind, tokens: int, wanted: int, rows: tuple[int, int], *rest: Any) -> Any:
        tables.append((kind, dict(zip(self._engine.table_groups, rest[0], strict=True))))
        return plain(self, kind, tokens, wanted, rows, *rest)

    monkeypatch.setattr(Steps, "feed", feed)
    sessions = both(bundle, policy="fill")
    follow(sessions, [text(29), text(63, 1)], np.array([text(2, seed) for seed in range(40)]), 3)
    lora = [own for kind, own in tables if kind is StepKind.LORA]
    refreshes = [own for kind, own in tables if kind is StepKind.REFRESH]
    dropped = (1, GEMMA2_WINDOW if name == "gemma2" else 0)  # the second layer's pool and window
    assert {own[dropped] for own in lora} == {2}  # one of each row
    assert max(own[0, 0] for own in lora) == 3 + 4
    assert max(own[0, 0] for own in refreshes) == 3 + 4
    assert max(own[dropped] for own in refreshes[1:]) == (3 + 4 if name == MODEL else 4)  # two of each row
    for session in sessions:
        session.close()
