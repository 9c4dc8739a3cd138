"""The kernel that chooses tokens on the device, its very source on the host, against float64 written apart.

NVRTC compiles the same source here for the GPUs that it knows; it was run on none.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime import BundleError, SamplingOptions
from lora_drop_runtime.decoding.sampling import RowSampler
from lora_drop_runtime.engines.trt.kernels import ADDRESSES, NUMBERS, SOURCE, Choice, compiled
from numpy.typing import NDArray

from tests.support.fake_cuda import FakeCuda
from tests.support.kernel_build import chooser_on_host

Arrays = dict[str, NDArray[Any]]
NUMBERS_OF_A_STEP = {"window_width": 4, "place": 2, "kept": 1, "dropped": 0, "back": 0, "next_width": 1}


def made(logits: NDArray[np.float32], options: SamplingOptions, draws: int = 1) -> Arrays:
    """What a launch over logits [B, V] reads and writes."""
    rows, vocab = logits.shape
    return {
        "logits": np.ascontiguousarray(logits, np.float32),
        "next_token": logits.argmax(axis=1).astype(np.int64),
        "uniforms": np.zeros((draws, rows)),
        "top_p": np.full(rows, options.top_p),
        "top_k": np.full(rows, options.top_k, np.int64),
        "temperature": np.full(rows, options.temperature, np.float32),
        "penalty": np.full(rows, options.repetition_penalty, np.float32),
        "new_tokens": np.full(rows, 10**6, np.int32),
        "stops": np.zeros((rows, vocab), np.uint8),
        "seen": np.zeros((rows, vocab), np.uint8),
        "ids": np.full((rows, 1), -7, np.int64),
        "window": np.full((rows, 4), -7, np.int64),
        "len_kept": np.arange(10, 10 + rows),
        "len_dropped": np.arange(5, 5 + rows),
        "tokens": np.full(rows, -7, np.int64),
        "drawn": np.zeros(rows, np.int32),
        "over": np.zeros(rows, np.int32),
    }


def launch(arrays: Arrays, order: int = 0, **numbers: int) -> NDArray[np.int64]:
    """The tokens [B]."""
    rows, vocab = arrays["logits"].shape
    sizes = NUMBERS_OF_A_STEP | {"rows": rows, "vocab": vocab, "most_kept": 100, "most_dropped": 100} | numbers
    assert set(sizes) == set(NUMBERS)
    choice = Choice(**{name: arrays[name].ctypes.data for name in ADDRESSES}, **sizes)
    chooser_on_host().choose_tokens(ctypes.byref(choice), order)
    return arrays["tokens"].copy()


def probabilities(logits: NDArray[Any], options: SamplingOptions, seen: list[int]) -> NDArray[np.float64]:
    """Of each token [V], in float64: penalty, temperature, top-k with its ties, top-p."""
    scores = logits.astype(np.float64)
    for token in seen:
        scores[token] *= options.repetition_penalty if scores[token] < 0 else 1 / options.repetition_penalty
    likely = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if options.top_k:
        worst = scores[likely[min(options.top_k, len(likely)) - 1]]
        likely = [token for token in likely if scores[token] >= worst]
    weights = np.zeros(len(scores))
    for token in likely:
        weights[token] = np.exp((scores[token] - scores.max()) / options.temperature)
    weights /= weights.sum()
    kept, mass = [], 0.0
    for token in likely:
        kept.append(token)
        mass += weights[token]
        if mass >= options.top_p * (1 - 1e-12):
            break
    found = np.zeros(len(scores))
    found[kept] = weights[kept] / weights[kept].sum()
    return found


OPTIONS = [
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.3),
    SamplingOptions(temperature=50.0),
    SamplingOptions(temperature=1.0, top_k=7),
    SamplingOptions(temperature=0.7, top_p=0.8),
    SamplingOptions(temperature=1.3, top_k=40, top_p=0.5, repetition_penalty=1.4),
    SamplingOptions(temperature=0.9, top_k=10**6, top_p=0.999, repetition_penalty=0.8),
    SamplingOptions(temperature=1.0, top_p=1e-9),
    SamplingOptions(temperature=1e-8),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_part_of_the_unit_interval_is_the_right_token(options: SamplingOptions) -> None:
    """A grid of numbers in [0, 1), a row each: how often a token comes is its probability, up to the grid."""
    generator = np.random.default_rng(3)
    rows, vocab, seen = 400, 300, [3, 5, 200]
    logits = (generator.standard_normal(vocab) * 3).astype(np.float32)
    logits[[17, 18, 250]] = logits[40]  # ties
    logits[9] = -np.inf
    arrays = made(np.tile(logits, (rows, 1)), options)
    arrays["seen"][:, seen] = 1
    arrays["uniforms"][0] = (np.arange(rows) + 0.5) / rows
    tokens = launch(arrays)
    expected = probabilities(logits, options, seen)
    counts = np.bincount(tokens, minlength=vocab)
    assert not counts[expected == 0].any()
    # A token is one piece of the interval: at most one point of the grid more or less than its length holds
    assert np.abs(counts - expected * rows).max() <= 1 + 1e-3
    order = tokens if options.top_p == 1 else -expected[tokens]  # by id, or from the likeliest on
    assert (np.diff(order) >= -1e-12).all()


@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_a_seed_draws_what_it_draws_on_the_host(options: SamplingOptions) -> None:
    """The host's own sampler, its random numbers handed over, over 40 tokens: the same ones."""
    logits = (np.random.default_rng(8).standard_normal((40, 1000)) * 4).astype(np.float32)
    prompt = np.array([1, 2, 3])
    host, ahead = (RowSampler(options, prompt, np.random.SeedSequence(11), 0) for _ in range(2))
    arrays = made(logits[:1], options, draws=40)
    arrays["seen"][0, prompt] = 1
    arrays["uniforms"][:, 0] = ahead.generator.random(40)
    for step in logits:
        arrays["logits"][0] = step
        assert launch(arrays, kept=0)[0] == host.take(step)


def test_a_large_vocabulary_with_flat_logits() -> None:
    """Ids of more than 16 bits; every token is a piece of the interval, also the last ones."""
    vocab = 70_000
    for options in (SamplingOptions(temperature=1.0), SamplingOptions(temperature=1.0, top_p=0.5)):
        arrays = made(np.zeros((3, vocab), np.float32), options)
        arrays["uniforms"][0] = [0.0, 0.99999, 1 - 2**-53]
        # All are alike: of top_p the lower half is left
        kept = vocab if options.top_p == 1 else vocab // 2
        assert launch(arrays).tolist() == [0, int(0.99999 * kept), kept - 1]


def test_draws_follow_the_distribution() -> None:
    """χ² of 2000 draws over the 20 tokens that top-k leaves: 43.8 is the 0.1 % point of 19 degrees of freedom."""
    options = SamplingOptions(temperature=1.2, top_k=20)
    logits = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    arrays = made(np.tile(logits, (2000, 1)), options)
    arrays["uniforms"][0] = np.random.default_rng(2).random(2000)
    expected = 2000 * probabilities(logits, options, [])
    counts = np.bincount(launch(arrays), minlength=64)
    there = expected > 0
    assert there.sum() == 20
    assert not counts[~there].any()
    assert ((counts - expected)[there] ** 2 / expected[there]).sum() < 43.8


def test_the_order_of_threads_changes_nothing() -> None:
    options = SamplingOptions(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.2)
    logits = np.random.default_rng(4).standard_normal((6, 700)).astype(np.float32)
    found = []
    for order in (0, -1, 1, 2, 3):
        arrays = made(logits, options)
        arrays["uniforms"][0] = np.linspace(0, 0.999, 6)
        arrays["seen"][:, ::3] = 1
        found.append(launch(arrays, order).tolist())
    assert all(tokens == found[0] for tokens in found)


def test_greedy_with_and_without_a_penalty() -> None:
    logits = np.array([[1, 5, 5, -2], [4, 3.9, 1, 0], [-1, -3, -2, -1.5]], np.float32)
    arrays = made(logits, SamplingOptions())
    arrays["next_token"][:] = [2, 0, 3]  # the engine's choice is taken as it is
    assert launch(arrays).tolist() == [2, 0, 3]
    arrays = made(logits, SamplingOptions(repetition_penalty=1.3))
    arrays["seen"][1, 0] = arrays["seen"][2, 0] = 1
    assert launch(arrays).tolist() == [1, 1, 0]  # a tie: the lowest id; 4 / 1.3 < 3.9; −1 · 1.3 > −1.5
    assert arrays["seen"][1].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("options", [SamplingOptions(temperature=1.0), SamplingOptions(repetition_penalty=1.5)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_their_row_alone(options: SamplingOptions, value: float) -> None:
    logits = np.zeros((3, 200), np.float32)
    logits[:, 60] = 9
    logits[1, 150] = value
    logits[2] = -np.inf
    arrays = made(logits, options)
    assert launch(arrays).tolist()[1:] == [-1, -1]
    assert arrays["tokens"][0] >= 0
    assert arrays["over"].tolist() == [0, 1, 1]
    assert arrays["ids"][1:].tolist() == [[0], [0]]  # what is fed all the same is a token


def test_rows_move_on() -> None:
    """Lengths, ids and window before the next step, of a row that goes on, one that stops and one that was over."""
    logits = np.zeros((3, 8), np.float32)
    arrays = made(logits, SamplingOptions())
    arrays["next_token"][:] = [4, 6, 4]
    arrays["stops"][1:, 6] = 1
    arrays["over"][2] = 1
    launch(arrays, kept=1, dropped=1, back=3, next_width=4, most_kept=100, most_dropped=7)
    assert arrays["over"].tolist() == [0, 1, 1]
    assert arrays["len_kept"].tolist() == [10 + 1 - 3, 11 + 1, 12]
    assert arrays["len_dropped"].tolist() == [5 + 1, 7 - 4, 7 - 4]  # 4 more would not fit behind rows that are over
    assert arrays["ids"].tolist() == [[4], [6], [4]]
    assert arrays["window"].tolist() == [[-7, -7, 4, -7], [-7, -7, 6, -7], [-7, -7, 4, -7]]
    assert arrays["drawn"].tolist() == [1, 1, 1]
    assert arrays["seen"].any(axis=1).tolist() == [True, False, False]


# ── compiling it ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("capability", ["7.5", "12.0"])
def test_nvrtc_compiles_it_without_a_gpu(capability: str) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:
        pytest.skip(f"NVRTC is not installed (pip install nvidia-cuda-nvrtc): {error}")
    image = compiled(nvrtc, SOURCE.read_bytes(), capability)
    assert image.startswith(b"\x7fELF")
    assert b"choose_tokens" in image
    with pytest.raises(BundleError, match="cannot be compiled") as caught:
        compiled(nvrtc, SOURCE.read_bytes(), "3.5")
    assert "nvrtcCompileProgram" in caught.value.note


def test_without_nvrtc() -> None:
    with pytest.raises(BundleError, match="cannot be compiled") as caught:
        compiled(FakeCuda(), SOURCE.read_bytes(), "8.9")
    assert "libnvrtc.so was not found" in caught.value.note
    assert "pip install nvidia-cuda-nvrtc" in caught.value.hint
