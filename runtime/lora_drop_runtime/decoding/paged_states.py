"""Recurrent states of rows whose caches are paged, and the entries of their last tokens.

Enters: what rows run, and behind how many tokens. Leaves: which entries and states a call reads and where it writes
(bundle/paged_io.py). A row has two places in the table of states, and begins with one of them: the other is for what
its next refresh makes of it, which the call writes there, or gives. What a call has made of entries and states counts
as soon as it is known behind how many tokens the row goes on; until then those before it are as they were, so that the
same tokens can run again, or fewer of them count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.graph_io import GATED_DELTA, MOST_PENDING
from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.bundle.paged_io import (
    DROPPED_TABLE,
    RECURRENCE_TABLES,
    recurrence_names,
    recurrence_tables,
)
from lora_drop_runtime.engines.engine import PagedSteps
from lora_drop_runtime.plan.schedule import StepKind

from . import checks
from .slots import Run

Array = npt.NDArray[np.float32]
MOST_PADDED = 8  # tokens of a row in a call that is brought to the width of others
_LONG = 2**30  # tokens, after which the operator would write a state of its own accord


class _Ran(NamedTuple):
    """What the latest call has run of a row.

    Attributes:
        row: its number in the call.
        begun, end: tokens of the row before it and after it.
        first, held: the place of its first entry among those that the call gives, and how many are its own.
    """

    kind: StepKind
    row: int
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
        fills = manifest.plan.refresh_policy.fills
        self._is_delta = self._form is not None and self._form.rule == GATED_DELTA
        self._is_dropped = [layer in dropped for layer in self._layers]
        self._always = [fills or layer not in dropped for layer in self._layers]  # whether LoRA steps give entries
        self.tokens, self._sides = [0] * count, [0] * count
        self._length, self._pads = 0, False  # of rows in a call, with padding
        self._width = 0  # that calls of few tokens have had
        self._asides: dict[int, Array] = {}  # of the delta rule, by rows: states that a call reads, and that it gives
        self._beside: Array | None = None  # what the latest call gives of states, where that is not in the table
        self._ran: dict[int, _Ran] = {}
        self._going: dict[int, int] = {}  # behind how many tokens rows of the latest call go on, as far as it is known
        self.arrays: dict[str, Array] = {}
        if self._form is None:
            return
        form, layers = self._form, len(self._layers)
        # The last entry stands for those before a row's first token: zeros
        self._entries = np.zeros((layers, count * form.recent + 1, form.entry), np.float32)
        sizes = (form.key_dim, form.value_dim) if self._is_delta else (form.value_dim, form.key_dim)
        self._states = np.zeros((layers, 2 * count, form.heads, *sizes), np.float32)
        self._names = [recurrence_names(layer) for layer in self._layers]
        of_dropped = dropped.intersection(self._layers)
        self._tables = recurrence_tables(form.rule, len(of_dropped) < layers, bool(of_dropped))
        for (recent, state, *_), entries, states in zip(self._names, self._entries, self._states, strict=True):
            self.arrays |= {recent: entries} if self._is_delta else {recent: entries, state: states}

    def __bool__(self) -> bool:
        """Whether any layer has a recurrent state."""
        return self._form is not None

    @property
    def nbytes(self) -> int:
        return self._entries.nbytes + self._states.nbytes if self else 0

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
            for number, (_, _, present, _) in enumerate(self._names):
                if self._always[number] or ran.kind is StepKind.REFRESH:
                    self._entries[number, places] = self._output(present)[0, sources]
        if self._beside is not None and ran.counts_whole(kept):
            self._states[:, self._place(slot, 1 - self._sides[slot])] = self._beside[:, ran.row]
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
            self._states[:, self._place(slot, self._sides[slot])] = 0

    def _place(self, slot: int, side: int) -> int:
        return side * len(self.tokens) + slot

    def copy(self, other: PagedStates, source: int, target: int, kept: int) -> None:
        """Take those of a row's first tokens, as many as are in its states or more, from these or from other ones."""
        if self._form is None:
            return
        other._settle(source, max(kept, other._going.get(source, kept)))  # the row itself may go on behind more
        self._ran.pop(target, None)
        self._going.pop(target, None)
        size, side = self._form.recent, self._sides[target]
        theirs = other._entries[:, source * size : (source + 1) * size]
        self._entries[:, target * size : (target + 1) * size] = theirs
        self._states[:, self._place(target, side)] = other._states[:, other._place(source, other._sides[source])]
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

    def sizes(self, order: Sequence[int], runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
        """Dtype and sizes of what a call reads of these rows, each of which runs one of the runs, by the inputs."""
        form = self._form
        if form is None:
            return {}
        rows = len(order)
        pending = [run.kept - self.tokens[slot] for slot, run in zip(order, runs, strict=True)]
        counts = [len(run.tokens) for run in runs]
        longest = [count + before for count, before in zip(counts, pending, strict=True)]
        self._length = max(longest)
        self._pads = self._is_delta and self._length <= MOST_PADDED
        if self._pads:  # calls of one width, for which the plugin need not prepare its kernels anew
            self._width = self._length = max(self._length, self._width)
        in_all = rows * self._length if self._is_delta else sum(longest)
        earlier = rows * self._length if self._pads else sum(pending)
        sizes: dict[str, tuple[int, ...]] = {
            "before": (earlier + rows * (form.taps - 1) + 1,),
            "mixed": (form.taps, in_all),
            "new": (sum(counts),),
            "held": (sum(min(count, form.recent) for count in counts),),
            "grid": (2,),
            "begins": (rows + 1,),
            "states": (2 * rows,),
            "places": (rows + 1,),
            "past": (rows,),
            "interval": (rows,),
        }
        sizes[f"{DROPPED_TABLE}grid"], sizes[f"{DROPPED_TABLE}begins"] = sizes["grid"], sizes["begins"]
        types = RECURRENCE_TABLES[form.rule]
        return {port: (types[name][0], *sizes[name]) for name, port in self._tables.items()}

    def fill(
        self, inputs: Mapping[str, npt.NDArray[Any]], kind: StepKind, order: Sequence[int], runs: Sequence[Run]
    ) -> dict[int, _Ran]:
        """Write what a call reads; returns what it will have run."""
        form = self._form
        if form is None:
            return {}
        tables = {name: inputs[port] for name, port in self._tables.items()}
        found, size, before, mixed = {}, form.recent, len(tables["before"]), tables["mixed"]
        nothing = len(self._entries[0]) - 1
        mixed[:] = before - 1  # padding, which changes no state and is not read
        begins = [0]
        seen = at = new = held = 0
        for number, (slot, run) in enumerate(zip(order, runs, strict=True)):
            count, pending = len(run.tokens), run.kept - self.tokens[slot]
            own, stays, end = pending + form.taps - 1, min(count, size), at + pending + count
            tables["before"][seen : seen + own] = [
                slot * size + token % size if token >= 0 else nothing for token in range(run.kept - own, run.kept)
            ]
            places = np.arange(own + count)
            places[:own] += seen
            places[own:] += before + new - own
            for tap in range(form.taps):
                mixed[tap, at:end] = places[tap : tap + pending + count]
            tables["new"][new : new + count] = np.arange(at + pending, end)
            tables["held"][held : held + stays] = np.arange(new + count - stays, new + count)
            found[slot] = _Ran(kind, number, run.kept, run.kept + count, held, stays)
            seen, new, held = seen + own, new + count, held + stays
            at = at + self._length if self._is_delta else end
            begins.append(at)
        tables["before"][seen:] = nothing
        is_refresh = kind is StepKind.REFRESH
        values: dict[str, Any] = {"grid": (len(order), self._length), "begins": begins}
        values |= {f"{DROPPED_TABLE}{name}": value if is_refresh else 0 for name, value in values.items()}
        if not self._is_delta:
            sides = ((slot, side) for slot in order for side in (self._sides[slot], 1 - self._sides[slot]))
            values["states"] = [self._place(slot, side) for slot, side in sides]
            values |= {"places": range(0, 2 * len(order) + 1, 2), "interval": _LONG}
        for name, value in values.items():
            if name in tables:
                tables[name][...] = value
        return found

    def give(self, steps: PagedSteps, kind: StepKind, order: Sequence[int]) -> None:
        """By the delta rule: a call with the latest feed reads the rows' states where they are, and writes them where
        they go, if they lie one behind another; else copies, and beside them."""
        if not self._is_delta:
            return
        count, reads = len(order), [self._place(slot, self._sides[slot]) for slot in order]
        writes = [self._place(slot, 1 - self._sides[slot]) for slot in order]
        in_place = reads == [*range(reads[0], reads[0] + count)]
        self._beside = None
        if not in_place:
            if count not in self._asides:  # which stay: requests write there
                shape = (2, len(self._layers), count, *self._states.shape[2:])
                self._asides[count] = np.zeros(shape, np.float32)
            self._asides[count][0] = self._states[:, reads]
            self._beside = self._asides[count][1]

        def arrays() -> dict[str, Array]:
            found: dict[str, Array] = {}
            for number, (_, state, _, present) in enumerate(self._names):
                if in_place:
                    own = self._states[number]
                    read, write = (own[places[0] : places[0] + count] for places in (reads, writes))
                else:
                    read, write = self._asides[count][:, number]
                runs = kind is StepKind.REFRESH or not self._is_dropped[number]
                found |= {state: read, present: write} if runs else {state: read[:0]}
            return found

        steps.give((kind, count, reads[0] if in_place else -1), arrays)

    def ran(self, found: dict[int, _Ran]) -> None:
        """A call has run."""
        self._ran = found
