"""The C interfaces of the kernels in ctypes, for whoever calls a built library from Python.

Enters: the path of a library that exports skip_write_kv_attention.h and int4_gemm.h, of the device or of the host
build. Leaves: that library with the types of its functions set, and the structs that they take. What a call means is
said in the headers.
Nothing here knows arrays, GPUs or what the pointers lead to.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

# LoraDropDtype
DTYPE_CODES = {"f32": 0, "f16": 1, "bf16": 2, "f8": 3, "i8": 4}

SIZES = ("batch", "new_tokens", "heads", "kv_heads", "head_dim", "slots", "rotary_dim", "interleaved", "window")
FLOATS = ("scale", "softcap", "norm_epsilon")
INPUTS = ("query", "key", "value", "cos", "sin", "q_norm", "k_norm", "k_scale", "v_scale", "sinks", "length", "count")
UPDATED = ("key_cache", "value_cache", "output", "workspace")


class LoraDropAttention(ctypes.Structure):
    """The struct of skip_write_kv_attention.h."""

    _fields_ = (
        [(name, ctypes.c_int32) for name in (*SIZES, "dtype", "kv_dtype")]
        + [(name, ctypes.c_float) for name in FLOATS]
        + [(name, ctypes.c_void_p) for name in (*INPUTS, *UPDATED)]
    )


GEMM_SIZES = ("rows", "inputs", "outputs", "block")
GEMM_POINTERS = ("x", "weights", "scales", "zero_points", "y")


class LoraDropInt4Gemm(ctypes.Structure):
    """The struct of int4_gemm.h."""

    _fields_ = [(name, ctypes.c_int32) for name in (*GEMM_SIZES, "dtype")] + [
        (name, ctypes.c_void_p) for name in GEMM_POINTERS
    ]


def bind_int4_gemm(library: ctypes.CDLL) -> None:
    gemm = ctypes.POINTER(LoraDropInt4Gemm)
    library.lora_drop_int4_gemm_problem.argtypes = [gemm]
    library.lora_drop_int4_gemm_problem.restype = ctypes.c_char_p
    library.lora_drop_int4_gemm.argtypes = [gemm, ctypes.c_void_p]
    library.lora_drop_int4_gemm.restype = ctypes.c_int


def bind_attention(library: ctypes.CDLL) -> None:
    call = ctypes.POINTER(LoraDropAttention)
    library.lora_drop_attention_problem.argtypes = [call]
    library.lora_drop_attention_problem.restype = ctypes.c_char_p
    library.lora_drop_workspace_bytes.argtypes = [call, ctypes.c_int32]
    library.lora_drop_workspace_bytes.restype = ctypes.c_size_t
    library.lora_drop_attention.argtypes = [call, ctypes.c_size_t, ctypes.c_int32, ctypes.c_void_p]
    library.lora_drop_attention.restype = ctypes.c_int


def load_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    bind_attention(library)
    bind_int4_gemm(library)
    return library
