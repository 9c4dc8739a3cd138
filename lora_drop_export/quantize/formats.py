"""Weight-only quantization, a few rows at a time.

Enters: rows of a float32 matrix [N, K], a `BlockFormat`. Leaves: unsigned integers, scales and zero points of blocks
along K, and their bytes exactly as ONNX holds UINT4 and UINT8: value = (q − zero_point) · scale. Two methods:

    rtn       the scale spans each block's range, values are rounded to the nearest
    search    the scale that has the least weighted squared error among many, solved again for the integers it gives

Also the way back: `DequantizedRef` reads a quantized tensor of a safetensors file as float32. Knows no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from lora_drop_runtime.bundle.manifest import BLOCK_SIZES, QUANTIZED_DTYPES
from lora_drop_runtime.bundle.safetensors_file import TensorRef
from lora_drop_runtime.errors import InputError

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.uint8]
Blocked = tuple[Integers, Floats, Integers]  # q [n, K], scales [n, K/block], zero points [n, K/block]
METADATA_KEY = "lora_drop_quantization"
_BLOCK_SIZES = (128, 64, 32, 16)
_PIECE_VALUES = 1 << 17  # of one thread: what a core's cache holds
_CHUNK_VALUES = 1 << 22  # read at once when dequantizing
_STEPS = np.arange(-1.0, 1.01, 0.1, dtype=np.float32)  # levels by which a block's range is widened or clipped


@dataclass(frozen=True)
class BlockFormat:
    """How one tensor is stored: `bits` 4 or 8, a scale per `block_size` values along K.

    `symmetric`: every zero point is 2^(bits−1).
    """

    bits: int
    block_size: int
    symmetric: bool

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Quantization:
    """What the user asked for: bits, the largest block size, the method, and whether zero points may be used."""

    bits: int
    block_size: int = 32
    method: str = "search"
    symmetric: bool = False

    @classmethod
    def of(cls, dtype: str, block_size: int | None = None, method: str | None = None) -> Quantization:
        """With the defaults for what is not given."""
        bits = QUANTIZED_DTYPES[dtype]
        default = "search" if bits == 4 else "rtn"  # 8 bits leave nothing to search for
        method = method or default
        return cls(bits, block_size or BLOCK_SIZES[0], method, symmetric=bits == 8 or method == "rtn")

    def format_of(self, shape: tuple[int, ...]) -> BlockFormat | None:
        """The format of a matrix [N, K]; None when no block size divides K.

        4-bit zero points need an even number of blocks a row, so that rows begin at whole bytes: a smaller block
        makes it even, or the tensor is symmetric.
        """
        if len(shape) != 2:
            return None
        sizes = [size for size in _BLOCK_SIZES if size <= self.block_size and shape[1] % size == 0]
        if not sizes:
            return None
        if self.symmetric or self.bits == 8:
            return BlockFormat(self.bits, sizes[0], self.symmetric)
        even = [size for size in sizes if shape[1] // size % 2 == 0]
        return BlockFormat(4, even[0], False) if even else BlockFormat(4, sizes[0], True)


def quantize_rows(rows: Floats, form: BlockFormat, method: str) -> Blocked:
    """Quantize float32 [n, K]; returns q uint8 [n, K], scales float32 and zero points uint8 [n, K / block_size]."""
    n, k = rows.shape
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, form.block_size)
    quantize = _search if method == "search" else _rtn
    step = max(1, _PIECE_VALUES // form.block_size)
    pieces = [blocks[begin : begin + step] for begin in range(0, len(blocks), step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda piece: quantize(piece, form), pieces))
    q, scales, zero_points = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return q.reshape(n, k), scales.reshape(n, -1), zero_points.reshape(n, -1)


def _range(x: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    """Per block [b, 1]: the steps per unit that make the range fit, and its lower end.

    Symmetric integers reach one further down than up, so the value of largest magnitude goes to the lower end.
    """
    if form.symmetric:
        largest = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
        steps = np.divide(-form.middle, largest, out=np.zeros_like(largest), where=largest != 0)
        return steps, np.zeros_like(largest)
    low = np.minimum(x.min(1, keepdims=True), 0)
    span = np.maximum(x.max(1, keepdims=True), 0) - low
    return np.divide(2**form.bits - 1, span, out=np.zeros_like(span), where=span > 0), low


def _round(x: Floats, steps: Floats, low: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    """Integers q − zero_point [b, block] and the zero points [b, 1], as float32."""
    if form.symmetric:
        zero: Floats = np.full_like(steps, form.middle)
    else:
        zero = np.clip(np.rint(-low * steps), 0, 2**form.bits - 1)
    q = x * steps
    np.rint(q, out=q)
    np.clip(q, -zero, 2**form.bits - 1 - zero, out=q)
    return q, zero


def _rtn(x: Floats, form: BlockFormat) -> Blocked:
    steps, low = _range(x, form)
    q, zero = _round(x, steps, low, form)
    scales = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    return (q + zero).astype(np.uint8), scales[:, 0], zero[:, 0].astype(np.uint8)


def _search(x: Floats, form: BlockFormat) -> Blocked:
    weights = np.abs(x)
    weights += np.sqrt(np.mean(x * x, axis=1, keepdims=True))  # large values matter more, none is nothing
    weighted = weights * x
    fit, low = _range(x, form)
    levels = form.middle if form.symmetric else 2**form.bits - 1
    best_q, best_zero = _round(x, fit, low, form)
    best_error = np.full_like(fit, np.inf)
    best_scale = np.zeros_like(fit)
    for step in _STEPS:
        q, zero = _round(x, fit * (1 + step / levels), low, form)
        dot = np.einsum("bk,bk->b", weighted, q)[:, None]
        norm = np.einsum("bk,bk,bk->b", weights, q, q)[:, None]
        scale = np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0)  # the least-squares one
        rest = q * scale
        rest -= x
        error = np.einsum("bk,bk,bk->b", weights, rest, rest)[:, None]
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_zero, zero, where=better)
        np.copyto(best_q, q, where=better)
    best_q += best_zero
    return best_q.astype(np.uint8), best_scale[:, 0], best_zero[:, 0].astype(np.uint8)


def pack(q: Integers, bits: int) -> bytes:
    """The bytes of ONNX's UINT4 or UINT8: two 4-bit values a byte, the first in the low half."""
    flat = q.reshape(-1)
    if bits == 8:
        return flat.tobytes()
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def unpack(data: npt.NDArray[np.uint8], bits: int) -> Integers:
    """The values of packed bytes [..., n], [..., n · 8 / bits]."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def dequantize(q: Integers, scales: Floats, zero_points: Integers) -> Floats:
    """float32 [n, K] of q [n, K], scales and zero points [n, K / block]."""
    n, k = q.shape
    blocks = q.reshape(n, scales.shape[1], -1).astype(np.float32)
    blocks -= zero_points[..., None].astype(np.float32)
    blocks *= scales[..., None]
    return blocks.reshape(n, k)


def block_formats(
    shapes: Mapping[str, tuple[int, ...]],
    native: Mapping[str, BlockFormat],
    groups: Iterable[tuple[str, ...]],
    quantization: Quantization,
) -> dict[str, BlockFormat]:
    """The format of each weight that is quantized; those of a group are alike.

    Args:
        shapes: name → [N, K] of the weights that may be quantized.
        native: the formats that some have in the checkpoint; taken where it is what was asked for.
        groups: names that will be one matrix; names outside `shapes` have no part in this.
    """

    def taken(name: str) -> bool:
        form = native.get(name)
        return form is not None and (form.bits, form.block_size) == (quantization.bits, quantization.block_size)

    together = {name: group for group in groups for name in group}
    formats = {}
    for name, shape in shapes.items():
        members = together.get(name, (name,))
        form = native[name] if all(map(taken, members)) else quantization.format_of(shape)
        if form is not None:
            formats[name] = form
    return formats


def quantized_blocks(source: Any, form: BlockFormat, method: str, chunk_rows: int) -> Iterable[Blocked]:
    """A tensor's integers, scales and zero points, `chunk_rows` rows at a time.

    Integers that the checkpoint holds in blocks of the same size are taken as they are.

    Raises:
        InputError: a value is infinite or not a number.
    """
    native = getattr(source, "native", None)
    taken = native is not None and (native.bits, native.block_size) == (form.bits, form.block_size)
    for begin in range(0, source.shape[0], chunk_rows):
        if taken:
            yield source.native_rows(begin, begin + chunk_rows)
            continue
        rows = np.asarray(source.rows(begin, begin + chunk_rows), np.float32)
        if not np.isfinite(rows).all():
            raise InputError(
                "A weight cannot be quantized.",
                note=f"{source.name} has values that are infinite or not a number.",
                hint="The checkpoint is damaged, or needs --dtype fp32.",
            )
        yield quantize_rows(rows, form, method)


@dataclass(frozen=True)
class DequantizedRef:
    """A quantized tensor [N, K] of a safetensors file, read as float32; offers what TensorRef offers.

    Its parts there: q U8 [N, K · bits / 8], scales F32 [N, K / block], zero points U8.
    """

    form: BlockFormat
    q: TensorRef
    scales: TensorRef
    zero_points: TensorRef
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.q.name

    @property
    def file(self) -> Path:
        return self.q.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape[0], self.q.shape[1] * 8 // self.form.bits

    @property
    def size_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def read(self) -> Floats:
        """All values, float32."""
        return self.rows(0, self.shape[0])

    def rows(self, begin: int, end: int) -> Floats:
        """Rows `begin` to `end`, float32."""
        end = min(end, self.shape[0])
        values = np.empty((max(0, end - begin), self.shape[1]), np.float32)
        step = max(1, _CHUNK_VALUES // self.shape[1])
        for first in range(begin, end, step):
            last = min(end, first + step)
            q = unpack(self.q.rows(first, last), self.form.bits)
            scales = np.asarray(self.scales.rows(first, last))
            if self.form.symmetric:
                zero_points = np.full(scales.shape, self.form.middle, np.uint8)
            else:
                zero_points = unpack(self.zero_points.rows(first, last), self.form.bits)
            values[first - begin : last - begin] = dequantize(q, scales, zero_points)
        return values


def quantization_metadata(formats: Mapping[str, BlockFormat]) -> dict[str, str]:
    """What a safetensors file says of its quantized tensors: name → [bits, block size, symmetric], as JSON."""
    if not formats:
        return {}
    return {METADATA_KEY: json.dumps({n: [f.bits, f.block_size, f.symmetric] for n, f in formats.items()})}


def part_names(name: str) -> tuple[str, str, str]:
    """Names of a quantized tensor's integers, scales and zero points in its file."""
    return name, f"{name}.scales", f"{name}.zero_points"


def dequantized_tensors(path: Path, refs: Mapping[str, TensorRef]) -> dict[str, TensorRef | DequantizedRef]:
    """The tensors of a safetensors file, quantized ones as one that reads float32."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return dict(refs)
    found: dict[str, TensorRef | DequantizedRef] = dict(refs)
    for name, (bits, block_size, symmetric) in json.loads(text).items():
        q, scales, zero_points = (refs[part] for part in part_names(name))
        for part in part_names(name):
            del found[part]
        found[name] = DequantizedRef(BlockFormat(bits, block_size, symmetric), q, scales, zero_points)
    return found


def quantizable(graph: ir.Graph) -> frozenset[str]:
    """Names of the parameters that are weights of linear layers, or the table that token ids are looked up in.

    Args:
        graph: as traced (trace.py): a linear layer is MatMul with a transposed initializer.
    """

    def is_weight(value: ir.Value) -> bool:
        uses = list(value.uses())
        return bool(uses) and all(_is_linear(use.node) or _is_lookup(use.node, use.idx) for use in uses)

    return frozenset(name for name, value in graph.initializers.items() if is_weight(value))


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "Transpose":
        return False
    return all(use.node.op_type == "MatMul" and use.idx == 1 for use in node.outputs[0].uses())


def _is_lookup(node: ir.Node, position: int) -> bool:
    if node.op_type != "Gather" or position != 0 or ("axis" in node.attributes and node.attributes["axis"].as_int()):
        return False
    return node.inputs[1] is not None and node.inputs[1].name == "input_ids"
