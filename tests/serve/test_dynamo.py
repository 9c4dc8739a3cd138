"""The example of a worker of NVIDIA Dynamo, with stand-ins for what it takes of Dynamo."""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import BundleError
from lora_drop_serve.driver import Driver

from tests.serve.test_client import alone

WORKER = Path(__file__).parents[2] / "examples/dynamo/worker.py"


def told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens that the worker tells for each of these requests."""
    found: list[list[int]] = []
    drivers: list[Driver] = []

    class Kept(Driver):
        def start(self) -> None:
            drivers.append(self)
            super().start()

    class Endpoint:
        async def serve_endpoint(self, generate: Callable[[Any, Any], Any]) -> None:
            context = SimpleNamespace(is_stopped=lambda: False)
            try:
                for one in asked:
                    parts = [part async for part in generate(one, context)]
                    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
                    found.append([token for part in parts for token in part["token_ids"]])
            finally:
                await drivers[0].stop()

    async def register_model(*_: Any, **__: Any) -> None:
        await asyncio.sleep(0)

    names = SimpleNamespace(Tokens=0, Chat=1, Completions=2, Aggregated=0)
    runtime = SimpleNamespace(endpoint=lambda _: Endpoint())
    stands_in: dict[str, dict[str, Any]] = {
        "dynamo": {},
        "dynamo.llm": {"ModelInput": names, "ModelType": names, "WorkerType": names, "register_model": register_model},
        "dynamo.llm.exceptions": {"InvalidArgument": ValueError},
        "dynamo.runtime": {"dynamo_worker": lambda: lambda main: lambda: main(runtime)},
    }
    for name, members in stands_in.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lora_drop_serve.driver.Driver", Kept)
    monkeypatch.setattr(sys, "argv", ["worker.py", str(bundle.root), "checkpoint"])
    runpy.run_path(str(WORKER), run_name="__main__")
    return found


def request(**options: Any) -> dict[str, Any]:
    sampling = {"temperature": None, "top_p": None, "top_k": -1, "seed": None, "frequency_penalty": None} | options
    return {"token_ids": [3, 14], "stop_conditions": {"max_tokens": 12}, "sampling_options": sampling}


def test_requests_draw_by_their_seed_and_anew_without_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request(temperature=0.0), request(seed=5), request(seed=5), request(), request()]
    greedy, seeded, again, first, second = told(bundle, monkeypatch, asked)
    assert greedy == alone(bundle, [3, 14], 12, k=0)
    assert seeded == again
    assert first != second


def test_a_row_that_fails_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of a text, with a reason beside which nobody learns what went wrong."""

    def largest(*_: Any) -> None:
        raise BundleError("These are no numbers.")

    monkeypatch.setattr("lora_drop_runtime.decoding.sampling.RowSampler.largest", largest)
    with pytest.raises(BundleError, match="These are no numbers"):
        told(bundle, monkeypatch, [request(temperature=0.0)])
