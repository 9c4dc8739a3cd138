"""One row's drafts, cycle after cycle: where they come from, when drafting stops, and which of them are accepted.

Enters: the row's new tokens, then logits of LoRA steps and of the refresh that verifies. Leaves: what to feed next, and
the tokens that were made. Runs nothing itself, and is told how many drafts are wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.plan.drafting import DraftSource

from .acceptance import Draft, drafted, verified
from .constraint import forked
from .drafts import Text
from .pace import RowOutcome
from .sampling import RowSampler

CONFIDENCE = 0.2  # drafting stops where the likeliest token has less probability (docs/algorithm.md says how chosen)


class Drafter:
    """Args:
        sampler: of the row.
        source: where its drafts come from.
        stops: token ids that end it.
        prompt: its tokens, which drafts are looked up in.
        most_pending: tokens in no recurrent state, to which those come that a refresh accepts where it does not accept
            all; None for no limit.

    Attributes:
        most: drafts that there is room for.
        drafts: of this cycle.
        source: `lora`, or `ngram` where they were looked up.
        stopped: whether drafting ended at a low confidence.
    """

    def __init__(
        self,
        sampler: RowSampler,
        source: DraftSource,
        stops: Collection[int],
        prompt: Sequence[int],
        most_pending: int | None,
    ) -> None:
        self._sampler, self._source, self._stops = sampler, source, stops
        self._text = Text(prompt if source.looks_up else ())
        self._last, self.most = 0, 0
        self._pending, self._most_pending = 0, most_pending
        self._kept = sampler.seen, sampler.constraint
        self._known: list[int] = []
        self.drafts: list[Draft] = []
        self.source, self.stopped = "lora", False

    @property
    def fed(self) -> list[int]:
        """What the refresh runs: the row's last token and its drafts."""
        return [self._last, *(draft.token for draft in self.drafts)]

    @property
    def may_look_up(self) -> bool:
        """Whether this cycle's drafts stand in the text."""
        return bool(self._known)

    @property
    def may_draft(self) -> bool:
        """Whether LoRA steps may make a draft more."""
        room = len(self.drafts) < self.most and not self.stopped and not self._sampler.is_over
        return room and self._source.runs_lora_steps and not self._known

    def begin(self, made: Sequence[int], most: int) -> None:
        """Begin a cycle behind the tokens that were made, with room for `most` drafts."""
        if self._most_pending is not None:
            most = min(most, self._most_pending - self._pending)
        self._last, self.most = made[-1], most
        self.drafts, self.stopped, self.source = [], False, "lora"
        if self._source.looks_up:
            for token in made:
                self._text.append(token)
            self._known = self._text.continuation(most)

    def look_up(self, count: int) -> None:
        """Take up to `count` drafts from the text."""
        self.source = "ngram"
        self.drafts = [Draft(token) for token in self._known[:count]]

    def begin_steps(self) -> None:
        """LoRA steps begin; `end_steps` ends them, also after an error: drafts are no part of the text yet."""
        constraint = self._sampler.constraint
        self._kept = self._sampler.seen, constraint
        self._sampler.constraint = forked(constraint)

    def end_steps(self) -> None:
        self._sampler.seen, self._sampler.constraint = self._kept

    def saw(self, logits: npt.NDArray[np.float32]) -> None:
        """Draft by the logits [V] of a LoRA step; or stop."""
        draft, likeliest = drafted(self._sampler, logits)
        self.stopped = likeliest < CONFIDENCE
        if not self.stopped:
            self.drafts.append(draft)
            self._sampler.remember(draft.token)

    def judge(self, logits: npt.NDArray[np.float32]) -> list[int]:
        """The cycle's new tokens by the refresh's logits [n, V], up to a stop token, which is the last of them."""
        tokens = verified(self._sampler, self.drafts, logits, self._source.lenience)
        stop = next((place for place, token in enumerate(tokens, 1) if token in self._stops), len(tokens))
        self._pending = 0 if stop == len(self.drafts) + 1 else self._pending + stop
        return tokens[:stop]

    def outcome(self, made: Sequence[int]) -> RowOutcome:
        """What became of the drafts."""
        agreed = sum(draft.token == token for draft, token in zip(self.drafts, made, strict=False))
        count = len(self.drafts)
        return RowOutcome(self.source, count, min(count, len(made)), agreed, self.stopped)
