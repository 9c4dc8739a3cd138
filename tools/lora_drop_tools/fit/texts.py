"""Texts that adapters are fitted on and judged by: batches by number, the same number the same batch.

How many of a window's tokens are its prompt is random, so that every phase of the cycle occurs everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from lora_drop_runtime.command_line import refuse_unused
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from lora_drop_tools.shared.corpus import Corpus, read_texts

from .files import has_columns, is_streamed
from .settings import PROMPT, FitSettings
from .stream import TokenStream, open_documents

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel
    from lora_drop_tools.teacher_forcing.layout import Layout

SEEN, UNSEEN = 0, 1  # make other batches of the same seed


class Texts(Protocol):
    """Batches of windows."""

    def __call__(self, number: int) -> tuple[Any, Layout]:
        """Token ids [B, T] and their layout."""
        ...

    def state(self) -> dict[str, Any]:
        """A way to the last batch without those before it; `torch.save` takes it."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to a `state`; what a number gives stays the same."""
        ...


def _random_layout(random: np.random.Generator, settings: FitSettings, device: Any) -> Layout:
    from lora_drop_tools.teacher_forcing.layout import Layout

    k = int(random.choice(settings.k))
    prompt = PROMPT + int(random.integers(0, k + 1))
    return Layout.of(settings.window_tokens, prompt, PeriodicSchedule(k), device)


class SampledTexts:
    """Windows from random places of ids int64 [N]."""

    def __init__(self, ids: Any, settings: FitSettings, device: Any, salt: int) -> None:
        self._ids, self._settings, self._device, self._salt = ids, settings, device, salt

    def __call__(self, number: int) -> tuple[Any, Layout]:
        import torch

        of = self._settings
        random = np.random.default_rng([of.seed, self._salt, number])
        starts = random.integers(0, len(self._ids) - of.window_tokens + 1, of.batch)
        layout = _random_layout(random, of, self._device)
        ids = torch.stack([self._ids[start : start + of.window_tokens] for start in starts])
        return ids.to(self._device), layout

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Any batch is as near as another."""


class StreamedTexts:
    """Each window of a stream once, in its order."""

    def __init__(self, stream: TokenStream, settings: FitSettings, device: Any) -> None:
        self._stream, self._settings, self._device = stream, settings, device

    def __call__(self, number: int) -> tuple[Any, Layout]:
        of = self._settings
        block, place = divmod(number * of.batch, self._stream.per_block)
        ids = self._stream.block(block)[place : place + of.batch]
        random = np.random.default_rng([of.seed, SEEN, number])
        return ids.to(self._device), _random_layout(random, of, self._device)

    def state(self) -> dict[str, Any]:
        return self._stream.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self._stream.load(state)


class Source:
    """The text that the settings name; opened, not yet tokens.

    Raises:
        InputError: there is none, it cannot be read, or it has no columns and one was named.
    """

    def __init__(self, settings: FitSettings) -> None:
        self._texts: Sequence[str] | None = None
        if settings.dataset is None and not has_columns(settings.text):
            refuse_unused(settings, ("text_column",), "--text is plain", "give files with rows")
        if settings.dataset is None and not is_streamed(settings.text):
            self._texts = read_texts(settings.text)
            return
        self._open = functools.partial(open_documents, settings.text, settings.dataset, settings.text_column)
        self._open()

    def texts(self, loaded: LoadedModel, settings: FitSettings, device: Any) -> tuple[Texts, Texts]:
        """Texts to learn from, and texts to be judged by.

        Raises:
            InputError: there is too little of them.
        """
        window = settings.window_tokens
        if self._texts is not None:
            corpus = Corpus.of(loaded, self._texts, window)
            seen, held_out = SampledTexts(corpus.fit, settings, device, SEEN), corpus.held_out
            return seen, SampledTexts(held_out, settings, device, UNSEEN)
        end = getattr(loaded.tokenizer, "eos_token_id", None)
        stream = TokenStream(self._open, loaded.encode, end, window, settings.batch, settings.seed)
        return StreamedTexts(stream, settings, device), SampledTexts(stream.held_out, settings, device, UNSEEN)
