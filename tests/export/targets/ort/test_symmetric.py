"""int4 weights without zero points of their own, in matrix products and in looked-up embeddings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from lora_drop_export.check.verify import compare
from lora_drop_export.quantize.formats import BlockFormat, dequantize, pack
from tests.support.bundles import make_bundle
from tests.support.export_array import model_with, source


@pytest.mark.parametrize(
    ("hidden", "quantization", "tied"),
    [(64, "rtn", False), (112, "search", False), (144, "search", True), (144, "rtn", True)],
)
def test_against_pytorch(hidden: int, quantization: str, tied: bool, tmp_path: Path) -> None:
    """An odd number of blocks a row (7, 9) leaves `search` no zero points either."""
    small = source(model_with(hidden_size=hidden, tied=tied), "float32", "float32")
    small = dataclasses.replace(small, checkpoint=dataclasses.replace(small.checkpoint, owned=True))
    options = {"drop_layers": (1,), "always_first": 1, "dtype": "int4", "quantization": quantization}
    bundle = make_bundle(small, tmp_path / "b", **options)
    result = compare(bundle, threads=1)
    assert result.passed, result
    looked_up = [
        node
        for branch in onnx.load(bundle.root / "ort/steps.onnx", load_external_data=False).graph.node
        for attribute in branch.attribute
        for node in attribute.g.node
        if node.op_type == "GatherBlockQuantized"
    ]
    assert looked_up
    assert all(len(node.input) == 4 and node.input[3] for node in looked_up)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operator_takes_the_zero_points_that_it_is_given(bits: int) -> None:
    """What the lowering relies on; without them the operator takes 0 over UINT4."""
    form = BlockFormat(bits, 16, symmetric=True)
    generator = np.random.default_rng(0)
    q = generator.integers(0, 1 << bits, (5, 48), dtype=np.uint8)
    scales = generator.standard_normal((5, 3)).astype(np.float32)
    zero_points = np.full((5, 3), form.middle, np.uint8)
    kind = onnx.TensorProto.UINT4 if bits == 4 else onnx.TensorProto.UINT8
    constants = [
        helper.make_tensor("q", kind, q.shape, pack(q, bits), raw=True),
        helper.make_tensor("z", kind, scales.shape, pack(zero_points, bits), raw=True),
        helper.make_tensor("s", onnx.TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
    ]
    node = helper.make_node(
        "GatherBlockQuantized", ["q", "i", "s", "z"], ["y"], domain="com.microsoft", gather_axis=0, quantize_axis=1,
        block_size=16, bits=bits,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 48])],
        constants,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"i": np.array([3, 1])})
    assert np.array_equal(rows, dequantize(q, scales, zero_points)[[3, 1]])
