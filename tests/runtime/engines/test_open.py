"""Which engine a target gets, on a toy target that no file of the product knows."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime import BundleError, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import ENTRIES, OtherEntry
from lora_drop_runtime.decoding import session as session_module
from lora_drop_runtime.engines import open as open_module
from lora_drop_runtime.engines.open import ENGINES, open_engine
from lora_drop_runtime.plan.drop_plan import DropPlan

from tests.support.fake_engine import FakeEngine, make_manifest, next_token

PLAN = DropPlan(num_layers=6, sites=(3, 4))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bundle whose only target is `toy`."""
    manifest = dataclasses.replace(make_manifest(PLAN), targets={"toy": OtherEntry({})})
    (tmp_path / "lora_drop.json").write_text(manifest.to_json())
    return tmp_path


class WarmEngine(FakeEngine):
    warms_up = True


@pytest.mark.parametrize("kind", [FakeEngine, WarmEngine])
def test_a_toy_target_needs_a_row_and_nothing_else(root: Path, monkeypatch, kind: type[FakeEngine]) -> None:
    opened: list[tuple[Any, ...]] = []
    engine = kind(PLAN)

    def open_toy(bundle: Bundle, *asked: Any) -> FakeEngine:
        opened.append((bundle.root, *asked))
        return engine

    monkeypatch.setitem(ENGINES, "toy", open_toy)
    with Session.open(root, provider="abacus", threads=3) as session:
        assert opened == [(root, "toy", "abacus", 3)]
        assert bool(engine.runs) == kind.warms_up  # a request that nobody sees
        tokens = [4, 2]
        for _ in range(9):
            tokens.append(int(next_token(tokens[-1], len(tokens) - 1)))
        assert list(session.stream([4, 2], 9)) == tokens[2:]
    assert engine.times_closed == 1


def test_a_target_without_an_engine(root: Path) -> None:
    with pytest.raises(BundleError, match="no engine") as caught:
        Session.open(root)
    assert caught.value.note == "The bundle has 'toy', engines are there for ort, openvino, tensorrt, tensorrt-rtx."
    assert caught.value.hint


@pytest.mark.parametrize(
    ("target", "provider", "engine"),
    [
        ("ort", None, "ort"),
        ("ort", "cuda", "ort"),
        ("tensorrt", None, "trt"),
        ("tensorrt-rtx", None, "trt"),
        ("tensorrt-rtx", "rtx", "ort"),
        ("tensorrt", "cpu", "ort"),
    ],
)
def test_the_engine_of_each_target(monkeypatch, tmp_path: Path, target: str, provider: str | None, engine: str) -> None:
    """With a provider ONNX Runtime runs the graphs of every target."""
    monkeypatch.setattr("lora_drop_runtime.engines.ort.engine.OrtEngine", lambda *_, **__: "ort")
    monkeypatch.setattr("lora_drop_runtime.engines.trt.engine.TrtEngine", lambda *_: "trt")
    manifest = dataclasses.replace(make_manifest(PLAN), targets=dict.fromkeys(ENTRIES, OtherEntry({})))
    opened: Any = open_engine(Bundle(tmp_path, manifest), target, provider)
    assert opened == engine


def test_the_session_knows_no_engine() -> None:
    """And `open` imports none before it is opened."""
    for module, inside in ((session_module, True), (open_module, False)):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        nodes = ast.walk(tree) if inside else tree.body
        imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in imported if "ort.engine" in name or "trt.engine" in name], module.__name__
