"""The tokens of a request under a policy that verifies: drafts, one refresh over all of them, what it accepts.

Enters: a request after its prefill. Leaves: tokens, those that the full schedule would have chosen. A cycle feeds each
row's last token and its drafts to LoRA steps, or looks drafts up in the row's text, then runs the last token and the
drafts through the refresh graph at once. The accepted drafts and one token of the refresh's are the row's new tokens;
the lengths move on over what was accepted. Knows no engine and no text.

All rows draft and verify together, at one pace, which is what a cycle's time is measured for; rows of a batch each have
their own (row.py). A cycle that ends early, by an interrupt or an error, leaves the lengths where it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.engines.engine import Engine
from lora_drop_runtime.plan.drafting import DraftSource
from lora_drop_runtime.plan.schedule import StepKind

from .drafter import Drafter
from .pace import CycleTimes, Pace
from .request import Request
from .sampling import Ids, Sampler
from .slots import Logits, Run
from .statistics import Cycle, Statistics

Clock = Callable[[], float]


def most_verified(engine: Engine) -> int | None:
    """Tokens of a row that one refresh verifies, the row's own among them; None for no limit."""
    limits = engine.prefill_chunk, engine.verified_tokens
    return min((limit for limit in limits if limit is not None), default=None)


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
        self._request, self._pace, self._clock = request, pace, clock
        self._stops, self._sampler = stops, sampler
        engine = request.engine
        self._most = most_verified(engine)
        self._together = engine.batched_chunks
        most = request.slots.most_lora_steps
        self._rows = [
            Drafter(sampler.rows[row], source, stops, prompt.tolist(), most) for row, prompt in enumerate(prompts)
        ]
        self._left = [new_tokens] * len(self._rows)
        self._going = list(range(len(self._rows)))
        self._cycles: list[Cycle] = []

    def statistics(self) -> Statistics:
        return Statistics(tuple(self._cycles), self._pace.note)

    def tokens(self, logits: Logits, before_cycle: Callable[[], None]) -> Iterator[tuple[Ids, npt.NDArray[np.bool_]]]:
        """Yields (a token per row, which rows it belongs to); rows advance by different counts.

        Args:
            logits: float32 [B, V] of the prefill.
            before_cycle: is called before the engine runs again, and may raise.
        """
        first = self._sampler.sample(logits, np.ones(len(self._rows), np.bool_)).tolist()
        made = [[token] for token in first]
        while True:
            for row in self._going:
                is_over = made[row][-1] in self._stops or self._sampler.rows[row].is_over
                self._left[row] = 0 if is_over else self._left[row] - len(made[row])
            yield from self._told(made)
            self._going = [row for row in self._going if self._left[row]]
            if not self._going:
                return
            before_cycle()
            made = self._cycle(made)

    def _told(self, made: Sequence[Sequence[int]]) -> Iterator[tuple[Ids, npt.NDArray[np.bool_]]]:
        """The new tokens of each row but for a stop token."""
        told = [tokens[:-1] if tokens and tokens[-1] in self._stops else tokens for tokens in made]
        for place in range(max(map(len, told))):
            active = np.array([place < len(tokens) for tokens in told])
            yield np.array([tokens[place] if place < len(tokens) else 0 for tokens in told], np.int64), active

    # ── one cycle ──────────────────────────────────────────────────────────────────────────────────────────

    def _cycle(self, made: Sequence[Sequence[int]]) -> list[list[int]]:
        """The new tokens of each row behind those that it made last; a stop token is the last, a row that is over has
        none."""
        begin = self._clock()
        for row in self._going:
            # A verification makes a token more than it accepts
            left = self._left[row]
            self._rows[row].begin(made[row], (left if self._most is None else min(left, self._most)) - 1)
        self._look_up()
        lora_steps = self._draft()
        middle = self._clock()
        logits = self._verify()
        new: list[list[int]] = [[] for _ in self._rows]
        for row in self._going:
            new[row] = self._rows[row].judge(logits[row])
            self._request.advance(row, self._rows[row].fed[: len(new[row])])
        width = max(len(self._rows[row].fed) for row in self._going)
        mean = sum(map(len, new)) / len(self._going)
        self._note(new, CycleTimes(lora_steps, middle - begin, width, self._clock() - middle, mean))
        return new

    def _asked(self, source: str, rows: Sequence[int]) -> int:
        """How many drafts the pace asks of these rows."""
        most = max((self._rows[row].most for row in rows), default=0)
        width = max(len(self._rows[row].fed) for row in self._going)
        runs = 1 if self._together else len(self._going)  # of the refresh graph that verify them
        return self._pace.drafts(source, most, runs=runs, width=width) if most else 0

    def _look_up(self) -> None:
        found = [row for row in self._going if self._rows[row].may_look_up]
        count = self._asked("ngram", found)
        for row in found:
            self._rows[row].look_up(count)

    def _draft(self) -> int:
        """Draft by LoRA steps for all rows that looked nothing up; returns how many steps ran."""
        drafting = [row for row in self._going if self._rows[row].may_draft]
        count = self._asked("lora", drafting)
        steps = 0
        for row in drafting:
            self._rows[row].begin_steps()
        try:
            while going := [row for row in drafting if self._rows[row].may_draft and steps < count]:
                logits = self._run(StepKind.LORA, going, steps)
                steps += 1
                for row in going:
                    self._rows[row].saw(logits[row, 0])
        finally:
            for row in drafting:
                self._rows[row].end_steps()
        return steps

    def _verify(self) -> list[Logits]:
        """By row, the logits float32 [n, V] after each of what it was fed; of a row that is over some [0, V]."""
        logits = self._run(StepKind.REFRESH, self._going, 0)
        return [logits[row, : len(self._rows[row].fed)] for row in range(len(self._rows))]

    def _run(self, kind: StepKind, due: Sequence[int], steps: int) -> Logits:
        """Run the last draft of these rows, after so many LoRA steps, or all of them; the others stand still."""
        request = self._request
        runs = []
        width = 1 if kind is StepKind.LORA else max(len(self._rows[row].fed) for row in due)
        for row in set(range(len(self._rows))).difference(self._going):
            request.stands_over(row, width)
        for row, (kept, dropped) in enumerate(zip(request.kept, request.dropped, strict=True)):
            fed: Sequence[int] = self._rows[row].fed if row in self._going else ()
            if kind is StepKind.LORA and row in due:
                runs.append(Run(kind, fed[-1:], kept + steps, dropped))
            else:
                runs.append(Run(StepKind.REFRESH, fed, kept, dropped, each=True))
        request.slots.run(kind, runs, due)
        return request.slots.logits()

    def _note(self, made: Sequence[Sequence[int]], times: CycleTimes) -> None:
        """Count the cycle, and tell the pace."""
        drafts, accepted = [0] * len(self._rows), [0] * len(self._rows)
        outcomes = [self._rows[row].outcome(made[row]) for row in self._going]
        for row, outcome in zip(self._going, outcomes, strict=True):
            drafts[row], accepted[row] = outcome.drafted, outcome.accepted
        self._cycles.append(Cycle(times.lora_steps, tuple(drafts), tuple(accepted), tuple(map(len, made))))
        self._pace.saw(times, outcomes)
