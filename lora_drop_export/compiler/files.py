"""The files of a bundle that are neither graphs nor weights, how a bundle is known, and the disk it needs."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, VERIFY_NAME, FileRecord, Manifest
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.files import is_file
from lora_drop_runtime.text import TextCodec

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.foreign import refused
from lora_drop_export.checkpoint.open import read_tokenizer
from lora_drop_export.staging.owned import Kind

_VERSIONED = (
    "lora-drop-export",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnx-graphsurgeon",
    "onnxruntime",
    "onnxruntime-gpu",
    "polygraphy",
    "numpy",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
)
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_SLACK_BYTES = 64 << 20  # graphs, tokenizer, manifest


def copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """Tokenizer as transformers sees it, generation config, chat template, licence.

    Raises:
        ModelError, BundleError: the tokenizer's files are damaged, or need code that is not trusted.
    """
    directory.mkdir(parents=True)
    with refused("The checkpoint's files cannot be copied.", checkpoint.directory):
        for pattern in ("generation_config.json", *_LICENCE_FILES):
            for file in checkpoint.directory.glob(pattern):
                if is_file(file):
                    shutil.copyfile(file, directory / file.name)
    tokenizer = read_tokenizer(checkpoint.directory, checkpoint.trust_remote_code)
    if tokenizer is None:
        if not any(directory.iterdir()):
            directory.rmdir()
        return
    with refused("The checkpoint's tokenizer cannot be used.", checkpoint.directory):
        tokenizer.save_pretrained(directory)
        if (directory / "tokenizer.json").is_file():
            TextCodec.open(directory)  # as sessions will


def make_model_directory(checkpoint: Checkpoint, weights: Path) -> None:
    """Config, and code if the model brings some, beside the weights, so that the reference can be built from them."""
    with refused("The model's config cannot be written.", checkpoint.directory / "config.json"):
        checkpoint.config.save_pretrained(weights)
    if checkpoint.trust_remote_code:
        for file in checkpoint.directory.glob("*.py"):
            shutil.copyfile(file, weights / file.name)


_version = functools.cache(importlib.metadata.version)  # what is installed stays as it is while a process runs


def tool_versions() -> dict[str, str]:
    versions = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = _version(package)
    return versions


def _bundle_files(root: Path) -> frozenset[str] | None:
    """The files that a bundle's manifest names, itself among them; None where it is no manifest of this program.

    Of any format version, so that a bundle that this one cannot read can be replaced.
    """
    try:
        data = json.loads((root / MANIFEST_NAME).read_bytes())
        signs = data["format_version"], data["model"]["fingerprint"], data["plan"]
        sites = signs[2]["sites" if "sites" in signs[2] else "drop_layers"]
        sizes = {name: record["size_bytes"] for name, record in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    types = isinstance(signs[0], int) and isinstance(signs[1], str) and isinstance(sites, list)
    return frozenset((MANIFEST_NAME, *sizes)) if types else None


BUNDLE = Kind("bundle", MANIFEST_NAME, _bundle_files)


def check_disk(root: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed_bytes + _SLACK_BYTES:
        raise InputError(
            "There is too little free disk space.",
            note=f"The weights take {needed_bytes / 2**20:.0f} MiB, graphs and tokenizer may take {_SLACK_BYTES >> 20} "
            f"more; {free / 2**20:.0f} MiB are free.",
            hint="Free some space, or choose another --out; --weights link copies no weights that stay as they are.",
        )


def verification_details(root: Path, targets: Iterable[str]) -> list[dict[str, Any]]:
    """What verify.json says of a bundle's targets but for these; empty where it cannot be read."""
    try:
        known: list[dict[str, Any]] = json.loads((root / VERIFY_NAME).read_bytes())
        return [result for result in known if result["target"] not in targets]
    except (OSError, ValueError, KeyError, TypeError):  # a record of what was, which nothing is computed from
        return []


def write_verification(root: Path, details: list[dict[str, Any]]) -> FileRecord:
    """Write verify.json: the steps of each target's comparison."""
    path = root / VERIFY_NAME
    path.write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
    return record_file(path)


def write_manifest(root: Path, manifest: Manifest) -> Bundle:
    """Write what a bundle says of itself, over what it said before; all that do so go through here."""
    (root / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(root, manifest)
