"""Which tensors a new safetensors file holds, in which order and at which offsets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_drop_runtime.dtypes import BY_SAFETENSORS, safetensors_name

from lora_drop_export.checkpoint.checkpoint import TensorSource
from lora_drop_export.quantize.formats import BlockFormat, part_names


@dataclass(frozen=True)
class Order:
    """The tensors of a file to write, a tied one once, in the order of their data.

    `groups` lists the first initializer name of each tensor; the members of a group that was asked for stand together.
    """

    sources: dict[str, TensorSource]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, refs: Mapping[str, TensorSource], groups: Sequence[tuple[str, ...]]) -> Order:
        together = {name: group for group in groups for name in group}
        first: dict[str, str] = {}  # the checkpoint's name → initializer
        ordered: list[tuple[str, ...]] = []
        placed: set[str] = set()
        for name in refs:
            new = tuple(n for n in together.get(name, (name,)) if first.setdefault(refs[n].name, n) == n)
            new = tuple(n for n in new if n not in placed)
            placed.update(new)
            if new:
                ordered.append(new)
        return cls({name: refs[name] for group in ordered for name in group}, tuple(ordered))


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file to be written; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * BY_SAFETENSORS[self.dtype].size_bytes


def file_entries(order: Order, dtype: str, formats: Mapping[str, BlockFormat]) -> list[Entry]:
    """Where the data go: of a quantized group first all integers, then all scales; zero points end the file.

    They alone may have odd sizes, and E4M3, whose matrices go there then, so that everything before them is aligned.
    """
    front: list[Entry] = []
    back: list[Entry] = []
    for group in order.groups:
        integers, scales = [], []
        for name in group:
            source, form = order.sources[name], formats.get(name)
            if form is None:
                integers.append(Entry(source.name, safetensors_name(dtype), source.shape))
                continue
            n, k = source.shape
            names = part_names(source.name)
            blocks = k // form.block_size
            scales.append(Entry(names[1], safetensors_name(dtype), form.scales_shape(source.shape)))
            if form.floating:
                stored = Entry(names[0], safetensors_name(form.stored_as), (n, k))
                (back if stored.size_bytes % 4 else integers).append(stored)
                continue
            integers.append(Entry(names[0], "U8", (n, k * form.bits // 8)))
            row_bits = blocks * form.bits
            whole = row_bits % 8 == 0
            back.append(Entry(names[2], "U8", (n, row_bits // 8) if whole else ((n * row_bits + 7) // 8,)))
        front += integers + scales
    return front + back
