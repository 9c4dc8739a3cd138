"""Bundles of target openvino that several tests serve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.openvino import compiled

from tests.support.bundles import make_adapted_bundle

from .test_engine import MIXED, MODEL, TARGETS


@pytest.fixture(scope="module")
def models_stay_compiled() -> Iterator[None]:
    """Until the module's last test, though nobody has them open: each takes a third of a second to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_open", {})
        yield


CHANGE = {"surrogate": "residual-delta", "drop_layers": MIXED, "rank": 4}
BUNDLES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "residual": (MODEL, {}, ("skip", "backfill", "lossless")),
    "change": (MODEL, CHANGE, ("skip", "backfill", "lossless")),
    "recurrent, halves": (MODEL, {"surrogate": "recurrent", "drop_layers": MIXED}, ("skip", "backfill", "lossless")),
    "fill": (MODEL, {"policy": "fill", "surrogate": "anchor"}, ("fill",)),
}


@pytest.fixture(scope="module", params=BUNDLES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Bundle, dict[str, Session]]]:
    """A bundle, and a session for each of its policies."""
    name, options, policies = BUNDLES[request.param]
    bundle = make_adapted_bundle(name, tmp_path_factory.mktemp("served"), targets=TARGETS, max_batch=8, **options)
    with contextlib.ExitStack() as stack:
        root = bundle.root
        yield bundle, {policy: stack.enter_context(Session.open(root, policy=policy, threads=1)) for policy in policies}
