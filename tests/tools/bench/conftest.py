"""Shared by the tests of `lora-drop bench`.

Times are scripted wherever a figure is checked; where they are real, only what does not depend on them is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora_drop_tools.bench.arms import TimedSession
from lora_drop_tools.bench.result import Memory, Run
from lora_drop_tools.shared import machine

from tests.support.bundles import make_bundle

bench_module = importlib.import_module("lora_drop_tools.bench.bench")  # the name in the package is the function


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of 8 layers, 1 and 2 of the 4 eligible ones are dropped; 128 tokens, prompts of 127, batches of 8."""
    root = tmp_path_factory.mktemp("bench")
    return [make_bundle("llama", root / f"rho{ratio}", drop_ratio=ratio).root for ratio in (0.25, 0.5)]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**22)
    monkeypatch.setattr(machine, "BANDWIDTH_ROUNDS", 1)


def held(pss: dict[str, int] | None) -> Callable[..., list[Memory]]:
    """Stands for `measure_memory`."""
    return lambda name, bundle, windows, request, *_: [Memory(name, 3, request, pss)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Replaces what takes time: every step under k takes the given seconds, 90 % of them in the engine."""

    def script(step_seconds: dict[int, float]) -> None:
        def run(self: TimedSession, prompts: Any, new_tokens: int, k: int) -> Run:
            steps = [step_seconds[k]] * (new_tokens - 1)
            kv = {"kept": 0, "dropped": 0, "allocated": 0}
            return Run(0.5, steps, [0.9 * seconds for seconds in steps], kv, kv)

        monkeypatch.setattr(TimedSession, "run", run)
        monkeypatch.setattr(bench_module, "measure_memory", held(None))

    return script
