"""Bundles of target openvino that several tests serve."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.openvino import compiled

from tests.support.bundles import make_adapted_bundle

from .test_engine import FOUR, MIXED, with_layers

_COMPILED: dict[Any, Any] = {}


@pytest.fixture(scope="module")
def models_stay_compiled() -> Iterator[None]:
    """For the modules that ask for it, though nobody has them open: each takes a third of a second to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_open", _COMPILED)
        yield


@pytest.fixture(scope="module")
def quick_to_collect() -> None:
    """Collections of garbage, each a second and more beside what other tests have left, look at the module's alone."""
    gc.collect()
    gc.freeze()


HALVES = {"drop_layers": MIXED, "always_first": 1}
# Layers, options, policies
BUNDLES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "residual": (4, FOUR, ("skip", "backfill", "lossless")),
    "change": (6, HALVES | {"surrogate": "residual-delta", "rank": 4}, ("skip", "backfill", "lossless")),
    "recurrent, halves": (6, HALVES | {"surrogate": "recurrent"}, ("skip", "backfill", "lossless")),
    "fill": (4, FOUR | {"policy": "fill", "surrogate": "anchor"}, ("fill",)),
}


Served = tuple[Bundle, dict[str, Session]]


@pytest.fixture(scope="session")
def opened_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Served]]:
    with contextlib.ExitStack() as stack:

        @functools.cache
        def make(key: str) -> Served:
            layers, options, policies = BUNDLES[key]
            root = tmp_path_factory.mktemp("served")
            bundle = make_adapted_bundle(with_layers(layers), root, targets=("openvino",), max_batch=8, **options)
            sessions = {policy: Session.open(bundle.root, policy=policy, threads=1) for policy in policies}
            for session in sessions.values():
                stack.enter_context(session)
            return bundle, sessions

        yield make


@pytest.fixture(scope="module", params=BUNDLES)
def served(request: pytest.FixtureRequest, models_stay_compiled: None, opened_once: Callable[[str], Served]) -> Served:
    """A bundle, and a session for each of its policies."""
    return opened_once(request.param)
