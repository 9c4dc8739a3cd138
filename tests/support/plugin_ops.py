"""The plugins' nodes as operators on PyTorch's tensors, on the CPU and on a GPU, by the plugins' own kernels.

Enters: a built kernel library (plugins/kernels/binding.py). Leaves: a function for each plugin, which takes a node's
inputs in their order and its attributes as keywords. Caches are updated in place. TensorRT's glue has no part in it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from plugins.kernels.binding import DTYPE_CODES, LoraDropAttention, LoraDropInt4Gemm

Tensor = torch.Tensor
CODES = {
    torch.float32: DTYPE_CODES["f32"],
    torch.float16: DTYPE_CODES["f16"],
    torch.bfloat16: DTYPE_CODES["bf16"],
    torch.float8_e4m3fn: DTYPE_CODES["f8"],
    torch.int8: DTYPE_CODES["i8"],
}
OPTIONAL = {
    "has_count": ("count",),
    "rotary_dim": ("cos", "sin"),
    "has_norm": ("q_norm", "k_norm"),
    "has_kv_scale": ("k_scale", "v_scale"),
    "has_sinks": ("sinks",),
}
HOST_MULTIPROCESSORS = 2


def _stream(tensor: Tensor) -> int | None:
    return None if tensor.device.type == "cpu" else torch.cuda.current_stream(tensor.device).cuda_stream


def _multiprocessors(tensor: Tensor) -> int:
    if tensor.device.type == "cpu":
        return HOST_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def plugin_ops(library: ctypes.CDLL) -> dict[str, Callable[..., Any]]:
    """Operators by name."""

    def attend(*inputs: Tensor, **attributes: Any) -> tuple[Tensor, Tensor, Tensor]:
        names = ["query", "key", "value", "key_cache", "value_cache", "length"]
        names += [name for flag, extra in OPTIONAL.items() if attributes[flag] for name in extra]
        given = dict(zip(names, inputs, strict=True))
        caches = given["key_cache"], given["value_cache"]
        assert all(cache.is_contiguous() for cache in caches)
        tensors = {name: tensor.contiguous() for name, tensor in given.items()}
        query = tensors["query"]
        tensors["output"] = torch.full_like(query, torch.nan)
        call = LoraDropAttention(
            batch=query.shape[0],
            new_tokens=query.shape[1],
            slots=caches[0].shape[2],
            dtype=CODES[query.dtype],
            kv_dtype=CODES[caches[0].dtype],
        )
        for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "interleaved", "window"):
            setattr(call, name, attributes[name])
        for name in ("scale", "softcap", "norm_epsilon"):
            setattr(call, name, attributes[name])
        for name, tensor in tensors.items():
            setattr(call, name, tensor.data_ptr())
        problem = library.lora_drop_attention_problem(call)
        assert problem is None, problem
        units = _multiprocessors(query)
        size = library.lora_drop_workspace_bytes(call, units)
        workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8, device=query.device)
        call.workspace = -(-workspace.data_ptr() // 256) * 256
        assert library.lora_drop_attention(call, size, units, _stream(query)) == 0
        return tensors["output"], *caches

    def int4_gemm(x: Tensor, *parts: Tensor, block: int, has_zero_points: int, **_: Any) -> Tensor:
        weights, scales, points = (*parts, None)[:3]
        assert (points is not None) == bool(has_zero_points)
        assert {t.dtype for t in (weights, points) if t is not None} == {torch.int8}
        assert scales.dtype == x.dtype
        outputs, inputs = weights.shape[0], 2 * weights.shape[1]
        assert (x.shape[-1], scales.shape) == (inputs, (outputs, inputs // block))
        assert points is None or points.shape == (outputs, inputs // block // 2)
        x = x.contiguous()
        y = x.new_full((*x.shape[:-1], outputs), torch.nan)
        rows = x.numel() // inputs
        call = LoraDropInt4Gemm(rows, inputs, outputs, block, CODES[x.dtype])
        for name, tensor in {"x": x, "weights": weights, "scales": scales, "zero_points": points, "y": y}.items():
            setattr(call, name, None if tensor is None else tensor.data_ptr())
        problem = library.lora_drop_int4_gemm_problem(call)
        assert problem is None, problem
        assert library.lora_drop_int4_gemm(call, _stream(x)) == 0
        return y

    return {"SkipWriteKVAttention": attend, "Int4Gemm": int4_gemm}
