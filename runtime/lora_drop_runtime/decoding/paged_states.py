"""Recurrent states of rows whose caches are paged, and the entries of their last tokens.

Enters: what rows run, and behind how many tokens. Leaves: which entries and states a call reads and where it writes
(bundle/paged_io.py). A row has two places in the table of states: a refresh reads one and writes the other. What a call
has made of entries and states counts as soon as it is known behind how many tokens the row goes on; until then those
before it are as they were, so that the same tokens can run again, or fewer of them count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.graph_io import MOST_PENDING
from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.bundle.paged_io import recurrence_names
from lora_drop_runtime.plan.schedule import StepKind

from . import checks
from .slots import Run

Array = npt.NDArray[np.float32]
_LONG = 2**30  # tokens, after which the operator would write a state of its own accord


class _Ran(NamedTuple):
    """What the latest call has run of a row.

    Attributes:
        begun, end: tokens of the row before it and after it.
        first, held: the place of its first entry among those that the call gives, and how many are its own.
    """

    kind: StepKind
    begun: int
    end: int
    first: int
    held: int

    def counts_whole(self, kept: int) -> bool:
        """Whether a row that goes on behind so many tokens has the states that the call has left."""
        return self.kind is StepKind.REFRESH and kept >= self.end


class PagedStates:
    """Args:
    count: of rows.
    output: gives by its name what the latest call has left.

    Attributes:
        arrays: what calls read and write in place, by the names of the graph's inputs.
        tokens: of each row, those that are in its states.
    """

    def __init__(self, manifest: Manifest, count: int, output: Callable[[str], Array]) -> None:
        model, dropped = manifest.model, set(manifest.plan.dropped_attentions)
        self._form, self._output = model.recurrence, output
        self._layers = sorted(model.recurrent_layers) if self._form is not None else []
        self._has_dropped = not dropped.isdisjoint(self._layers)
        fills = manifest.plan.refresh_policy.fills
        self._always = [fills or layer not in dropped for layer in self._layers]  # whether LoRA steps give entries
        self.tokens, self._sides = [0] * count, [0] * count
        self._ran: dict[int, _Ran] = {}
        self._going: dict[int, int] = {}  # behind how many tokens rows of the latest call go on, as far as it is known
        self.arrays: dict[str, Array] = {}
        if self._form is None:
            return
        form, layers = self._form, len(self._layers)
        # The last entry stands for those before a row's first token: zeros
        self._entries = np.zeros((layers, count * form.recent + 1, form.entry), np.float32)
        self._states = np.zeros((layers, 2 * count, form.heads, form.value_dim, form.key_dim), np.float32)
        self._names = [recurrence_names(layer) for layer in self._layers]
        for (recent, state, _), entries, states in zip(self._names, self._entries, self._states, strict=True):
            self.arrays |= {recent: entries, state: states}

    def __bool__(self) -> bool:
        """Whether any layer has a recurrent state."""
        return self._form is not None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    # ── a row ──────────────────────────────────────────────────────────────────────────────────────────────────

    def goes_back(self, slot: int, kept: int) -> bool:
        """Whether a row may go on behind so many tokens: its states are of no later one."""
        ran = self._ran.get(slot)
        if ran is None or ran.kind is StepKind.LORA or self._going.get(slot, ran.end) < ran.end:
            return kept >= self.tokens[slot]
        return kept >= ran.end

    def goes_on(self, slot: int, kept: int) -> None:
        """A row goes on behind so many tokens, or fewer where that is said before the next call.

        Raises:
            InputError: what that needs is not there any more.
        """
        ran = self._ran.get(slot)
        if kept < self.tokens[slot]:
            raise checks.states_are_torn()
        if ran is None:
            return
        lacks_any = ran.end - ran.held > ran.begun or kept - self.tokens[slot] > MOST_PENDING
        if lacks_any and ran.begun < kept and not ran.counts_whole(kept):
            raise checks.states_are_torn()
        self._going[slot] = kept

    def _settle(self, slot: int, kept: int) -> None:
        """What the latest call has made of a row that goes on behind so many tokens counts from now on."""
        self.goes_on(slot, kept)
        ran, form = self._ran.get(slot), self._form
        if ran is None or form is None:
            return
        known, end = ran.end - ran.held, min(kept, ran.end)
        if end > known:
            places = [slot * form.recent + token % form.recent for token in range(known, end)]
            sources = slice(ran.first, ran.first + end - known)
            for number, (_, _, present) in enumerate(self._names):
                if self._always[number] or ran.kind is StepKind.REFRESH:
                    self._entries[number, places] = self._output(present)[0, sources]
        tokens, sides, others = self.tokens.copy(), self._sides.copy(), self._ran.copy()
        if ran.counts_whole(kept):
            tokens[slot], sides[slot] = ran.end, 1 - sides[slot]
        del others[slot]
        self.tokens, self._sides, self._ran = tokens, sides, others

    def begin(self, slot: int) -> None:
        """A row begins, with states of no token: zeros."""
        self._ran.pop(slot, None)
        self._going.pop(slot, None)
        self.tokens[slot] = 0
        if self:
            self._states[:, 2 * slot + self._sides[slot]] = 0

    def copy(self, other: PagedStates, source: int, target: int, kept: int) -> None:
        """Take those of a row of so many tokens of these or of other ones."""
        if self._form is None:
            return
        other._settle(source, kept)
        self._ran.pop(target, None)
        self._going.pop(target, None)
        size, side = self._form.recent, self._sides[target]
        theirs = other._entries[:, source * size : (source + 1) * size]
        self._entries[:, target * size : (target + 1) * size] = theirs
        self._states[:, 2 * target + side] = other._states[:, 2 * source + other._sides[source]]
        self.tokens[target] = other.tokens[source]

    # ── a call ─────────────────────────────────────────────────────────────────────────────────────────────────

    def ready(self, kind: StepKind, runs: Sequence[Run], due: Collection[int]) -> None:
        """Before a call. Raises InputError where too many LoRA steps follow each other."""
        for slot in [*self._ran]:
            if slot < len(runs):
                self._settle(slot, runs[slot].kept)
        self._ran, self._going = {}, {}
        for slot in due:
            if runs[slot].kept < self.tokens[slot]:
                raise checks.states_are_torn()
        if kind is StepKind.LORA:
            checks.check_lora_steps(max(runs[slot].kept - self.tokens[slot] for slot in due) + 1, MOST_PENDING)

    def sizes(self, order: Sequence[int], runs: Sequence[Run]) -> dict[str, tuple[int, ...]]:
        """Of what a call reads of these rows, each of which runs one of the runs."""
        form = self._form
        if form is None:
            return {}
        rows, new = len(order), sum(len(run.tokens) for run in runs)
        pending = sum(run.kept - self.tokens[slot] for slot, run in zip(order, runs, strict=True))
        held = sum(min(len(run.tokens), form.recent) for run in runs)
        found: dict[str, tuple[int, ...]] = {
            "before": (pending + rows * (form.taps - 1),),
            "mixed": (form.taps, pending + new),
            "new": (new,),
            "held": (held,),
            "begins": (rows + 1,),
            "dropped": (rows + 1,),
            "states": (2 * rows,),
            "places": (rows + 1,),
            "past": (rows,),
            "interval": (rows,),
        }
        if not self._has_dropped:
            del found["dropped"]
        return found

    def fill(
        self, tables: Mapping[str, npt.NDArray[np.int64]], kind: StepKind, order: Sequence[int], runs: Sequence[Run]
    ) -> dict[int, _Ran]:
        """Write what a call reads; returns what it will have run."""
        form = self._form
        if form is None:
            return {}
        found, size, before = {}, form.recent, len(tables["before"])
        seen = at = new = held = 0
        for number, (slot, run) in enumerate(zip(order, runs, strict=True)):
            count, first = len(run.tokens), self.tokens[slot]
            pending, stays = run.kept - first, min(count, size)
            own = pending + form.taps - 1
            tables["before"][seen : seen + own] = [
                slot * size + token % size if token >= 0 else -1 for token in range(run.kept - own, run.kept)
            ]
            places = np.arange(own + count)
            places[:own] += seen
            places[own:] += before + new - own
            for tap in range(form.taps):
                tables["mixed"][tap, at : at + pending + count] = places[tap : tap + pending + count]
            tables["new"][new : new + count] = np.arange(at + pending, at + pending + count)
            tables["held"][held : held + stays] = np.arange(new + count - stays, new + count)
            tables["states"][2 * number] = 2 * slot + self._sides[slot]
            tables["states"][2 * number + 1] = 2 * slot + 1 - self._sides[slot]
            found[slot] = _Ran(kind, run.kept, run.kept + count, held, stays)
            seen, at, new, held = seen + own, at + pending + count, new + count, held + stays
            tables["begins"][number + 1], tables["places"][number + 1] = at, 2 * (number + 1)
        tables["before"][tables["before"] < 0] = len(self._entries[0]) - 1
        tables["interval"][:] = _LONG
        if self._has_dropped:
            tables["dropped"][:] = tables["begins"] if kind is StepKind.REFRESH else 0
        return found

    def ran(self, found: dict[int, _Ran]) -> None:
        """A call has run."""
        self._ran = found
