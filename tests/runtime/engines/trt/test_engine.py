"""The TensorRT engine under a session: the very graphs that TensorRT builds from, on a fake CUDA and a fake TensorRT.

Which memory a step reads and writes, when it is captured, and that everything is freed; what the fakes stand for, and
what they cannot show, is said in fake_cuda.py and fake_trt.py.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import BundleError, InputError, SamplingOptions, Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.request import Request
from lora_drop_runtime.dtypes import BY_TENSORRT, bfloat16_from_float32, float32_from_bfloat16
from lora_drop_runtime.engines.trt import cuda_device as cuda_device_module
from lora_drop_runtime.engines.trt import engine as engine_trt
from lora_drop_runtime.engines.trt import io_check
from lora_drop_runtime.engines.trt import library as trt_library
from lora_drop_runtime.engines.trt import plans as plans_module
from lora_drop_runtime.engines.trt import plugin as plugin_module
from lora_drop_runtime.engines.trt import step as step_module
from lora_drop_runtime.engines.trt.cuda_device import CudaDevice
from lora_drop_runtime.engines.trt.engine import DeviceBuffer, TrtEngine
from lora_drop_runtime.engines.trt.io_check import EngineTensor, io_problems
from lora_drop_runtime.engines.trt.library import error_logger
from lora_drop_runtime.engines.trt.step import EngineStep
from lora_drop_runtime.errors import NoDeviceError
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from tests.support import fake_cuda, fake_trt, oracle
from tests.support.bundles import family, oracle_plan, save_adapters
from tests.support.fake_cuda import FakeCuda, cudaError_t
from tests.support.fake_trt import TARGET, FakeTrt, change_manifest, make_device_bundle, open_device_session

LORA, REFRESH = StepKind.LORA, StepKind.REFRESH
# Chunks of 4: several runs, rows of one, of less than one and of exactly two chunks
RAGGED = [[7, 3, 11, 19, 2, 40, 41, 42, 43, 44, 45], [5], [23, 29, 31, 2, 3, 4, 99, 98]]
FORCED = [[3, 5, 7], [100, 9, 2], [8, 8, 8], [1, 2, 3], [30, 31, 32], [77, 6, 5], [4, 4, 90], [60, 2, 9], [1, 1, 1]]
PLANS: dict[str, dict[str, Any]] = {
    "residual": {"rank": 2},
    "recurrent": {"surrogate": "recurrent", "rank": 2},
    "recurrent, rank 0": {"surrogate": "recurrent", "sharing": "constants"},
    "anchor, attn_mlp": {"surrogate": "anchor", "injection": "attn_mlp", "rank": 2},
    "recurrent, attn_mlp": {"surrogate": "recurrent", "injection": "attn_mlp", "rank": 2},
    "nothing dropped": {"drop_layers": ()},
}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A device bundle per name of PLANS, made once; with adapters where the plan has a rank."""

    @functools.cache
    def make(name: str, made_from: str = "llama", sharing: str = "inputs") -> Bundle:
        root = tmp_path_factory.mktemp("trt")
        options = {"sharing": sharing} | PLANS[name]
        if options.get("rank"):
            plan = make_device_bundle(made_from, root / "without", **options).manifest.plan
            options["adapters"] = save_adapters(root / "adapters", plan, 64, None, rank=options["rank"])
        return make_device_bundle(made_from, root / "bundle", k=1, **options)

    return make


@pytest.fixture
def bundle(bundles: Callable[..., Bundle]) -> Bundle:
    return bundles("recurrent")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """The bundle, to be damaged."""
    shutil.copytree(bundle.root, tmp_path / "copy")
    return Bundle.open(tmp_path / "copy")


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, np.array([len(prompt) for prompt in prompts])


def steps(session: Session, k: int | None = None, prompts: list[list[int]] = RAGGED) -> list[np.ndarray]:
    """Logits of the prefill and of all forced steps."""
    logits = [session.prefill(*padded(prompts), max_new_tokens=len(FORCED) + 1, k=k).copy()]
    return logits + [session.step(tokens[: len(prompts)]).copy() for tokens in FORCED]


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """Float32 on both sides, summed in another order: 1e-6 of the largest logit was seen."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.isfinite(a).all(), f"step {step}"
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), f"step {step}"


def ort_steps(bundle: Bundle, k: int) -> list[np.ndarray]:
    with Session.open(bundle.root, target="ort", threads=1) as session:
        return steps(session, k)


# ── the same logits and tokens as elsewhere ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", PLANS)
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


@pytest.mark.parametrize("sharing", ["inputs", "constants"])
@pytest.mark.parametrize("made_from", ["qwen2", "gemma2"])
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


# ── capacities ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_are_the_engines_whatever_a_request_needs(bundle: Bundle) -> None:
    session, _, _ = open_device_session(bundle)
    with session:
        for new_tokens in (1, 20):
            session.prefill(*padded(RAGGED), max_new_tokens=new_tokens)
            for name, cache in session._request.caches.items():
                dropped = int(name.split(".")[1]) in bundle.manifest.plan.drop_layers
                # max_seq_len 64, max_prompt_len 40, k = 1: 63 tokens, of which 40 + 11 in a dropped layer
                assert cache.shape == (3, 2, 51 if dropped else 63, 16)
        assert session.kv_bytes()["allocated"] == 3 * 2 * 4 * 2 * 16 * (63 * 6 + 51 * 2)


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


# ── memory ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_scratch_block_for_all_contexts(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate(RAGGED, 9)
        assert cuda.mallocs.count(5000) == 1  # the larger need of the two engines
        assert 3000 not in cuda.mallocs
        assert {context.memory for context in cuda.users} == {(engine._plans.scratch, 5000)}
        assert {context.engine.kind for context in cuda.users} == {LORA, REFRESH}


def test_both_engines_share_caches_weights_and_ids(bundle: Bundle) -> None:
    """One buffer table: a name is one address, in every context and for past and present."""
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate(RAGGED, 9)
        addresses: dict[str, set[int]] = {}
        for bound in [context.addresses for context in cuda.users]:
            for name, address in bound.items():
                if "state" not in name:
                    addresses.setdefault(name.replace("present_", "past_"), set()).add(address)
        assert all(len(found) == 1 for found in addresses.values())
        assert len(set.union(*addresses.values())) == len(addresses)  # and no two names share one
        table = bundle.weight_inputs(TARGET)
        assert set(table) <= set(addresses)
        block = cuda.blocks[min(address for name in table for address in addresses[name])]
        assert block.nbytes == engine.resident_bytes["weights"]
        assert sum(weight.size_bytes for weight in table.values()) <= block.nbytes


def test_resident_bytes(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        assert engine.resident_bytes["buffers"] == 0
        session.generate(RAGGED, 9)
        resident = engine.resident_bytes
        assert resident["scratch"] == 5000
        assert resident["buffers"] > session.kv_bytes()["allocated"]
        on_device = sum(block.nbytes for block in cuda.blocks.values())
        assert resident["weights"] + resident["scratch"] + resident["buffers"] == on_device


def test_logits_may_be_read_after_close(bundle: Bundle) -> None:
    """Page-locked memory is numpy's own."""
    session, _, _ = open_device_session(bundle)
    logits = session.prefill(*padded(RAGGED))
    before = logits.copy()
    session.close()
    np.testing.assert_array_equal(logits, before)


def test_a_slice_of_a_buffer_is_a_view() -> None:
    buffer = DeviceBuffer("x", 4096, (4, 2, 8), "bfloat16")
    assert buffer.nbytes == 128
    assert buffer[1:3] == DeviceBuffer("x", 4096 + 32, (2, 2, 8), "bfloat16")
    assert buffer[:] == buffer


# ── CUDA graphs ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "graphs"), [("residual", 2), ("recurrent", 3), ("recurrent, rank 0", 2)])
def test_one_graph_per_step_kind_batch_and_side_of_the_state(bundles, name: str, graphs: int) -> None:
    session, engine, cuda = open_device_session(bundles(name))
    with session:
        trt = engine._plans._trt
        session.generate(RAGGED, 12, k=2)
        assert engine.captures == len(cuda.executables) == graphs
        made = trt.contexts_made, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]
        plain = cuda.calls["cudaMemcpyAsync"]
        session.generate(RAGGED, 12, k=2)  # the second request of the same batch: nothing new
        assert engine.captures == graphs
        assert (trt.contexts_made, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]) == made
        # Only the prefill's chunks copied outside of a graph: ids, two lengths, index; and the token back
        assert cuda.calls["cudaMemcpyAsync"] == plain + 3 * 5
        session.generate(RAGGED[:2], 12, k=2)  # a smaller batch in the same memory
        assert engine.captures == 2 * graphs
        assert cuda.calls["cudaMalloc"] == made[1]
        session.generate(RAGGED, 12, k=2)
        session.generate(RAGGED[:2], 12, k=2)
        assert engine.captures == len(cuda.executables) == 2 * graphs
        assert not cuda.graphs


def test_a_larger_batch_replaces_buffers_and_drops_the_graphs_that_hold_them(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate(RAGGED[:1], 12, k=2)
        assert len(cuda.executables) == 3
        blocks = len(cuda.blocks)
        session.generate(RAGGED, 12, k=2)
        assert engine.captures == 6
        assert len(cuda.executables) == 3
        assert len(cuda.blocks) == blocks
        session.generate(RAGGED[:1], 12, k=2)
        assert engine.captures == 9
        assert len(cuda.executables) == 6


def test_prompts_of_any_length_leave_the_graphs_alone(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        session.generate([[1]], 12, k=2)
        captures, mallocs = engine.captures, cuda.calls["cudaMalloc"]
        for length in (2, 4, 5, 17, 40):
            session.generate([[1] * length], 12, k=2)
        assert (engine.captures, cuda.calls["cudaMalloc"]) == (captures, mallocs)


@pytest.mark.parametrize(("name", "k"), [("residual", 3), ("recurrent", 2), ("recurrent", 1), ("residual", 0)])
def test_after_a_warm_up_nothing_is_captured_or_allocated(bundles, name: str, k: int) -> None:
    session, engine, cuda = open_device_session(bundles(name))
    with session:
        session.schedule = PeriodicSchedule(k)
        session.warm_up()
        made = engine.captures, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]
        assert engine.captures
        assert session.kv_bytes()["allocated"] == 0
        session.generate(RAGGED[:1], 12)
        assert (engine.captures, cuda.calls["cudaMalloc"], cuda.calls["cudaHostRegister"]) == made


def test_open_warms_up(bundle: Bundle, monkeypatch) -> None:
    """Through `Session.open`; a warm-up that fails leaves nothing open."""
    opened = []

    def open_engine(opened_bundle: Bundle, target: str) -> Any:
        _, engine, cuda = open_device_session(opened_bundle)
        opened.append((engine, cuda))
        return engine

    monkeypatch.setattr(engine_trt, "TrtEngine", open_engine)
    with Session.open(bundle.root, target=TARGET, k=2) as session:
        assert session.schedule == PeriodicSchedule(2)
        assert opened[0][0].captures == 3
    monkeypatch.setattr(Session, "step", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        Session.open(bundle.root, target=TARGET)
    assert not opened[1][1].blocks


def test_what_a_context_has_run_or_says_decides_on_capture(bundle: Bundle) -> None:
    """Without CUDA graphs the same tokens, and the reason is on record."""
    session, engine, _ = open_device_session(bundle)
    with session:
        expected = steps(session)
        assert engine.capture_note == ""
    cuda = FakeCuda()
    session, engine, _ = open_device_session(bundle, cuda=cuda, trt=FakeTrt(cuda, capturable=False))
    with session:
        assert_close(steps(session), expected)
        assert "cannot be captured" in engine.capture_note
        assert engine.captures == 0
        assert cuda.calls["cudaStreamBeginCapture"] == 0
    cuda = FakeCuda()
    cuda.fail["cudaGraphInstantiate"] = cudaError_t.cudaErrorInvalidValue
    session, engine, _ = open_device_session(bundle, cuda=cuda)
    with session:
        assert_close(steps(session), expected)
        assert "cudaGraphInstantiate: cudaErrorInvalidValue" in engine.capture_note
        assert cuda.calls["cudaStreamBeginCapture"] == 1
        assert not cuda.graphs
    assert not cuda.live


def test_a_capture_that_fails_in_tensorrt_ends_the_capture(bundle: Bundle, monkeypatch) -> None:
    session, engine, cuda = open_device_session(bundle)
    execute = fake_trt.FakeExecutionContext.execute_async_v3

    def refusing(self: Any, stream: int) -> bool:
        if self.cuda.captured is not None:
            return self._refuse("this layer cannot be captured")
        return execute(self, stream)

    with session:
        expected = steps(session)
        engine._drop_steps()
        monkeypatch.setattr(fake_trt.FakeExecutionContext, "execute_async_v3", refusing)
        assert_close(steps(session), expected)
        assert "this layer cannot be captured" in engine.capture_note
        assert cuda.captured is None
    assert not cuda.live


def test_enterprise_tensorrt_has_no_runtime_configuration(bundle: Bundle) -> None:
    cuda = FakeCuda()
    session, _, _ = open_device_session(bundle, cuda=cuda, trt=FakeTrt(cuda, rtx=False))
    with session:
        assert_close(steps(session, 1), ort_steps(bundle, 1))


@pytest.mark.parametrize("at", ["enqueue", "launch"])
def test_an_interrupted_step_can_be_repeated(bundle: Bundle, monkeypatch, at: str) -> None:
    session, engine, cuda = open_device_session(bundle)
    with session:
        expected = steps(session)
        session.prefill(*padded(RAGGED), max_new_tokens=len(FORCED) + 1)
        if at == "enqueue":
            engine._drop_steps()
            monkeypatch.setattr(EngineStep, "_enqueue", interrupting(EngineStep._enqueue))
        else:
            monkeypatch.setattr(CudaDevice, "launch", interrupting(CudaDevice.launch))
        for tokens, logits in zip(FORCED, expected[1:], strict=True):
            try:
                ours = session.step(tokens)
            except KeyboardInterrupt:
                assert not cuda.queue  # nothing is under way any more that reads what the host writes next
                ours = session.step(tokens)
            np.testing.assert_array_equal(ours, logits)


def interrupting(function: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C at the end of every second call."""
    calls = 0

    def call(*arguments: Any) -> None:
        nonlocal calls
        function(*arguments)
        calls += 1
        if calls % 2:
            raise KeyboardInterrupt

    return call


# ── adapters ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_load_adapters_is_what_onnx_runtime_does(bundles, tmp_path: Path) -> None:
    made = bundles("recurrent, attn_mlp")
    plan = made.manifest.plan
    matrices = {}
    generator = np.random.default_rng(9)
    for site in plan.sites:
        a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (64, 2)))
        matrices[site] = (SimpleNamespace(numpy=lambda a=a: a), SimpleNamespace(numpy=lambda b=b: b), 0.05)
    directory = save_adapters(tmp_path / "a", plan, 64, None, rank=2, matrices=matrices)
    session, engine, _ = open_device_session(made)
    with (
        session,
        Session.open(made.root, target="ort", threads=1) as other,
        Session.open(made.root, target=TARGET, provider="cpu", threads=1) as same_graphs,
    ):
        before = steps(session)
        captures = engine.captures
        for each in (session, other, same_graphs):
            each.load_adapters(directory)
        after = steps(session)
        assert engine.captures == captures  # the same memory, so the same graphs
        assert_close(after, steps(other))
        assert_close(after, steps(same_graphs))
        np.testing.assert_array_equal(before[0], after[0])
        assert np.abs(before[2] - after[2]).max() > 1e-2


def test_adapters_inside_the_engines_stay(bundles) -> None:
    made = bundles("recurrent", "llama", "constants")
    session, _, _ = open_device_session(made)
    with session, pytest.raises(InputError, match="cannot be replaced") as caught:
        session.load_adapters(made.root.parent / "adapters")
    assert "constants" in caught.value.note
    assert "--weight-sharing inputs" in caught.value.hint


def test_bfloat16_bits() -> None:
    import ml_dtypes

    generator = np.random.default_rng(2)
    bits = generator.integers(0, 2**32, 100_000, np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 1], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    ours = float32_from_bfloat16(bfloat16_from_float32(values))
    np.testing.assert_array_equal(ours, expected.astype(np.float32))


# ── closing, and errors ────────────────────────────────────────────────────────────────────────────────────────


def test_everything_is_freed(bundle: Bundle) -> None:
    session, engine, cuda = open_device_session(bundle)
    session.generate(RAGGED, 9)
    stream = session.stream(RAGGED[0], 9)
    next(stream)
    assert {"blocks", "pinned", "streams", "executables", "users"} <= set(cuda.live)
    session.close()
    session.close()
    engine.close()
    assert not cuda.live
    with pytest.raises(InputError, match="closed"):
        next(stream)


def test_everything_is_freed_whichever_call_fails(bundle: Bundle) -> None:
    """CUDA fails at each of its calls in turn, while opening, in a request and in capture."""
    session, _, cuda = open_device_session(bundle)
    opened = cuda.called
    session.generate(RAGGED[:1], 6)
    used = cuda.called
    session.close()
    assert opened > 40
    step = used // 40
    for number in [*range(1, 8), *range(8, used, step)]:
        cuda = FakeCuda()
        cuda.fail_at_call = number
        try:
            session, engine, _ = open_device_session(bundle, cuda=cuda)
        except BundleError:
            assert number <= opened
        else:
            with session:
                try:
                    session.generate(RAGGED[:1], 6)
                except BundleError as error:
                    reason = error.note
                else:  # a capture that failed
                    reason = engine.capture_note
            assert "cudaErrorIllegalAddress" in reason
        assert not cuda.live, f"call {number} of {opened} and {used}"


def test_a_step_that_fails_in_tensorrt(bundle: Bundle, monkeypatch) -> None:
    session, _, cuda = open_device_session(bundle)
    session.generate(RAGGED, 3)
    monkeypatch.setattr(
        fake_trt.FakeExecutionContext, "execute_async_v3", lambda self, _: self._refuse("cuBLAS has failed")
    )
    with pytest.raises(BundleError, match="cannot run a step") as caught:
        session.generate(RAGGED, 3)
    assert "cuBLAS has failed" in caught.value.note
    session.close()
    assert not cuda.live


def refused(call: Callable[[], Any], fact: str, *note: str, error: type[BundleError] = BundleError) -> None:
    with pytest.raises(BundleError) as caught:
        call()
    assert type(caught.value) is error
    assert fact in caught.value.fact
    for value in note:
        assert value in caught.value.note
    assert caught.value.hint


def test_no_driver_no_gpu(bundle: Bundle) -> None:
    cuda = FakeCuda()
    cuda.fail["cudaGetDeviceCount"] = cudaError_t.cudaErrorInsufficientDriver
    refused(lambda: CudaDevice(cuda), "no GPU", "cudaErrorInsufficientDriver in words", error=NoDeviceError)
    cuda = FakeCuda()
    cuda.cudaGetDeviceCount = lambda: (cudaError_t.cudaSuccess, 0)  # type: ignore[method-assign]
    refused(lambda: CudaDevice(cuda), "no GPU", "0 devices", error=NoDeviceError)


def test_another_gpu_architecture(bundle: Bundle) -> None:
    cuda = FakeCuda(capability=(9, 0))
    call = functools.partial(open_device_session, bundle, cuda=cuda)
    refused(call, "other GPUs", "9.0", "8.6, 8.9, 12.0", error=NoDeviceError)
    assert not cuda.live


def test_another_version_of_tensorrt(bundle: Bundle) -> None:
    cuda = FakeCuda()
    call = functools.partial(open_device_session, bundle, cuda=cuda, trt=FakeTrt(cuda, version="1.8.0.1"))
    refused(call, "cannot load an engine", "1.7.1.116", "1.8.0.1", "plan file is not compatible: expecting 1.8.0.1")
    assert not cuda.live


@pytest.mark.parametrize("module", ["tensorrt_rtx", "cuda.bindings.runtime"])
def test_a_module_that_is_not_installed(bundle: Bundle, monkeypatch, module: str) -> None:
    import importlib

    def missing(name: str) -> Any:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return SimpleNamespace()

    monkeypatch.setattr(importlib, "import_module", missing)
    fact = "library of the target" if module == "tensorrt_rtx" else "CUDA bindings"
    with pytest.raises(BundleError, match=fact) as caught:
        Session.open(bundle.root, target=TARGET)
    assert module in caught.value.note
    assert "pip install" in caught.value.hint


def test_out_of_device_memory(bundle: Bundle) -> None:
    cuda = FakeCuda(memory_bytes=1 << 20)
    refused(
        lambda: open_device_session(bundle, cuda=cuda),
        "out of memory",
        "The weights",
        "free are 1.0 of 1.0",
        error=NoDeviceError,
    )
    assert not cuda.live
    cuda = FakeCuda(memory_bytes=1_250_000)
    session, _, _ = open_device_session(bundle, cuda=cuda)
    with session:
        refused(lambda: session.generate([[1, 2, 3]] * 4, 5), "out of memory", "past_", "MiB", error=NoDeviceError)
        assert len(session.generate([[1, 2, 3]], 5)[0]) == 5  # and goes on with what fits
    assert not cuda.live


def test_the_plugin_library(copy: Bundle, monkeypatch, tmp_path: Path) -> None:
    entry = copy.manifest.targets[TARGET]
    made = change_manifest(copy, {**entry, "form": "plugin"})
    library = tmp_path / "plugin.so"
    monkeypatch.setenv("LORA_DROP_PLUGIN_LIB", str(library))
    cuda = FakeCuda()
    trt = FakeTrt(cuda)
    call = functools.partial(open_device_session, made, cuda=cuda, trt=trt)
    refused(call, "attention plugin is needed", str(library))
    library.write_bytes(b"something else")
    refused(call, "plugin cannot be loaded", "invalid ELF header")
    assert not cuda.live
    library.write_bytes(b"a plugin library")
    session, _, _ = call()
    again, _, _ = open_device_session(made, cuda=FakeCuda(), trt=trt)  # a library loads once in a process
    assert trt.libraries == [str(library)]
    again.close()
    assert_close(steps(session, 1), ort_steps(made, 1))
    session.close()
    assert trt.libraries == [str(library)]  # engines may outlive whoever loaded it
    monkeypatch.delenv("LORA_DROP_PLUGIN_LIB")
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    refused(call, "attention plugin is needed", "plugins/build/liblora_drop_plugin.so")


def test_engines_for_newer_gpus_and_versions(copy: Bundle) -> None:
    """hardware_compatible: any GPU from Ampere on; version_compatible: the engine brings code, to be allowed."""
    entry = copy.manifest.targets[TARGET]
    newer = FakeCuda(capability=(10, 3))
    refused(lambda: open_device_session(copy, cuda=newer), "other GPUs", "10.3", "8.6", error=NoDeviceError)
    made = change_manifest(copy, {**entry, "hardware_compatible": True})
    session, _, _ = open_device_session(made, cuda=FakeCuda(capability=(10, 3)))
    session.close()
    refused(
        lambda: open_device_session(made, cuda=FakeCuda(capability=(7, 5))), "other GPUs", "7.5", error=NoDeviceError
    )
    for kind in StepKind:
        path = copy.root / entry[kind.value]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host_code": True}))
    refused(lambda: open_device_session(copy), "cannot load an engine", "host code")
    session, _, _ = open_device_session(change_manifest(copy, {**entry, "version_compatible": True}))
    session.close()


def test_a_damaged_table_of_weights(copy: Bundle) -> None:
    path = copy.root / TARGET / "weights.json"
    table = json.loads(path.read_text())
    name = "model.norm.weight"
    whole = table[name]
    size = path.stat().st_size
    for entry, fact in (
        ({**whole, "parts": [[*whole["parts"][0][:2], 128]]}, "table of weights is damaged"),
        ({**whole, "shape": [65]}, "does not fit the bundle's manifest"),
        (None, "does not fit the bundle's manifest"),
    ):
        text = json.dumps({k: v for k, v in {**table, name: entry}.items() if v is not None})
        path.write_text(text.ljust(size))
        refused(lambda: open_device_session(Bundle.open(copy.root)), fact, name)


def test_a_step_outside_the_profiles(copy: Bundle) -> None:
    entry = copy.manifest.targets[TARGET]
    made = change_manifest(copy, {**entry, "prefill_chunk": 5})
    session, _, _ = open_device_session(made)
    with session:
        refused(lambda: session.prefill(np.array([[1, 2, 3, 4, 5]])), "not built", "(1, 5)", "(1, 1) to (4, 4)")


def test_what_io_problems_finds(bundle: Bundle) -> None:
    manifest = bundle.manifest
    weights = bundle.weight_inputs(TARGET)
    slots = {"slots_kept": 63, "slots_dropped": 51}
    io = manifest.io(REFRESH, TARGET)

    def tensors() -> Iterator[EngineTensor]:
        for specs, is_input in ((io.inputs, True), (io.outputs, False)):
            for spec in specs:
                shape = tuple(slots.get(d, -1) if isinstance(d, str) else d for d in spec.shape)
                yield EngineTensor(spec.name, spec.dtype, shape, is_input)
        yield EngineTensor("model.norm.weight", "float32", (64,), True)

    whole = {tensor.name: tensor for tensor in tensors()}
    assert io_problems(whole.values(), io, weights, slots) == []
    for name, change, expected in (
        ("len_kept", None, "len_kept is missing"),
        ("x", EngineTensor("x", "float32", (1,), True), "x is in no table"),
        ("logits", EngineTensor("logits", "float16", (-1, -1, 131), False), "logits has dtype float16 where float32"),
        ("past_key.0", EngineTensor("past_key.0", "float32", (-1, 2, 64, 16), True), "past_key.0 has shape"),
        ("model.norm.weight", EngineTensor("model.norm.weight", "float32", (65,), True), "model.norm.weight has shape"),
        ("next_token", EngineTensor("next_token", "int64", (-1, -1), True), "next_token has is_input True"),
    ):
        changed = {k: v for k, v in {**whole, name: change}.items() if v is not None}
        (problem,) = io_problems(changed.values(), io, weights, slots)
        assert expected in problem


@pytest.mark.parametrize("name", ["residual", "recurrent, attn_mlp", "nothing dropped"])
def test_networks_that_tensorrt_rtx_parses_have_the_tables_inputs_and_outputs(bundles, name: str) -> None:
    """No GPU is needed to parse; dtypes and shapes are those that the session binds."""
    import onnx

    from lora_drop_export.console import Console
    from lora_drop_export.targets.trt.build import EngineBuilder
    from lora_drop_export.targets.trt.options import BuilderOptions

    pytest.importorskip("tensorrt_rtx")
    made = bundles(name)
    builder = EngineBuilder(TARGET, made.root, BuilderOptions(), Console())
    entry = made.manifest.targets[TARGET]
    for kind in StepKind:
        proto = onnx.load(made.root / entry["graphs"][kind.value], load_external_data=False)
        _, network = builder.parse(proto)
        tensors = [
            EngineTensor(tensor.name, BY_TENSORRT[tensor.dtype.name].name, tuple(tensor.shape), is_input)
            for get, count, is_input in (
                (network.get_input, network.num_inputs, True),
                (network.get_output, network.num_outputs, False),
            )
            for tensor in map(get, range(count))
        ]
        slots = {f"slots_{group}": size for group, size in entry["slots"].items()}
        assert io_problems(tensors, made.manifest.io(kind, TARGET), made.weight_inputs(TARGET), slots) == []
        assert len(tensors) > 40


# ── mutants: each of these mistakes makes the comparison above fail ────────────────────────────────────────────


def _rebind(change: Callable[[StepKind, dict[str, Any], dict[str, Any]], None]) -> tuple[Any, str, Any]:
    prepare = TrtEngine.prepare

    def changed(self: TrtEngine, kind: StepKind, inputs: Any, outputs: Any) -> Any:
        inputs, outputs = dict(inputs), dict(outputs)
        change(kind, inputs, outputs)
        return prepare(self, kind, inputs, outputs)

    return TrtEngine, "prepare", changed


def _swap_kv(only: StepKind, layer: int) -> tuple[Any, str, Any]:
    def change(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        if kind is only:
            for names, prefix in ((inputs, "past"), (outputs, "present")):
                key, value = f"{prefix}_key.{layer}", f"{prefix}_value.{layer}"
                names[key], names[value] = names[value], names[key]

    return _rebind(change)


def _swap_layers(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if kind is LORA:
        for names, prefix in ((inputs, "past"), (outputs, "present")):
            a, b = f"{prefix}_key.0", f"{prefix}_key.1"
            names[a], names[b] = names[b], names[a]


def _write_elsewhere(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if kind is LORA:
        outputs["present_key.5"] = outputs["present_value.0"]


def _no_state_write(kind: StepKind, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    if kind is LORA:
        outputs["present_state.4"] = outputs["present_state.6"]


def _after_prefill(change: Callable[[Any], None]) -> tuple[Any, str, Any]:
    prefill = Request.prefill

    def changed(self: Any, ids: Any, lengths: Any) -> None:
        prefill(self, ids, lengths)
        change(self)

    return Request, "prefill", changed


def _kept_off_by_one(request: Any) -> None:
    request.len_kept -= 1


def _dropped_off_by_one(request: Any) -> None:
    request.len_dropped += 1


def _without_copy_of(name: str) -> tuple[Any, str, Any]:
    """The step no longer copies a host array in, once it has run a first time."""
    enqueue = EngineStep._enqueue

    def changed(self: Any) -> None:
        address = self._addresses.get(name)
        if self._ran:
            self._copies_in = [copy for copy in self._copies_in if copy[0] != address]
        enqueue(self)

    return EngineStep, "_enqueue", changed


def _one_side(self: Any, token_ids: Any, active: Any, step: Any = Request.step) -> None:
    step(self, token_ids, active)
    self.side = 0


def _lora_for_refresh(self: Any, ids: Any, rows: slice, index: Any, prepare: Any = Request._prepare_refresh) -> Any:
    return self._prepare_lora() if ids is self.input_ids else prepare(self, ids, rows, index)


def _reversed_parts(self: Bundle, target: str, table: Any = Bundle.weight_inputs) -> Any:
    import dataclasses

    return {k: dataclasses.replace(w, parts=w.parts[::-1]) for k, w in table(self, target).items()}


def _front_chunks(self: Any, ids: Any, lengths: Any, chunk: int) -> None:
    """Chunks from the front, all rows together: rows that have ended run on padding and lose logits and state."""
    for begin in range(0, ids.shape[1], chunk):
        part = np.ascontiguousarray(ids[:, begin : begin + chunk])
        self.logits_index[:, 0] = np.clip(lengths - begin - 1, 0, part.shape[1] - 1)
        self._prepare_refresh(part, slice(None), self.logits_index)()
        self.len_kept[:] = self.len_dropped[:] = np.minimum(lengths, begin + chunk)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "none": (PeriodicSchedule, "kind", PeriodicSchedule.kind),
    "K and V of a kept layer swapped in the LoRA step": _swap_kv(LORA, 5),
    "K and V of a kept layer swapped in the refresh": _swap_kv(REFRESH, 5),
    "two layers' K swapped in the LoRA step": _rebind(_swap_layers),
    "a missing K write": _rebind(_write_elsewhere),
    "a missing state write": _rebind(_no_state_write),
    "the kept slot off by one": _after_prefill(_kept_off_by_one),
    "the dropped slot off by one": _after_prefill(_dropped_off_by_one),
    "a stale len_kept": _without_copy_of("len_kept"),
    "a stale len_dropped": _without_copy_of("len_dropped"),
    "stale ids": _without_copy_of("input_ids"),
    "a refresh where a LoRA step is due, and the reverse": (
        PeriodicSchedule,
        "kind",
        lambda self, step, kind=PeriodicSchedule.kind: kind(self, step + 1),
    ),
    "the refresh engine for a LoRA step": (
        Request,
        "_prepare_lora",
        lambda self: self._prepare_refresh(self.input_ids, slice(None), self.logits_index),
    ),
    "the LoRA engine for a refresh": (Request, "_prepare_refresh", _lora_for_refresh),
    "the state's sides never change": (Request, "step", _one_side),
    "parts of fused weights in the wrong order": (Bundle, "weight_inputs", _reversed_parts),
    "caches that are not zeroed": (CudaDevice, "zero", lambda *_: None),
    "no wait for the step": (CudaDevice, "synchronize", lambda *_: None),
    "chunks from the front": (Request, "_prefill_rows_together", _front_chunks),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(bundle: Bundle, monkeypatch, name: str) -> None:
    expected = ort_steps(bundle, 2)
    monkeypatch.setattr(fake_trt.FakeExecutionContext, "checks_aliases", False)  # the logits alone have to tell
    monkeypatch.setattr(*MUTANTS[name])
    session, _, _ = open_device_session(bundle, 2)
    ours = steps(session)
    if name == "none":
        assert_close(ours, expected)
    else:
        with pytest.raises(AssertionError):
            assert_close(ours, expected)


@pytest.mark.parametrize("of_key", ["kind", "shapes"])
def test_a_graph_found_by_less_than_all_its_bindings_shows(bundle: Bundle, monkeypatch, of_key: str) -> None:
    """Captured graphs kept by step kind alone, or by kind and shapes but not by address (the state's sides)."""
    prepare = TrtEngine.prepare
    kept: dict[Any, Any] = {}

    def wrong(self: TrtEngine, kind: StepKind, inputs: Any, outputs: Any) -> Any:
        step = prepare(self, kind, inputs, outputs)
        shapes = tuple(value.shape for value in inputs.values()) if of_key == "shapes" else None
        return kept.setdefault((kind, shapes), step) if step.keeps_context else step

    monkeypatch.setattr(TrtEngine, "prepare", wrong)
    session, _, _ = open_device_session(bundle)
    if of_key == "kind":
        session.generate([*RAGGED, [1]], 9, k=2)  # a larger batch first, so that no buffer is replaced
    ours = steps(session, 2)
    with pytest.raises(AssertionError):
        assert_close(ours, ort_steps(bundle, 2))


def test_an_in_place_output_elsewhere_is_refused(bundle: Bundle, monkeypatch) -> None:
    monkeypatch.setattr(*MUTANTS["a missing K write"])
    session, _, _ = open_device_session(bundle)
    with session, pytest.raises(BundleError, match="cannot run a step") as caught:
        steps(session)
    assert "present_key.5 must be bound to the address of past_key.5" in caught.value.note


# ── the fakes against the real libraries ───────────────────────────────────────────────────────────────────────


def test_cuda_functions_have_the_real_signatures() -> None:
    """Each function that cuda_device.py names exists, takes as many arguments, and is faked with the same names."""
    real = pytest.importorskip("cuda.bindings.runtime")
    tree = ast.parse(Path(cuda_device_module.__file__).read_text())
    used = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "_call" and isinstance(node.args[0], ast.Constant):
                used[node.args[0].value] = len(node.args) - 1
            elif node.func.attr.startswith("cuda"):
                used[node.func.attr] = len(node.args)
    assert len(used) >= 19
    for name, count in used.items():
        theirs = list(inspect.signature(getattr(real, name)).parameters)
        ours = list(inspect.signature(getattr(FakeCuda, name)).parameters)[1:]
        assert theirs == ours, name
        assert len(theirs) == count, name
    for enumeration in ("cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr", "cudaStreamCaptureMode"):
        for member in getattr(fake_cuda, enumeration):
            assert int(getattr(getattr(real, enumeration), member.name)) == member, member
    assert FakeCuda.cudaStreamNonBlocking == real.cudaStreamNonBlocking
    assert int(real.cudaStream_t(5)) == 5


def test_the_real_cuda_bindings_without_a_gpu(bundle: Bundle) -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    error, _ = real.cudaGetDeviceCount()
    if not error:
        pytest.skip("this machine has a GPU")
    with pytest.raises(NoDeviceError, match="no GPU"):
        CudaDevice()
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(NoDeviceError, match="no GPU"):
        Session.open(bundle.root, target=TARGET)


def test_tensorrt_classes_have_what_the_fakes_have() -> None:
    """Every method and property of the fakes that engine_trt.py uses, with the parameters' names."""
    trt = pytest.importorskip("tensorrt_rtx")
    pairs = {
        "Runtime": fake_trt.FakeRuntime,
        "ICudaEngine": fake_trt.FakeCudaEngine,
        "IExecutionContext": fake_trt.FakeExecutionContext,
        "IRuntimeConfig": fake_trt.FakeRuntimeConfig,
        "IPluginRegistry": fake_trt.FakePluginRegistry,
        "ILogger": fake_trt.ILogger,
    }
    source = "".join(
        map(inspect.getsource, (engine_trt, io_check, plans_module, plugin_module, step_module, trt_library))
    )
    checked = 0
    for name, fake in pairs.items():
        for member, value in vars(fake).items():
            if member.startswith("_") or not callable(value) or f".{member}(" not in source:
                continue
            documented = getattr(getattr(trt, name), member).__doc__
            signatures = re.findall(rf"{member}\(self: [\w.]+(?:, )?(.*)\) ->", documented)
            names = [re.findall(r"(?:^|, )(\w+): ", signature) for signature in signatures]
            ours = list(inspect.signature(value).parameters)[1:]
            if member == "create_execution_context":
                assert sorted(n[0] for n in names) == ["runtime_config", "strategy"]
            else:
                assert ours in names, (name, member, names)
            checked += 1
    assert checked > 15
    for name in ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"):
        assert isinstance(getattr(trt.ICudaEngine, name), property)
    assert isinstance(trt.IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy, property)
    for enumeration in ("ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):
        for member in getattr(fake_trt, enumeration):
            assert int(getattr(getattr(trt, enumeration), member.name)) == member.value or member.name in dir(
                getattr(trt, enumeration)
            )
    for member in fake_trt.ILogger.Severity:
        assert int(getattr(trt.ILogger.Severity, member.name)) == member
    assert trt.ILogger.Severity.INTERNAL_ERROR <= trt.ILogger.Severity.ERROR < trt.ILogger.Severity.WARNING
    assert {member.name for member in fake_trt.DataType} <= set(trt.DataType.__members__)


def test_the_real_logger_and_runtime(bundle: Bundle) -> None:
    """As far as TensorRT-RTX goes without a GPU: its runtime refuses a plan, and our logger hears why."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = error_logger(trt)
    runtime = trt.Runtime(logger)
    assert runtime.deserialize_cuda_engine(b"this is no engine") is None
    assert logger.lines
    assert runtime.get_plugin_registry() is not None
