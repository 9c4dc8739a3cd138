"""How ONNX Runtime sessions over a bundle's weights are opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.manifest import QUANTIZED_DTYPES, ModelFacts
from lora_drop_runtime.engines.threads import default_threads

PACKED_BYTES = 768 << 20  # a second of packing


def packs_weights(model: ModelFacts) -> bool:
    """Whether ONNX Runtime rearranges weights for its kernels when a bundle is opened, or computes on the mapped files.

    Quantized weights have no other kernels worth having. Float weights gain where matrices are small and opening stays
    below a second.
    """
    return model.weight_dtype in QUANTIZED_DTYPES or model.weight_bytes <= PACKED_BYTES


def session_options(ort: Any, root: str | Path, threads: int | None) -> Any:
    """How sessions over a bundle's weights are opened; `threads` as for OrtEngine."""
    options = ort.SessionOptions()
    # Left alone it makes a thread for each core of the machine, and binds it there, whatever cores the process may use.
    # On Windows and macOS nothing says which these are, nor which processors are one core: that it knows itself
    if threads is None and hasattr(os, "sched_getaffinity"):
        threads = default_threads()
    options.intra_op_num_threads = threads or 0
    folder = os.fsencode(Path(root).resolve())  # which may be no UTF-8
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    # Threads that spin on after a step take the cores from whoever comes next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
