"""From what the user named to a checkpoint on disk.

Enters: a local directory, a hub id, a GGUF file or a bundle. Leaves: a `Checkpoint`: the config, where each tensor
lies, and the directory with tokenizer and generation config. Reads headers only, and a quantized checkpoint's zero
points: tensors are read, and those of a GGUF file, of a quantized checkpoint or of a quantized bundle dequantized, when
they are asked for. A `.bin` checkpoint is first converted by transformers into an
ordinary safetensors directory under `scratch`; a GGUF file's or a bundle's config and tokenizer are written there.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import ADAPTERS_NAME, KV_SCALES_NAME, MANIFEST_NAME
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_runtime.files import is_directory, is_file, refuse_locked

from lora_drop_export.quantize.choice import Quantization
from lora_drop_export.quantize.dequantized import DequantizedTensor, dequantized_tensors

from .checkpoint import Checkpoint, TensorSource, shards_of
from .foreign import CHECKPOINT_HINT, read_json, refused, said
from .gguf import gguf_reader, parsed_once, read_gguf
from .gguf_config import complete_config
from .mxfp4 import METHOD as MXFP4
from .mxfp4 import mxfp4_tensors
from .packed import packed_tensors
from .packed_config import in_floats, rounds_more
from .renamed import joined_experts, renamed_tensors
from .text_part import MULTIMODAL, own_names, text_config, text_tensors

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "LICENSE*", "*.txt", "*.py"]
# Of a fast tokenizer; of older ones, some of which have no file named so
_TOKENIZERS = ("tokenizer*", "vocab.json", "vocab.txt", "merges.txt", "*.model")
_PROCESSORS_TEMPLATE = "chat_template.json"  # of multimodal models, in which their tokenizers do not look
_PICKLED = "pytorch_model*.bin"  # where there is nothing else
_FILES = (".json", ".jinja", ".safetensors", ".bin", ".model")
_UNREADABLE = "transformers cannot read this checkpoint."
_CONVERT = "Convert it to a safetensors directory first, or download it again."


def read_tokenizer(directory: Path, trust_remote_code: bool, **kwargs: Any) -> Any:
    """transformers' tokenizer of a local directory, None where it has none; with the chat template of its processor.

    Raises:
        ModelError: its files are damaged, or it needs code of its own that is not trusted.
    """
    from transformers import AutoTokenizer

    if not kwargs and not any(is_file(path) for pattern in _TOKENIZERS for path in directory.glob(pattern)):
        return None
    hint = CHECKPOINT_HINT
    if not is_file(directory / "tokenizer.json") and any(directory.glob("*.model")) and not find_spec("sentencepiece"):
        hint = "Tokenizers in a .model file need a package: pip install sentencepiece protobuf"
    with refused("The checkpoint's tokenizer cannot be read.", directory, hint):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True, **kwargs
        )
        template = directory / _PROCESSORS_TEMPLATE
        if not kwargs and tokenizer.chat_template is None and is_file(template):
            tokenizer.chat_template = read_json(template, "The checkpoint's chat template cannot be read.")[
                "chat_template"
            ]
    return tokenizer


def _config(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if not isinstance(read_json(directory / "config.json", "The model's config.json is damaged."), dict):
        raise ModelError(
            "The model's config.json is damaged.",
            note=f"{directory / 'config.json'} holds no JSON object.",
            hint=CHECKPOINT_HINT,
        )
    hint = "Check config.json; a newer transformers may know this type of model."
    with refused("transformers cannot read the model's config.", directory / "config.json", hint):
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)


def _quantization(config: Any, directory: Path) -> Any:
    """What config.json says of quantized weights, as transformers of the whole model or its text; None for none.

    ModelOpt's older checkpoints say it in a file of their own.
    """
    with refused("The model's config cannot be used.", "config.json"):
        parts = config, config.get_text_config(decoder=True)
    in_config = (getattr(part, "quantization_config", None) for part in parts)
    said = next((one for one in in_config if one is not None), None)
    if said is None and is_file(own := directory / "hf_quant_config.json"):
        with refused("The checkpoint's quantization_config cannot be used.", own):
            found = read_json(own, "The checkpoint cannot be used.")["quantization"]
            if found["quant_algo"] is not None:  # else of caches alone
                said = {"quant_method": "modelopt", **found}
    return said


def _check_layer_count(config: Any, tensors: int) -> None:
    """Refuse a config of more layers than there are tensors, before any of them is built."""
    with refused("The model's config cannot be used.", "config.json"):
        layers = config.get_text_config().num_hidden_layers
        if type(layers) is not int or not 0 < layers <= tensors:
            raise ModelError(
                "The checkpoint does not hold the model that its config describes.",
                note=f"num_hidden_layers is {layers!r:.80}, and there are {tensors} tensors.",
                hint=CHECKPOINT_HINT,
            )


def _model_directory(model: Any, scratch: Path, tokenizer: Any) -> Path:
    """Config, generation config and tokenizer of a loaded model, in a new directory under `scratch`."""
    target = scratch / "converted"
    target.mkdir(parents=True)
    model.config._name_or_path = ""
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target


def _gguf(path: Path, scratch: Path, log: Callable[[str], None]) -> Checkpoint:
    """A GGUF file, its tensors where they lie; config and tokenizer are written to a directory under `scratch`."""
    with refused("The GGUF file cannot be read.", path, _CONVERT), parsed_once():
        reader = gguf_reader(path)  # before the packages below take their seconds
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        _check_layer_count(config, len(reader.tensors))
        complete_config(config, reader)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        tensors = read_gguf(path.resolve(), reader, model, log)
        try:
            tokenizer = read_tokenizer(path.parent, False, gguf_file=path.name)
        except ModelError as error:  # of a kind that transformers cannot convert
            log(f"the bundle will take token ids only: {error.note}")
            tokenizer = None
        target = _model_directory(model, scratch, tokenizer)
    config = _config(target, False)
    return Checkpoint(path.name, target, config, tensors, joined=joined_experts(tensors, config), owned=True)


def _snapshot(model: str) -> Path:
    """The files of a hub repository, from the cache or downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise HFValidationError("it looks like a path")
        directory = Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(model, allow_patterns=[*_HUB_PATTERNS, _PICKLED]))
        return directory
    except GatedRepoError as error:
        raise InputError(
            "The hub gives this model only to accounts that may have it.",
            note=f"{model!r:.120}: {said(error)}",
            hint="Ask for access on the model's page, then use: hf auth login (or set HF_TOKEN)",
        ) from None
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = said(error)
        raise InputError(
            "There is no such model.",
            note=f"{model!r:.120} is no directory here, and not a repository that the hub gave: {reason}",
            hint="Check the spelling; a private model needs HF_TOKEN; offline, give a directory or a .gguf file.",
        ) from None


def _what_is_there(path: Path) -> str:
    """Of a path that is neither a file nor a directory."""
    if os.path.exists(path):
        return "a device, a pipe or a socket"
    return "a link to nothing" if os.path.islink(path) else "not there"


def _check_files(directory: Path) -> None:
    """Refuse a directory, a device or a link to nothing in the place of a file."""
    for path in sorted(directory.iterdir()):
        if path.suffix in _FILES and not is_file(path):
            raise InputError(
                "A file of the checkpoint is no file.",
                note=f"{str(path)!r:.300} is a directory, a device, or a link to nothing.",
                hint=CHECKPOINT_HINT,
            )


def _check_shards(directory: Path, files: Sequence[Path]) -> None:
    """Refuse files that by their names are not all: model-00001-of-00003.safetensors."""
    for file in files:
        names = shards_of(file.name)
        missing = [name for name in names if directory / name not in files]
        if missing:
            raise InputError(
                "A shard of the checkpoint is missing.",
                note=f"{file.name:.120} is one of {len(names)} files, {missing[0]:.120} is not in {directory}.",
                hint="Download the rest of the checkpoint.",
            )


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, the whole one before shards, those in order."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if is_file(single):  # as in transformers, which leaves an index that is past where it writes one file
        return [single]
    if not is_file(index):
        files = sorted(directory.glob("*.safetensors"))
        _check_shards(directory, files)
        return files
    damaged = "The checkpoint's index is damaged."
    data = read_json(index, damaged)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(damaged, note=f"{index} has no weight_map of tensors to files.", hint=CHECKPOINT_HINT)
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(
            damaged,
            note=f"{index} names {outside[0]!r:.120}; files lie beside it.",
            hint=CHECKPOINT_HINT,
        )
    missing = [name for name in names if not is_file(directory / name)]
    if missing:
        raise InputError(
            "A shard of the checkpoint is missing.",
            note=f"{index.name} names {len(names)} files, {missing[0]:.120} is not in {directory}.",
            hint="Download the rest of the checkpoint.",
        )
    return [directory / name for name in names]


def _tensors(directory: Path, files: Sequence[Path]) -> dict[str, TensorSource]:
    """Where the tensors of a checkpoint's files lie; headers are read, and checked by the safetensors library too."""
    tensors: dict[str, TensorSource] = {}
    for file in files:
        with refused("A file is not a whole safetensors file.", file):
            tensors |= dequantized_tensors(file.resolve(), read_tensors(file.resolve()))
    if not tensors:
        raise InputError(
            "The model directory has no weights.",
            note=f"{files[0].name} in {directory} holds no tensor.",
            hint="Download the weights again.",
        )
    return tensors


def _converted(scratch: Path, directory: Path, trust_remote_code: bool) -> Checkpoint:
    """Load with transformers and write an ordinary float32 safetensors directory under `scratch`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with refused(_UNREADABLE, directory, _CONVERT):
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                weights_only=True,  # no pickled object but tensors
                output_loading_info=True,
            )
        except pickle.UnpicklingError:  # PyTorch's message advises to run the objects' code
            raise ValueError("a .bin file is damaged, or holds objects besides tensors, which are not made") from None
    if report["missing_keys"]:
        raise ModelError(
            "The checkpoint does not hold the model that its config describes.",
            note=f"Parameter {min(report['missing_keys'])} is missing; transformers would take a random one.",
            hint=CHECKPOINT_HINT,
        )
    with refused(_UNREADABLE, directory, _CONVERT):
        target = _model_directory(loaded, scratch, read_tokenizer(directory, trust_remote_code))
    if trust_remote_code:
        for file in directory.glob("*.py"):
            shutil.copyfile(file, target / file.name)
    stored = dict(loaded.named_parameters())
    stored |= {name: buffer for name, buffer in loaded.named_buffers() if name in loaded.state_dict()}
    save_file({name: value.detach().contiguous() for name, value in stored.items()}, target / "model.safetensors")
    tensors = read_tensors(target / "model.safetensors")
    config = _config(target, trust_remote_code)
    return Checkpoint(
        directory.resolve().name, target, config, tensors, trust_remote_code=trust_remote_code, owned=True
    )


def _names(tensors: Iterable[str], config: Any) -> tuple[dict[str, str], dict[str, tuple[tuple[str, ...], ...]]]:
    """`Checkpoint.renamed` and `Checkpoint.joined`: transformers renames and joins what the decoder itself calls so."""
    own = own_names(tensors)
    names = {*own, *tensors} - set(own.values())
    renamed = {new: own.get(old, old) for new, old in renamed_tensors(names, config).items()}
    joined = {
        new: tuple(tuple(own.get(part, part) for part in expert) for expert in experts)
        for new, experts in joined_experts(names, config).items()
    }
    return own | renamed, joined


def _bundle(path: Path, scratch: Path, trust_remote_code: bool) -> Checkpoint:
    """The weights of a bundle, quantized ones as they lie; config and tokenizer are put together under `scratch`."""
    bundle = Bundle.open(path)
    manifest, weights, directory = bundle.manifest, bundle.root / "weights", scratch / "bundle"
    directory.mkdir(parents=True)
    for name in manifest.files:
        folder, _, inner = name.partition("/")
        if folder == "tokenizer":
            (directory / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), directory / inner)
    for file in (*weights.glob("*.py"), weights / "config.json"):
        shutil.copyfile(file, directory / file.name)
    own = (weights / ADAPTERS_NAME, weights / KV_SCALES_NAME)
    tensors = _tensors(weights, [file for file in sorted(weights.glob("*.safetensors")) if file not in own])
    config = _config(directory, trust_remote_code)
    if manifest.quantization:
        how = Quantization(**{name: manifest.quantization[name] for name in Quantization.__dataclass_fields__})
        for name, tensor in tensors.items():
            if isinstance(tensor, DequantizedTensor):
                tensors[name] = replace(tensor, quantization=how)
    renamed, joined = _names(tensors, config)
    name = manifest.model.name
    return Checkpoint(name, directory, config, tensors, renamed, joined, trust_remote_code, bundle=bundle)


def open_checkpoint(
    model: str, scratch: Path, *, trust_remote_code: bool = False, log: Callable[[str], None] = print
) -> Checkpoint:
    """Find the model the user named.

    Raises:
        InputError: nothing there, no weights, or a weights file that is not whole.
    """
    if not model:  # which would mean the current directory
        raise InputError(
            "The name of the model is empty.",
            note="It names nothing.",
            hint="Give a Hugging Face directory, a hub id, a .gguf file, or a bundle.",
        )
    with refused("There is no such model.", repr(model), "Check the spelling."):  # ~nobody/model
        path = Path(model).expanduser()
    refuse_locked(path)
    if is_file(path) and path.suffix.lower() == ".gguf":
        log(f"reading {path.name}")
        return _gguf(path, scratch, log)
    if is_file(path):
        raise InputError(
            "The model is a file, but not a GGUF file.",
            note=f"{path} ends in {path.suffix or 'nothing'}.",
            hint="Give a Hugging Face directory, a hub id, a .gguf file, or a bundle.",
        )
    if is_file(path / MANIFEST_NAME):
        return _bundle(path, scratch, trust_remote_code)
    if is_directory(path):
        directory = path
    elif path.suffix.lower() == ".gguf" or os.path.lexists(path):
        raise InputError(
            "There is no such model.",
            note=f"{model:.300} is {_what_is_there(path)}.",
            hint="Give a Hugging Face directory, a hub id, a .gguf file, or a bundle.",
        )
    else:
        directory = _snapshot(model)
    with refused("The model directory cannot be read.", directory, "Check its permissions."):
        _check_files(directory)
        if not is_file(directory / "config.json"):
            gguf = sorted(directory.glob("*.gguf"))
            what = f"GGUF file itself, {gguf[0]}" if gguf else "directory that save_pretrained wrote"
            raise InputError(
                "The model directory has no config.json.", note=f"{directory} was searched.", hint=f"Give the {what}."
            )
        files = _weight_files(directory)
        pickled = list(directory.glob("*.bin"))
    if not files and pickled:
        config = _config(directory, trust_remote_code)
        if config.model_type in MULTIMODAL:  # transformers' class of such a model is another one
            raise InputError(
                "The text decoder of a multimodal model is taken from safetensors files alone.",
                note=f"{directory} has *.bin alone, and its model type is {config.model_type}.",
                hint="Take one in safetensors files.",
            )
        if _quantization(config, directory) is not None:
            raise InputError(
                "The checkpoint is quantized, and not in safetensors files.",
                note=f"{directory} has *.bin alone, and config.json a quantization_config.",
                hint="Take one in safetensors files.",
            )
        log("converting the .bin checkpoint to safetensors")
        return _converted(scratch, directory, trust_remote_code)
    if not files:
        raise InputError(
            "The model directory has no weights.",
            note=f"{directory} holds no *.safetensors file.",
            hint="Download the weights too, or convert them to safetensors.",
        )
    tensors = _tensors(directory, files)
    name = path.resolve().name if directory is path else model
    config = _config(directory, trust_remote_code)
    _check_layer_count(config, len(tensors))
    quantization = _quantization(config, directory)
    if config.model_type in MULTIMODAL:
        log(f"note: the model is multimodal; its text decoder alone is taken ({config.model_type})")
        with refused("The model's config cannot be used.", "config.json"):
            config, tensors = text_config(config), text_tensors(tensors, config)
        _check_layer_count(config, len(tensors))
    if quantization is not None:
        vars(config).pop("quantization_config", None)  # what is read is the model without it
    if isinstance(quantization, dict) and quantization.get("quant_method") == MXFP4:
        tensors = mxfp4_tensors(config.model_type, tensors)
        log("the checkpoint's experts are in MXFP4, whose values int8 in blocks of 32 holds as they are")
    elif quantization is not None:
        tensors = packed_tensors(quantization, tensors)
        if not in_floats(quantization):
            log(f"the checkpoint's integers are taken as they are ({quantization['quant_method']})")
        elif rounds_more(quantization):
            log("note: the checkpoint is made for engines that round more than weights; here no more is rounded")
    renamed, joined = _names(tensors, config)
    return Checkpoint(name, directory, config, tensors, renamed, joined, trust_remote_code)
