"""What is elementwise, as ONNX Runtime's providers have it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from lora_drop_export.targets.ort.elementwise import compare_in_float32


@pytest.mark.parametrize("dtype", ["BFLOAT16", "FLOAT16"])
def test_bfloat16_is_compared_in_float32(dtype):
    """The CUDA provider compares halves of float16 alone."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g ({dtype.lower()}[4] x, {dtype.lower()}[1] least) => (bool[4] y) {{ y = Greater(x, least) }}
    """
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    compare_in_float32(model.graph)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    casts = [node.attribute[0].i for node in proto.graph.node if node.op_type == "Cast"]
    assert casts == ([onnx.TensorProto.FLOAT] * 2 if dtype == "BFLOAT16" else [])
    assert proto.graph.node[-1].op_type == "Greater"
