"""One row of a batch: what it wants to run next, and what it makes of the logits.

Enters: a prompt, then the logits of each run that the row asked for, or the token that was chosen from them. Leaves:
runs, and events. A row knows its own lengths alone: nothing of the other rows, of the slot that it lies in, or of when
its runs come. So its tokens are those of the row alone, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_drop_runtime.plan.drafting import DraftSource, VerifiedSchedule
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import AdaptiveSchedule, JoinedSchedule, PeriodicSchedule, Schedule, StepKind

from . import checks
from .cycle import Cycle
from .drafter import Drafter
from .flight import FirstState
from .pace import MOST_DRAFTS, AutoPace, CycleTimes, FixedPace, Pace
from .sampling import Ids, RowSampler
from .slots import Logits, Run
from .statistics import Cycle as VerifiedCycle
from .statistics import Statistics

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"
_SCORED = 8  # tokens of a prompt whose logits, of the whole vocabulary each, are wanted at once
_USUAL_WAIT = 4  # ticks, of a row whose schedule does not say its window


@dataclass(frozen=True)
class Event:
    """A token of a row, or its end.

    Attributes:
        row: as `Batch.add` named it.
        token: of the prompt where `is_prompt`. None where the row ends without one: a stop token is none, and a
            cancelled row makes no more.
        logprob: natural logarithm of the token's probability by the logits as they are, before bias, penalties,
            constraint and temperature; None where it was not asked for, and of a prompt's first token.
        top_logprobs: the likeliest tokens and their logprobs, as many as were asked for.
        kind: the step that made it.
        finished: None while the row goes on; `stop`, also where its constraint is over, `length`, `cancelled`, or
            `failed`.
        error: why it failed.
        statistics: with the end of a row whose refreshes verify drafts, what it has counted.
        is_prompt: the token is one of the prompt, which was asked to be scored.
        reused: how many tokens of the row's prompt were not run, for their K/V were there.
    """

    row: int
    token: int | None
    kind: StepKind
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finished: str | None = None
    error: BaseException | None = None
    statistics: Statistics | None = None
    is_prompt: bool = False
    reused: int = 0


Runs = Generator[Run, tuple[Logits, float], None]  # is sent the logits [n or 1, V] and the seconds that the run took
_ON_DEVICE: Logits = np.empty((1, 0), np.float32)  # the logits of a run whose token was chosen there


@dataclass(frozen=True)
class RowOptions:
    """What a row is asked to do; `logprobs` None wants none, else how many of the likeliest tokens beside its own, and
    `prompt_logprobs` the same of the prompt, whose first `context` tokens run as prompts do, and the others by the
    schedule.

    `slots` are those that its caches need in all, {"slots_kept": n, "slots_dropped": m}; a run of it begins at most
    `back` entries before its end, None where that is not known.
    """

    new_tokens: int
    policy: Policy
    schedule: Schedule
    source: DraftSource
    stops: frozenset[int]
    logprobs: int | None
    prompt_logprobs: bool
    context: int
    slots: Mapping[str, int]
    back: int | None


def logprobs_of(token: int, logits: Logits, most: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's logprob by the logits [V], and so many of the likeliest tokens with theirs.

    Of tokens that tie the lower ids come first, as argmax has it.
    """
    shifted = logits - logits.max()
    total = np.log(np.exp(shifted).sum(dtype=np.float64))
    most, likeliest = min(most, len(shifted)), np.empty(0, np.int64)
    if most:  # a vocabulary is not sorted for a few
        likeliest = np.flatnonzero(shifted >= np.partition(shifted, -most)[-most])
        likeliest = likeliest[np.argsort(-shifted[likeliest], kind="stable")][:most]
    return float(shifted[token] - total), tuple((int(one), float(shifted[one] - total)) for one in likeliest)


class Row:
    """A row from its prompt to its end.

    Args:
        number: its name.
        prompt: int64 [T].
        chunk: the most tokens in one run.
        most_verified: of them the most whose logits are wanted; None for no limit.
        most_lora_steps: that follow each other; None for no limit.
        tell: is given each event as it happens.

    Attributes:
        run: what it wants to run; None once it is over.
        kept, dropped: valid slots of its caches.
        reused: tokens of its prompt that were not run.
        parts: those of its prompt behind which another text goes on otherwise, and a run of it ends; 0 for none.
        waited: ticks since its last run.
        patience: ticks that it waits at most.
        is_new: whether its prompt is not done.
        phase: LoRA steps since its last refresh, of a periodic schedule.
        why_single_steps: why the host chooses its tokens one by one; empty where whole cycles could.
    """

    def __init__(
        self,
        number: int,
        prompt: Ids,
        options: RowOptions,
        sampler: RowSampler,
        chunk: int,
        most_verified: int | None,
        most_lora_steps: int | None,
        why_single_steps: str,
        tell: Callable[[Event], None],
    ) -> None:
        self.number, self.options, self._tell = number, options, tell
        self.why_single_steps = why_single_steps
        self.kept = self.dropped = self.waited = self.reused = self.parts = 0
        self._ids = prompt[: options.context].copy()  # as an array, which is compared with others in every tick
        self._prompt: list[int] = self._ids.tolist()
        self._text = list(self._prompt)  # and what was chosen behind it
        self._exact = 0  # of it the first tokens that full steps alone have run, each behind such tokens
        self._given: list[int] = prompt[options.context :].tolist()
        self._sampler, self._chunk = sampler, chunk
        self._most_verified = chunk if most_verified is None else min(chunk, most_verified)
        self._most_lora_steps = most_lora_steps
        self._left = options.new_tokens
        self._cycles: list[VerifiedCycle] = []
        self._chosen: int | None = None  # on the device, by the latest run
        schedule = options.schedule
        self._pace: Pace = AutoPace()
        window = schedule.k if isinstance(schedule, PeriodicSchedule | AdaptiveSchedule) else _USUAL_WAIT - 1
        if isinstance(schedule, VerifiedSchedule):
            drafts = MOST_DRAFTS if schedule.drafts is None else schedule.drafts
            window = min(drafts, self._most_verified - 1)  # what one refresh verifies ends a cycle, too
            if schedule.drafts is not None:
                self._pace = FixedPace(schedule.drafts)
        self.patience = window + 1
        self.phase = 0
        self.has_failed = False
        self.is_new = True
        self._runs = self._steps()
        self.run: Run | None = next(self._runs)

    @property
    def reusable(self) -> Ids:
        """Tokens of its prompt that need not run where their K/V are there: the last one has to give logits, and where
        the prompt is scored all have. Nor does the last one run alone: a kernel for one token may round otherwise."""
        return self._ids[: 0 if self.options.prompt_logprobs else -2]

    @property
    def exact(self) -> Ids:
        """Its first tokens, as far as its caches hold what a prompt of these would have: whatever the adapters, k and
        policy are. Nothing is written there any more. Of a run whose logits are no numbers it has none: in an attention
        these spoil the entries of the tokens before them as well, whose weights of 0 make no 0 of them."""
        return np.array(self._text[: self._exact], np.int64)

    @property
    def will_run(self) -> Ids:
        """Of a new row, what `exact` will soon have: its prompt, unless that is scored, which takes long."""
        return self._ids[: len(self._ids) if self.is_new and not self.options.prompt_logprobs else 0]

    def begin_behind(self, count: int, parts: int) -> None:
        """Before its first run: so many tokens of its prompt are in its caches; `parts` as the attribute has it."""
        self.kept = self.dropped = self.reused = self._exact = count
        self.part(parts)

    def part(self, tokens: int) -> None:
        """Amid its prompt, before a run: let a run end behind so many tokens."""
        self.parts = tokens
        self._runs = self._steps()
        self.run = next(self._runs)

    def forget_exact(self) -> None:
        """Its caches are another's now."""
        self._exact = 0

    def advance(self, found: Logits | int, seconds: float) -> None:
        """Its run is done, and gave these logits [n, V], or the token that was chosen from them on the device."""
        assert self.run is not None
        kind, self.waited = self.run.kind, 0
        self._chosen, logits = (found, _ON_DEVICE) if isinstance(found, int) else (None, found)
        try:
            self.run = self._runs.send((logits, seconds))
        except StopIteration:
            self.run = None
        except BaseException as error:  # of this row alone: its logits are no numbers, or its own schedule is wrong
            self.fail(error, kind)
            if not isinstance(error, Exception):
                raise

    def fail(self, error: BaseException, kind: StepKind) -> None:
        """End the row. Nobody takes over what it has written: not all of it may be numbers."""
        self.run, self.has_failed = None, True
        self.forget_exact()
        self._end(kind, FAILED, error)

    def in_flight(self) -> FirstState:
        """What it begins whole cycles with, or stands still beside them with while its prompt is not done."""
        if self.is_new or self.run is None:
            return FirstState(kept=self.kept, dropped=self.dropped)
        sampler = self._sampler
        entries = self.kept, self.dropped
        return FirstState(self.run.tokens[-1], *entries, self._left, sampler.options, sampler, self.options.stops)

    def join(self, ahead: int) -> None:
        """Let a new row's first cycle be shorter by so many LoRA steps, so that it refreshes with the others."""
        assert self.is_new
        assert isinstance(self.options.schedule, PeriodicSchedule)
        self.options = replace(self.options, schedule=JoinedSchedule(self.options.schedule.k, ahead))
        self.phase = ahead

    @property
    def k(self) -> int:
        """The window of a periodic schedule."""
        schedule = self.options.schedule
        assert isinstance(schedule, PeriodicSchedule | JoinedSchedule)
        return schedule.k

    @property
    def ends_its_prompt(self) -> bool:
        """Whether its next run is the last of its prompt."""
        return self.is_new and self.run is not None and self.kept + len(self.run.tokens) == len(self._prompt)

    def cancel(self) -> None:
        """Give the row up, while it wants to run."""
        assert self.run is not None
        kind, self.run = self.run.kind, None
        self._runs.close()
        self._end(kind, CANCELLED)

    def _end(self, kind: StepKind, finished: str, error: BaseException | None = None) -> None:
        """Tell that it is over, without a token."""
        counted = self._counted
        event = Event(self.number, None, kind, finished=finished, error=error, statistics=counted, reused=self.reused)
        self._tell(event)

    def statistics(self) -> Statistics:
        """What was counted, where refreshes verify drafts."""
        return Statistics(tuple(self._cycles), self._pace.note)

    @property
    def _verifies(self) -> bool:
        """Whether its refreshes verify drafts: under `lossless` and k = 0 there are none."""
        schedule = self.options.schedule
        return isinstance(schedule, VerifiedSchedule) and schedule.drafts != 0

    @property
    def _counted(self) -> Statistics | None:
        return self.statistics() if self._verifies else None

    def _steps(self) -> Runs:
        logits = yield from self._prefill()
        if self._verifies:
            yield from self._verified_tokens(logits)
        else:
            yield from self._scheduled_tokens(logits)

    def _prefill(self) -> Generator[Run, tuple[Logits, float], Logits]:
        """Returns the logits [V] after the prompt."""
        each = self.options.prompt_logprobs
        while self.kept < len(self._prompt):
            left = len(self._prompt) - self.kept
            count = min(self._chunk, left)
            if self.kept < self.parts:
                count = min(count, self.parts - self.kept)
            if 1 < count == left - 1:  # the last token does not run alone: see `reusable`
                count -= 1
            if each:
                most = min(count, self._most_verified, _SCORED)
                count = 1 << (most.bit_length() - 1)  # each number of logits has buffers of its own
            tokens = self._prompt[self.kept : self.kept + count]
            logits, _ = yield Run(StepKind.REFRESH, tokens, self.kept, self.dropped, each=each)
            if each:
                self._tell_prompt(self.kept, logits)
            if self._exact == self.kept and np.isfinite(logits[-1].max()):
                self._exact += count
            self.kept += count
            self.dropped += count
        self.is_new = False
        after: Logits = logits[-1]
        return after

    def _tell_prompt(self, begin: int, logits: Logits) -> None:
        """Tell tokens of the prompt that stand behind those from `begin` on, by the logits [n, V] after these."""
        if begin == 0:
            self._tell(Event(self.number, self._prompt[0], StepKind.REFRESH, is_prompt=True))
        for token, after in zip(self._prompt[begin + 1 :], logits, strict=False):
            self._tell_scored(token, after, StepKind.REFRESH)

    def _tell_scored(self, token: int, logits: Logits, kind: StepKind) -> None:
        """Tell a token of the prompt that stands behind these logits [V]."""
        self._sampler.largest(logits)
        logprob, top = logprobs_of(token, logits, self.options.logprobs or 0)
        self._tell(Event(self.number, token, kind, logprob, top, is_prompt=True))

    def _event(self, token: int, logits: Logits, kind: StepKind, is_over: bool) -> bool:
        """Tell a token, behind which the row's constraint may be over; returns whether the row goes on."""
        if token in self.options.stops:
            self._end(kind, STOP)
            return False
        self._left -= 1
        most = self.options.logprobs
        logprob, top = (None, ()) if most is None else logprobs_of(token, logits, most)
        finished = STOP if is_over else None if self._left else LENGTH
        counted = self._counted if finished else None
        self._tell(Event(self.number, token, kind, logprob, top, finished, statistics=counted, reused=self.reused))
        return finished is None

    # ── by a schedule ──────────────────────────────────────────────────────────────────────────────────────

    def _choose(self, logits: Logits) -> int:
        if self._chosen is None:
            return self._sampler.take(logits)
        self._sampler.took(self._chosen)
        return self._chosen

    def _scheduled_tokens(self, logits: Logits) -> Runs:
        policy, given = self.options.policy, iter(self._given)
        cycle = Cycle(self.options.schedule, len(self._given) + self.options.new_tokens - 1)
        kind, since_refresh = StepKind.REFRESH, list[int]()
        while True:
            token = next(given, None)
            if token is not None:
                self._tell_scored(token, logits, kind)
                self._text.append(token)
            else:
                token = self._choose(logits)
                self._text.append(token)
                if not self._event(token, logits, kind, self._sampler.is_over):
                    return
            kind = cycle.next_kind(lambda seen=logits: seen[None])  # type: ignore[misc]
            if kind is StepKind.LORA:
                checks.check_lora_steps(len(since_refresh) + 1, self._most_lora_steps)
                found, _ = yield Run(kind, [token], self.kept, self.dropped)
                since_refresh.append(token)
                self.dropped += policy.fills
                self.phase += 1
            else:
                back = policy.steps_taken_back(len(since_refresh))
                tokens = [*since_refresh[len(since_refresh) - back :], token]
                for begin in range(0, len(tokens), self._chunk):
                    part = tokens[begin : begin + self._chunk]
                    found, _ = yield Run(kind, part, self.kept - back + begin, self.dropped + begin)
                since_refresh.clear()
                self.dropped += back + 1
                self.phase = 0
                if policy.exact_refreshes or self._exact == self.kept:
                    self._exact = self.kept + 1
            self.kept += 1
            cycle.done()
            logits = found[-1]

    # ── drafts and their verification ──────────────────────────────────────────────────────────────────────

    def _verified_tokens(self, logits: Logits) -> Runs:
        options = self.options
        drafter = Drafter(self._sampler, options.source, options.stops, self._prompt, self._most_lora_steps)
        made, found = [self._sampler.take(logits)], logits[None]
        self._text += made
        self._pace.begin()
        while True:
            for place, token in enumerate(made):
                is_over = place == len(made) - 1 and self._sampler.is_over
                if not self._event(token, found[place], StepKind.REFRESH, is_over):
                    return
            drafter.begin(made, min(self._left, self._most_verified) - 1)
            if drafter.may_look_up:
                drafter.look_up(self._pace.drafts("ngram", drafter.most, runs=1, width=1))
            lora_steps, lora_seconds = yield from self._draft(drafter)
            fed = drafter.fed
            found, seconds = yield Run(StepKind.REFRESH, fed, self.kept, self.dropped, each=True)
            made = drafter.judge(found)
            self._text += made
            self.kept += len(made)
            self.dropped += len(made)
            self._exact = self.kept
            outcome = drafter.outcome(made)
            count = (outcome.drafted,), (outcome.accepted,), (len(made),)
            self._cycles.append(VerifiedCycle(lora_steps, *count))
            self._pace.saw(CycleTimes(lora_steps, lora_seconds, len(fed), seconds, len(made)), [outcome])

    def _draft(self, drafter: Drafter) -> Generator[Run, tuple[Logits, float], tuple[int, float]]:
        """Returns how many LoRA steps ran, and their seconds."""
        steps, total = 0, 0.0
        count = self._pace.drafts("lora", drafter.most, runs=1, width=1) if drafter.may_draft else 0
        drafter.begin_steps()
        try:
            while drafter.may_draft and steps < count:
                logits, seconds = yield Run(StepKind.LORA, drafter.fed[-1:], self.kept + steps, self.dropped)
                steps += 1
                total += seconds
                drafter.saw(logits[0])
        finally:
            drafter.end_steps()
        return steps, total
