"""Quantized weights as TensorRT's parser takes them.

Enters: a step graph whose DequantizeLinear nodes read UINT4 or UINT8 blocks with zero points and scales in the dtype of
activations, as the bundle stores them and ONNX Runtime runs them. Leaves: the same graph over INT4 or INT8 without zero
points, which TensorRT does not have. The new bytes lie in one file, for the parse alone. E4M3 has no zero points and
stays as it is.

    all zero points in the middle      INT4: q − 8; INT8: q − 128
    4 bits, zero points of their own   INT8: q − zero point, which is exact and takes twice the bytes

8 bits less a zero point of their own do not fit into INT8: `Target.takes_kept` says so before the trace. TensorRT wants
INT8 with positive scales: those of checkpoints are, those that `--dtype int8` makes need not be, so there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx
from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.errors import ModelError

from lora_drop_export.graphs.match import SYMMETRIC
from lora_drop_export.quantize.formats import unpack

_CHUNK_BYTES = 1 << 24


def _stored(root: Path, tensor: onnx.TensorProto) -> npt.NDArray[np.uint8]:
    where = {entry.key: entry.value for entry in tensor.external_data}
    file, offset, length = root / where["location"], int(where.get("offset", 0)), int(where["length"])
    return np.memmap(file, np.uint8, "r", offset, (length,))


def _signed(q: npt.NDArray[np.uint8], bits: int) -> Iterator[npt.NDArray[np.uint8]]:
    """q less the middle in two's complement is q with its highest bit turned over; two of 4 bits in a byte."""
    for begin in range(0, len(q), _CHUNK_BYTES):
        yield q[begin : begin + _CHUNK_BYTES] ^ np.uint8(0x88 if bits == 4 else 0x80)


def _less_zero_points(
    q: npt.NDArray[np.uint8], zero_points: npt.NDArray[np.uint8], shape: tuple[int, int], block_size: int
) -> Iterator[npt.NDArray[np.int8]]:
    """Rows of q − zero point, from packed 4-bit values; a row's zero points begin at a whole byte."""
    rows, columns = shape
    packed, points = q.reshape(rows, -1), zero_points.reshape(rows, -1)
    step = max(1, _CHUNK_BYTES // columns)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        yield unpack(packed[part], 4).astype(np.int8) - np.repeat(unpack(points[part], 4), block_size, 1).astype(
            np.int8
        )


class _File:
    """Where the new tensors go; `location` is the file's name as the parser resolves it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.location = file, Path(file.name).name

    def write(self, tensor: onnx.TensorProto, dtype: int, chunks: Iterator[npt.NDArray[np.generic]]) -> None:
        """Let an initializer be these bytes, of another dtype and of the same shape."""
        begin = self._file.seek(-(-self._file.tell() // 64) * 64)
        for chunk in chunks:
            self._file.write(chunk.tobytes())
        tensor.data_type = dtype
        del tensor.external_data[:]
        for key, value in (("location", self.location), ("offset", begin), ("length", self._file.tell() - begin)):
            tensor.external_data.add(key=key, value=str(value))


def _scales(stored: npt.NDArray[np.uint8], dtype: Any) -> npt.NDArray[Any]:
    """None is 0, which TensorRT refuses."""
    import ml_dtypes

    scales: npt.NDArray[Any] = np.frombuffer(stored, dtype)
    return np.where(scales == 0, ml_dtypes.finfo(dtype).smallest_subnormal, scales).astype(dtype)


def _not_taken(name: str, wrong: str, dtype: str, other: str = "") -> ModelError:
    return ModelError(
        "TensorRT cannot take these 8-bit weights.",
        note=f"{name} has {wrong}.",
        hint=f"Use {other}the model's float checkpoint with --dtype {dtype}.",
    )


def sign_weights(model: onnx.ModelProto, root: Path, file: IO[bytes]) -> None:
    """Change a step graph in place.

    Args:
        model: initializers refer to files of `root`. A scale of 0 becomes the least positive one.
        file: open for writing, directly in `root`, empty; the graph's new initializers lie in it.

    Raises:
        ModelError: 8 bits with negative scales, or integers of 8 bits with zero points.
    """
    import ml_dtypes

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    numpy = {BY_NAME["float32"].onnx: np.float32, BY_NAME["float16"].onnx: np.float16}
    numpy[BY_NAME["bfloat16"].onnx] = ml_dtypes.bfloat16
    out = _File(file)
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        weight, scales = (tensors[name] for name in node.input[:2])
        signed = _scales(_stored(root, scales), numpy[scales.data_type])
        if weight.data_type == onnx.TensorProto.FLOAT8E4M3FN:
            if (signed < 0).any():
                raise _not_taken(weight.name, "negative scales, TensorRT needs positive ones", "fp8")
            out.write(scales, scales.data_type, iter([signed]))
            continue
        points = tensors[node.input[2]]
        (block_size,) = (attribute.i for attribute in node.attribute if attribute.name == "block_size")
        bits = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.UINT8: 8}[weight.data_type]
        q, symmetric = _stored(root, weight), points.name.endswith(SYMMETRIC)
        if bits == 8 and (not symmetric or (signed < 0).any()):
            wrong = "negative scales, INT8 needs positive ones" if symmetric else "zero points, INT8 has none"
            raise _not_taken(weight.name, wrong, "int4", "--target ort or openvino, or ")
        if symmetric:
            out.write(weight, onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8, _signed(q, bits))
        else:
            shape = (int(weight.dims[0]), int(weight.dims[1]))
            integers = _less_zero_points(q, _stored(root, points), shape, block_size)
            out.write(weight, onnx.TensorProto.INT8, integers)
        out.write(scales, scales.data_type, iter([signed]))
        del node.input[2]
        model.graph.initializer.remove(points)
    file.flush()
