"""Stage `speed`: the attention kernel's time, against the bandwidth of the same GPU and against PyTorch's attention.

A contestant's calls are captured in one CUDA graph that walks over several caches, together larger than the L2 cache,
so neither launches nor cache hits are timed. Contestants take turns; medians are reported:

    kernel    norm-free step with RoPE, append and attention
    copy      as many device-to-device copies, each of half the bytes that a decode step reads: they are read and
              written, so that launches weigh alike in both, however few bytes there are
    sdpa      torch's scaled_dot_product_attention over the same lengths (attention alone), if torch sees the GPU
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_check.cuda import ELEMENT_BYTES, Gpu, kernels
from gpu_check.job import Failed, Job, Skip

LAYOUTS = {"Llama-3-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}  # heads, kv heads, head size
REPEATS = 21
LEAST_OF_COPY = 0.6
JUDGED_LENGTH, JUDGED_GROUP = 4096, 4  # what the bar holds for


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (512, 4096, 32768)
    prompts: tuple[int, ...] = (512, 2048)
    copy_bytes: int = 1 << 29
    repeats: int = REPEATS


TINY = Sizes((2,), (40,), (20,), 1 << 16, 2)


@dataclass(frozen=True)
class Attention:
    """One call: rows with `length` slots filled that get `new_tokens`."""

    layout: str
    batch: int
    length: int
    new_tokens: int = 1

    @property
    def kv_bytes(self) -> int:
        """Of the valid slots, after the call."""
        _, kv_heads, head_dim = LAYOUTS[self.layout]
        return 2 * self.batch * kv_heads * (self.length + self.new_tokens - 1) * head_dim * ELEMENT_BYTES


def kernel_contestant(
    gpu: Gpu, library: Any, allocate: Callable[[int], int], shape: Attention, caches: int
) -> Callable[[], float]:
    from plugins.kernels.binding import DTYPE_CODES, LoraDropAttention

    heads, kv_heads, head_dim = LAYOUTS[shape.layout]
    slots = shape.length + shape.new_tokens + 64  # the valid length counts, not the capacity
    rows = shape.batch * shape.new_tokens
    lengths = allocate(8 * shape.batch)
    gpu.device.upload(lengths, np.full(shape.batch, shape.length, np.int64))
    shared = {
        "query": gpu.random(allocate, rows * heads * head_dim),
        "key": gpu.random(allocate, rows * kv_heads * head_dim),
        "value": gpu.random(allocate, rows * kv_heads * head_dim),
        "cos": gpu.random(allocate, rows * head_dim // 2),
        "sin": gpu.random(allocate, rows * head_dim // 2),
        "output": allocate(rows * heads * head_dim * ELEMENT_BYTES),
    }
    calls = []
    for _ in range(caches):
        call = LoraDropAttention(
            batch=shape.batch,
            new_tokens=shape.new_tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            slots=slots,
            rotary_dim=head_dim,
            dtype=DTYPE_CODES["bf16"],
            kv_dtype=DTYPE_CODES["bf16"],
            scale=head_dim**-0.5,
            length=lengths,
            key_cache=gpu.random(allocate, shape.batch * kv_heads * slots * head_dim),
            value_cache=gpu.random(allocate, shape.batch * kv_heads * slots * head_dim),
            **shared,
        )
        calls.append(call)
    workspace_bytes = library.lora_drop_workspace_bytes(calls[0], gpu.multiprocessors)
    workspace = allocate(max(workspace_bytes, 1))

    def enqueue() -> None:
        for call in calls:
            call.workspace = workspace
            problem = library.lora_drop_attention_problem(call)
            assert problem is None, problem
            error = library.lora_drop_attention(call, workspace_bytes, gpu.multiprocessors, gpu.device.stream)
            assert error == 0, f"CUDA error {error}"

    seconds = gpu.captured(enqueue)
    return lambda: seconds() / caches


def sdpa_contestant(shape: Attention, caches: int) -> Callable[[], float] | None:
    """None where PyTorch is not installed, or sees no GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    heads, kv_heads, head_dim = LAYOUTS[shape.layout]
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(shape.batch, heads, shape.new_tokens, head_dim, **options)
    slots = shape.length + shape.new_tokens - 1
    kv = [torch.randn(2, shape.batch, kv_heads, slots, head_dim, **options) for _ in range(caches)]
    causal = shape.new_tokens > 1

    def attend() -> None:
        for key, value in kv:
            torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=heads != kv_heads
            )

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / caches

    return seconds


def cache_count(gpu: Gpu, shape: Attention) -> int:
    return max(2, -(-4 * gpu.l2_bytes // shape.kv_bytes)) if shape.new_tokens == 1 else 2


def fits(gpu: Gpu, shape: Attention) -> bool:
    """The kernel's caches, and PyTorch's and what is copied beside them, with a fifth for all else; PyTorch keeps what
    it once took."""
    return 3.6 * cache_count(gpu, shape) * shape.kv_bytes < gpu.free_bytes


def time_call(gpu: Gpu, library: Any, shape: Attention, sizes: Sizes, copy_rate: float) -> dict[str, Any]:
    """Args:
    copy_rate: bytes a second that one large copy reads and writes.
    """
    caches, decodes = cache_count(gpu, shape), shape.new_tokens == 1
    with gpu.memory() as allocate:
        contestants = {"kernel": kernel_contestant(gpu, library, allocate, shape, caches)}
        if decodes:
            contestants["copy"] = gpu.copies_contestant(allocate, shape.kv_bytes // 2, caches)
        sdpa = sdpa_contestant(shape, caches)
        if sdpa is not None:
            contestants["sdpa"] = sdpa
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(sizes.repeats):
            for name, seconds in contestants.items():
                samples[name].append(seconds())
    median = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "layout": shape.layout,
        "batch": shape.batch,
        "length": shape.length,
        "new_tokens": shape.new_tokens,
        "kv_bytes": shape.kv_bytes,
        "kernel_us": median["kernel"] * 1e6,
        "kernel_us_min_max": [min(samples["kernel"]) * 1e6, max(samples["kernel"]) * 1e6],
        "of_copy_rate": median["copy"] / median["kernel"] if decodes else None,
        "of_large_copy_rate": shape.kv_bytes / median["kernel"] / copy_rate,
        "sdpa_us": median["sdpa"] * 1e6 if sdpa is not None else None,
    }


def too_slow(call: dict[str, Any]) -> bool:
    """Whether a decode step is below the bar, where the bar holds."""
    heads, kv_heads, _ = LAYOUTS[call["layout"]]
    judged = call["new_tokens"] == 1 and call["length"] >= JUDGED_LENGTH and heads // kv_heads <= JUDGED_GROUP
    return bool(judged and call["of_copy_rate"] < LEAST_OF_COPY)


def judge(calls: list[dict[str, Any]]) -> None:
    """Raises Failed with the calls that are below the bar."""
    slow = [f"{c['layout']} {c['batch']} × {c['length']}: {c['of_copy_rate']:.0%}" for c in calls if too_slow(c)]
    if slow:
        raise Failed(f"below {LEAST_OF_COPY:.0%} of the copy rate: {', '.join(slow)}")


def run(job: Job) -> None:
    gpu = Gpu(job)
    library = kernels(job, gpu)
    sizes = TINY if job.stand_in else Sizes()
    rate = gpu.copy_rate(sizes.copy_bytes)
    job.numbers["copy_bytes_per_s"] = rate
    job.say(f"copy: {rate / 1e9:.0f} GB/s")
    calls: list[dict[str, Any]] = []
    job.numbers["calls"] = calls
    shapes = [Attention(n, b, length) for n in LAYOUTS for b in sizes.batches for length in sizes.lengths]
    shapes += [Attention("Llama-3-8B", 1, 0, tokens) for tokens in sizes.prompts]
    for shape in shapes:
        if not fits(gpu, shape):
            job.say(f"{shape.layout} {shape.batch} × {shape.length}: skip: too little device memory is free")
            continue
        call = time_call(gpu, library, shape, sizes, rate)
        calls.append(call)
        sdpa = "" if call["sdpa_us"] is None else f", sdpa {call['sdpa_us']:.1f} µs"
        share = f", {call['of_copy_rate']:.0%} of copy" if shape.new_tokens == 1 else ""
        tokens = f", {shape.new_tokens} new" if shape.new_tokens > 1 else ""
        job.say(f"{shape.layout} {shape.batch} × {shape.length}{tokens}: {call['kernel_us']:.1f} µs{share}{sdpa}")
    if not calls:
        raise Skip("too little device memory is free for any of the calls")
    if not job.stand_in:
        judge(calls)
