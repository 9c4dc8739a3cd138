"""The graphs that TensorRT-RTX's parser gets, run by ONNX Runtime, against the oracle; and its engines of all families.

The oracle decodes one token and one row at a time on the unmodified transformers model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from lora_drop_export.targets.trt.build import EngineBuilder
from tests.export.test_against_oracle import assert_same_run
from tests.support.bundles import PROMPTS, family, make_bundle, more_family, oracle_plan, save_adapters
from tests.support.models import FAMILIES
from tests.support.trt_graphs import ADA, of_family

OPTIONS: dict[str, Any] = {
    "targets": ("tensorrt-rtx",),
    "k": 2,
    "max_seq_len": 40,
    "max_prompt_len": 24,
    "surrogate": "recurrent",
    "rank": 2,
}
BUILD = EngineBuilder.build


def parse_alone(builder: EngineBuilder, proto: onnx.ModelProto, _profiles: object) -> bytes:
    """In the place of a build, which takes seconds."""
    builder.parse(proto)
    return b"no engine"


def parse_refresh_alone(builder: EngineBuilder, proto: onnx.ModelProto, profiles: Any) -> bytes:
    """The refresh step's engine takes four times as long as the LoRA step's."""
    return (parse_alone if proto.graph.name == "refresh" else BUILD)(builder, proto, profiles)


def operators(bundle: Bundle) -> dict[str, list[str]]:
    graphs = bundle.target("tensorrt-rtx")[1].graphs
    return {kind: [node.op_type for node in onnx.load(bundle.root / file).graph.node] for kind, file in graphs.items()}


@pytest.fixture(scope="module")
def of_llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineBuilder, "build", parse_alone)
        root = tmp_path_factory.mktemp("llama") / "b"
        return operators(make_bundle(of_family("llama"), root, always_first=1, **OPTIONS))


# Whose graphs have the same operators as a Llama's
AS_LLAMA = ("mistral",)
# One weight less, some of llama_bias's biases
NEARLY_AS_LLAMA = ("llama_tied", "qwen2")


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_of_tensorrt(name, of_llama, tmp_path, monkeypatch):
    """Every family for tensorrt-rtx: both engines are built, and the very ONNX that the parser got decodes right.

    Weights as inputs, static capacities, prompts in chunks; what only a GPU shows is the engines' own numbers. Engines
    are for one generation of GPUs; test_trt.py has one for all of them. Graphs that differ from a Llama's in numbers
    alone are parsed, and of those that are nearly the same the smaller engine is built.
    """
    if name in AS_LLAMA:
        monkeypatch.setattr(EngineBuilder, "build", parse_alone)
    elif name in NEARLY_AS_LLAMA:
        monkeypatch.setattr(EngineBuilder, "build", parse_refresh_alone)
    source = of_family(name)
    bundle = make_bundle(source, tmp_path / "b", always_first=1, **OPTIONS, builder=ADA)
    if name in AS_LLAMA:
        assert operators(bundle) == of_llama
    entry = bundle.target("tensorrt-rtx")[1]
    assert entry.compute_capabilities == ADA.compute_capabilities
    assert {
        kind: (bundle.root / getattr(entry, kind)).stat().st_size for kind in ("refresh", "lora")
    } == entry.engine_bytes
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, 64, bundle.manifest.model.fingerprint, rank=2)
    engine = OrtEngine(bundle, "tensorrt-rtx", threads=1)
    with Session(bundle, engine, PeriodicSchedule(2)) as session:
        session.load_adapters(adapters)
        assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, 2)
        engine.prefill_chunk = 4
        assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, 3)
        session = Session(bundle, engine, PeriodicSchedule(2), "backfill")
        assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, 2)
        engine.prefill_chunk = 3  # less than a cycle: a backfill in two runs
        assert_same_run(session, source.model, oracle_plan(bundle, adapters), PROMPTS, 3)


@pytest.mark.parametrize("surrogate", ["residual-delta", "residual-delta-gated"])
def test_a_change_as_state(surrogate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that see what two neighbours, and one layer, added at the anchor."""
    monkeypatch.setattr(EngineBuilder, "build", parse_alone)
    options = OPTIONS | {"surrogate": surrogate, "drop_layers": (3, 4, 6)}
    bundle = make_bundle("llama", tmp_path / "b", **options)
    assert bundle.manifest.plan.states == {"3": "4", "6": "6"}
    adapters = save_adapters(tmp_path / "a", bundle.manifest.plan, 64, bundle.manifest.model.fingerprint, rank=2)
    with Session(bundle, OrtEngine(bundle, "tensorrt-rtx", threads=1), PeriodicSchedule(2)) as session:
        session.load_adapters(adapters)
        assert_same_run(session, family("llama").model, oracle_plan(bundle, adapters), PROMPTS, 2)


def test_attention_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes what stands for them, and all experts of a mixture."""
    monkeypatch.setattr(EngineBuilder, "build", parse_alone)
    source = more_family("gpt_oss")
    options = OPTIONS | {"surrogate": "residual", "drop_layers": (1,)}
    bundle = make_bundle(source, tmp_path / "b", always_first=1, always_last=0, **options)
    with Session(bundle, OrtEngine(bundle, "tensorrt-rtx", threads=1), PeriodicSchedule(2)) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)


def test_keys_and_values_without_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dropped attention fills, under weights and biases that are fused with those of its queries."""
    monkeypatch.setattr(EngineBuilder, "build", parse_alone)
    source = of_family("qwen2")
    bundle = make_bundle(source, tmp_path / "b", always_first=1, **OPTIONS | {"rank": 0, "policy": "fill"})
    with Session(bundle, OrtEngine(bundle, "tensorrt-rtx", threads=1), PeriodicSchedule(2)) as session:
        assert_same_run(session, source.model, oracle_plan(bundle), PROMPTS, 2)
