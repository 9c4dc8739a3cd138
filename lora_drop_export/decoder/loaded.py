"""A checkpoint as a whole PyTorch model, for the tools that fit and profile.

Enters: what a user named: a Hugging Face directory, a hub id, a GGUF file or a bundle. Leaves: the frozen transformers
model with its weights, its tokenizer, and of a bundle the plan. Knows no schedule. Everything is read through
checkpoint/open.py, so a quantized bundle gives the weights that it decodes with, dequantized.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.errors import InputError, first_line
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.weights.resolve import resolve_tensors

from .anatomy import buffer_values, tied_names


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        name: as the user would say it.
        model: transformers' causal language model, in eval mode, no parameter of which learns.
        tokenizer: transformers' tokenizer, None where there is none.
        fingerprint: of the base weights, as adapters and bundles record it.
        plan: of a bundle, else None.
    """

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    plan: DropPlan | None

    def encode(self, text: str) -> Any:
        """Token ids int64 [T] without special tokens.

        Raises:
            InputError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "The model has no tokenizer.",
                note=f"{self.name} has no tokenizer files, and the text has to become tokens.",
                hint="Put the tokenizer's files beside the weights.",
            )
        import torch

        return torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _no_device(device: str, reason: str) -> InputError:
    return InputError(
        "The model cannot be put on the device.",
        note=f"{device!r} was asked for: {reason}.",
        hint="Use --device cpu.",
    )


def _check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know, or has not got here."""
    import torch

    try:
        if torch.empty(1, device=device).is_meta:
            raise _no_device(device, "it holds no values")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise _no_device(device, first_line(error)) from None


def _model(checkpoint: Checkpoint, dtype: str, device: str, look: Callable[[Any], None]) -> Any:
    """The model that the config describes, its parameters read one at a time; `look` is given it without them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            checkpoint.config, dtype=getattr(torch, dtype), trust_remote_code=checkpoint.trust_remote_code
        ).eval()
    look(model)
    tied = tied_names(model)
    for name, value in buffer_values(model).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = value
    refs = resolve_tensors(checkpoint, {name: tuple(p.shape) for name, p in model.named_parameters()}, tied)
    for name, ref in refs.items():
        owner, _, leaf = name.rpartition(".")
        values = torch.from_numpy(np.array(ref.read(), np.float32)).to(getattr(torch, dtype))
        model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(values, False)
    model.tie_weights()
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or too little of its memory
        raise _no_device(device, first_line(error)) from None


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(directory.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(directory)


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    log: Callable[[str], None] = print,
    check: Callable[[LoadedModel], None] = lambda loaded: None,
) -> LoadedModel:
    """Load a model into memory.

    Args:
        source: a Hugging Face directory, a hub id, a GGUF file, or a bundle.
        dtype: `float32`, `float16` or `bfloat16`.
        check: refuses what will not fit the model, before its weights are read; all else is there, the model on
            PyTorch's device `meta`.

    Raises:
        InputError, ModelError, BundleError: nothing there, or not a model that can be read.
    """
    _check_device(device)
    path, plan, fingerprint = Path(source).expanduser(), None, None
    tokenizer_dir = None
    if (path / MANIFEST_NAME).is_file():
        bundle = Bundle.open(path)
        plan, fingerprint = bundle.manifest.plan, bundle.manifest.model.fingerprint
        source, tokenizer_dir = str(path / "weights"), path / "tokenizer"
    with tempfile.TemporaryDirectory(prefix="lora-drop-") as scratch:
        checkpoint = open_checkpoint(source, Path(scratch), trust_remote_code=trust_remote_code, log=log)
        if plan is not None:
            checkpoint = dataclasses.replace(checkpoint, name=path.resolve().name)
        loaded = LoadedModel(
            name=checkpoint.name,
            model=None,
            tokenizer=_tokenizer(tokenizer_dir or checkpoint.directory),
            fingerprint=fingerprint or checkpoint.fingerprint(),
            plan=plan,
        )

        def look(model: Any) -> None:
            check(dataclasses.replace(loaded, model=model))

        return dataclasses.replace(loaded, model=_model(checkpoint, dtype, device, look))
