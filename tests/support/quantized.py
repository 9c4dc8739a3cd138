"""Matrices to quantize, and where the bytes of a stored one lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.bundle.safetensors_file import TensorPlace, read_tensors
from safetensors.numpy import save_file

from lora_drop_export.quantize.formats import BlockFormat
from lora_drop_export.weights.store import store_weights

FORMATS = [
    BlockFormat(bits, size, symmetric) for bits in (4, 8) for size in (16, 32, 128) for symmetric in (True, False)
]
FORMATS += [BlockFormat(bits, 256, True) for bits in (4, 8)]  # the whole of a row in tests of all formats


def matrix(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Gaussian rows of different sizes, with a few blocks that are awkward to scale."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, k)) * np.exp(generator.standard_normal((n, 1)))
    x[0, :16], x[1, :128], x[2, :128] = 0, 0.25, -3
    x[3, :128] = np.abs(x[3, :128]) + 1
    return x.astype(np.float32)


def store(arrays: dict[str, np.ndarray], root: Path, formats: dict[str, BlockFormat], **options: Any) -> Any:
    root.mkdir(exist_ok=True)
    save_file(arrays, root / "source.safetensors")
    refs = read_tensors(root / "source.safetensors")
    return store_weights(refs, "float32", root, "copy", formats=formats, **options)


def data(root: Path, tensor: TensorPlace) -> bytes:
    with (root / tensor.location).open("rb") as file:
        file.seek(tensor.offset_bytes)
        return file.read(tensor.size_bytes)
