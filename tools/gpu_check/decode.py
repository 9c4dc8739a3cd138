"""Stage `decode`: tokens a second of a large model, full schedule and LoRA-Drop, against the card's copy rate and
against transformers with a static cache and torch.compile, in one run.

The model has the shape of Llama-3-8B, or of a smaller one where memory is short, and random weights made here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu_check.bundles import TINY_LENGTHS, need_exporter, small_checkpoint, timed
from gpu_check.cuda import Gpu
from gpu_check.engines import options_here
from gpu_check.job import Job, Skip
from gpu_check.ort import BUILT, built, need_provider

RATIOS = (0.5, 0.25)
WINDOW = 3
AIM = 0.85  # of the copy rate
LENGTHS = {"prompt": 128, "new_tokens": 129}
# Shapes of Llama 3, as far as they differ from the largest
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
}
WEIGHT_BYTES = {"8B": 16.1e9, "3B": 7.2e9, "1B": 3.0e9}  # bf16, the embedding and the head apart
ROOM = 1.25  # of the weights, for what runs them


def chosen_shape(free_bytes: int, disk_bytes: int) -> str:
    """The largest that fits; weights lie on the disk once more for int4. Raises Skip."""
    for name, size in WEIGHT_BYTES.items():
        if ROOM * size <= free_bytes and 2 * size <= disk_bytes:
            return name
    raise Skip(
        f"{free_bytes / 2**30:.1f} GiB of device memory and {disk_bytes / 2**30:.1f} of disk are free, too little"
    )


def fill(file: Path) -> int:
    """Random weights in the place of a safetensors file's hole: bf16, normal numbers of size 0.02, norms 1."""
    noise = np.random.default_rng(0).normal(scale=0.02, size=1 << 24).astype(np.float32).view(np.uint16)[1::2].copy()
    ones = np.full(1 << 16, 0x3F80, np.uint16)
    with file.open("r+b") as weights:
        size = int.from_bytes(weights.read(8), "little")
        header = json.loads(weights.read(size))
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            weights.seek(8 + size + begin)
            source = ones if "norm" in name else noise
            left = (end - begin) // 2
            while left:
                piece = source[:left]
                weights.write(piece.tobytes())
                left -= piece.size
    return int(end)


def large_checkpoint(job: Job, shape: str) -> Path:
    from tests.support.large import sparse_checkpoint

    directory = job.work / shape
    directory.mkdir()
    sparse_checkpoint(directory, **SHAPES[shape])
    job.numbers["weight_bytes"] = fill(directory / "model.safetensors")
    return directory


Runner = tuple[str, str | None, dict[str, Any]]  # target, provider, options of the export


def runners(job: Job) -> list[Runner]:
    """What can run here; what the others lack is written down. Raises Skip where nothing can."""
    if job.stand_in:
        return [("ort", "cpu", {})]
    found: list[Runner] = []
    for target in ("tensorrt", "tensorrt-rtx"):
        try:
            found.append((target, None, options_here(job, target)))
        except Skip as skip:
            job.numbers[target] = f"skip: {skip}"
    try:
        need_provider(job, "cuda")
        found.append(("ort", "cuda", {}))
    except Skip as skip:
        job.numbers["ort"] = f"skip: {skip}"
    if not found:
        raise Skip("no engine that runs on a GPU is installed: tensorrt, tensorrt-rtx, onnxruntime-gpu")
    return found


def baseline(job: Job, model: Path, lengths: dict[str, int]) -> dict[str, Any]:
    device = "cpu" if job.stand_in else "cuda"
    if not job.stand_in:
        import torch

        if not torch.cuda.is_available():
            raise Skip("the installed torch has no CUDA")
    command = [sys.executable, "-m", "gpu_check.baseline", model, lengths["prompt"], lengths["new_tokens"], device]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"transformers ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(job: Job, bundle: Path, target: str, provider: str | None, k: int, lengths: dict[str, int]) -> Any:
    found = timed(bundle, target, provider, k, **lengths)
    found["of_copy_rate"] = found["tokens_per_s"] * found["bytes_per_token"] / job.numbers["copy_bytes_per_s"]
    return found | {"aim": AIM}


def decode(job: Job, model: Path, runner: Runner, weights: str, lengths: dict[str, int]) -> None:
    """Full schedule and LoRA-Drop at each ratio, of one kind of weights on one engine."""
    target, provider, own = runner
    options = own | {"targets": (target,), "dtype": weights, "rank": 16, "weights": "link", "max_batch": 1}
    options |= {"max_seq_len": sum(lengths.values())} | ({"quantization": "rtn"} if weights == "int4" else {})
    for ratio in RATIOS:
        name = f"{target} {weights} ρ={ratio}"
        export = partial(built, job, model, name, provider, options | {"drop_ratio": ratio})
        if job.part(f"{name} export", export) == BUILT:
            for k in (0, WINDOW) if ratio == RATIOS[0] else (WINDOW,):
                job.part(f"{name} k={k}", partial(measured, job, job.work / name, target, provider, k, lengths))
        shutil.rmtree(job.work / name, ignore_errors=True)


def run(job: Job) -> None:
    need_exporter()
    gpu = Gpu(job)
    first, *others = runners(job)
    if job.stand_in:
        model, lengths = small_checkpoint(job), TINY_LENGTHS
        job.numbers["copy_bytes_per_s"] = gpu.copy_rate(1 << 16)
    else:
        shape, lengths = chosen_shape(gpu.free_bytes, shutil.disk_usage(job.work).free), LENGTHS
        job.numbers["copy_bytes_per_s"] = gpu.copy_rate(1 << 29)
        job.say(f"copy: {job.numbers['copy_bytes_per_s'] / 1e9:.0f} GB/s; random weights of the {shape} shape")
        job.numbers["shape"] = shape
        model = large_checkpoint(job, shape)
    gpu.device.close()
    dtype = "float32" if job.stand_in else "bfloat16"
    decode(job, model, first, dtype, lengths)
    job.part("transformers", partial(baseline, job, model, lengths))
    for runner in others:
        decode(job, model, runner, dtype, lengths)
    if not job.stand_in:
        for runner in (first, *others):
            decode(job, model, runner, "int4", lengths)
    if not job.problems and not any(isinstance(found, dict) for found in job.numbers.values()):
        raise job.skipped()  # what stands there of the card and the shape says nothing of an engine
