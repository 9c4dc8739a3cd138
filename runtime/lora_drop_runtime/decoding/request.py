"""One request: rows that start together and share a schedule, so that each step is one for all of them.

Enters: padded prompts, then a token per row. Leaves: logits or chosen tokens. Checks nothing: what reaches it was
checked by the session.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.engine import Buffer, Engine, Step
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import Schedule, StepKind

from .cycle import Cycle
from .sampling import Ids
from .slots import Logits, Run, Slots

PREFILL_CHUNK = 512  # tokens of a row in one prefill run; longer prompts go in chunks, which bounds the activations


class Request:
    """The slots and counters of one request. Its caches have prompt + new − 1 kept slots, and as many dropped ones as
    the policy needs.

    Args:
        lengths: int64 [B], of the prompts.
        new_tokens: of each row.

    Attributes:
        kept, dropped: valid entries of each row.
        max_steps: decode steps that there is room for.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, lengths: Ids, new_tokens: int, schedule: Schedule, policy: Policy
    ) -> None:
        self.engine, self.schedule, self.policy = engine, schedule, policy
        self.batch, self.max_steps = len(lengths), new_tokens - 1
        longest = int(lengths.max())
        needed = {
            "slots_kept": longest + self.max_steps,
            "slots_dropped": policy.dropped_slots(longest, self.max_steps, schedule),
        }
        self.slots = Slots(bundle, engine, self.batch, engine.slots(needed))
        self.kept, self.dropped = [0] * self.batch, [0] * self.batch
        self._since_refresh: list[list[int]] = []  # the tokens [B] of each LoRA step since the last refresh
        self._cycle = Cycle(schedule, self.max_steps)
        self._all = range(self.batch)

    @property
    def steps_done(self) -> int:
        """Decode steps after the prefill; where drafts are verified the tokens of the longest row."""
        return self._cycle.steps_done

    @property
    def caches(self) -> dict[str, Buffer]:
        return self.slots.buffers.caches

    @property
    def len_kept(self) -> Ids:
        return np.array(self.kept, np.int64)

    @property
    def len_dropped(self) -> Ids:
        return np.array(self.dropped, np.int64)

    def prefill(self, ids: Ids, lengths: Ids) -> None:
        """Run the prompts, int64 [B, T], in chunks that are counted from each row's end: the last run leaves the logits
        and states of all rows."""
        ends = lengths.tolist()
        chunk, longest = self._chunk, max(end - begin for begin, end in zip(self.kept, ends, strict=True))
        for left in range((longest - 1) // chunk * chunk, -1, -chunk):  # tokens that come after this run
            runs, due = [], []
            for row, end in enumerate(ends):
                begin, end = self.kept[row], end - left
                if end > begin:
                    due.append(row)
                tokens = ids[row, begin : max(end, begin + 1)].tolist()  # one, of a row that does not begin yet
                runs.append(Run(StepKind.REFRESH, tokens, begin, self.dropped[row]))
            self.slots.run(StepKind.REFRESH, runs, due, once=True)
            for row in due:
                self._advance(row, len(runs[row].tokens))
        self._prompts = ends

    @property
    def _chunk(self) -> int:
        """The most tokens of a row in one run."""
        return min(PREFILL_CHUNK, self.engine.prefill_chunk or PREFILL_CHUNK)

    def logits(self) -> Logits:
        """float32 [B, V] of the latest step; valid until the next."""
        return self.slots.logits()[:, 0]

    def chosen(self, active: npt.NDArray[np.bool_]) -> Ids:
        """The tokens [B] that the engine chose in the last step, 0 in rows that are not active."""
        tokens = np.where(active, self.slots.chosen(), 0)
        if tokens.min() < 0:
            raise BundleError(
                "The model computed logits that are not numbers.",
                note=f"The logits of row {int(tokens.argmin())} have NaN or infinity among them.",
                hint="Check the bundle with: lora-drop inspect --check; or export it with a wider --dtype.",
            )
        return tokens

    def next_kind(self, active: npt.NDArray[np.bool_] | None) -> StepKind:
        """What the next step runs; the schedule is asked once, and sees the logits of the rows that are active.

        Raises:
            InputError: it returns something else, or more refreshes than it said there would be.
        """

        def read() -> npt.NDArray[np.float32]:
            logits = self.logits()
            return logits if active is None else logits[active]

        return self._cycle.next_kind(read)

    def step(self, token_ids: Ids, active: npt.NDArray[np.bool_] | None) -> None:
        """Run the next step in the rows that are active; all when None."""
        kind = self.next_kind(active)
        tokens: list[int] = token_ids.tolist()
        going = self._all if active is None else [row for row, goes_on in enumerate(active.tolist()) if goes_on]
        refresh = kind is StepKind.REFRESH
        back = self.policy.steps_taken_back(len(self._since_refresh)) if refresh else 0
        if back:
            self._run_again(going, [*self._since_refresh[-back:], tokens])
        else:
            self._run(kind, going, [(token,) for token in tokens], self.kept, self.dropped)
        writes_dropped = refresh or self.policy.fills
        for row in going:
            self.kept[row] += 1
            if writes_dropped:
                self.dropped[row] += back + 1
        self._cycle.done()
        if refresh:
            self._since_refresh.clear()
        else:
            self._since_refresh.append(tokens)

    def _run_again(self, going: Sequence[int], steps: Sequence[Sequence[int]]) -> None:
        """Run the tokens of some LoRA steps, [B] each, and the new ones through the refresh graph, from their first
        slot on."""
        chunk, behind = self._chunk, 1 - len(steps)
        for begin in range(0, len(steps), chunk):
            fed = [[step[row] for step in steps[begin : begin + chunk]] for row in self._all]
            kept, dropped = [n + behind + begin for n in self.kept], [n + begin for n in self.dropped]
            self._run(StepKind.REFRESH, going, fed, kept, dropped)

    def _run(
        self,
        kind: StepKind,
        going: Sequence[int],
        fed: Sequence[Sequence[int]],
        kept: Sequence[int],
        dropped: Sequence[int],
    ) -> None:
        """Run what each row is fed behind so many entries; the rows that are not going are over."""
        runs = [Run(kind, *one) for one in zip(fed, kept, dropped, strict=True)]
        if len(going) < self.batch:
            for row in set(self._all).difference(going):
                runs[row] = Run(kind, (), self.kept[row], self.dropped[row])
        self.slots.run(kind, runs, going)

    def advance(self, row: int, tokens: int) -> None:
        """A refresh that verified drafts has run so many tokens of a row that stay."""
        self._advance(row, tokens)
        self._cycle.steps_done = max(self.steps_done, self.kept[row] - self._prompts[row])

    def _advance(self, row: int, tokens: int) -> None:
        self.kept[row] += tokens
        self.dropped[row] += tokens

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of valid K/V entries in kept and in dropped layers, and of all K/V buffers."""
        return self.slots.kv_bytes(sum(self.kept), sum(self.dropped))

    def chunk(self, width: int) -> Step:
        """A refresh over so many tokens in every row, from the lengths on, which it leaves as they are."""
        runs = [Run(StepKind.REFRESH, [0] * width, self.kept[row], self.dropped[row]) for row in self._all]
        return lambda: self.slots.run(StepKind.REFRESH, runs, self._all)
