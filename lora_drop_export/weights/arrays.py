"""Small weight files of our own: adapters and cache scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.safetensors_file import TensorPlace, read_tensors
from lora_drop_runtime.dtypes import safetensors_name

from .layout import Entry
from .write import stored_blocks, write_safetensors


def store_arrays(arrays: Mapping[str, npt.NDArray[Any]], file: str, dtype: str, root: Path) -> dict[str, TensorPlace]:
    """Write small arrays, if any, to `weights/file` and return their places; `read_arrays` is the way back."""
    if not arrays:
        return {}
    path = root / "weights" / file
    entries = [Entry(name, safetensors_name(dtype), array.shape) for name, array in arrays.items()]
    chunks = ((name, block) for name, array in arrays.items() for block in stored_blocks(array, dtype))
    write_safetensors(path, entries, chunks, lambda *_: None)
    return {name: dataclasses.replace(ref, file=Path("weights", file)) for name, ref in read_tensors(path).items()}


def read_arrays(root: Path, file: str) -> dict[str, npt.NDArray[Any]]:
    """What `store_arrays` wrote to `weights/file`; nothing where there is no such file. Copies, and no mapped file:
    Windows renames no directory that has one."""
    path = root / "weights" / file
    return {name: np.array(ref.read()) for name, ref in read_tensors(path).items()} if path.is_file() else {}
