"""One request: rows that start together and share a schedule, so that each step is one for all of them.

Enters: padded prompts, then a token per row. Leaves: logits or chosen tokens. Checks nothing: what reaches it was
checked by the session.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.engine import Buffer, Engine, Step
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import Schedule, StepKind

from .cycle import Cycle
from .paged_slots import slots_for
from .row_blocks import most_taken_back
from .sampling import Ids, not_numbers
from .slots import Logits, Run, Slots

PREFILL_CHUNK = 512  # tokens of a row in one prefill run; longer prompts go in chunks, which bounds the activations


def checked_tokens(tokens: Ids, active: npt.NDArray[np.bool_]) -> Ids:
    """Tokens [B] that an engine chose, 0 in rows that are not active. Raises BundleError: logits were no numbers."""
    tokens = np.where(active, tokens, 0)
    if tokens.min() < 0:
        raise not_numbers(f"The logits of row {int(tokens.argmin())} have NaN or infinity among them.")
    return tokens


class Written:
    """Which of a row's tokens its dropped layers have entries of, as spans that lie apart."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []  # of positions: from, and to before

    def add(self, end: int, count: int) -> None:
        """The tokens before position `end`, so many, have entries behind all others."""
        begin = end - count
        if self._spans and self._spans[-1][1] == begin:
            begin = self._spans.pop()[0]
        self._spans.append((begin, end))

    def count(self, tokens: int) -> int:
        """Entries of the first `tokens`."""
        return sum(min(end, tokens) - begin for begin, end in self._spans if begin < tokens)

    def first(self, tokens: int) -> Written:
        """Those of the first `tokens`."""
        found = Written()
        found._spans = [(begin, min(end, tokens)) for begin, end in self._spans if begin < tokens]
        return found


class Request:
    """The slots and counters of one request. Its caches have prompt + new − 1 kept slots, and as many dropped ones as
    the policy needs.

    Args:
        lengths: int64 [B], of the prompts.
        new_tokens: of each row.
        forget: whether layers give up what they do not see any more, where they can.

    Attributes:
        tokens: that each row has in its caches, prompt and decoded.
        kept, dropped: valid entries of each row.
        max_steps: decode steps that there is room for.
        has_failed: whether logits that were asked for were no numbers.
        is_torn: whether an interrupt came as a step was counted, so that entries and lengths may disagree.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        lengths: Ids,
        new_tokens: int,
        schedule: Schedule,
        policy: Policy,
        forget: bool = False,
    ) -> None:
        self.engine, self.schedule, self.policy = engine, schedule, policy
        self.batch, self.max_steps = len(lengths), new_tokens - 1
        longest = int(lengths.max())
        needed = {
            "slots_kept": longest + self.max_steps,
            "slots_dropped": policy.dropped_slots(longest, self.max_steps, schedule),
        }
        self._capacities = engine.slots(needed)
        several = policy.runs_several(schedule)
        self.slots = slots_for(bundle, engine, self.batch, self._capacities, several, self._chunk)
        self._all = range(self.batch)
        for row in self._all:
            self.slots.admit(row, self._capacities, most_taken_back(policy, schedule) if forget else None)
        self.tokens: list[list[int]] = [[] for _ in self._all]
        self.kept, self.dropped = [0] * self.batch, [0] * self.batch
        self._written = [Written() for _ in self._all]
        self._since_refresh: list[list[int]] = [[] for _ in self._all]  # tokens of each row's LoRA steps
        self.is_torn = self.has_failed = False
        self._next_is_full = False  # after a truncation
        self._have_stood = False  # rows, while others ran
        self._has_state = bundle.manifest.plan.has_state
        self._cycle = Cycle(schedule, self.max_steps)

    @property
    def steps_done(self) -> int:
        """Decode steps after the prefill; where drafts are verified the tokens of the longest row."""
        return self._cycle.steps_done

    @property
    def caches(self) -> dict[str, Buffer]:
        assert isinstance(self.slots, Slots)
        return self.slots.buffers.caches

    @property
    def len_kept(self) -> Ids:
        return np.array(self.kept, np.int64)

    @property
    def len_dropped(self) -> Ids:
        return np.array(self.dropped, np.int64)

    def prefill(self, ids: Ids, lengths: Ids) -> None:
        """Run the prompts, int64 [B, T], from the tokens on that rows have already."""
        ends: list[int] = lengths.tolist()
        fed = {row: ids[row, self.kept[row] : end].tolist() for row, end in enumerate(ends)}
        self._run_in_full(fed, dict.fromkeys(fed, 0), once=True)
        for row, tokens in fed.items():
            self._fed(row, tokens, len(tokens))
        self._prompts = ends

    def _run_in_full(self, fed: dict[int, list[int]], back: dict[int, int], *, once: bool) -> None:
        """Run tokens of rows, the first of them so many before a row's last entry, in chunks that are counted from each
        row's end: the last run leaves the logits and states of all rows. The others keep their entries."""
        chunk, longest = self._chunk, max(map(len, fed.values()))
        for left in range((longest - 1) // chunk * chunk, -1, -chunk):  # tokens that come after this run
            runs, due = [], []
            for row, (kept, dropped) in enumerate(zip(self.kept, self.dropped, strict=True)):
                tokens = fed.get(row, [0])
                begin, end = max(len(tokens) - left - chunk, 0), len(tokens) - left
                if end > 0 and row in fed:
                    due.append(row)
                part = tokens[begin : max(end, begin + 1)]  # one, of a row that does not begin yet
                runs.append(Run(StepKind.REFRESH, part, kept - back.get(row, 0) + begin, dropped + begin))
            self.slots.run(StepKind.REFRESH, runs, due, once=once)

    @property
    def _chunk(self) -> int:
        """The most tokens of a row in one run."""
        return min(PREFILL_CHUNK, self.engine.prefill_chunk or PREFILL_CHUNK)

    def logits(self) -> Logits:
        """float32 [B, V] of the latest step; valid until the next."""
        return self.slots.logits()[:, 0]

    def _are_numbers(self) -> bool:
        """Whether its latest logits are; not where they cannot be had."""
        try:
            return bool(np.isfinite(self.logits().max(axis=1)).all())
        except BundleError:
            return False

    def may_hold_nan(self) -> bool:
        """Whether what it has written may be no numbers. Where the engine chooses tokens its logits are not read."""
        if self.engine.chooses_tokens:
            return self.has_failed or bool((self.slots.chosen() < 0).any())
        return self.has_failed or not self._are_numbers()

    def may_be_taken_over(self) -> bool:
        """Whether another request can begin with its caches; where logits are no numbers, later slots are none, also
        those of a cycle that ran ahead and whose tokens nobody was told."""
        return not self.is_torn and not self.has_failed and self._are_numbers()

    def wipe(self) -> None:
        """Forget all entries, and the memory of them: the request is over."""
        for row in self._all:
            self.slots.wipe(row)

    def chosen(self, active: npt.NDArray[np.bool_]) -> Ids:
        """The tokens [B] that the engine chose in the last step, 0 in rows that are not active."""
        return checked_tokens(self.slots.chosen(), active)

    def next_kind(self, active: npt.NDArray[np.bool_] | None) -> StepKind:
        """What the next step runs; the schedule is asked once, and sees the logits of the rows that are active.

        Raises:
            InputError: it returns something else, or more refreshes than it said there would be.
        """

        def read() -> npt.NDArray[np.float32]:
            logits = self.logits()
            return logits if active is None else logits[active]

        return StepKind.REFRESH if self._next_is_full else self._cycle.next_kind(read)

    def step(self, token_ids: Ids, active: npt.NDArray[np.bool_] | None) -> None:
        """Run the next step in the rows that are active; all when None. One that is interrupted can be repeated, unless
        the request is torn."""
        kind = self.next_kind(active)
        tokens: list[int] = token_ids.tolist()
        going = self._all if active is None else [row for row, goes_on in enumerate(active.tolist()) if goes_on]
        back = {row: self._taken_back(row, kind) for row in going}
        if any(back.values()):
            again = {row: self._since_refresh[row][-count:] if count else [] for row, count in back.items()}
            self._run_in_full({row: [*again[row], tokens[row]] for row in going}, back, once=False)
        else:
            self._run_one_token(kind, going, tokens)
        self.is_torn = True
        self.slots.accept()
        self.took(kind, tokens, going)

    def took(self, kind: StepKind, tokens: Sequence[int], going: Sequence[int]) -> None:
        """The next step has run tokens of the rows that are going."""
        self.is_torn = True
        self._have_stood |= len(going) < self.batch
        for row in going:
            if kind is StepKind.LORA:
                self._fed(row, (tokens[row],), int(self.policy.fills))
                self._since_refresh[row].append(tokens[row])
            else:
                self._fed(row, (tokens[row],), self._taken_back(row, kind) + 1)
                self._since_refresh[row].clear()
        if self._next_is_full:
            self._next_is_full = False
            self._prompts = [length + 1 for length in self._prompts]
            self.max_steps -= 1
        else:
            self._cycle.done()
        self.is_torn = False

    def meet(self) -> None:
        """All rows go on. Those that stood still have not kept their states: the next step then runs in full."""
        if self._have_stood and self._has_state:
            self.truncate(self.kept)

    def _taken_back(self, row: int, kind: StepKind) -> int:
        """LoRA steps of a row that the next step runs again."""
        return self.policy.steps_taken_back(len(self._since_refresh[row])) if kind is StepKind.REFRESH else 0

    def _run_one_token(self, kind: StepKind, going: Sequence[int], tokens: Sequence[int]) -> None:
        """The rows that are not going are over."""
        entries = zip(self.kept, self.dropped, strict=True)
        runs = [Run(kind, (token,), kept, dropped) for token, (kept, dropped) in zip(tokens, entries, strict=True)]
        if len(going) < self.batch:
            for row in set(self._all).difference(going):
                runs[row] = runs[row]._replace(tokens=())
        self.slots.run(kind, runs, going, held=True)

    def advance(self, row: int, tokens: Sequence[int]) -> None:
        """A refresh that verified drafts has run these tokens of a row, which stay."""
        self._fed(row, tokens, len(tokens))
        self.slots.goes_on(row, self.kept[row])
        self._cycle.steps_done = max(self.steps_done, self.kept[row] - self._prompts[row])

    def stands_over(self, row: int, width: int) -> None:
        """A row that is over may lose its last entries beside others that write so many: those are to run again."""
        stays = min(self._capacities.values()) - width
        if stays < self.dropped[row] and not self.engine.idle_rows:
            self.dropped[row], self._written[row] = stays, self._written[row].first(stays)
            self._since_refresh[row] = self.tokens[row][stays:]

    def _fed(self, row: int, tokens: Sequence[int], written: int) -> None:
        """A row has got tokens, and its dropped layers the entries of the latest `written` ones."""
        self.tokens[row] += tokens
        self.kept[row] += len(tokens)
        self.dropped[row] += written
        if written:
            self._written[row].add(self.kept[row], written)

    # ── what stays of it ───────────────────────────────────────────────────────────────────────────────────

    def entries(self, row: int, tokens: int) -> tuple[int, int]:
        """Valid entries (kept, dropped) of the first `tokens` of a row, at most those that it has.

        Where a policy leaves no holes because a refresh runs the tokens before it again, only those count that one has
        run: so the caches are the full model's.
        """
        if not self.policy.leaves_holes and not self.policy.fills:
            tokens = min(tokens, self.dropped[row])
        return tokens, self._written[row].count(tokens)

    def _longest_prefix(self, tokens: Sequence[int], rows: Iterable[int]) -> tuple[int, int]:
        """(row, count) of that of the rows which has entries of the most of these tokens, from the first on."""
        best = 0, 0
        for row in rows:
            same = next((n for n, (a, b) in enumerate(zip(self.tokens[row], tokens, strict=False)) if a != b), None)
            count, _ = self.entries(row, min(len(self.tokens[row]), len(tokens)) if same is None else same)
            best = max(best, (row, count), key=lambda one: one[1])
        return best

    def take_over(self, other: Request, row: int, tokens: Sequence[int]) -> None:
        """Begin a row with what the rows of another request have of these tokens.

        In an engine of one request that is the request before. What its row of the same place has left is taken as it
        lies, where the caches have the same place and sizes.
        """
        in_place = not self.engine.many_requests
        if in_place and not self.slots.has_memory_of(other.slots):  # type: ignore[union-attr, arg-type]  # none is paged
            return
        source, count = other._longest_prefix(tokens, [row] if in_place else other._all)
        kept, dropped = other.entries(source, count)
        if not other.slots.goes_back(source, kept, dropped):
            return
        if not in_place:
            self.slots.copy(other.slots, source, row, kept, dropped)  # type: ignore[arg-type]  # of one engine
        self.tokens[row] = other.tokens[source][:kept]
        self.kept[row], self.dropped[row] = kept, dropped
        self._written[row] = other._written[source].first(kept)

    def goes_back(self, row: int, length: int) -> bool:
        """Whether a row may be cut back to so many tokens: whether all is there that later ones see."""
        return self.slots.goes_back(row, *self.entries(row, min(length, self.kept[row])))

    def truncate(self, lengths: Sequence[int]) -> None:
        """Cut each row back to so many tokens. The next step runs in full, and the schedule begins anew."""
        for row, length in enumerate(lengths):
            self.cut(row, length)
        self._next_is_full, self._have_stood = True, False
        self._prompts = list(lengths)
        self.max_steps = self._steps_left()
        self._cycle = Cycle(self.schedule, max(self.max_steps - 1, 0))

    def take_back(self, told: Sequence[int]) -> None:
        """Forget what verified drafts have put behind the tokens that were told, so many of each row: the last of them
        is not fed yet."""
        for row, count in enumerate(told):
            self.cut(row, self._prompts[row] + max(count - 1, 0))
            self.slots.goes_on(row, self.kept[row])
        self._cycle.steps_done = max(kept - begin for kept, begin in zip(self.kept, self._prompts, strict=True))

    def cut(self, row: int, length: int) -> None:
        """Forget a row's tokens behind the first so many."""
        length = min(length, self.kept[row])
        kept, dropped = self.entries(row, length)
        self.tokens[row] = self.tokens[row][:length]
        self._since_refresh[row] = self.tokens[row][kept:]  # where they count only once they have run in full
        self.kept[row], self.dropped[row] = length, dropped
        self._written[row] = self._written[row].first(kept)

    def _steps_left(self) -> int:
        """Steps that there are slots for, the first of them in full."""
        steps, room = self._capacities["slots_kept"] - max(self.kept), self._capacities["slots_dropped"]
        begun = max(map(operator.add, self.dropped, map(len, self._since_refresh))) + 1
        while (
            steps > 0 and self.policy.leaves_holes and self.policy.dropped_slots(begun, steps - 1, self.schedule) > room
        ):
            steps -= 1
        return steps

    def fork(self, engine: Engine) -> Request:
        """The same with slots of its own, in this engine or one beside it."""
        new = copy.copy(self)
        new.engine = engine
        new.slots = self.slots.fork(engine, self._capacities, self.kept, self.dropped)  # type: ignore[arg-type]  # of its kind
        new.tokens = [list(tokens) for tokens in self.tokens]
        new.kept, new.dropped = list(self.kept), list(self.dropped)
        new._written = [written.first(kept) for written, kept in zip(self._written, self.kept, strict=True)]
        new._since_refresh = [list(tokens) for tokens in self._since_refresh]
        new._cycle = copy.copy(self._cycle)
        return new

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of valid K/V entries in kept and in dropped layers, and of all K/V buffers."""
        return self.slots.kv_bytes(sum(self.kept), sum(self.dropped))

    def chunk(self, width: int) -> Step:
        """A refresh over so many tokens in every row, from the lengths on, which it leaves as they are."""
        runs = [Run(StepKind.REFRESH, [0] * width, self.kept[row], self.dropped[row]) for row in self._all]
        return lambda: self.slots.run(StepKind.REFRESH, runs, self._all)
