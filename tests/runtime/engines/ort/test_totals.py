"""The totals that attention reads: inputs of the graph, on the host, and the longest row's slots before every run."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx
import onnxruntime
import pytest
from lora_drop_runtime import Session, StepKind

from tests.support.bundles import PROMPTS, make_bundle

TOTAL_INPUT = 6  # of GroupQueryAttention


def attentions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return found + [node for body in bodies for node in attentions(body)]


@pytest.mark.parametrize("least", [1, 4])
def test_no_node_computes_a_total(tmp_path, monkeypatch, least):
    """Else a GPU's provider computes it on the device, where attention cannot read it; folded attention likewise."""
    monkeypatch.setattr("lora_drop_export.targets.ort.attention.MIN_FOLD", least)
    bundle = make_bundle("llama", tmp_path / "b", drop_layers=(4,))
    graph = onnx.load(bundle.root / "ort" / "steps.onnx", load_external_data=False).graph
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    nodes = attentions(graph)
    assert len(nodes) >= 2 * bundle.manifest.plan.num_layers - 1
    assert {node.input[TOTAL_INPUT] for node in nodes} == {"total_kept", "total_dropped"}
    assert {node.input[TOTAL_INPUT - 1] for node in nodes} == {"last_kept", "last_dropped"}
    for node in nodes:
        total = inputs[node.input[TOTAL_INPUT]]
        assert total.elem_type == onnx.TensorProto.INT32
        assert len(total.shape.dim) == 0
        assert any("past_key.4" in name for name in node.input) == (node.input[TOTAL_INPUT] == "total_dropped")


def test_totals_are_the_longest_rows(tmp_path, monkeypatch):
    """Before each run of ragged rows, also in the rows' own runs of chunks and of tokens that are taken back."""
    bundle = make_bundle("llama", tmp_path / "b", drop_layers=(4,))
    addresses: dict[tuple[int, str], tuple[int, tuple[int, ...], np.dtype]] = {}
    bind, run, seen = onnxruntime.IOBinding.bind_input, onnxruntime.InferenceSession.run_with_iobinding, []

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        addresses[id(self), name] = buffer_ptr, tuple(shape), np.dtype(element_type)
        bind(self, name, device_type, device_id, element_type, shape, buffer_ptr)

    def bound(binding: object, name: str) -> np.ndarray:
        address, shape, dtype = addresses[id(binding), name]
        memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape).copy()

    def running(self, binding, *arguments):
        new = bound(binding, "input_ids").shape[1]
        for group in ("kept", "dropped"):
            total = bound(binding, f"total_{group}")
            assert total.dtype == np.int32
            assert total == bound(binding, f"len_{group}").max() + new
        seen.append((bool(bound(binding, "lora_step")), int(total), new))
        run(self, binding, *arguments)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", bind_input)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", running)
    monkeypatch.setattr("lora_drop_runtime.decoding.request.PREFILL_CHUNK", 4)
    for policy in ("skip", "backfill"):
        with Session.open(bundle.root, threads=1, policy=policy, k=2) as session:
            session.generate(PROMPTS, 9)
    kinds = [StepKind.LORA if lora else StepKind.REFRESH for lora, _, _ in seen]
    assert kinds.count(StepKind.LORA) == 2 * 6
    assert {new for lora, _, new in seen if lora} == {1}
    assert {new for lora, _, new in seen if not lora} == {1, 3, 4}  # single tokens, three taken again, chunks
