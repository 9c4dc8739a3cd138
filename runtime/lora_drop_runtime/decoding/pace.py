"""How many drafts a cycle makes: a fixed number, or as many as pay, within a budget.

Enters: what a cycle took and what was accepted. Leaves: the number of drafts of the next one. Reads no clock itself:
who runs the cycles says how long they took. Knows no token and no engine.

`AutoPace` compares with the full schedule, which makes a token in the time of a one-token refresh. It keeps running
medians of the times of that refresh, of a LoRA step and of a verification by its width, and for each place of a draft
how often drafting went on there and how often the draft was accepted, old cycles counting less. Of all lengths it takes
the one with the most expected tokens per second. One that is not expected to pay is tried again all the same, ever more
seldom, since texts change.

The budget holds always: a cycle drafts only if, should every draft be rejected, the time spent since the request began
still is at most 1.05 times what the full schedule would have taken for the same tokens. A request begins with at most
one refresh of what those before it gained. What no one has timed yet is taken to be dear: a LoRA step as a refresh, a
further token of a verification as half of one.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

ALLOWED = 0.05  # that drafting may cost over the full schedule
MOST_DRAFTS = 8
_REMEMBERED = 9  # times that a median is taken of
_FORGETTING = 0.97  # of what earlier cycles said about acceptance, with each cycle
_HOPE, _WEIGHT = 0.8, 2.0  # the share that the first place begins with: drafts are tried; and for how many trials
_REFRESH_AGAIN = 32  # cycles after which the one-token refresh is timed again: the context grows
_LONGEST_WAIT = 64  # cycles between two trials of what did not pay
_TRIALS = 8  # before it is said that drafts do not pay


@dataclass(frozen=True)
class RowOutcome:
    """What became of one row's drafts.

    Attributes:
        drafted, judged, accepted: how many were made; of them, up to the first that was rejected or ended the row; of
            those, all that agreed.
        stopped: whether drafting stopped at a low confidence.
    """

    source: str
    drafted: int
    judged: int
    accepted: int
    stopped: bool


@dataclass(frozen=True)
class CycleTimes:
    """What a cycle took.

    Attributes:
        lora_steps, lora_seconds: how many ran, and all of what came before the refresh.
        width, refresh_seconds: the most tokens of a row, and the refresh with the judgement of its drafts.
        tokens: made in each row that was going, on average.
    """

    lora_steps: int
    lora_seconds: float
    width: int
    refresh_seconds: float
    tokens: float


class Pace(Protocol):
    """Chooses how many drafts are made."""

    note: str

    def begin(self) -> None:
        """A request begins."""
        ...

    def drafts(self, source: str, most: int, *, runs: int, width: int) -> int:
        """How many drafts of a source the next cycle makes in a row, at most `most`.

        Args:
            source: `lora` or `ngram`.
            runs: of the refresh graph that verify several tokens.
            width: tokens that are verified in any case.
        """
        ...

    def saw(self, times: CycleTimes, rows: Sequence[RowOutcome]) -> None:
        """A cycle is over."""
        ...


@dataclass
class FixedPace:
    """Always `k` drafts."""

    k: int
    note: str = ""

    def begin(self) -> None:
        pass

    def drafts(self, source: str, most: int, *, runs: int, width: int) -> int:
        return min(self.k, most)

    def saw(self, times: CycleTimes, rows: Sequence[RowOutcome]) -> None:
        pass


class _Median:
    """Of the latest times; the shortest of few, since the first run of a step does work that no other does."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, seconds: float) -> None:
        self._times.append(seconds)

    @property
    def seconds(self) -> float | None:
        if not self._times:
            return None
        return min(self._times) if len(self._times) < 3 else statistics.median(self._times)


class _Shares:
    """How often something happened of late at each place of a draft; a place that was hardly reached is as the one
    before it, the first is hoped for."""

    def __init__(self) -> None:
        self._yes, self._all = [0.0] * MOST_DRAFTS, [0.0] * MOST_DRAFTS

    def forget(self) -> None:
        self._yes = [yes * _FORGETTING for yes in self._yes]
        self._all = [count * _FORGETTING for count in self._all]

    def add(self, place: int, yes: bool) -> None:
        self._yes[place] += yes
        self._all[place] += 1

    def values(self) -> list[float]:
        values, before = [], _HOPE
        for yes, count in zip(self._yes, self._all, strict=True):
            before = (yes + _WEIGHT * before) / (count + _WEIGHT)
            values.append(before)
        return values


@dataclass
class _Source:
    """One source of drafts: how often its places go on and are accepted, and when it is tried again."""

    goes_on: _Shares = field(default_factory=_Shares)
    accepted: _Shares = field(default_factory=_Shares)
    trials: int = 0
    wait: int = 1
    waited: int = 0

    def add(self, row: RowOutcome) -> None:
        self.goes_on.forget()
        self.accepted.forget()
        for place in range(min(row.drafted + row.stopped, MOST_DRAFTS)):
            self.goes_on.add(place, place < row.drafted)
        for place in range(min(row.judged, MOST_DRAFTS)):
            self.accepted.add(place, place < row.accepted)
        self.trials += 1


class AutoPace:
    """As many drafts as pay; never more than the budget bears. One for each number of rows of a session.

    Attributes:
        note: a sentence once it is known that drafts do not pay, else empty.
        spent, full: seconds of the request's cycles, and what the full schedule would have taken for their tokens; it
            begins with what earlier ones took too long, or with the refresh that they left.
    """

    def __init__(self) -> None:
        self.note = ""
        self.spent, self.full = 0.0, 0.0
        self._refresh, self._lora = _Median(), _Median()
        self._wide: dict[int, _Median] = {}
        self._sources: dict[str, _Source] = {}
        self._since_refresh = 0

    def begin(self) -> None:
        """What earlier requests gained is theirs: of it one refresh is left for this one's first drafts."""
        self.spent, self.full = max(self.spent - self.full, -(self._refresh.seconds or 0.0)), 0.0

    def drafts(self, source: str, most: int, *, runs: int, width: int) -> int:
        refresh, most = self._refresh.seconds, min(most, MOST_DRAFTS)
        if refresh is None or self._since_refresh >= _REFRESH_AGAIN or not most:
            return 0
        state = self._sources.setdefault(source, _Source())
        rates = self._rates(source, state, most, refresh, runs)
        count = max(range(most + 1), key=rates.__getitem__)
        if rates[count] > 1 / refresh and count:
            state.wait = 1
        else:
            self._say_so(source, state, refresh, runs)
            state.waited += 1
            if state.waited < state.wait:
                return 0
            count = 1
        while count and not self._affordable(source, count, refresh, runs, width):
            count -= 1
        if count and rates[count] <= 1 / refresh:
            state.wait, state.waited = min(2 * state.wait, _LONGEST_WAIT), 0
        return count

    def saw(self, times: CycleTimes, rows: Sequence[RowOutcome]) -> None:
        if times.lora_steps:
            self._lora.add(times.lora_seconds / times.lora_steps)
        if times.width == 1:
            self._refresh.add(times.refresh_seconds)
        else:
            self._wide.setdefault(times.width, _Median()).add(times.refresh_seconds)
        for row in rows:
            if row.drafted or row.stopped:
                self._sources.setdefault(row.source, _Source()).add(row)
        plain = times.width == 1 and not times.lora_steps
        self._since_refresh = 0 if times.width == 1 else self._since_refresh + 1
        seconds = times.lora_seconds + times.refresh_seconds
        self.spent += seconds
        self.full += seconds if plain else times.tokens * (self._refresh.seconds or 0.0)

    def _lora_seconds(self, source: str, refresh: float) -> float:
        seconds = self._lora.seconds
        return 0.0 if source == "ngram" else refresh if seconds is None else seconds

    def _wide_seconds(self, width: int, refresh: float, runs: int, *, worst: bool) -> float:
        """Of a verification: as timed, else on from the widest below it."""
        if width == 1:
            return refresh
        known = self._wide.get(width)
        if known is not None and known.seconds is not None:
            return known.seconds
        below = max((one for one in self._wide if one < width), default=1)
        begin = self._wide_seconds(below, refresh, runs, worst=worst) if below > 1 else runs * refresh
        further = 0.5 * refresh * runs
        if below > 1 and not worst:
            further = min(further, max(0.0, begin - runs * refresh) / (below - 1))
        return begin + (width - below) * further

    def _rates(self, source: str, state: _Source, most: int, refresh: float, runs: int) -> list[float]:
        """Expected tokens per second of a row with up to 0, 1, …, `most` drafts."""
        looked_up = source == "ngram"  # all at once, without a stop
        goes_on, accepted = state.goes_on.values(), state.accepted.values()
        reached, alive, tokens, spent = 1.0, 1.0, 1.0, 0.0
        rates = [1 / refresh]
        for place in range(most):
            verification = self._wide_seconds(place + 1, refresh, runs, worst=False)
            share = 1.0 if looked_up else goes_on[place]
            spent += reached * (self._lora_seconds(source, refresh) + (1 - share) * verification)
            reached *= share
            alive *= share * accepted[place]
            tokens += alive
            further = self._wide_seconds(place + 2, refresh, runs, worst=False)
            rates.append(tokens / (spent + reached * further))
        return rates

    def _affordable(self, source: str, count: int, refresh: float, runs: int, width: int) -> bool:
        cost = count * self._lora_seconds(source, refresh)
        cost += self._wide_seconds(max(width, count + 1), refresh, runs, worst=True)
        return self.spent + cost <= (1 + ALLOWED) * (self.full + refresh)

    def _say_so(self, source: str, state: _Source, refresh: float, runs: int) -> None:
        if self.note or state.trials < _TRIALS:
            return
        step = self._lora_seconds(source, refresh) / refresh
        wide = self._wide_seconds(2, refresh, runs, worst=False) / refresh
        share = state.accepted.values()[0] * (1 if source == "ngram" else state.goes_on.values()[0])
        made = f"a LoRA step takes {step:.2f} of a refresh and " if step else ""
        self.note = (
            f"drafts do not pay here: {made}a refresh that verifies one draft takes {wide:.2f} of one that verifies "
            f"none, and {share:.0%} of the first drafts are accepted; most steps run the full schedule"
        )
