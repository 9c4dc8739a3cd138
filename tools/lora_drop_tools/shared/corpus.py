"""Plain text for the tools that run a model over it.

Enters: files. Leaves: token ids, cut into what is fitted on and what is held out.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.dtypes import BY_SHORT, MODEL_DTYPES
from lora_drop_runtime.errors import InputError, counted
from lora_drop_runtime.files import is_device, refuse_rows

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel

DTYPES = {short: row.name for short, row in BY_SHORT.items() if row.name in MODEL_DTYPES}
WINDOW = 256  # tokens of a piece of text, where the model and the bundle allow as many
HELD_OUT_SHARE = 20  # one token in so many, at the end of each text


def read_texts(files: Sequence[str | Path]) -> list[str]:
    """The files' contents.

    Raises:
        InputError: there is none, or one cannot be read as UTF-8, or has rows: their names and marks are no text.
    """
    if not files:
        raise InputError(
            "There is no text.", note="None was given, and the model is run over it.", hint="Use --text FILE."
        )
    texts = []
    for file in map(Path, files):
        refuse_rows(file)
        try:
            if is_device(file):
                raise OSError(errno.EINVAL, "is a device")
            texts.append(file.read_text(encoding="utf-8-sig"))  # Windows' editors begin files with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                "The text cannot be read.",
                note=f"{file}: {getattr(error, 'strerror', None) or error}.",
                hint="Give a UTF-8 text file.",
            ) from None
    return texts


def window_that_fits(loaded: LoadedModel, window: int | None) -> int:
    """Tokens of a window; of None the usual number, or what the model's context and the bundle allow.

    Raises:
        InputError: it is longer than the model's context.
    """
    from lora_drop_export.decoder.context import context_in_words, context_length

    context = context_length(loaded.model.config)
    if window is None:
        return min(WINDOW, context, loaded.max_seq_len or WINDOW)
    if window > context:
        raise InputError(
            "The window is longer than the model's context.",
            note=f"--window is {window}, the context is {context_in_words(loaded.model.config)}.",
            hint=f"Use --window {min(WINDOW, context)}.",
        )
    return window


@dataclass(frozen=True)
class Corpus:
    """Token ids int64 of all texts: what is learned from, and the end of each text, which is not."""

    fit: Any
    held_out: Any

    @classmethod
    def of(cls, loaded: LoadedModel, texts: Sequence[str], window: int) -> Corpus:
        """Raises InputError where a part has less than one window of tokens."""
        import torch

        fit, held_out = [], []
        for text in texts:
            ids = loaded.encode(text)
            end = len(ids) - len(ids) // HELD_OUT_SHARE
            fit.append(ids[:end])
            held_out.append(ids[end:])
        corpus = cls(torch.cat(fit), torch.cat(held_out))
        if len(corpus.held_out) < window:
            total = len(corpus.fit) + len(corpus.held_out)
            raise InputError(
                "The text is too short.",
                note=f"It has {counted(total, 'token')}; one in {HELD_OUT_SHARE} is held out, a window has {window}.",
                hint=f"Give more --text, {window * HELD_OUT_SHARE} tokens at least, or lower --window.",
            )
        return corpus
