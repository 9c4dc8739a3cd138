"""Optimization profiles: the ranges of every symbolic size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

Range = tuple[int, int, int]  # smallest, most frequent, largest
Profile = Mapping[str, Range]  # symbolic size → its range


LEAST_VERIFIED = 9  # tokens of a row: eight drafts and the one before them, whatever the plan's k


def refresh_profiles(tokens: int, max_batch: int, prefill_chunk: int) -> dict[str, Profile]:
    """One profile for decode steps, of up to so many tokens a row and their logits, one for chunks of a prefill."""
    batch = (1, 1, max_batch)
    return {
        "decode": {"batch": batch, "sequence": (1, 1, tokens), "rows": (1, 1, tokens)},
        "prefill": {"batch": batch, "sequence": (1, prefill_chunk, prefill_chunk), "rows": (1, 1, 1)},
    }


def lora_profiles(max_batch: int) -> dict[str, Profile]:
    return {"decode": {"batch": (1, 1, max_batch)}}


def symbolic_dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def optimization_profile(builder: Any, symbols: Mapping[str, list[int | str]], profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, dims in symbols.items():
        if any(isinstance(dim, str) for dim in dims):
            made.set_shape(name, *([profile[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)))
    return made
