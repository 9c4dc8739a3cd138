"""Texts that a bundle writes: many prompts through one running batch, each text as the prompt alone would get it.

Enters: prompts of token ids, each with its stop strings and sampling. Leaves: their texts, one after the other as they
end. Rows join the batch when others leave it, so nothing waits for the longest. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.text import TextCodec, TextStream

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Wish:
    """A prompt, ids [T], and how it is continued: up to an end token or the first of the `until` strings, left out.

    `sampling` None is greedy.
    """

    ids: Ids
    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: SamplingOptions | None = None


@dataclass
class _Text:
    """A text that is being written."""

    index: int
    stream: TextStream
    text: str = ""


@dataclass(frozen=True)
class _Size:
    """What a batch has room for: tokens of a prompt and of a whole row, rows, and refreshes as often as under `k`."""

    prompt: int
    whole: int
    k: int
    slots: int

    def with_room_for(self, other: _Size | None) -> _Size:
        if other is None:
            return self
        return _Size(
            max(self.prompt, other.prompt),
            max(self.whole, other.whole),
            min(self.k, other.k),
            max(self.slots, other.slots),
        )


class Writer:
    """Writes texts with a bundle. Use as a context manager.

    A running batch is opened when there is something to write, as large as that takes, and kept.

    Args:
        path: the bundle's directory.
        policy, target, provider, threads, lenience: as for `Session.open`.
    """

    def __init__(
        self,
        path: Path,
        codec: TextCodec,
        policy: str,
        target: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        lenience: float | None = None,
    ) -> None:
        self._path, self._codec, self._policy = path, codec, policy
        self._target, self._provider, self._threads, self.lenience = target, provider, threads, lenience
        self._batch: Batch | None = None
        self._size: _Size | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def _fitting(self, wishes: Sequence[Wish], k: int, slots: int) -> Batch:
        """A batch with room for each of these; the one there is, where it has."""
        needed = _Size(
            max(len(wish.ids) for wish in wishes),
            max(len(wish.ids) + wish.max_new_tokens for wish in wishes),
            k,
            slots,
        )
        if self._batch is None or needed.with_room_for(self._size) != self._size:
            self._size = needed.with_room_for(self._size)
            self.close()
            self._batch = Batch.open(
                self._path,
                slots=self._size.slots,
                max_seq_len=self._size.whole,
                max_prompt_len=self._size.prompt,
                k=self._size.k,
                policy=self._policy,
                lenience=self.lenience,
                target=self._target,
                provider=self._provider,
                threads=self._threads,
            )
        return self._batch

    def write(self, wishes: Sequence[Wish], k: int, slots: int, done: Callable[[int, str], None]) -> None:
        """Write all texts under `k`; at most `slots` of them at once.

        Args:
            done: gets an index into `wishes` and its text, when it has ended.

        Raises:
            BundleError: the model computed logits that are not numbers.
        """
        if not wishes:
            return
        batch = self._fitting(wishes, k, slots)
        running: dict[int, _Text] = {}
        try:
            for index, wish in enumerate(wishes):
                row = batch.add(wish.ids, wish.max_new_tokens, k=k, sampling=wish.sampling)
                running[row] = _Text(index, self._codec.stream(wish.until))
            while batch.rows:
                for event in batch.tick():
                    text = running.get(event.row)
                    if text is None:
                        continue  # its stop string came; what is told now is its end
                    if event.error is not None:
                        raise event.error
                    if event.token is not None:
                        text.text += text.stream.push(event.token)
                    if text.stream.stopped or event.finished is not None:
                        del running[event.row]
                        if event.finished is None:
                            batch.cancel(event.row)
                        done(text.index, text.text + text.stream.finish())
        except BaseException:
            self.close()  # rows are in it that nobody asks for any more
            raise
