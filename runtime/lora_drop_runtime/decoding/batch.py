"""A running batch: rows join when they come and leave when they end, and every tick is one step of the engine.

Enters: prompts, any time. Leaves: events. All rows of a tick run the same step, refresh or LoRA; a row that is not due
for it stands still. The kind that most rows wait for runs next, LoRA where as many wait for either: so rows of one
window come to refresh together, and a new row's prompt joins them there. No row waits longer than a cycle of its own.

On an engine that runs whole cycles a tick is one, wherever the rows allow it (`Batch.why_single_steps`), and tells the
tokens of the cycle before. Rows come and leave between two cycles, and there prompts run, a chunk after each cycle.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.command_line import tell
from lora_drop_runtime.engines.engine import Array, Engine
from lora_drop_runtime.errors import InputError, counted, whole_number
from lora_drop_runtime.plan.drafting import VerifiedSchedule, draft_source, scheduled
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import PeriodicSchedule, Schedule, StepKind, periodic_like

from . import checks
from .constraint import Constraint, forked
from .flight import FirstState, Flight, why_single_steps
from .kept_prefixes import PagedPrefixes, common, prefixes_for
from .opening import checked_policy, open_bundle
from .paged_slots import PagedSlots, prepare_for_several, slots_for
from .prompts import prompt_rows
from .row import Event, Row, RowOptions
from .row_blocks import most_taken_back
from .sampling import Ids, RowSampler, SamplingOptions
from .schedules import named_schedule, row_schedule
from .slots import Logits, Run, Slots
from .statistics import Statistics
from .stream import Usage

CHUNK = 128  # tokens of a prompt in one tick, beside rows that decode
USUAL_BACK = 32  # LoRA steps that refreshes of rows of any policy take back
_WORTH_WAITING = 32  # tokens that another row's prompt is just running: fewer run anew with the rest


class Batch:
    """Decodes many requests of one bundle. Use as a context manager, from one thread at a time.

    `Batch.open` is the way in; the constructor takes an engine, for tests.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        schedule: Schedule,
        policy: str | None = None,
        draft: str | None = None,
        lenience: float | None = None,
        *,
        slots: int | None = None,
        max_seq_len: int | None = None,
        max_prompt_len: int | None = None,
        join_early: bool = False,
        kv_cache_bytes: int | None = None,
        keep_prefixes: bool = False,
    ) -> None:
        self.bundle, self._engine, self._is_open = bundle, engine, True
        self._in_cycles = engine.runs_cycles  # asked in this thread, which may compile a kernel: `add` comes from any
        self._policy = checked_policy(bundle, policy)
        self._schedule = scheduled(schedule, self._policy)
        self._source = draft_source(draft, self._policy, len(bundle.manifest.plan.sites), lenience)
        self._join_early = checks.flag("join_early", join_early)
        limits = bundle.manifest.limits
        self._count = checks.checked_slots(slots, limits)
        self.max_seq_len, self.max_prompt_len = checks.row_limits(max_seq_len, max_prompt_len, limits)
        self._chunk = min(CHUNK, engine.prefill_chunk or CHUNK)
        steps = self.max_seq_len - self.max_prompt_len - 1
        needed = self._dropped_slots(self._policy, self.max_prompt_len, steps, self._schedule)
        self._capacity = {"slots_kept": self.max_seq_len - 1, "slots_dropped": needed}
        # Padded attention wants room for a whole chunk behind a row that has a single token beside it
        self._paged = engine.block_slots is not None
        room = self._chunk if engine.idle_rows and not self._paged else 0
        most = engine.slots({name: count + room for name, count in self._capacity.items()})
        several = self._policy.runs_several(self._schedule)
        if several:
            prepare_for_several(engine)
        self._slots = slots_for(bundle, engine, self._count, most, several, self._chunk)
        self._most_lora_steps = self._slots.most_lora_steps
        self._most_bytes = checks.checked_cache_bytes(kv_cache_bytes, self._paged)
        block = self._slots.bytes_of(dict.fromkeys(self._capacity, 1), None)
        checks.check_block(block, self.row_bytes, self._most_bytes)
        keeps = checks.flag("keep_prefixes", keep_prefixes)
        self._prefixes = prefixes_for(engine, self._slots, self._count, self._bytes_of_all()) if keeps else None
        self._why_none_kept = "" if self._prefixes or not keeps else "; no prefixes are kept by this engine"
        self._rows: list[Row] = []  # by slot
        self._waiting: deque[Row] = deque()
        self._untold: list[Event] = []
        self._got: list[tuple[Row, Run, Logits, float]] = []  # of the latest run: what rows wanted, and its logits
        self._flight: Flight | None = None  # of all rows, which hold the slots until it is over
        self._added = 0
        self._adding = threading.RLock()  # by any thread, while no other closes the batch
        self._usage = Usage("batch")

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        slots: int | None = None,
        max_seq_len: int | None = None,
        max_prompt_len: int | None = None,
        join_early: bool = False,
        kv_cache_bytes: int | None = None,
        keep_prefixes: bool = False,
        k: int | str | Schedule | None = None,
        schedule: str | None = None,
        policy: str | None = None,
        draft: str | None = None,
        lenience: float | None = None,
        target: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        check: bool = False,
    ) -> Batch:
        """Open a bundle, allocate the slots, and say on standard error what they take.

        Args:
            slots: rows that run at once, more wait for a free one; 8 when None, or what the bundle allows.
            max_seq_len, max_prompt_len: tokens of a row (prompt and new), and of its prompt; the bundle's when None.
                Where the policy leaves holes, dropped layers get room for `max_prompt_len` tokens and a refresh in
                every k + 1 after them.
            join_early: run a new prompt at once, not beside the next refresh, and shorten the row's first cycle so that
                it refreshes with rows of its `k`. Its first token comes sooner, and its tokens depend on when it came.
            kv_cache_bytes: the most that the rows' K/V may take, where caches are paged (target openvino); what all
                slots can need when None. A row waits until its blocks fit beside those of the rows that run.
            keep_prefixes: do not run again what a prompt has in common with the beginning of another row, which runs or
                is over: its K/V are taken over, where they are the full model's. Those of rows that are over stay until
                their room is needed. Not on a GPU.

        The other arguments are those of `Session.open`, and what rows do that are added without their own.

        Raises:
            BundleError: the bundle is damaged, or cannot run here.
            InputError: an argument out of range.
        """
        opened = open_bundle(
            path,
            k=k,
            schedule=schedule,
            policy=policy,
            draft=draft,
            lenience=lenience,
            target=target,
            provider=provider,
            threads=threads,
            check=check,
        )
        try:
            batch = cls(
                opened.bundle,
                opened.engine,
                opened.schedule,
                opened.policy,
                draft,
                lenience,
                slots=slots,
                max_seq_len=max_seq_len,
                max_prompt_len=max_prompt_len,
                join_early=join_early,
                kv_cache_bytes=kv_cache_bytes,
                keep_prefixes=keep_prefixes,
            )
        except BaseException:
            opened.engine.close()
            raise
        tell(batch.describe())
        return batch

    def __enter__(self) -> Batch:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise checks.not_pickled("batch", "")

    def close(self) -> None:
        """Free slots and engine; the batch cannot be used afterwards.

        Raises:
            InputError: another thread is running a tick.
        """
        self._usage.enter()
        try:
            with self._adding:
                if self._is_open:
                    self._is_open = False
                    self._rows, self._waiting, self._prefixes = [], deque(), None
                    del self._slots
                    self._engine.close()
        finally:
            self._usage.leave()

    def describe(self) -> str:
        """How many slots there are, and what they take."""
        self._check_open()
        slots = f"{counted(self._count, 'slot')} of {self.max_seq_len} tokens, prompts of {self.max_prompt_len}: "
        if not self._paged:
            cycles = "; whole cycles without the host" if self._in_cycles else ""
            return slots + f"{self._slots.nbytes / 2**20:,.1f} MiB of K/V and states{cycles}{self._why_none_kept}"
        rows = "rows" if self._prefixes is None else "rows, and with prefixes that are kept"
        held = self._slots.recurrent.nbytes * (1 if self._prefixes is None else 2)  # type: ignore[union-attr]
        states = f", beside {held / 2**20:,.1f} MiB of recurrent states" if held else ""
        return slots + f"K/V grows with the {rows}, to at most {self._bytes_of_all() / 2**20:,.1f} MiB{states}"

    @property
    def slots(self) -> int:
        """Rows that run at once."""
        return self._count

    @property
    def row_bytes(self) -> int:
        """The most bytes of K/V that a row can need where caches are paged, whatever its policy, and its k up to 32 or
        the batch's."""
        self._check_open()
        back = most_taken_back(self._policy, self._schedule)
        # No row has more entries in dropped layers than in kept ones
        most = dict.fromkeys(self._capacity, self._capacity["slots_kept"])
        return self._slots.bytes_of(most, None if back is None else max(back, USUAL_BACK))

    @property
    def target(self) -> str:
        """That it runs on."""
        return self._engine.target

    @property
    def policy(self) -> Policy:
        """Of rows that are added without their own."""
        return self._policy

    @property
    def schedule(self) -> Schedule:
        """Likewise."""
        return self._schedule

    @property
    def lenience(self) -> float:
        """Likewise, where they verify drafts."""
        return self._source.lenience

    @property
    def rows(self) -> int:
        """Rows that run or wait, or whose last event has not been told."""
        return len(self._rows) + len(self._waiting) + sum(event.finished is not None for event in self._untold)

    @property
    def waiting(self) -> int:
        """Rows that do not begin with the next tick, for want of a slot or of room in the caches, or because another
        row is just running the beginning of their prompts."""
        begin: list[Row] = []
        waiting = list(self._waiting)  # at once: `add` comes from any thread
        for row in waiting:
            if len(self._rows) + len(begin) == self._count:
                break
            if self._ahead(row, begin) is not None:
                continue
            if not self._have_room([*begin, row]):
                break
            begin.append(row)
        return len(waiting) - len(begin)

    @property
    def waiting_rows(self) -> list[int]:
        """The numbers of the rows that have no slot."""
        return [row.number for row in list(self._waiting)]  # at once: `add` comes from any thread

    def add(
        self,
        prompt_ids: Sequence[int] | Array,
        max_new_tokens: int,
        *,
        k: int | str | Schedule | None = None,
        schedule: str | None = None,
        policy: str | None = None,
        draft: str | None = None,
        lenience: float | None = None,
        sampling: SamplingOptions | None = None,
        stop_token_ids: Sequence[int] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        context_tokens: int | None = None,
        constraint: Constraint | None = None,
    ) -> int:
        """Add a row, which begins at the next tick for which a slot is free. It draws as the one prompt of a session.

        Args:
            prompt_ids: at least one token.
            max_new_tokens: upper bound.
            k, schedule, policy, draft, lenience: of this row; the batch's when None. An adaptive schedule that is named
                brings the k and the policy that it was calibrated for.
            sampling: greedy when None.
            stop_token_ids: end the row; the model's end tokens when None.
            logprobs: tell each token's logprob, and so many of the likeliest tokens'; None tells none.
            prompt_logprobs: tell the prompt's tokens first, each but the first with its logprob by full steps, whatever
                `k` is; needs `logprobs`. The prompt then goes in by 8 tokens a tick.
            context_tokens: with `prompt_logprobs`, how many of the prompt's tokens are its context. Those behind are
                scored as if the row had written them, each by the step that its schedule has there; None scores all by
                full steps. Under `lossless` the two are one.
            constraint: of what the row may write, as for `Session.generate`; the row works on a fork of it.

        Returns:
            The row's number, as its events have it.

        Raises:
            InputError: the row can never fit, or an argument is out of range.
        """
        self._check_open()
        prompt = checks.one_prompt(prompt_rows(prompt_ids))
        manifest = self.bundle.manifest
        lengths = np.array([len(prompt)], np.int64)
        checks.check_prompts(prompt[None])
        new_tokens = whole_number("The number of new tokens", max_new_tokens, "Use for example max_new_tokens=64.")
        limits = checks.batch_limits(self.max_seq_len, self.max_prompt_len)
        checks.check_request(prompt[None], lengths, new_tokens, limits, manifest.model.vocab_size, "batch")
        checks.check_name("The schedule", schedule, 'Use for example schedule="margin".')
        checks.check_name("The policy", policy, 'Use for example policy="skip".')
        checks.check_name("The draft", draft, 'Use for example draft="ngram".')
        verifier = self._policy if policy is None else checked_policy(self.bundle, policy)
        if schedule is not None:
            verified = isinstance(self._schedule, VerifiedSchedule)
            periodic = self._schedule if verified else periodic_like(self._schedule, manifest.plan.k)
            k, name = named_schedule(manifest, schedule, k, policy, (periodic, self._policy.name))
            verifier = checked_policy(self.bundle, name)
        chosen = row_schedule(manifest, self._schedule, k, verifier)
        source = draft_source(draft, verifier, len(manifest.plan.sites), lenience, self._source)
        scores = checks.flag("prompt_logprobs", prompt_logprobs)
        context = checks.checked_context(context_tokens, len(prompt), scores)
        context = len(prompt) if verifier.verifies else context
        kept = len(prompt) + new_tokens - 1
        needed = self._dropped_slots(verifier, context, kept - context, chosen)
        if not self._paged:
            checks.check_fits(needed, self._capacity["slots_dropped"])
        if isinstance(chosen, PeriodicSchedule):
            checks.check_lora_steps(min(chosen.k, kept - context), self._most_lora_steps)
        takes, back = {"slots_kept": kept, "slots_dropped": needed}, most_taken_back(verifier, chosen)
        stops = frozenset(checks.stop_ids(stop_token_ids, manifest.special_tokens.eos))
        likeliest = checks.checked_logprobs(logprobs)
        if scores and likeliest is None:
            raise InputError(
                "A prompt's logprobs need logprobs.",
                note="prompt_logprobs is True, logprobs is None.",
                hint="Use for example logprobs=0.",
            )
        options = RowOptions(new_tokens, verifier, chosen, source, stops, likeliest, scores, context, takes, back)
        sampling = checks.checked_sampling(sampling, manifest.model.vocab_size)
        checks.check_constraint(constraint)
        (stream,) = np.random.SeedSequence(sampling.seed).spawn(1)
        own = forked(constraint)
        with self._adding:
            self._check_open()
            checks.check_pool(self._slots.bytes_of(takes, back), self._most_bytes)
            number = self._added
            self._added += 1
            sampler = RowSampler(sampling, prompt, stream, number, own)
            limits_of_runs = self._chunk, self._engine.verified_tokens, self._most_lora_steps
            why = why_single_steps(self._engine, chosen, verifier, sampling, own, likeliest)
            self._waiting.append(Row(number, prompt, options, sampler, *limits_of_runs, why, self._tell))
        return number

    def cancel(self, row: int) -> None:
        """Give a row up: its slot is free at once, and the next tick has its last event. One that is over stays so.

        Raises:
            InputError: no row has that number.
        """
        self._usage.enter()
        try:
            self._check_open()
            checks.check_row(row, self._added)
            self._settle(land=True)  # and what an interrupted tick has left
            for rows in (self._rows, self._waiting):
                for slot, one in enumerate(list(rows)):  # at once: `add` comes from any thread
                    if one.number == row:
                        one.cancel()
                        if rows is self._rows:
                            self._free(slot)
                        else:
                            self._waiting.remove(one)
                        return
        finally:
            self._usage.leave()

    def tick(self) -> list[Event]:
        """Run one step for the rows that are due for it, or a whole cycle; returns their events, several of a row under
        `lossless` and of a cycle.

        Nothing happens where there is no row. After an interrupt the next tick goes on; a row whose tokens were being
        chosen then has `failed`, and all rows have whose cycle was being begun.

        Raises:
            BundleError: the engine cannot run the step.
            InputError: the batch is closed, or in use by another thread.
        """
        self._usage.enter()
        try:
            self._check_open()
            self._settle(land=self._next_row() is not None)  # and what an interrupted tick has left
            while (row := self._next_row()) is not None:
                self._admit(row)
            if self._rows:
                self._run()
                self._settle()
        finally:
            self._usage.leave()
        events, self._untold = self._untold, []
        return events

    def statistics(self, row: int) -> Statistics | None:
        """What a row that runs has counted, where its refreshes verify drafts; None of one that does not run."""
        self._check_open()
        checks.check_row(row, self._added)
        return next((one.statistics() for one in self._rows if one.number == row), None)

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of valid K/V entries in kept and in dropped layers, and of all slots; there prefixes are kept, too.

        Entries that rows share count for each of them, the blocks that hold them once: `allocated` may be less.
        """
        self._check_open()
        found = self._slots.kv_bytes(sum(row.kept for row in self._rows), sum(row.dropped for row in self._rows))
        if self._prefixes is not None and isinstance(self._slots, PagedSlots):
            found["allocated"] = self._slots.bytes_in_use
        return found

    @property
    def why_single_steps(self) -> str:
        """Why the next tick is no whole cycle on the device; empty where it is one, or there is no row."""
        self._check_open()
        return self._why_single_steps()

    def _dropped_slots(self, policy: Policy, prompt: int, steps: int, schedule: Schedule) -> int:
        """What a row needs in dropped layers; one more where it joins early: its first refresh may come sooner."""
        needed = policy.dropped_slots(prompt, steps, schedule)
        joins = self._join_early and policy.leaves_holes and isinstance(schedule, PeriodicSchedule)
        return min(needed + 1, prompt + steps) if joins else needed

    def _run(self) -> None:
        why, new = self._why_single_steps(), [row for row in self._rows if row.is_new]
        going = [row for row in self._rows if not row.is_new]
        if going and not why and (not new or any(row.waited for row in going)):
            self._fly(going, 1 if new else 2)
            return
        self._settle(land=True)
        kind = self._next_kind() if why or not going else StepKind.REFRESH
        self._join(kind)
        runs = [row.run for row in self._rows if row.run is not None]
        assert len(runs) == len(self._rows)
        due = [slot for slot, run in enumerate(runs) if run.kind is kind]
        begin = time.perf_counter()
        self._slots.run(kind, runs, due, once=any(self._rows[slot].is_new for slot in due), held=True)
        logits = self._slots.logits()
        seconds = time.perf_counter() - begin
        self._got = [(self._rows[slot], runs[slot], logits[slot, : runs[slot].wanted], seconds) for slot in due]
        for slot, row in enumerate(self._rows):
            row.waited += slot not in due

    def _why_single_steps(self) -> str:
        """The one place that decides."""
        going = [row for row in self._rows if not row.is_new]
        for row in self._rows:
            if row.why_single_steps:
                return f"row {row.number}: {row.why_single_steps}"
        for row in going[1:]:
            if (row.k, row.options.policy) != (going[0].k, going[0].options.policy):
                return f"rows {going[0].number} and {row.number} have another k or policy each"
        for row in going:
            if row.phase:
                return f"row {row.number} is amid a cycle"
            assert isinstance(self._slots, Slots)
            width = row.options.policy.refresh_tokens(row.k)
            for new in self._rows:
                if new.is_new and not self._slots.have_room(new.kept, new.dropped, width):
                    return f"row {new.number} has no room to stand still beside a cycle"
        return ""

    def _fly(self, going: Sequence[Row], ahead: int) -> None:
        """Begin the next cycle, and read the one before it; `ahead` 2 leaves one under way."""
        if self._flight is None:
            assert isinstance(self._slots, Slots)
            # A power of two, so that few graphs serve all numbers of rows
            count = min(1 << (len(self._rows) - 1).bit_length(), self._count)
            first = [row.in_flight() for row in self._rows]
            first += [FirstState()] * (count - len(first))
            self._flight = Flight(self._slots, going[0].k, going[0].options.policy, first)
        self._flight.keep_ahead(ahead)
        self._flight.read()
        for row in self._rows:
            row.waited += row.is_new

    def _found(self) -> Iterator[tuple[Row, Logits | int, float]]:
        """What rows have got and were not given."""
        if self._got:
            self._slots.accept()
        while self._got:
            row, run, logits, seconds = self._got[0]
            if row.run is run:
                yield row, logits, seconds
            else:
                self._got.pop(0)
        flight = self._flight
        if flight is None:
            return
        for slot, row in enumerate(self._rows):
            first = flight.rows[slot].kept
            while not row.is_new and row.run is not None and row.kept - first < len(flight.tokens):
                yield row, int(flight.tokens[row.kept - first][slot]), 0.0  # each step has fed one token

    def _give(self) -> BaseException | None:
        """Give rows what they have got, and tell their events."""
        interrupt: BaseException | None = None
        for row, found, seconds in self._found():
            try:
                row.advance(found, seconds)
                if self._most_lora_steps is not None and not row.has_failed:
                    self._goes_on(self._rows.index(row))
            except BaseException as error:
                interrupt = interrupt or error
        return interrupt

    def _goes_on(self, slot: int) -> None:
        """A row with recurrent states has advanced. Where its prompt parts from another text it leaves them for others:
        nobody goes on behind fewer tokens than states have."""
        row = self._rows[slot]
        self._slots.goes_on(slot, row.kept)
        if row.kept == row.parts and self._prefixes is not None:
            row.parts = 0
            if len(row.exact) == row.kept:
                self._prefixes.leave(slot, row.exact, len(self._rows))

    def _settle(self, land: bool = False) -> None:
        """Give rows what the last run has made, and take out those that are over and those that do not wait any more.

        An interrupt ends the row that it comes upon; the others take what they got all the same, here or later.

        Args:
            land: wait for cycles that are under way; done in any case where a row is over, whose slot is another's.
        """
        if self._rows and self._rows[-1] in self._waiting:  # an interrupt came as it was admitted
            self._waiting.remove(self._rows[-1])
        interrupt = self._give()
        land = land or any(row.run is None for row in self._rows)
        while (flight := self._flight) is not None and (land or flight.is_torn):
            if flight.is_torn:
                for row in self._rows:
                    if row.run is not None and not row.is_new:
                        row.fail(checks.interrupted_cycle(), row.run.kind)
                self._flight = None
            elif flight.unread:
                flight.read()
                interrupt = self._give() or interrupt
            else:
                self._flight = None
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].run is None:
                self._free(slot)
        if interrupt is not None:
            raise interrupt

    def _join(self, kind: StepKind) -> None:
        """New rows whose prompts end in this tick join those of their window."""
        for row in self._rows if self._join_early and kind is StepKind.REFRESH else ():
            schedule = row.options.schedule
            if row.ends_its_prompt and isinstance(schedule, PeriodicSchedule) and not row.options.policy.verifies:
                others = (
                    one.phase
                    for one in self._rows
                    if not one.is_new and one.run is not None and one.run.kind is StepKind.LORA
                    if getattr(one.options.schedule, "k", None) == schedule.k
                )
                row.join(next(others, 0))

    def _next_row(self) -> Row | None:
        """The row that may begin: the one that waits longest, but for those of whose prompts another row is just
        running the beginning."""
        if len(self._rows) == self._count or not self._waiting:
            return None
        for row in list(self._waiting):  # at once: `add` comes from any thread
            ahead = self._ahead(row)
            if ahead is None:
                return row if self._have_room([row]) else None
            soon, one = ahead
            if self._prefixes is not None and not self._prefixes.of_all:
                one.part(soon)
        return None

    def _soon(self, one: Row, tokens: Ids) -> int:
        """How many of these tokens of a prompt one may go on behind once another row's is done; or, with recurrent
        states, once that has run as many, where it can leave them: at one place, little before where others want it."""
        assert self._prefixes is not None
        same = common(one.will_run, tokens)
        if self._prefixes.of_all:
            return same
        soon = min(same, one.parts or same)
        return soon if soon > max(one.kept, one.parts - _WORTH_WAITING) else 0

    def _ahead(self, row: Row, begin: Sequence[Row] = ()) -> tuple[int, Row] | None:
        """How many tokens of a row's prompt will soon be there to begin with, by one that runs or begins, and that one;
        None where they are hardly more than now."""
        if self._prefixes is None:
            return None
        tokens = row.reusable
        found = [(self._soon(one, tokens), one) for one in [*self._rows, *begin] if one.is_new]
        soon, one = max(found, key=lambda pair: pair[0], default=(0, row))
        if soon < _WORTH_WAITING or soon - self._prefixes.longest(tokens, self._exact())[0] < _WORTH_WAITING:
            return None
        return soon, one

    def _exact(self) -> list[Ids]:
        return [row.exact for row in self._rows]

    def _admit(self, row: Row) -> None:
        slot, slots, back = len(self._rows), row.options.slots, row.options.back
        if self._prefixes is None:
            self._slots.admit(slot, slots, back)
        else:
            exact = self._exact()
            parts = 0 if self._prefixes.of_all else self._prefixes.parts(row.reusable, exact)
            begun = self._prefixes.begin(slot, slots, back, row.reusable, exact)
            row.begin_behind(begun, parts if parts - begun >= _WORTH_WAITING else 0)
        self._rows.append(row)
        self._waiting.remove(row)

    def _bytes_of_all(self) -> int:
        """That the blocks of all rows may take, where caches are paged."""
        most = self._count * self.row_bytes
        return most if self._most_bytes is None else min(most, self._most_bytes)

    def _have_room(self, new: Sequence[Row]) -> bool:
        """Whether the blocks of rows that wait fit beside those of the rows that run."""
        if self._most_bytes is None:
            return True
        if isinstance(self._prefixes, PagedPrefixes):  # blocks that rows share count once
            needs = [(row.options.slots, row.options.back, row.reusable) for row in new]
            return self._prefixes.have_room(needs, self._exact())
        every = [row.options for row in [*self._rows, *new]]
        return sum(self._slots.bytes_of(one.slots, one.back) for one in every) <= self._most_bytes

    def _next_kind(self) -> StepKind:
        """What the next tick runs."""
        wanted = [row.run.kind for row in self._rows if row.run is not None]
        for row, kind in zip(self._rows, wanted, strict=True):
            if row.waited >= row.patience:  # those that wait all wait for one kind: the other ran
                return kind
        if self._join_early and any(row.is_new for row in self._rows):
            return StepKind.REFRESH
        return StepKind.REFRESH if 2 * wanted.count(StepKind.REFRESH) > len(wanted) else StepKind.LORA

    def _free(self, slot: int) -> None:
        """Take a row out; the last one moves to its slot."""
        rows, last = self._rows[:-1], self._rows[-1]
        if self._rows[slot].has_failed:
            self._slots.wipe(slot)
        if self._prefixes is not None:
            over = self._rows[slot]
            self._prefixes.keep(slot, over.exact, len(self._rows))
            over.forget_exact()  # an interrupt may come behind the move, and its slot is another's then
        if slot < len(rows):
            assert last.run is not None
            valid = (max(last.kept, last.run.kept), max(last.dropped, last.run.dropped))
            self._slots.move(len(rows), slot, *valid)
            rows[slot] = last
        self._slots.release(len(rows))
        self._rows = rows

    def _tell(self, event: Event) -> None:
        """A row has one last event, though an interrupt, which ends it, may come as that is told."""
        over = [one.row for one in self._untold if one.finished] if event.finished else ()
        if event.row not in over:
            self._untold.append(event)

    def _check_open(self) -> None:
        if not self._is_open:
            raise checks.closed_batch()
