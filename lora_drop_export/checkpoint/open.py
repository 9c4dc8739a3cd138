"""From what the user named to a checkpoint on disk.

Enters: a local directory, a hub id or a GGUF file. Leaves: a `Checkpoint`: the config, where each tensor lies, and the
directory with tokenizer and generation config. Reads headers only: tensors are read, and those of a GGUF file or a
quantized bundle dequantized, when they are asked for. A `.bin` checkpoint is first converted by transformers into an
ordinary safetensors directory under `scratch`; a GGUF file's config and tokenizer are written there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError, ModelError, first_line

from lora_drop_export.quantize.dequantized import dequantized_tensors

from .checkpoint import Checkpoint, TensorSource
from .gguf import read_gguf
from .renamed import renamed_tensors

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "LICENSE*", "*.txt", "*.py"]
_UNREADABLE = (ValueError, KeyError, ImportError, OSError, RuntimeError, IndexError)  # of transformers and gguf


def _unreadable(error: BaseException) -> ModelError:
    return ModelError(
        "transformers cannot read this checkpoint.",
        note=first_line(error),
        hint="Convert it to a safetensors directory first.",
    )


def _model_directory(model: Any, scratch: Path, source: Path, **kwargs: Any) -> Path:
    """Config, generation config and tokenizer of a loaded model, in a new directory under `scratch`."""
    from transformers import AutoTokenizer

    target = scratch / "converted"
    target.mkdir(parents=True)
    model.config._name_or_path = ""
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    with contextlib.suppress(ValueError, OSError, ImportError):  # without a tokenizer the bundle takes token ids
        AutoTokenizer.from_pretrained(source, **kwargs).save_pretrained(target)
    return target


def _config(directory: Path, trust_remote_code: bool, **kwargs: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, **kwargs)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            "transformers cannot read the model's config.",
            note=first_line(error),
            hint="A newer transformers may know it; for models with code of their own add --trust-remote-code.",
        ) from None


def _gguf(path: Path, scratch: Path) -> Checkpoint:
    """A GGUF file, its tensors where they lie; config and tokenizer are written to a directory under `scratch`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors = read_gguf(path.resolve(), model)
    except _UNREADABLE as error:
        raise _unreadable(error) from None
    target = _model_directory(model, scratch, path.parent, gguf_file=path.name)
    return Checkpoint(path.name, target, _config(target, False), tensors, owned=True)


def _snapshot(model: str) -> Path:
    """The files of a hub repository, from the cache or downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise HFValidationError("it looks like a path")
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            "There is no such model.",
            note=f"{model!r} is no directory here, and not a repository that the hub gave: {reason}",
            hint="Check the spelling; offline, give a local directory or a .gguf file.",
        ) from None


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, shards in order."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            "The checkpoint's index is damaged.",
            note=f"{index} has no weight_map in JSON.",
            hint="Download it again.",
        ) from None
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(
            "A shard of the checkpoint is missing.",
            note=f"{index.name} names {len(names)} files, {missing[0]} is not in {directory}.",
            hint="Download the rest of the checkpoint.",
        )
    return [directory / name for name in names]


def _converted(scratch: Path, directory: Path, trust_remote_code: bool) -> Checkpoint:
    """Load with transformers and write an ordinary float32 safetensors directory under `scratch`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except _UNREADABLE as error:
        raise _unreadable(error) from None
    target = _model_directory(loaded, scratch, directory)
    save_file({name: p.detach().contiguous() for name, p in loaded.named_parameters()}, target / "model.safetensors")
    tensors = read_tensors(target / "model.safetensors")
    return Checkpoint(directory.resolve().name, target, _config(target, False), tensors, owned=True)


def open_checkpoint(
    model: str, scratch: Path, *, trust_remote_code: bool = False, log: Callable[[str], None] = print
) -> Checkpoint:
    """Find the model the user named.

    Raises:
        InputError: nothing there, no weights, or a weights file that is not whole.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        log(f"reading {path.name}")
        return _gguf(path, scratch)
    if path.is_file():
        raise InputError(
            "The model is a file, but not a GGUF file.",
            note=f"{path} ends in {path.suffix or 'nothing'}.",
            hint="Give a Hugging Face directory, a hub id, or a .gguf file.",
        )
    directory = path if path.is_dir() else _snapshot(model)
    if not (directory / "config.json").is_file():
        raise InputError(
            "The model directory has no config.json.",
            note=f"{directory} was searched.",
            hint="Give the directory that save_pretrained wrote.",
        )
    files = _weight_files(directory)
    if not files and any(directory.glob("*.bin")):
        log("converting the .bin checkpoint to safetensors")
        return _converted(scratch, directory, trust_remote_code)
    if not files:
        raise InputError(
            "The model directory has no weights.",
            note=f"{directory} holds no *.safetensors file.",
            hint="Download the weights too, or convert them to safetensors.",
        )
    tensors: dict[str, TensorSource] = {}
    for file in files:
        tensors |= dequantized_tensors(file.resolve(), read_tensors(file.resolve()))
    if not tensors:
        raise InputError(
            "The model directory has no weights.",
            note=f"{files[0].name} in {directory} holds no tensor.",
            hint="Download the weights again.",
        )
    name = path.resolve().name if directory is path else model
    config = _config(directory, trust_remote_code)
    return Checkpoint(name, directory, config, tensors, renamed_tensors(tensors, config), trust_remote_code)
