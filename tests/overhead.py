"""Times that no test asserts, since they are a machine's: `python -m tests.overhead` prints them and what it ran on.

Enters: nothing. Leaves, on standard output: microseconds of Python in a decode step beside an engine that does nothing;
seconds and peak memory of an 8B-shaped export (16 GB of weights that are one hole), and of its TensorRT-RTX engines
where the library is installed. `--only step` and `--only export` measure one of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_tools.shared.machine import cpu_time, foreign_cores, machine_facts

from tests.support.fake_engine import IdleEngine, open_session
from tests.support.large import engines_without_weights, graphs_only, measured, sparse_checkpoint

STEPS = 3000
DEEP = DropPlan(num_layers=30, sites=tuple(range(3, 29, 2)))


def median_us(next_one: Callable[[], Any]) -> float:
    """Of each call; the median, since other processes run too."""
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        next_one()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def time_steps() -> None:
    for plan in (DEEP, dataclasses.replace(DEEP, surrogate="recurrent", rank=16)):
        session, _ = open_session(plan, engine=IdleEngine(plan), vocab_size=1000)
        stream = session.stream([1, 2, 3], STEPS + 2)
        next(stream)
        streamed = median_us(lambda stream=stream: next(stream))
        session.prefill(np.array([[1, 2, 3]]), max_new_tokens=STEPS + 2)
        token = np.array([5])
        stepped = median_us(lambda session=session, token=token: session.step(token))
        print(f"Python of a step, 30 layers, {plan.surrogate}: {stepped:.1f} µs in step, {streamed:.1f} µs in stream")


def time_export() -> None:
    with tempfile.TemporaryDirectory(prefix="lora-drop-large-") as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "bundle"
        model.mkdir()
        sparse_checkpoint(model)
        jobs = {"neutral graphs": graphs_only(model, out)}
        if importlib.util.find_spec("tensorrt_rtx"):
            jobs["engines, weights as inputs"] = engines_without_weights(out)
        for name, arguments in jobs.items():
            begin = time.perf_counter()
            (found,) = measured(arguments)
            seconds = time.perf_counter() - begin
            print(f"Llama-3-8B shape, {name}: {seconds:.0f} s, peak {found.peak_bytes / 1e9:.2f} GB")
        graph_bytes = sum((out / f"{name}.onnx").stat().st_size for name in ("refresh", "lora"))
        print(f"Both neutral graphs are {graph_bytes / 1e6:.2f} MB.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print times that depend on the machine.")
    parser.add_argument("--only", choices=["step", "export"], help="Measure one of both.")
    only = parser.parse_args().only
    facts, begin = machine_facts(), cpu_time()
    print(f"{facts['cpu']}, {facts['physical_cores']} cores, {facts['system']}, Python {facts['versions']['python']}")
    if only != "export":
        time_steps()
    if only != "step":
        time_export()
    others = foreign_cores(begin, cpu_time())
    if others is not None:
        print(f"Other processes kept {others:.2f} cores busy meanwhile; times are worth something below 0.1.")


if __name__ == "__main__":
    main()
