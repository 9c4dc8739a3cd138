"""The tokens of a request under a policy that verifies: drafts, one refresh over all of them, what it accepts.

Enters: a request after its prefill. Leaves: tokens, those that the full schedule would have chosen. A cycle feeds each
row's last token and its drafts to LoRA steps, or looks drafts up in the row's text, then runs the last token and the
drafts through the refresh graph at once. The accepted drafts and one token of the refresh's are the row's new tokens;
the lengths move on over what was accepted. Knows no engine and no text.

A cycle that ends early, by an interrupt or an error, leaves the lengths where it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.plan.drafting import DraftSource

from .acceptance import Draft, drafted, verified
from .drafts import Text
from .pace import CycleTimes, Pace, RowOutcome
from .request import Request
from .sampling import Ids, RowSampler, Sampler
from .speculation import Logits, Speculation
from .statistics import Cycle, Statistics

CONFIDENCE = 0.2  # drafting stops where the likeliest token has less probability (docs/algorithm.md says how chosen)
Clock = Callable[[], float]


@dataclass
class _Row:
    """A row's place in the request; `left` tokens may still be made, `last` was chosen and not yet fed."""

    index: int
    sampler: RowSampler
    text: Text
    left: int
    last: int = 0
    source: str = "lora"
    drafts: list[Draft] = field(default_factory=list)
    stopped: bool = False  # drafting, at a low confidence

    @property
    def fed(self) -> list[int]:
        """What the refresh runs."""
        return [self.last, *(draft.token for draft in self.drafts)]


class Lossless:
    """Makes the tokens of one request.

    Args:
        request: after its prefill.
        prompts: int64 [T_i] of each row.
        sampler: of the rows.
        stops: token ids that end a row.
        new_tokens: upper bound per row.
        source: where drafts come from.
        pace: how many.
        clock: seconds.
    """

    def __init__(
        self,
        request: Request,
        prompts: Sequence[Ids],
        sampler: Sampler,
        stops: set[int],
        new_tokens: int,
        source: DraftSource,
        pace: Pace,
        clock: Clock,
    ) -> None:
        self._request, self._source, self._pace, self._clock = request, source, pace, clock
        self._stops = stops
        self._steps = Speculation(request)
        self._sampler = sampler
        self._rows = [
            _Row(index, sampler.rows[index], Text(prompt.tolist() if source.looks_up else ()), new_tokens)
            for index, prompt in enumerate(prompts)
        ]
        self._going = list(self._rows)
        self._cycles: list[Cycle] = []

    def statistics(self) -> Statistics:
        return Statistics(tuple(self._cycles), self._pace.note)

    def tokens(
        self, logits: npt.NDArray[np.float32], before_cycle: Callable[[], None]
    ) -> Iterator[tuple[Ids, npt.NDArray[np.bool_]]]:
        """Yields (a token per row, which rows it belongs to); rows advance by different counts.

        Args:
            logits: float32 [B, V] of the prefill.
            before_cycle: is called before the engine runs again, and may raise.
        """
        first = self._sampler.sample(logits, np.ones(len(self._rows), np.bool_)).tolist()
        made = [[token] for token in first]
        while True:
            yield from self._advanced(made)
            self._going = [row for row in self._going if row.left]
            if not self._going:
                return
            before_cycle()
            made = self._cycle()

    def _advanced(self, made: list[list[int]]) -> Iterator[tuple[Ids, npt.NDArray[np.bool_]]]:
        """Give the new tokens of each row to it, and yield them but for a stop token."""
        for row in self._going:
            for token in made[row.index]:
                row.left -= 1
                row.last = token
                if self._source.looks_up:
                    row.text.append(token)
            if row.last in self._stops:
                row.left = 0
                made[row.index].pop()
        for place in range(max(map(len, made))):
            active = np.array([place < len(tokens) for tokens in made])
            yield np.array([tokens[place] if place < len(tokens) else 0 for tokens in made], np.int64), active

    # ── one cycle ──────────────────────────────────────────────────────────────────────────────────────────

    def _cycle(self) -> list[list[int]]:
        """The new tokens of each row, a stop token the last of them; none of a row that is over."""
        begin = self._clock()
        self._look_up()
        lora_steps = self._draft()
        middle = self._clock()
        logits = self._steps.verify({row.index: row.fed for row in self._going})
        made = self._judge(logits)
        for row in self._going:
            self._request.advance(row.index, len(made[row.index]))
        width = max(len(row.fed) for row in self._going)
        mean = sum(map(len, made)) / len(self._going)
        self._note(made, CycleTimes(lora_steps, middle - begin, width, self._clock() - middle, mean))
        return made

    def _most(self, row: _Row) -> int:
        """Drafts that the row has room for: a verification makes a token more than it accepts."""
        return row.left - 1 if self._steps.most is None else min(row.left, self._steps.most) - 1

    def _asked(self, source: str, rows: Sequence[_Row]) -> int:
        """How many drafts the pace asks of these rows."""
        most = max((self._most(row) for row in rows), default=0)
        width = max(len(row.fed) for row in self._going)
        return self._pace.drafts(source, most, runs=self._steps.runs(len(self._going)), width=width) if most else 0

    def _look_up(self) -> None:
        """Begin the cycle's drafts, where that is wanted with those that stand in the rows' texts."""
        for row in self._going:
            row.drafts, row.stopped, row.source = [], False, "lora"
        if not self._source.looks_up:
            return
        found = {row.index: row.text.continuation(self._most(row)) for row in self._going}
        count = self._asked("ngram", [row for row in self._going if found[row.index]])
        for row in self._going:
            if found[row.index]:
                row.source = "ngram"
                row.drafts = [Draft(token) for token in found[row.index][:count]]

    def _draft(self) -> int:
        """Draft by LoRA steps for all rows that looked nothing up; returns how many steps ran."""
        if not self._source.runs_lora_steps:
            return 0
        drafting = [row for row in self._going if row.source == "lora"]
        count = self._asked("lora", drafting)
        drafting = [row for row in drafting if min(count, self._most(row))]
        seen = [(row, row.sampler.seen) for row in drafting]
        behind, steps = [0] * len(self._rows), 0
        try:
            while drafting:
                logits = self._steps.draft({row.index: row.fed[-1] for row in drafting}, behind)
                steps += 1
                for row in drafting:
                    behind[row.index] += 1
                    draft, likeliest = drafted(row.sampler, logits[row.index])
                    row.stopped = likeliest < CONFIDENCE
                    if not row.stopped:
                        row.drafts.append(draft)
                        row.sampler.remember(draft.token)
                drafting = [
                    row for row in drafting if not row.stopped and len(row.drafts) < min(count, self._most(row))
                ]
        finally:  # drafts are no part of the text yet
            for row, before in seen:
                row.sampler.seen = before
        return steps

    def _judge(self, logits: Mapping[int, Logits]) -> list[list[int]]:
        """What the verifier makes of the drafts, cut behind a stop token."""
        made: list[list[int]] = [[] for _ in self._rows]
        for row in self._going:
            tokens = verified(row.sampler, row.drafts, logits[row.index])
            stop = next((place for place, token in enumerate(tokens, 1) if token in self._stops), len(tokens))
            made[row.index] = tokens[:stop]
        return made

    def _note(self, made: Sequence[Sequence[int]], times: CycleTimes) -> None:
        """Count the cycle, and tell the pace."""
        drafts, accepted = [0] * len(self._rows), [0] * len(self._rows)
        outcomes = []
        for row in self._going:
            own = made[row.index]
            agreed = sum(draft.token == token for draft, token in zip(row.drafts, own, strict=False))
            drafts[row.index], accepted[row.index] = len(row.drafts), agreed
            outcomes.append(
                RowOutcome(row.source, len(row.drafts), min(len(row.drafts), len(own)), agreed, row.stopped)
            )
        self._cycles.append(Cycle(times.lora_steps, tuple(drafts), tuple(accepted), tuple(map(len, made))))
        self._pace.saw(times, outcomes)
