"""Step graphs in PyTorch: what each operator of the TensorRT form computes, on any device.

Enters: an ONNX graph in the native form, its inputs as tensors. Leaves: its outputs. Integers that come from shapes and
constants stay on the host, so that nothing waits for the device and a CUDA graph can capture a run. An operator that
is not here is an error with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import onnx
import torch
from torch.nn import functional

Tensor = torch.Tensor
DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 16: torch.bfloat16}
DTYPES |= {3: torch.int8, 17: torch.float8_e4m3fn}


def from_onnx(tensor: onnx.TensorProto) -> Tensor:
    array = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype("float32")).to(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _axes(arguments: list[Tensor], index: int, attributes: Mapping[str, Any]) -> list[int] | None:
    if len(arguments) > index and arguments[index] is not None:
        return [int(axis) for axis in arguments[index].flatten().tolist()]
    return attributes.get("axes")


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end])


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    wanted = sorted(axis % (x.dim() + axes.numel()) for axis in axes.flatten().tolist())
    for axis in wanted:
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.flatten().tolist()))


def _gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    picked = x.index_select(axis, index.reshape(-1).remainder(x.shape[axis]))  # -1 is the last
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    if batch_dims == 0:
        return x[tuple(indices.unbind(-1))]
    assert batch_dims == 1
    rows = torch.arange(x.shape[0], device=x.device).reshape(-1, *(1,) * (indices.dim() - 2))
    return x[(rows.expand(indices.shape[:-1]), *indices.unbind(-1))]


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    wanted = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes.tolist()]
    cut = [slice(None)] * x.dim()
    strides = [1] * len(wanted) if steps is None else steps.tolist()
    for axis, begin, end, step in zip(wanted, starts.tolist(), ends.tolist(), strides, strict=True):
        cut[axis] = slice(begin, end, step)
    return x[tuple(cut)]


def _split(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int = 2) -> tuple[Tensor, ...]:
    return x.chunk(num_outputs, axis) if sizes is None else x.split(sizes.tolist(), axis)


def _gemm(a: Tensor, b: Tensor, c: Tensor | None = None, **how: Any) -> Tensor:
    a, b = (x.T if how.get(flag) else x for x, flag in ((a, "transA"), (b, "transB")))
    product = a @ b * how.get("alpha", 1.0)
    return product if c is None else product + how.get("beta", 1.0) * c


def _rms_norm(x: Tensor, weight: Tensor, *, epsilon: float = 1e-5, **_: Any) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: int = 0, **_: Any) -> Tensor:
    assert not interleaved
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, S, R/2]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _tensor_scatter(past: Tensor, new: Tensor, begins: Tensor, *, axis: int = -2, **_: Any) -> Tensor:
    """In place, as the session binds past and present to one address."""
    assert axis % past.dim() == 2
    slots = begins.reshape(-1, 1) + torch.arange(new.shape[2], device=past.device)  # [B, S]
    return past.scatter_(2, slots[:, None, :, None].expand_as(new), new)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, **how: Any) -> Tensor:
    assert not how, f"Attention: {', '.join(how)}"
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def _reduce_max(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, **how: Any) -> Tensor:
    return x.amax(_axes([x, axes], 1, how) or list(range(x.dim())), keepdim=bool(keepdims))


def _reduce_mean(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, **how: Any) -> Tensor:
    return x.mean(_axes([x, axes], 1, how) or list(range(x.dim())), keepdim=bool(keepdims))


def _arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, **_: Any) -> Tensor:
    return x.argmax(axis, keepdim=bool(keepdims))


def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return (torch.isneginf(x) & bool(detect_negative)) | (torch.isposinf(x) & bool(detect_positive))


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


OPS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": _arg_max,
    "Attention": _attention,
    "Cast": lambda x, to: x.to(DTYPES[to]),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Cos": torch.cos,
    "Div": lambda a, b: a / b if a.is_floating_point() else a // b,
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist()))),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": lambda x, approximate=b"none": functional.gelu(x, approximate=approximate.decode()),
    "Gemm": _gemm,
    "Greater": torch.gt,
    "Identity": lambda x: x,
    "IsInf": _is_inf,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "RMSNormalization": _rms_norm,
    "Range": lambda begin, end, step: torch.arange(int(begin), int(end), int(step)),
    "Reciprocal": torch.reciprocal,
    "ReduceMax": _reduce_max,
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "TensorScatter": _tensor_scatter,
    "Transpose": lambda x, perm: x.permute(*perm),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
# Their tensors beside the first say sizes and axes, which torch takes as numbers
SIZES = {"Expand", "Range", "ReduceMax", "ReduceMean", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Unsqueeze"}


class Program:
    """A graph, its constants on the device.

    Args:
        plugins: operators beside those here, as plugin_ops.py makes them.
    """

    def __init__(
        self, graph: onnx.GraphProto, device: str, plugins: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    ) -> None:
        self.device, self.ops = device, {**OPS, **plugins}
        self.outputs = [value.name for value in graph.output]
        self.constants = {tensor.name: self._placed(from_onnx(tensor)) for tensor in graph.initializer}
        self.nodes = []
        for node in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                (value,) = attributes.values()
                value = from_onnx(value) if isinstance(value, onnx.TensorProto) else torch.tensor(value)
                self.constants[node.output[0]] = self._placed(value)
            elif node.op_type not in self.ops:
                raise NotImplementedError(f"tests/support/torch_ops.py has no operator {node.op_type}")
            else:
                self.nodes.append((node.op_type, list(node.input), list(node.output), attributes))
        self._uploaded: dict[tuple[Any, ...], Tensor] = {}

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device) if value.is_floating_point() else value

    def _on_device(self, value: Tensor) -> Tensor:
        """A host's integers on the device. Copied once, since a copy waits, which a capture does not allow; kept, since
        captured graphs hold its address. On the default stream: memory of this one's may be what captured graphs write
        to, which PyTorch does not know of."""
        key = value.dtype, tuple(value.shape), tuple(value.flatten().tolist())
        if key not in self._uploaded:
            apart = torch.cuda.stream(torch.cuda.default_stream()) if "cuda" in str(self.device) else nullcontext()
            with apart:
                self._uploaded[key] = value.to(self.device)
        return self._uploaded[key]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Any] = {"": None, **self.constants, **inputs}
        for op, names, outputs, attributes in self.nodes:
            arguments = [values[name] for name in names]
            on_device = any(x is not None and x.device.type != "cpu" for x in arguments)
            if on_device and op not in SIZES:
                arguments = [x if x is None or x.device.type != "cpu" else self._on_device(x) for x in arguments]
            found = self.ops[op](*arguments, **attributes)
            values |= zip(outputs, found if isinstance(found, (tuple, list)) else (found,), strict=True)
        return {name: values[name] for name in self.outputs}
