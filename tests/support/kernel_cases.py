"""The calls of the attention kernel that are tested, as sizes and settings.

Nothing here knows arrays, a library or the kernel's algorithm; the names are those of skip_write_kv_attention.h.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One call. `lengths` and `counts` per row; a count of None is a null pointer."""

    name: str
    lengths: tuple[int, ...] = (37, 0, 130)
    counts: tuple[int, ...] | None = None
    new_tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    spare_slots: int = 7  # past the longest row
    rotary_dim: int | None = None  # None: head_dim
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    norm: bool = False
    sinks: bool = False
    dtype: str = "f32"
    kv_dtype: str | None = None  # None: dtype
    holes: int = 0  # positions run this far ahead of slots
    multiprocessors: int = 4
    seed: int = 0

    @property
    def cache_dtype(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def quantized(self) -> bool:
        return self.cache_dtype in ("f8", "i8")

    @property
    def appended(self) -> tuple[int, ...]:
        return self.counts if self.counts is not None else (self.new_tokens,) * len(self.lengths)

    @property
    def slots(self) -> int:
        return max(n + c for n, c in zip(self.lengths, self.appended, strict=True)) + self.spare_slots

    @property
    def rotated(self) -> int:
        return self.head_dim if self.rotary_dim is None else self.rotary_dim


CASES = [
    Case("one_token"),
    Case("count_is_null_and_all_rows_are_empty", lengths=(0, 0)),
    *(Case(f"head_dim_{d}", head_dim=d, new_tokens=2) for d in (8, 16, 32, 80, 96, 128, 256)),
    *(Case(f"new_tokens_{s}", new_tokens=s, lengths=(70, 0)) for s in (2, 4, 9, 16, 17, 40)),
    Case("mha", heads=3, kv_heads=3),
    Case("gqa_of_llama_3_8b", heads=32, kv_heads=8, head_dim=128, dtype="bf16", lengths=(90,)),
    Case("gqa_of_135m", heads=9, kv_heads=3, dtype="bf16"),
    Case("mqa_32", heads=32, kv_heads=1, head_dim=128, new_tokens=2, lengths=(100, 3)),
    Case("mqa_71", heads=71, kv_heads=1, lengths=(100,), dtype="bf16"),
    Case("mqa_71_of_4_tokens_in_tiles", heads=71, kv_heads=1, new_tokens=4, counts=(4, 2), lengths=(130, 5)),
    Case("gqa_16_of_9_tokens_of_256", heads=16, kv_heads=1, head_dim=256, new_tokens=9, lengths=(40,)),
    Case("counts", new_tokens=4, counts=(4, 0, 2), lengths=(37, 21, 0)),
    Case("counts_in_prefill", new_tokens=40, counts=(40, 0, 17, 1), lengths=(5, 9, 0, 70), dtype="f16"),
    Case("no_count_at_all", new_tokens=2, counts=(0, 0), lengths=(12, 0)),
    Case("holes", new_tokens=3, holes=23),
    Case("capacity", lengths=(40, 3), spare_slots=3000),
    Case("capacity_and_splits", lengths=(40, 700, 3), spare_slots=2000, multiprocessors=1000, dtype="f16"),
    Case("splits", lengths=(513, 0, 64), multiprocessors=500, new_tokens=2, counts=(2, 0, 2)),
    Case("splits_in_prefill", lengths=(300, 0), new_tokens=20, counts=(20, 0), multiprocessors=500),
    Case("split_slots_of_every_length", lengths=(1, 63, 64, 65, 127, 128, 129, 191), multiprocessors=64, kv_heads=1),
    Case("window", window=50, lengths=(37, 0, 130, 300)),
    Case("window_shorter_than_the_new_tokens", window=3, new_tokens=9, lengths=(37, 0, 2)),
    Case("window_in_prefill", window=20, new_tokens=40, lengths=(37, 0), counts=(40, 33)),
    Case("window_and_splits", window=200, lengths=(900, 10), new_tokens=4, multiprocessors=300),
    Case("softcap", softcap=3.0, new_tokens=2),
    Case("sinks", sinks=True, lengths=(37, 0, 130), counts=(1, 0, 1)),
    Case("sinks_and_splits", sinks=True, lengths=(513, 0, 64), multiprocessors=500, new_tokens=2, counts=(2, 0, 2)),
    Case("norm", norm=True, new_tokens=3, dtype="bf16"),
    Case("norm_in_prefill", norm=True, new_tokens=18, head_dim=96),
    Case("norm_without_rope", norm=True, rotary_dim=0),
    Case("no_rope", rotary_dim=0, new_tokens=2),
    Case("interleaved", interleaved=True, new_tokens=2),
    Case("partial_rotary", rotary_dim=16, new_tokens=2, dtype="f16"),
    Case("partial_rotary_interleaved", rotary_dim=20, interleaved=True, head_dim=80, new_tokens=17),
    Case("f16", dtype="f16", head_dim=128, new_tokens=4),
    Case("bf16", dtype="bf16", head_dim=256, heads=8, kv_heads=1, new_tokens=2),
    Case("f8_of_f32", kv_dtype="f8", new_tokens=3),
    Case("f8_of_bf16", dtype="bf16", kv_dtype="f8", head_dim=128, new_tokens=2, multiprocessors=64),
    Case("f8_of_bf16_of_one_token", dtype="bf16", kv_dtype="f8"),
    Case("f8_of_f16_in_prefill", dtype="f16", kv_dtype="f8", new_tokens=33, lengths=(4,)),
    Case("i8_of_f32_in_prefill", kv_dtype="i8", new_tokens=33, lengths=(4, 70), counts=(33, 5)),
    Case("i8_of_f16", dtype="f16", kv_dtype="i8", head_dim=96, new_tokens=2),
    Case("i8_of_bf16", dtype="bf16", kv_dtype="i8", heads=9, kv_heads=3),
    # On tensor cores: float16 and bfloat16 with several tokens, or with groups of 8 and more
    *(Case(f"tensor_head_dim_{d}", head_dim=d, new_tokens=18, lengths=(50, 0), dtype="f16", counts=(18, 5))
      for d in (8, 72, 80, 96, 256)),
    Case("tensor_prompt", new_tokens=70, lengths=(5, 0), counts=(70, 33), dtype="bf16", head_dim=128),
    Case("tensor_group_of_8", heads=16, kv_heads=2, head_dim=128, dtype="f16", lengths=(200, 0, 63), counts=(1, 1, 0),
         multiprocessors=1),
    Case("tensor_group_of_20", heads=20, kv_heads=1, dtype="f16", lengths=(64, 130), new_tokens=2),
    Case("tensor_window", window=20, new_tokens=40, lengths=(37, 0), counts=(40, 33), dtype="f16"),
    Case("tensor_window_and_parts", window=200, lengths=(900, 10), new_tokens=4, dtype="f16", multiprocessors=300),
    Case("tensor_softcap_and_norm", softcap=3.0, norm=True, interleaved=True, new_tokens=19, dtype="f16", holes=9,
         lengths=(30, 3)),
    Case("tensor_sinks", sinks=True, heads=16, dtype="f16", lengths=(64, 0), new_tokens=20, counts=(20, 3)),
    Case("tensor_sinks_and_parts", sinks=True, window=200, lengths=(900, 10), new_tokens=4, dtype="bf16",
         multiprocessors=300),
    Case("tensor_i8", dtype="bf16", kv_dtype="i8", new_tokens=33, lengths=(40,), head_dim=96),
    Case("tensor_parts_of_a_prompt", lengths=(300, 0), new_tokens=40, counts=(40, 0), multiprocessors=500, dtype="f16"),
    Case("ragged", lengths=(700, 3, 0, 65, 128, 11), counts=(1, 1, 0, 1, 1, 1), multiprocessors=5),
    Case("everything", dtype="bf16", kv_dtype="f8", heads=12, kv_heads=2, head_dim=128, rotary_dim=64, norm=True,
         sinks=True, softcap=20.0, window=150, new_tokens=5, counts=(5, 0, 3, 1), lengths=(400, 9, 0, 149), holes=11,
         multiprocessors=200),
]  # fmt: skip


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
