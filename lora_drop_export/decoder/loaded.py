"""A checkpoint as a whole PyTorch model, for the tools that fit and profile.

Enters: what a user named: a Hugging Face directory, a hub id, a GGUF file or a bundle. Leaves: the frozen transformers
model with its weights, its tokenizer, and of a bundle the plan. Knows no schedule. Everything is read through
checkpoint/open.py, so a quantized bundle gives the weights that it decodes with, dequantized.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.errors import InputError, first_line
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.foreign import refused
from lora_drop_export.checkpoint.open import open_checkpoint, read_tokenizer
from lora_drop_export.weights.resolve import resolve_tensors

from .anatomy import buffer_values, put_tensor, stored_tensors, tied_names
from .build import build_model
from .refusals import refuse_by_config


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        name: as the user would say it.
        model: transformers' causal language model, in eval mode, no parameter of which learns.
        tokenizer: transformers' tokenizer, None where there is none.
        fingerprint: of the base weights, as adapters and bundles record it.
        plan: of a bundle, else None.
        max_seq_len: tokens of the longest text that a bundle allows, else None.
    """

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    plan: DropPlan | None
    max_seq_len: int | None = None

    def encode(self, text: str) -> Any:
        """Token ids int64 [T] without special tokens.

        Raises:
            InputError: there is no tokenizer, or it has tokens that the model does not.
        """
        if self.tokenizer is None:
            raise InputError(
                "The model has no tokenizer.",
                note=f"{self.name} has no tokenizer files, and the text has to become tokens.",
                hint="Put the tokenizer's files beside the weights."
                if self.plan is None
                else "Give the checkpoint that the bundle was made from, with the tokenizer's files.",
            )
        import torch

        with refused("The checkpoint's tokenizer cannot be used.", self.name):
            listed = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = torch.tensor(listed, dtype=torch.int64)
        known = self.model.get_input_embeddings().weight.shape[0]
        if len(unknown := ids[ids >= known]):
            raise InputError(
                "The text has a token that the model does not know.",
                note=f"It is {int(unknown[0])}, the model has 0 to {known - 1}.",
                hint=f"Use the tokenizer that {self.name} was trained with, or leave this token out of the text.",
            )
        return ids


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

    refuse_by_config(checkpoint.config)
    with torch.device("meta"):
        model = build_model(checkpoint, dtype)
    look(model)
    tied = tied_names(model)
    for name, value in buffer_values(model).items():
        put_tensor(model, name, value)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model, checkpoint).items()}
    for name, ref in resolve_tensors(checkpoint, shapes, tied).items():
        values = torch.from_numpy(np.array(ref.read(), np.float32)).to(getattr(torch, dtype))
        put_tensor(model, name, values)
    model.tie_weights()
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or too little of its memory
        raise _no_device(device, first_line(error)) from None


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
    with refused("There is no such model.", repr(source), "Check the spelling."):  # ~nobody/model
        path = Path(source).expanduser()
    with tempfile.TemporaryDirectory(prefix="lora-drop-") as scratch, contextlib.ExitStack() as stack:
        checkpoint = open_checkpoint(source, Path(scratch), trust_remote_code=trust_remote_code, log=log)
        stack.enter_context(checkpoint.unchanged())
        manifest = None if checkpoint.bundle is None else checkpoint.bundle.manifest
        if manifest is not None:
            checkpoint = dataclasses.replace(checkpoint, name=path.resolve().name)
        loaded = LoadedModel(
            name=checkpoint.name,
            model=None,
            tokenizer=read_tokenizer(checkpoint.directory, trust_remote_code),
            fingerprint=checkpoint.fingerprint(),
            plan=None if manifest is None else manifest.plan,
            max_seq_len=None if manifest is None else manifest.limits.max_seq_len,
        )

        def look(model: Any) -> None:
            check(dataclasses.replace(loaded, model=model))

        return dataclasses.replace(loaded, model=_model(checkpoint, dtype, device, look))
