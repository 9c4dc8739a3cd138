"""Sessions on target openvino against target ort on the same bundle; what sessions share, and what an engine says."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Batch, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.openvino import engine as module
from lora_drop_runtime.engines.openvino.engine import _FEEDS, Feed, OpenVinoEngine
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

from tests.support.bundles import Family, first_layers, make_adapted_bundle, make_bundle, save_adapters
from tests.support.damage import write
from tests.support.decoding import padded

pytestmark = pytest.mark.usefixtures("quick_to_collect")

TARGETS = ("openvino", "ort")
TOLERANCE = 3e-5  # of the largest |logit|; both compute in float32, and sum in other orders
NEAR = 1e-3  # of the largest |logit|: two best logits that are nearer may change places
MIXED = ("1.attn", "2.mlp", "3", "4.attn", "4.mlp")  # of six layers
VOCAB, HIDDEN = 131, 64
MODEL = "qwen3"  # the one on which memory that grew once lost what an If had made (sites.py)
FOUR = {"always_first": 1, "drop_ratio": 0.5}  # of four layers, of which the second is dropped
MINUTES = 600


def with_layers(count: int) -> Family:
    """The model's first layers."""
    return first_layers(MODEL, count)


def both(bundle: Bundle, **options: Any) -> list[Any]:
    """A session on each target."""
    return [Session.open(bundle.root, target=target, threads=1, **options) for target in TARGETS]


def assert_near(ours: np.ndarray, theirs: np.ndarray, what: str = "", tolerance: float = TOLERANCE) -> None:
    """Logits [B, V], row by row."""
    assert ours.shape == theirs.shape
    errors = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)
    assert errors.max() < tolerance, f"{what}: {errors}"


def follow(sessions: list[Any], prompts: list[list[int]], tokens: np.ndarray, k: int) -> None:
    """All sessions run the prompts and the tokens [steps, B]; logits of every step are those of the last one."""
    ids, lengths = padded(prompts)
    new_tokens = len(tokens) + 1
    begun = [session.prefill(ids, lengths, max_new_tokens=new_tokens, k=k) for session in sessions]
    for one in begun[:-1]:
        assert_near(one, begun[-1], f"prompts of {lengths.tolist()}")
    for step, column in enumerate(tokens, 1):
        found = [session.step(column) for session in sessions]
        for one in found[:-1]:
            assert_near(one, found[-1], f"prompts of {lengths.tolist()}, step {step}")


# ── requests of any lengths ────────────────────────────────────────────────────────────────────────────────────

LENGTHS = st.integers(1, 100) | st.sampled_from((1, 31, 32, 33, 64, 65, 100))
REQUESTS = st.tuples(
    st.lists(LENGTHS, min_size=1, max_size=4),  # of the prompts
    st.integers(0, 5),  # decode steps
    st.integers(0, 2),  # k
    st.integers(0, 2**31),
)
GROWING = [([length], 3, 1, length) for length in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 100, 1, 100)]
RAGGED = [([1, 90, 7], 3, 1, 0), ([3], 2, 1, 1), ([64, 2, 33, 5], 4, 2, 2), ([100, 100], 5, 1, 3), ([1], 1, 1, 4)]


def check_feed(engine: OpenVinoEngine) -> None:
    """All inputs of the graph but caches are written before a call, in the graph's types."""
    feed = Feed(StepKind.LORA, 3, 2, (2, 2), (4, 2), engine.states_shape(2), engine.table_groups, {})
    for port in engine.compiled.model.inputs:
        (name,) = port.names
        if "_cache." not in name:
            array = feed.arrays[name]
            assert port.element_type.to_dtype() == array.dtype
            assert port.partial_shape.compatible(type(port.partial_shape)(list(array.shape)))


# The other pairs are decoded against the oracle in tests/export/targets/openvino
@pytest.mark.parametrize(
    ("surrogate", "policy"),
    [
        ("residual", "skip"),
        ("recurrent", "backfill"),
        ("recurrent", "fill"),
        ("anchor", "skip"),
        ("residual-delta", "backfill"),
        ("residual-delta", "fill"),
        ("residual-gated", "skip"),
        ("residual-delta-gated", "backfill"),
    ],
)
def test_logits_are_those_of_target_ort(surrogate: str, policy: str, tmp_path: Path) -> None:
    """Any requests, one after the other in one session: ragged, longer and shorter than those before. Adapters matter,
    and all kinds of sites are dropped. Lengths grow or shrink, in turns: each policy meets both."""
    options = {"surrogate": surrogate, "policy": policy, "rank": 4, "drop_layers": MIXED, "always_first": 1}
    options["max_batch"] = 8
    bundle = make_adapted_bundle(with_layers(6), tmp_path, targets=TARGETS, **options)
    kept = OpenVinoEngine(bundle, threads=1)  # so that the model stays compiled
    check_feed(kept)
    theirs = Session.open(bundle.root, target="ort", policy=policy, threads=1)
    order = 1 if surrogate in ("recurrent", "anchor") else -1

    @settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @example(GROWING[::order])
    @example(RAGGED)
    @given(st.lists(REQUESTS, min_size=1, max_size=6))
    def check(script: list[tuple[list[int], int, int, int]]) -> None:
        with Session.open(bundle.root, policy=policy, threads=1) as ours:
            for lengths, steps, k, seed in script:
                rng = np.random.default_rng(seed)
                prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
                follow([ours, theirs], prompts, rng.integers(0, VOCAB, (steps, len(prompts))), k)

    check()
    theirs.close()
    kept.close()


def test_the_memory_of_calls_is_bounded_and_one_that_left_comes_back(bundle: Bundle) -> None:
    """More sizes of calls than a request keeps memory for, twice."""
    sizes = [1 + 3 * number % 97 for number in range(_FEEDS + 8)]
    assert len(set(sizes)) > _FEEDS
    ours, theirs = both(bundle, k=0)
    for session in (ours, theirs):
        session.prefill(np.array([[1]]), max_new_tokens=100)
    for width in (*sizes, *sizes[:8]):
        for session in (ours, theirs):
            session._running().chunk(width)()
        assert_near(ours._running().logits(), theirs._running().logits(), f"{width} tokens")
        steps = ours._running().slots._steps
        assert max(len(request._feeds) for request in (steps._narrow, steps._wide)) <= _FEEDS
    ours.close()
    theirs.close()


KERNELS = """
import ctypes, sys
from lora_drop_runtime import Session
class Heap(ctypes.Structure):  # mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free keep".split()]
heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
with Session.open(sys.argv[1], threads=1, k=0) as session:
    for count in range(130, 0, -1):  # the largest first, which takes the memory of what a call computes
        session.prefill([[1] * count], max_new_tokens=2)
        if count in (20, 1):
            print(heap().used + heap().mapped)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not tell its heap's size")
def test_kernels_of_numbers_of_tokens_take_bounded_memory(tmp_path: Path) -> None:
    """Without the cache that all models of a process share, which has a bound of its own."""
    bundle = make_bundle(with_layers(4), tmp_path / "b", targets=("openvino",), dtype="int4", max_seq_len=256, **FOUR)
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, str(bundle.root)],
        env=os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=MINUTES,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 3e6  # a kind of kernels takes 0.1 MB a number, and there are five


# ── what sessions share ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    options = FOUR | {"rank": 4, "surrogate": "recurrent", "max_batch": 8}
    bundle = make_bundle(with_layers(4), tmp_path_factory.mktemp("shared") / "b", targets=TARGETS, **options)
    with contextlib.closing(OpenVinoEngine(bundle, threads=1)):  # so that the model stays compiled
        yield bundle


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """That nobody has open."""
    return Bundle.open(shutil.copytree(bundle.root, tmp_path / "copy"))


@pytest.fixture
def adapters(bundle: Bundle, tmp_path: Path) -> Path:
    return save_adapters(tmp_path / "adapters", bundle.manifest.plan, HIDDEN, bundle.manifest.model.fingerprint)


def some_requests(seed: int) -> list[tuple[list[list[int]], np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = (((5, 1, 40), 5), ((70,), 4), ((2, 33), 6))
    return [
        ([rng.integers(0, VOCAB, n).tolist() for n in lengths], rng.integers(0, VOCAB, (steps, len(lengths))))
        for lengths, steps in shapes
    ]


def test_sessions_share_a_compiled_model_until_the_last_is_closed(copy: Bundle) -> None:
    first, second = (Session.open(copy.root, threads=1) for _ in range(2))
    reference = Session.open(copy.root, target="ort", threads=1)
    compiled = weakref.ref(first._engine.compiled)
    assert first._engine is not second._engine
    assert second._engine.compiled is compiled()
    for prompts, tokens in some_requests(0):
        follow([first, second, reference], prompts, tokens, 2)
    first.close()
    for prompts, tokens in some_requests(1):
        follow([second, reference], prompts, tokens, 2)
    assert compiled() is not None
    with Session.open(copy.root, threads=1) as third:
        assert third._engine.compiled is compiled()
    second.close()
    del third, first
    gc.collect()
    assert compiled() is None
    reference.close()


def test_weights_that_were_damaged_and_are_copied_again(copy: Bundle) -> None:
    """Who opens them then does not get the model that was compiled of the damaged ones, which another has open yet."""
    file = copy.root / "weights" / "model.safetensors"
    good = file.read_bytes()
    begin = 8 + int.from_bytes(good[:8], "little")
    write(file, good[:begin] + b"\xff" * (len(good) - begin))
    with Session.open(copy.root, threads=1) as damaged:
        with pytest.raises(BundleError, match="not numbers"):
            damaged.generate([5, 6], 3)
        write(file, good)
        with (
            Session.open(copy.root, threads=1, check=True) as again,
            Session.open(copy.root, target="ort", threads=1) as reference,
        ):
            for prompts, tokens in some_requests(0):
                follow([again, reference], prompts, tokens, 2)


def test_steps_of_several_tokens_get_a_model_of_their_own(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many come between those of one token, about as many each time: not under skip, lossless or with k = 0."""
    prompts, tokens = some_requests(4)[0]
    monkeypatch.setattr(module, "ENOUGH_CALLS", 2)
    engines = []
    with contextlib.ExitStack() as opened:
        for policy, k in (("skip", 2), ("lossless", 2), ("backfill", 0), ("backfill", 2), ("backfill", 2)):
            sessions = both(copy, policy=policy)
            for session in sessions:
                opened.enter_context(session)
            follow(sessions, prompts, tokens, k)
            assert sessions[0]._engine.wide is None
            for _ in range(2):
                follow(sessions, prompts, tokens, k)
            engines.append(sessions[0]._engine)
        plain, drafting, full, wide, other = engines
        assert plain.wide is drafting.wide is full.wide is None
        assert not plain.notes()
        assert wide.wide is other.wide is not None
        assert wide.wide is not wide.compiled
        assert "MiB of weights are held twice" in wide.notes()[-1]
        narrow, second = (weakref.ref(model) for model in (wide.compiled, wide.wide))
        monkeypatch.setattr(module, "MOST_TWICE", copy.manifest.model.weight_bytes - 1)
        sessions = both(copy, policy="backfill")
        for session in sessions:
            opened.enter_context(session)
            session.warm_up()
        follow(sessions, prompts, tokens, 2)
        assert sessions[0]._engine.wide is None
    del engines, plain, drafting, full, wide, other, session, sessions, opened
    gc.collect()
    assert narrow() is second() is None


def test_a_bundle_that_has_moved_gets_no_model_for_several_tokens(copy: Bundle) -> None:
    """Who serves for long goes on with the one that is compiled."""
    with contextlib.closing(OpenVinoEngine(copy, threads=1)) as engine:
        copy.root.rename(copy.root.with_name("moved"))
        engine.prepare_for_several()
        assert engine.wide is None


@pytest.mark.parametrize("k", [0, 2])
def test_who_runs_long_has_that_model_from_the_beginning(bundle: Bundle, k: int) -> None:
    with Session.open(bundle.root, policy="backfill", k=k, threads=1) as session:
        session.warm_up()
        assert (session._engine.wide is not None) == (k > 0)
    with Batch.open(bundle.root, policy="backfill", k=k, slots=2, threads=1) as batch:
        assert (batch._engine.wide is not None) == (k > 0)


INTERRUPTED = """
import gc, signal, sys, threading
from lora_drop_runtime import Session
first, second = (Session.open(sys.argv[1], threads=threads) for threads in (1, 2))
first.close()
del first
gc.collect()
last = [second]
del second
def close():
    last.pop().close()
    gc.collect()
thread = threading.Thread(target=close)
thread.start()
thread.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_sessions_have_gone(bundle: Bundle) -> None:
    """The first one first, and the last one in another thread: the stack for signals that the plugin set up stays."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + INTERRUPTED
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.root)], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_a_step_that_fails_has_openvinos_reason(bundle: Bundle) -> None:
    """Not the line of its source in which it was noticed."""
    with Session.open(bundle.root, threads=1) as session:
        session.prefill([[1, 2, 3]], max_new_tokens=4)
        request = session._running().slots._steps._narrow._request = Mock()
        request.infer.side_effect = RuntimeError(
            "Exception from src/inference/src/cpp/infer_request.cpp:224:\n[CPU] Reorder node failed\n"
        )
        with pytest.raises(BundleError, match="cannot run a step") as caught:
            session.step([1])
    assert caught.value.note == f"{bundle.root}: [CPU] Reorder node failed"


@pytest.mark.parametrize("fails_in", ["generate", "prefill", "step"])
def test_a_step_that_left_no_logits_does_not_end_the_session(fails_in: str, bundle: Bundle, monkeypatch) -> None:
    """As where memory is scarce, and enough later on: OpenVINO says nothing, or the step has raised before."""
    with Session.open(bundle.root, threads=1) as other:
        wanted = other.generate([1, 2, 3], 4)[0].tolist()
    with Session.open(bundle.root, threads=1) as session:
        if fails_in == "step":
            session.prefill([[1, 2, 3]], max_new_tokens=4)
        calls = {
            "generate": lambda: session.generate([1, 2, 3], 4),
            "prefill": lambda: session.prefill([[1, 2, 3]], max_new_tokens=4),
            "step": lambda: session.step([1]),
        }
        logits, failed = module._Request.logits, []

        def none(request: Any) -> np.ndarray:
            failed[:] = failed or [request]
            return logits(request)[: 0 if request is failed[0] else None]

        monkeypatch.setattr(module._Request, "logits", none)
        with pytest.raises(BundleError, match="has left no logits") as caught:
            calls[fails_in]()
        assert caught.value.note == "Of 1 rows of them that were asked for there are 0."
        assert session.generate([1, 2, 3], 4)[0].tolist() == wanted


def test_other_settings_and_adapters_are_another_compiled_model(bundle: Bundle) -> None:
    engines = [OpenVinoEngine(bundle, threads=1), OpenVinoEngine(bundle, threads=2)]
    engines.append(OpenVinoEngine(bundle, threads=1, exact=True))
    files, name = bundle.manifest.files, "weights/adapters.safetensors"
    again = files | {name: dataclasses.replace(files[name], sha256="0" * 64)}  # exported with others to the same place
    engines.append(OpenVinoEngine(Bundle(bundle.root, dataclasses.replace(bundle.manifest, files=again)), threads=1))
    assert len({id(engine.compiled) for engine in engines}) == 4
    for engine in engines:
        engine.close()


def test_loaded_adapters_are_a_sessions_own(bundle: Bundle, adapters: Path) -> None:
    """The other goes on in the middle of its request; a third session that opens later has the bundle's."""
    plain, fitted = both(bundle), both(bundle)
    shared = plain[0]._engine.compiled
    prompts, tokens = some_requests(2)[0]
    ids, lengths = padded(prompts)
    begun = [session.prefill(ids, lengths, k=2) for session in plain]
    assert_near(*begun)
    for session in fitted:
        session.load_adapters(adapters)
    assert plain[0]._engine.compiled is shared
    own = weakref.ref(fitted[0]._engine.compiled)
    assert own() is not shared
    follow(fitted, prompts, tokens, 2)
    fitted_logits = fitted[1]._logits().copy()
    for column in tokens:
        assert_near(*[session.step(column) for session in plain])
    assert np.abs(plain[1]._logits() - fitted_logits).max() > 0.1 * np.abs(fitted_logits).max()
    with Session.open(bundle.root, threads=1) as third:
        assert third._engine.compiled is shared
    for session in fitted:
        session.close()
    gc.collect()
    assert own() is None
    follow(plain, *some_requests(3)[1], 2)
    for session in plain:
        session.close()


def test_a_fork_shares_the_engine_and_the_last_one_closes_it(copy: Bundle) -> None:
    session = Session.open(copy.root, threads=1)
    compiled = weakref.ref(session._engine.compiled)
    session.prefill(np.array([[1, 2, 3]]))
    fork = session.fork()
    session.close()
    gc.collect()
    fork.step([4])
    assert compiled() is not None
    fork.close()
    del session, fork
    gc.collect()
    assert compiled() is None


# ── several at a time ──────────────────────────────────────────────────────────────────────────────────────────

TEXTS = {"skip": [5, 6, 7] * 13, "backfill": [11, 3], "lossless": [8, 1, 90, 4] * 4}


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> dict[str, list[int]]:
    """What each text becomes in a session of its own, which nobody disturbs."""
    found = {}
    for policy, text in TEXTS.items():
        with Session.open(bundle.root, policy=policy, k=2, threads=1) as session:
            found[policy] = session.generate([text], 40, stop_token_ids=())[0].tolist()
    return found


def test_streams_that_take_turns(bundle: Bundle, alone: dict[str, list[int]]) -> None:
    """Token by token, in sessions of one compiled model."""
    opened = {policy: Session.open(bundle.root, policy=policy, k=2, threads=1) for policy in TEXTS}
    streams = {policy: opened[policy].stream(text, 40, stop_token_ids=()) for policy, text in TEXTS.items()}
    found: dict[str, list[int]] = {policy: [] for policy in TEXTS}
    for _ in range(40):
        for policy, stream in streams.items():
            found[policy].append(next(stream))
    assert found == alone
    for session in opened.values():
        session.close()


@pytest.mark.parametrize("one_engine", [False, True])
def test_threads(bundle: Bundle, alone: dict[str, list[int]], one_engine: bool) -> None:
    """Sessions of one compiled model in threads of their own; of one engine, which has their blocks in common."""
    engine = OpenVinoEngine(bundle, threads=1)

    def ask(policy: str) -> list[list[int]]:
        own = engine if one_engine else OpenVinoEngine(bundle, threads=1)
        session = Session(bundle, own, PeriodicSchedule(2), policy)
        found = [session.generate([TEXTS[policy]], 40, stop_token_ids=())[0].tolist() for _ in range(4)]
        if not one_engine:
            session.close()
        return found

    with ThreadPoolExecutor(3) as pool:
        asked = {policy: pool.submit(ask, policy) for policy in TEXTS}
        found = {policy: one.result(MINUTES) for policy, one in asked.items()}
    assert found == {policy: [tokens] * 4 for policy, tokens in alone.items()}
    gc.collect()
    assert [pool.in_use for pool in engine.pools] == [0, 0]
    engine.close()


# ── drafts that are verified ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    options = FOUR | {"surrogate": "recurrent", "policy": "lossless", "max_batch": 8}
    bundle = make_bundle(with_layers(4), tmp_path_factory.mktemp("verified") / "b", targets=TARGETS, **options)
    with contextlib.closing(OpenVinoEngine(bundle, threads=1)):  # so that the model stays compiled
        yield bundle


@pytest.mark.parametrize("draft", ["ngram", "lora", "both"])
def test_lossless_gives_the_tokens_of_the_full_schedule(draft: str, verified: Bundle) -> None:
    """Those of target ort without drafts, up to a near-tie: two best logits within NEAR of the largest |logit|."""
    rng = np.random.default_rng(7)
    motif = rng.integers(0, VOCAB, 4).tolist()
    prompts = [motif * 8, [9], rng.integers(0, VOCAB, 37).tolist()]
    with Session.open(verified.root, k=4, draft=draft, threads=1) as session:
        rows = [row.tolist() for row in session.generate(prompts, 60, stop_token_ids=())]
        counted = session.statistics()
    assert counted.drafted >= counted.accepted > 0
    assert counted.tokens == 3 * 59
    compared = 0
    with Session.open(verified.root, target="ort", k=0, threads=1) as reference:
        for prompt, row in zip(prompts, rows, strict=True):
            assert len(row) == 60
            logits = reference.prefill(np.array([prompt]), max_new_tokens=60)
            for place, token in enumerate(row):
                second, first = np.sort(logits[0])[-2:]
                if first - second < NEAR * np.abs(logits).max():
                    break
                assert token == int(logits[0].argmax()), f"token {place} of {row}"
                compared += 1
                if place < 59:
                    logits = reference.step([token])
    assert compared > 100


# ── what an engine says ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["skip", "backfill"])
def test_kv_bytes(policy: str, bundle: Bundle) -> None:
    """Of valid entries K and V of 2 heads of 32 float32; and whole blocks of 32 slots are allocated."""
    entry = 2 * 2 * 32 * 4
    dropped_layers = len(bundle.manifest.plan.dropped_layers)
    kept_layers, lengths, new_tokens, k = 4 - dropped_layers, [30, 3], 40, 2
    assert dropped_layers == 1
    prompts = [[7] * length for length in lengths]
    with Session.open(bundle.root, policy=policy, k=k, threads=1) as session:
        assert session.kv_bytes() == {"kept": 0, "dropped": 0, "allocated": 0}
        session.prefill(*padded(prompts), max_new_tokens=new_tokens)
        # A row: 30 + 39 kept slots are 3 blocks; dropped ones 30 + 13 refreshes are 2, or 3 if the holes are filled
        dropped_blocks = {"skip": 2, "backfill": 3}[policy]
        allocated = 2 * 32 * entry * (3 * kept_layers + dropped_blocks * dropped_layers)
        for step in range(new_tokens):
            refreshes = step // (k + 1)
            extra = refreshes if policy == "skip" else refreshes * (k + 1)
            assert session.kv_bytes() == {
                "kept": (33 + 2 * step) * kept_layers * entry,
                "dropped": (33 + 2 * extra) * dropped_layers * entry,
                "allocated": allocated,
            }
            if step < new_tokens - 1:
                session.step([1, 2])
        in_use = sum(pool.in_use * pool.block_bytes for pool in session._engine.pools)
        assert in_use == allocated


def test_notes(bundle: Bundle) -> None:
    """Nothing to say of float32; what is said of a processor without some kernels is in test_refusals.py."""
    with Session.open(bundle.root, threads=1) as session:
        assert session.engine_notes() == []
        session.engine_notes().append("of the caller's own list")
        assert session.engine_notes() == []


def test_it_takes_as_many_threads_as_there_are_cores(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "default_threads", lambda: 1)  # more than there are OpenVINO itself does not take
    engine = OpenVinoEngine(bundle)
    assert engine.compiled.model.get_property("INFERENCE_NUM_THREADS") == 1
    engine.close()
