"""Versions of ONNX Runtime: float32 graphs take rows with different numbers of new tokens, those for a GPU do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from lora_drop_runtime import Batch, BundleError, InputError, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import NEW_TOKENS, PACKED_STEP
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME

from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.targets.ort.lower import ort_from_neutral
from tests.support.bundles import PROMPTS, first_layers, make_bundle, record_again

QUERY_LENGTHS = 16  # its place among GroupQueryAttention's inputs, since 1.32
RAGGED = {NEW_TOKENS, PACKED_STEP}


def attentions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return found + [node for body in bodies for node in attentions(body)]


def half_bundle(root: Path, targets: tuple[str, ...] = ("ort",)) -> Bundle:
    source = first_layers("llama", 4, "float16")
    return make_bundle(source, root, max_seq_len=64, always_first=1, targets=targets)


@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"kv_dtype": "int8"}])
def test_an_old_one_is_refused_for_float32(tmp_path, monkeypatch, options):
    """Whatever weights and caches are; GroupQueryAttention of 1.31 knows no lengths of queries."""
    bundle = make_bundle("llama", tmp_path / "b", drop_layers=(4,), **options)
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    with pytest.raises(InputError, match="too old for graphs in float32") as refused:
        Session.open(bundle.root)
    assert refused.value.note == "It is 1.31.1; 1.32 or newer is needed."
    assert "pip install 'lora-drop-export[cpu]'" in refused.value.hint
    for version in ("1.32.0", "1.40.0.dev20270101", "2.0.0"):
        monkeypatch.setattr("onnxruntime.__version__", version)
        Session.open(bundle.root).close()


def test_graphs_for_a_gpu_run_with_an_old_one(tmp_path, monkeypatch):
    """Their attention gets no input that it does not know; a batch's chunks run row by row."""
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    bundle = half_bundle(tmp_path / "b")
    for step in ("refresh", "lora"):
        graph = onnx.load(bundle.root / f"ort/{step}.onnx", load_external_data=False).graph
        nodes = attentions(graph)
        assert nodes
        assert all(len(node.input) <= QUERY_LENGTHS for node in nodes)
        assert not RAGGED & {value.name for value in graph.input}
    monkeypatch.setattr("lora_drop_runtime.decoding.request.PREFILL_CHUNK", 2)
    with Session.open(bundle.root, threads=1, policy="backfill", k=2) as session:
        assert not session._engine.idle_rows
        batch = session.generate(PROMPTS, 6, stop_token_ids=())
        for prompt, tokens in zip(PROMPTS, batch, strict=True):
            np.testing.assert_array_equal(session.generate([prompt], 6, stop_token_ids=())[0], tokens)
    with Batch.open(bundle.root, slots=2, threads=1, policy="backfill", k=2) as rows:
        for prompt in PROMPTS:
            rows.add(prompt, 6, stop_token_ids=())
        made: dict[int, list[int]] = {}
        while rows.rows:
            for event in rows.tick():
                made.setdefault(event.row, []).append(event.token)
    assert [made[row] for row in range(len(PROMPTS))] == [tokens.tolist() for tokens in batch]


def test_a_target_that_is_added(tmp_path, monkeypatch):
    """The bundle's dtype decides, which the options do not say."""
    plain = make_bundle("llama", tmp_path / "plain", targets=("none",), drop_layers=(4,))
    half = half_bundle(tmp_path / "half", targets=("none",))
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    options = ExportOptions(verify=False)
    with pytest.raises(InputError, match="too old for graphs in float32"):
        add_target(plain.root, ["ort"], options)
    assert set(add_target(half.root, ["ort"], options).manifest.targets) == {"ort"}


def test_attention_of_float32_gets_the_lengths_of_queries(tmp_path):
    """In both steps, and in each form but that of folded heads, which is for one row."""
    bundle = make_bundle("llama_mqa", tmp_path / "b", drop_layers=(4,))
    graph = onnx.load(bundle.root / "ort/steps.onnx", load_external_data=False).graph
    nodes = [node for node in attentions(graph) if not any(a.name == "causal" for a in node.attribute)]
    layers = bundle.manifest.plan.num_layers
    assert len(nodes) == 2 * layers - 1  # of a refresh and of a LoRA step
    assert {node.input[QUERY_LENGTHS] for node in nodes} == {NEW_TOKENS}
    assert {value.name for value in graph.input} >= RAGGED


def test_a_graph_of_the_other_form_is_refused_at_the_opening(tmp_path):
    """One that was lowered before there were such rows."""
    bundle = make_bundle("llama", tmp_path / "b", drop_layers=(4,))
    steps = (onnx.load(bundle.root / f"{step}.onnx", load_external_data=False) for step in ("refresh", "lora"))
    before = ort_from_neutral(*steps, bundle.manifest.limits.max_seq_len, ragged=False)
    (bundle.root / "ort/steps.onnx").write_bytes(before.SerializeToString())
    record_again(bundle.root)
    with pytest.raises(BundleError, match="not of the form") as refused:
        Session.open(bundle.root)
    assert "new_tokens, packed_step" in refused.value.note


def test_graphs_of_an_earlier_version_are_refused_in_halves(tmp_path):
    """They had both steps in one graph, which no GPU's provider captures."""
    bundle = half_bundle(tmp_path / "b")
    manifest = json.loads((bundle.root / MANIFEST_NAME).read_text())
    shutil.copy(bundle.root / "ort/lora.onnx", bundle.root / "ort/steps.onnx")
    manifest["targets"]["ort"] = {"steps": "ort/steps.onnx"}
    manifest["files"]["ort/steps.onnx"] = manifest["files"]["ort/lora.onnx"]
    (bundle.root / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="not of the form") as refused:
        Session.open(bundle.root)
    assert "it runs a graph for each step" in refused.value.note
