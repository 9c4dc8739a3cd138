"""Times the attention kernel of one decode step on a GPU, against the bandwidth of the same GPU.

    python plugins/bench.py [--library plugins/build/liblora_drop_kernels.so] [--json bench.json]

A contestant's calls are captured in one CUDA graph that walks over several caches, together larger than the L2 cache,
so neither launches nor cache hits are timed. Contestants take turns; medians are reported:

    kernel    norm-free decode step with RoPE, append and attention
    copy      one device-to-device copy, which reads and writes its bytes once
    sdpa      torch's scaled_dot_product_attention over the same lengths (attention alone), if torch sees the GPU

Exits with code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # plugins/ is no installed package, and a script finds only its own folder

from plugins.kernels.binding import DTYPE_CODES, LoraDropAttention, load_library  # noqa: E402

LAYOUTS = {"Llama-3-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}
LENGTHS = (512, 4096, 32768)
BATCHES = (1, 8)
REPEATS = 21
COPY_BYTES = 1 << 29
ELEMENT_BYTES = 2  # bf16


def done(result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime returned; its error raised."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(str(error))
    return values[0] if values else None


class Allocations:
    """Device memory for the length of a `with`."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.pointers: list[int] = []

    def __enter__(self) -> Callable[[int], int]:
        return self.allocate

    def __exit__(self, *_: object) -> None:
        done(self.cuda.cudaDeviceSynchronize())
        for pointer in self.pointers:
            done(self.cuda.cudaFree(pointer))

    def allocate(self, size_bytes: int) -> int:
        self.pointers.append(int(done(self.cuda.cudaMalloc(size_bytes))))
        return self.pointers[-1]


class NoGpuError(Exception):
    pass


class Gpu:
    """The first GPU, through cuda-python."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise NoGpuError("cuda-python is not installed") from error
        self.cuda = runtime
        error, count = runtime.cudaGetDeviceCount()
        if int(error) != 0 or count == 0:
            raise NoGpuError(str(error))
        properties = done(runtime.cudaGetDeviceProperties(0))
        self.multiprocessors = properties.multiProcessorCount
        self.l2_bytes = properties.l2CacheSize
        driver, version = done(runtime.cudaDriverGetVersion()), done(runtime.cudaRuntimeGetVersion())
        self.description = (
            f"{properties.name.decode()}, {self.multiprocessors} SMs, CUDA driver {driver}, runtime {version}"
        )
        self.stream = done(runtime.cudaStreamCreate())
        self.noise = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32).view(np.uint16)[1::2].copy()

    def memory(self) -> Allocations:
        return Allocations(self.cuda)

    def upload(self, to: int, array: np.ndarray) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        done(self.cuda.cudaMemcpy(to, array.ctypes.data, array.nbytes, kind))

    def random(self, allocate: Callable[[int], int], elements: int) -> int:
        """Normal numbers in bf16 (float32 cut off), the same few megabytes over and over."""
        pointer = allocate(elements * ELEMENT_BYTES)
        for start in range(0, elements, self.noise.size):
            self.upload(pointer + start * ELEMENT_BYTES, self.noise[: elements - start])
        return pointer

    def copy_contestant(self) -> Callable[[], float]:
        """Seconds of one copy of COPY_BYTES. Its memory stays for the whole run."""
        source, to = (done(self.cuda.cudaMalloc(COPY_BYTES)) for _ in range(2))
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def enqueue(stream: int) -> None:
            done(self.cuda.cudaMemcpyAsync(to, source, COPY_BYTES, kind, stream))

        return self.captured(enqueue)

    def captured(self, enqueue: Callable[[int], None]) -> Callable[[], float]:
        """Captures what `enqueue` puts on a stream; the result runs it once and returns the seconds."""
        cuda, stream = self.cuda, self.stream
        enqueue(int(stream))  # loads the kernels, which a capture does not allow
        done(cuda.cudaStreamSynchronize(stream))
        done(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
        enqueue(int(stream))
        graph = done(cuda.cudaGraphInstantiate(done(cuda.cudaStreamEndCapture(stream)), 0))
        start, end = done(cuda.cudaEventCreate()), done(cuda.cudaEventCreate())

        def seconds() -> float:
            done(cuda.cudaEventRecord(start, stream))
            done(cuda.cudaGraphLaunch(graph, stream))
            done(cuda.cudaEventRecord(end, stream))
            done(cuda.cudaEventSynchronize(end))
            return float(done(cuda.cudaEventElapsedTime(start, end))) / 1e3

        for _ in range(3):
            seconds()
        return seconds


def kernel_contestant(
    gpu: Gpu, library: ctypes.CDLL, allocate: Callable[[int], int], layout: str, batch: int, length: int, caches: int
) -> Callable[[], float]:
    heads, kv_heads, head_dim = LAYOUTS[layout]
    slots = length + 64  # the valid length counts, not the capacity
    cache_bytes = batch * kv_heads * slots * head_dim * ELEMENT_BYTES
    lengths = allocate(8 * batch)
    gpu.upload(lengths, np.full(batch, length, np.int64))
    shared = {
        "query": gpu.random(allocate, batch * heads * head_dim),
        "key": gpu.random(allocate, batch * kv_heads * head_dim),
        "value": gpu.random(allocate, batch * kv_heads * head_dim),
        "cos": gpu.random(allocate, batch * head_dim // 2),
        "sin": gpu.random(allocate, batch * head_dim // 2),
        "output": allocate(batch * heads * head_dim * ELEMENT_BYTES),
    }
    calls = []
    for _ in range(caches):
        call = LoraDropAttention(
            batch=batch,
            new_tokens=1,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            slots=slots,
            rotary_dim=head_dim,
            dtype=DTYPE_CODES["bf16"],
            kv_dtype=DTYPE_CODES["bf16"],
            scale=head_dim**-0.5,
            length=lengths,
            key_cache=gpu.random(allocate, cache_bytes // ELEMENT_BYTES),
            value_cache=gpu.random(allocate, cache_bytes // ELEMENT_BYTES),
            **shared,
        )
        calls.append(call)
    workspace_bytes = library.lora_drop_workspace_bytes(calls[0], gpu.multiprocessors)
    workspace = allocate(max(workspace_bytes, 1))

    def enqueue(stream: int) -> None:
        for call in calls:
            call.workspace = workspace
            problem = library.lora_drop_attention_problem(call)
            assert problem is None, problem
            error = library.lora_drop_attention(call, workspace_bytes, gpu.multiprocessors, stream)
            assert error == 0, f"CUDA error {error}"

    seconds = gpu.captured(enqueue)
    return lambda: seconds() / caches


def sdpa_contestant(layout: str, batch: int, length: int, caches: int) -> Callable[[], float] | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    heads, kv_heads, head_dim = LAYOUTS[layout]
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(batch, heads, 1, head_dim, **options)
    kv = [torch.randn(2, batch, kv_heads, length, head_dim, **options) for _ in range(caches)]

    def attend() -> None:
        for key, value in kv:
            torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=heads != kv_heads)

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
        return start.elapsed_time(end) / 1e3 / caches

    return seconds


def time_step(
    gpu: Gpu, library: ctypes.CDLL, layout: str, batch: int, length: int, copy_seconds: Callable[[], float]
) -> dict[str, Any]:
    _, kv_heads, head_dim = LAYOUTS[layout]
    kv_bytes = 2 * batch * kv_heads * length * head_dim * ELEMENT_BYTES
    caches = max(2, -(-4 * gpu.l2_bytes // kv_bytes))
    contestants = {"copy": copy_seconds}
    with gpu.memory() as allocate:
        contestants["kernel"] = kernel_contestant(gpu, library, allocate, layout, batch, length, caches)
        sdpa = sdpa_contestant(layout, batch, length, caches)
        if sdpa is not None:
            contestants["sdpa"] = sdpa
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(REPEATS):
            for name, seconds in contestants.items():
                samples[name].append(seconds())
    median = {name: statistics.median(values) for name, values in samples.items()}
    copy_bandwidth = 2 * COPY_BYTES / median["copy"]
    return {
        "layout": layout,
        "batch": batch,
        "length": length,
        "valid_kv_bytes": kv_bytes,
        "kernel_us": median["kernel"] * 1e6,
        "kernel_us_min_max": [min(samples["kernel"]) * 1e6, max(samples["kernel"]) * 1e6],
        "kernel_bytes_per_s": kv_bytes / median["kernel"],
        "of_copy_bandwidth": kv_bytes / median["kernel"] / copy_bandwidth,
        "sdpa_us": median["sdpa"] * 1e6 if sdpa is not None else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=ROOT / "plugins" / "build" / "liblora_drop_kernels.so")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    try:
        gpu = Gpu()
    except NoGpuError as error:
        print(f"no GPU, nothing is timed: {error}", file=sys.stderr)
        return 2
    library = load_library(arguments.library)

    copy_seconds = gpu.copy_contestant()
    copy_bandwidth = 2 * COPY_BYTES / statistics.median(copy_seconds() for _ in range(REPEATS))
    results: dict[str, Any] = {"gpu": gpu.description, "copy_bytes_per_s": copy_bandwidth, "steps": []}
    print(f"{gpu.description}; device-to-device copy {copy_bandwidth / 1e9:.0f} GB/s, bf16")
    print(f"{'layout':14}{'batch':>6}{'length':>8}{'kernel µs':>11}{'GB/s':>7}{'of copy':>9}{'sdpa µs':>9}")
    for layout in LAYOUTS:
        for batch in BATCHES:
            for length in LENGTHS:
                step = time_step(gpu, library, layout, batch, length, copy_seconds)
                results["steps"].append(step)
                sdpa = "–" if step["sdpa_us"] is None else f"{step['sdpa_us']:.1f}"
                print(
                    f"{layout:14}{batch:6}{length:8}{step['kernel_us']:11.1f}{step['kernel_bytes_per_s'] / 1e9:7.0f}"
                    f"{step['of_copy_bandwidth']:9.0%}{sdpa:>9}",
                    flush=True,
                )
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
