"""Which peers there are, what each reads, and why one cannot run here."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.manifest import ModelFacts
from lora_drop_runtime.errors import InputError

from lora_drop_export.checkpoint.foreign import CHECKPOINT_HINT, read_json
from lora_drop_tools.shared.results import refuse_in_bundle


@dataclass(frozen=True)
class PeerKind:
    """What a peer needs.

    Attributes:
        module: what shows that it is installed.
        package: what pip installs for it.
        reads: `directory` (Hugging Face) or `gguf`.
        precisions: of a bundle's weights, that it can compute with too.
        note: why it may not be installable.
    """

    module: str
    package: str
    reads: str
    precisions: tuple[str, ...]
    note: str = ""


PEERS = {
    "onnxruntime-genai": PeerKind(
        "onnxruntime_genai",
        "onnxruntime-genai onnx-ir torch transformers",  # the last three for its builder
        "directory",
        ("float32", "int8", "int4"),
    ),
    "llama.cpp": PeerKind("llama_cpp", "llama-cpp-python", "gguf", ("float32", "int8", "int4")),
    "transformers": PeerKind("transformers", "transformers", "directory", ("float32",)),
    "optimum-onnx": PeerKind(
        "optimum.onnxruntime",
        "optimum-onnx",
        "directory",
        ("float32",),
        "0.1.0 wants transformers < 4.58, so an environment of its own: --peer-python optimum-onnx=PYTHON",
    ),
    "openvino-genai": PeerKind(
        "openvino_genai",
        "openvino-genai optimum-intel",
        "directory",
        ("float32", "int8", "int4"),
        "optimum-intel 2.2 wants transformers < 5.6, so an environment of its own: --peer-python openvino-genai=PYTHON",
    ),
}
READS = {"directory": "a Hugging Face directory", "gguf": "a .gguf file"}
_SIZES = {"num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "vocab_size": "vocab_size"}  # the manifest's


@dataclass(frozen=True)
class PeerOptions:
    """What was asked for, checked; `models` has a path per kind of source, no `cache` is a temporary one.

    Attributes:
        required: the peers were named, so one that cannot take part is an error; without names it is left out.
    """

    names: tuple[str, ...]
    required: bool
    models: Mapping[str, Path]
    cache: Path | None
    pythons: Mapping[str, str]


def _checked_config(path: Path) -> dict[str, Any]:
    """Raises InputError where a model's config.json is damaged: each peer would say so in its own words, and late."""
    fact = "The model for the peers is damaged."
    config = read_json(path, fact)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(fact, note=f"{path}: it names no model_type.", hint=CHECKPOINT_HINT)
    return config


def check_same_model(options: PeerOptions, model: ModelFacts) -> None:
    """Refuse a Hugging Face directory of another model than the bundle's, whose speed would stand beside it."""
    if "directory" not in options.models:
        return
    path = options.models["directory"] / "config.json"
    config = _checked_config(path)
    for name, ours in _SIZES.items():
        text, wanted = config.get("text_config"), getattr(model, ours)
        size = config.get(name, text.get(name) if isinstance(text, dict) else None)
        if size not in (None, wanted):
            raise InputError(
                "The model for the peers is another one.",
                note=f"{name} is {size!r:.80} in {path}, and {wanted} in the bundle.",
                hint="Give the checkpoint that the bundle was made from.",
            )


def peer_options(
    names: Sequence[str],
    sources: Sequence[Path],
    cache: Path | None,
    pythons: Sequence[str],
) -> PeerOptions:
    """Check what a user gave; no names are all names, `sources` are the models to load.

    Raises:
        InputError: an unknown peer, no model, a model that is neither a directory nor a .gguf file, or two of a kind.
    """
    if not hasattr(os, "killpg"):  # nor can the pipes of processes be waited for
        raise InputError(
            "Peers are not measured on this system.",
            note=f"{sys.platform} has no groups of processes to end them with.",
            hint="Leave --peers out, or measure on Linux.",
        )
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise InputError(
            "Unknown peer.",
            note=f"{unknown[0]!r} was given, {', '.join(PEERS)} are known.",
            hint="Use --peers alone for all that can run, or --peers with names, separated by commas.",
        )
    if cache is not None:
        refuse_in_bundle(cache, "--peer-cache")
    if cache is not None and cache.exists() and not cache.is_dir():
        raise InputError(
            "What peers build cannot be kept there.",
            note=f"{cache} is not a directory.",
            hint="Give another --peer-cache; it is made where it does not exist.",
        )
    models: dict[str, Path] = {}
    for path in sources:
        kind = "directory" if (path / "config.json").is_file() else "gguf" if path.suffix == ".gguf" else None
        if kind is None or not path.exists():
            raise InputError(
                "The model for the peers cannot be read.",
                note=f"{path} is neither a Hugging Face directory (with config.json) nor a .gguf file.",
                hint="Give --model DIR, --model FILE.gguf, or both.",
            )
        if kind in models:
            raise InputError(
                "There are two models of one kind for the peers.",
                note=f"{models[kind]} and {path} were given; a peer loads one of them.",
                hint="Give one directory, one .gguf file, or one of each.",
            )
        if kind == "directory":
            _checked_config(path / "config.json")
        models[kind] = path.resolve()
    if not models:
        raise InputError(
            "The peers have no model to load.",
            note="--peers needs --model: a bundle's weights are in no form that others read.",
            hint="Give the checkpoint that the bundle was made from: --model DIR or --model FILE.gguf, or both.",
        )
    chosen: dict[str, str] = {}
    for text in pythons:
        name, _, path_text = text.partition("=")
        if name not in PEERS or not path_text:
            raise InputError(
                "The Python of a peer is not understood.",
                note=f"{text!r} was given; needed is NAME=PATH, NAME one of {', '.join(PEERS)}.",
                hint="Write for example --peer-python optimum-onnx=venv/bin/python.",
            )
        if not os.access(path_text, os.X_OK) or not Path(path_text).is_file():
            packages = PEERS[name].package.replace(" ", " and ")
            raise InputError(
                "The Python of a peer cannot be run.",
                note=f"{path_text} is not a program.",
                hint=f"Give the Python that has {packages}, as in --peer-python {name}=venv/bin/python.",
            )
        if name in chosen or (names and name not in names):
            raise InputError(
                "The Python of a peer would not be used.",
                note=f"{text!r} was given; "
                + ("another one is given for it." if name in chosen else f"--peers names {', '.join(names)}."),
                hint="Give one --peer-python for each peer that is measured.",
            )
        chosen[name] = os.path.abspath(path_text)
    return PeerOptions(tuple(names) or tuple(PEERS), bool(names), models, cache, chosen)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def reason_against(name: str, options: PeerOptions, precision: str) -> str | None:
    """Why a peer cannot take part, as far as that is known before any work; None when it can."""
    kind = PEERS[name]
    if precision not in kind.precisions:
        return f"it runs {', '.join(kind.precisions)} on the CPU, the bundle's weights are {precision}"
    if kind.reads not in options.models:
        given = READS[next(iter(options.models))]
        return f"it loads {READS[kind.reads]}, --model gives {given}"
    if name not in options.pythons and not _is_installed(kind.module):
        return f"not installed: pip install {kind.package}" + (f"; {kind.note}" if kind.note else "")
    return None


def check_named(options: PeerOptions, reasons: Mapping[str, str | None]) -> None:
    """Raises InputError for the first peer that was named and that has a reason against it."""
    for name, reason in reasons.items():
        if options.required and reason is not None:
            raise InputError(
                "A peer that was named cannot take part.",
                note=f"{name}: {reason}.",
                hint="Leave it out of --peers, or give --peers without names for all that can run.",
            )
