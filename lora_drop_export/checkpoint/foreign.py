"""The edge to files and libraries that are not ours: what they throw becomes an error that says what to do.

transformers, tokenizers, safetensors, torch and gguf throw whatever a damaged file makes them stumble over.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_drop_runtime.command_line import no_temporary_directory
from lora_drop_runtime.errors import InputError, LoraDropError, ModelError, is_failure
from lora_drop_runtime.files import read_bounded

from lora_drop_export.staging.failures import refused_write

_MOST_NOTE = 240  # characters
_MOST_JSON_BYTES = 256 << 20
CHECKPOINT_HINT = "Download or copy the checkpoint again, or take another one."


def said(error: BaseException) -> str:
    """What a foreign error says, in one printable line."""
    kind = type(error).__name__
    line = " ".join(str(error).split()) or kind
    line = "".join(c if c.isprintable() else "�" for c in line)
    line = line if kind in line or isinstance(error, OSError) else f"{kind}: {line}"
    return line if len(line) <= _MOST_NOTE else f"{line[:_MOST_NOTE]}…"


def _is_ours(error: BaseException) -> bool:
    """Whether an error is none of the file's: our own, Ctrl-C, too little memory, or a full disk."""
    if isinstance(error, Exception):
        is_full = refused_write(error) is not None or no_temporary_directory(error)
        return isinstance(error, LoraDropError | MemoryError) or is_full
    return not is_failure(error)


@contextlib.contextmanager
def refused(fact: str, what: object, hint: str = CHECKPOINT_HINT) -> Iterator[None]:
    """Turn whatever the block's libraries throw into an error of ours.

    Args:
        fact: the error's first sentence.
        what: the file or model, which the note begins with.

    Raises:
        ModelError: the block failed, or it would have needed the checkpoint's own code, which was not allowed.
    """
    try:
        yield
    except BaseException as error:
        if _is_ours(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                "The checkpoint needs code of its own, which is not run.",
                note=f"{what} names Python code that came with it.",
                hint="Read that code. If you trust it, add --trust-remote-code.",
            ) from None
        raise ModelError(fact, note=f"{what}: {said(error)}", hint=hint) from None


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")


def read_json(path: Path, fact: str) -> Any:
    """What a JSON file of a checkpoint holds.

    Args:
        fact: the error's first sentence where it is none.

    Raises:
        InputError, BundleError: it cannot be read, or holds no JSON.
    """
    try:
        return json.loads(read_bounded(path, _MOST_JSON_BYTES), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(fact, note=f"{path}: {said(error)}", hint=CHECKPOINT_HINT) from None
