"""Linear layers that read one tensor become one, where their bytes say that they may."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import pytest

from lora_drop_export.graphs.initializers import joined_linear
from lora_drop_export.graphs.match import Linear, QuantizedBlocks

IN = 64
X = ir.Value(name="x", shape=ir.Shape([1, "T", IN]), type=ir.TensorType(ir.DataType.FLOAT))


class File:
    """Says where initializers lie: one behind the other, as they are asked for."""

    def __init__(self) -> None:
        self.end = 0

    def value(self, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        length = int(math.prod(shape) * dtype.itemsize)
        tensor = ir.ExternalTensor("weights.safetensors", self.end, length, dtype, shape=ir.Shape(shape), name=name)
        self.end += length
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def layers(*rows: int, formats: list[tuple[int, int, bool] | None], biased: tuple[bool, ...]) -> list[Linear]:
    """Of so many rows each; a format is bits, values in a block, and whether all zero points lie in the middle. The
    layers' weights lie back to back, and so do their biases, scales and zero points."""
    file, made = File(), []
    codes = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
    count = [(out, IN // spec[1]) if spec else (out, 0) for out, spec in zip(rows, formats, strict=True)]
    weights = [
        file.value(f"{n}.weight", codes[spec[0]] if spec else ir.DataType.FLOAT, [out, IN])
        for n, (out, spec) in enumerate(zip(rows, formats, strict=True))
    ]
    biases = [
        file.value(f"{n}.bias", ir.DataType.FLOAT, [out]) if has else None
        for n, (out, has) in enumerate(zip(rows, biased, strict=True))
    ]
    scales = [file.value(f"{n}.scales", ir.DataType.FLOAT, list(shape)) for n, shape in enumerate(count)]
    points = [
        file.value(f"{n}.zero_points", codes[spec[0]] if spec else ir.DataType.UINT8, list(shape))
        for n, (shape, spec) in enumerate(zip(count, formats, strict=True))
    ]
    node: Any = ir.node("MatMul", [X, X])
    for n, spec in enumerate(formats):
        blocks = QuantizedBlocks(spec[0], spec[1], scales[n], points[n], spec[2]) if spec else None
        made.append(Linear(X, weights[n], biases[n], (rows[n], IN), node, blocks))
    return made


@pytest.mark.parametrize("spec", [None, (4, 32, False), (8, 64, True)])
@pytest.mark.parametrize("biased", [True, False])
def test_layers_alike_become_one(spec: tuple[int, int, bool] | None, biased: bool) -> None:
    graph = ir.Graph([], [], nodes=[])
    group = layers(96, 32, 32, formats=[spec] * 3, biased=(biased,) * 3)
    whole = joined_linear(graph, group)
    assert whole is not None
    assert whole.shape == (160, IN)
    of_all = [(whole.weight, [linear.weight for linear in group]), (whole.bias, [linear.bias for linear in group])]
    if spec:
        assert whole.blocks is not None
        of_all.append((whole.blocks.scales, [linear.blocks.scales for linear in group if linear.blocks]))
        if not spec[2]:
            of_all.append((whole.blocks.zero_points, [linear.blocks.zero_points for linear in group if linear.blocks]))
    for one, parts in of_all:
        if one is None:
            assert parts == [None] * 3
            continue
        tensors: list[Any] = [part.const_value for part in parts if part is not None]
        assert len(tensors) == 3
        tensor: Any = one.const_value
        assert (tensor.offset, tensor.length) == (tensors[0].offset, sum(each.length for each in tensors))
        assert list(one.shape or ()) == [160, *tensors[0].shape[1:]]


@pytest.mark.parametrize(
    "formats",
    [
        [(4, 32, False), (8, 32, False), (4, 32, False)],
        [(4, 32, False), (4, 32, False), (4, 64, False)],
        [(4, 32, False), (4, 32, True), (4, 32, False)],
        [(4, 32, False), (4, 32, False), None],
    ],
)
def test_layers_of_different_formats_stay_apart(formats: list[tuple[int, int, bool] | None]) -> None:
    """As a checkpoint has them that was quantized with more bits in some modules."""
    graph = ir.Graph([], [], nodes=[])
    assert joined_linear(graph, layers(96, 32, 32, formats=formats, biased=(False,) * 3)) is None
    assert not graph.initializers
