"""One request's caches, lengths and bound steps.

Enters: padded prompts, then a token per row. Leaves: logits or chosen tokens in the engine's buffers. Checks nothing:
what reaches it was checked by the session.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.engine import Buffer, Engine, Step
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.policy import Policy
from lora_drop_runtime.plan.schedule import Schedule, StepKind

from .buffers import RowBuffers
from .cycle import Cycle
from .sampling import Ids

PREFILL_CHUNK = 512  # tokens of a row in one prefill run; longer prompts go in chunks, which bounds the activations


@dataclass
class Request:
    """The buffers and counters of one request; prepared steps are made when first needed.

    A LoRA step reads the states of `side` and writes those of the other. `next_token` is empty where the engine does
    not choose.
    """

    bundle: Bundle
    engine: Engine
    schedule: Schedule
    policy: Policy
    batch: int
    max_steps: int
    buffers: RowBuffers
    len_kept: Ids
    len_dropped: Ids
    input_ids: Ids
    logits: Buffer
    logits_index: Ids
    next_token: Ids
    side: int = 0

    @classmethod
    def allocate(
        cls, bundle: Bundle, engine: Engine, lengths: Ids, new_tokens: int, schedule: Schedule, policy: Policy
    ) -> Request:
        """Size the caches for a request: prompt + new − 1 kept slots, as many dropped ones as the policy needs."""
        manifest = bundle.manifest
        batch, longest, steps = len(lengths), int(lengths.max()), new_tokens - 1
        needed = {"slots_kept": longest + steps, "slots_dropped": policy.dropped_slots(longest, steps, schedule)}
        buffers = RowBuffers.allocate(bundle, engine, batch, engine.slots(needed))
        outputs = manifest.io(StepKind.REFRESH, engine.target).outputs
        logits = next(spec for spec in outputs if spec.name == "logits")
        sizes = {"batch": batch, "rows": 1}
        return cls(
            bundle=bundle,
            engine=engine,
            schedule=schedule,
            policy=policy,
            batch=batch,
            max_steps=steps,
            buffers=buffers,
            len_kept=engine.allocate("len_kept", (batch,), "int64"),
            len_dropped=engine.allocate("len_dropped", (batch,), "int64"),
            input_ids=engine.allocate("input_ids", (batch, 1), "int64"),
            logits=engine.allocate_resident("logits", logits.sized(sizes), logits.dtype),
            logits_index=engine.allocate("logits_index", (batch, 1), "int64"),
            next_token=engine.allocate("next_token", (batch, int(engine.chooses_tokens)), "int64"),
        )

    def __post_init__(self) -> None:
        self._prepared: dict[tuple[StepKind, int], Step] = {}
        self._prepared_chunks: dict[tuple[int, int], tuple[Ids, Step]] = {}
        self._since_refresh: list[Ids] = []  # the tokens [B] of each LoRA step since the last refresh
        self._cycle = Cycle(self.schedule, self.max_steps)
        self.kept, self.dropped = self.len_kept.data, self.len_dropped.data
        self._idle = -1 if self.engine.idle_rows else 0  # the logits_index of a row that is not to run

    @property
    def steps_done(self) -> int:
        """Decode steps after the prefill; where drafts are verified the tokens of the longest row."""
        return self._cycle.steps_done

    @property
    def caches(self) -> dict[str, Buffer]:
        return self.buffers.caches

    def prefill(self, ids: Ids, lengths: Ids) -> None:
        """Run the prompts, in one go where they are short, else in chunks."""
        chunk = self._chunk
        if self.engine.batched_chunks or ids.shape[1] <= chunk:
            self._prefill_rows_together(ids, lengths, chunk)
        else:
            self._prefill_row_by_row(ids, lengths, chunk)
        self.logits_index[:] = 0
        self.side = 0
        self._prompts = lengths.copy()

    @property
    def _chunk(self) -> int:
        """The most tokens of a row in one run."""
        return min(PREFILL_CHUNK, self.engine.prefill_chunk or PREFILL_CHUNK)

    def _prefill_rows_together(self, ids: Ids, lengths: Ids, chunk: int) -> None:
        """Chunks counted from each row's end, so that the last run leaves the logits and states of all rows.

        A row that has not begun stands still; or it runs padding, over which its tokens are written later: from slot 0,
        at most `chunk` slots, so within the longest row's capacity.
        """
        width = ids.shape[1]
        for left in range((width - 1) // chunk * chunk, -1, -chunk):  # tokens that come after this run
            ends = np.maximum(lengths - left, 0)
            begins = np.maximum(ends - chunk, 0)  # what the run before left in the caches
            counts = ends - begins
            columns = np.minimum(begins[:, None] + np.arange(counts.max()), width - 1)  # [B, S]
            self.logits_index[:, 0] = np.maximum(counts - 1, self._idle)
            self._prepare_refresh(np.take_along_axis(ids, columns, 1), slice(None), self.logits_index)()
            self.len_kept[:] = self.len_dropped[:] = ends

    def _prefill_row_by_row(self, ids: Ids, lengths: Ids, chunk: int) -> None:
        for row, length in enumerate(lengths.tolist()):
            for begin in range(0, length, chunk):
                tokens = ids[row : row + 1, begin : min(begin + chunk, length)]
                index = np.array([[tokens.shape[1] - 1]], np.int64)
                self._prepare_refresh(np.ascontiguousarray(tokens), slice(row, row + 1), index)()
                self.len_kept[row] += tokens.shape[1]
                self.len_dropped[row] += tokens.shape[1]

    def chosen(self, active: npt.NDArray[np.bool_]) -> Ids:
        """The tokens [B] that the engine chose in the last step, 0 in rows that are not active."""
        tokens = np.where(active, self.next_token[:, 0], 0)
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
            logits = self.engine.read(self.logits)[:, 0]  # [B, V]
            return logits if active is None else logits[active]

        return self._cycle.next_kind(read)

    def step(self, token_ids: Ids, active: npt.NDArray[np.bool_] | None) -> None:
        """Run the next step; the lengths of rows that are not active stay, what they write is overwritten later."""
        kind = self.next_kind(active)
        refresh = kind is StepKind.REFRESH
        going = [True] * self.batch if active is None else active.tolist()
        self.input_ids[:, 0] = token_ids
        taken_back = self.policy.steps_taken_back(len(self._since_refresh)) if refresh else 0
        if taken_back:
            self._run_again(self._since_refresh[-taken_back:], going)
        else:
            self.run_one_token(kind)
        for row, goes_on in enumerate(going):
            if goes_on:
                self.kept[row] += 1
                if refresh or self.policy.fills:
                    self.dropped[row] += taken_back + 1
        self._cycle.done()
        if refresh:
            self.side = 0
            self._since_refresh.clear()
        else:
            self._since_refresh.append(self.input_ids[:, 0].copy())
            if self.buffers.are_double:
                self.side = 1 - self.side

    def advance(self, row: int, tokens: int) -> None:
        """A refresh has run so many tokens of a row that stay."""
        self.kept[row] += tokens
        self.dropped[row] += tokens
        self._cycle.steps_done = max(self.steps_done, int(self.kept[row] - self._prompts[row]))

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of valid K/V entries in kept and in dropped layers, and of all K/V buffers."""
        plan, token_bytes = self.bundle.manifest.plan, self.bundle.manifest.model.token_kv_bytes
        return {
            "kept": int(self.len_kept.sum()) * len(plan.kept_attentions) * token_bytes,
            "dropped": int(self.len_dropped.sum()) * len(plan.dropped_attentions) * token_bytes,
            "allocated": sum(buffer.nbytes for buffer in self.caches.values()),
        }

    def run_one_token(self, kind: StepKind) -> None:
        """Run `input_ids` through a step graph at `len_kept`, which stays."""
        key = kind, self.side if kind is StepKind.LORA else 0
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = (
                self._prepare_lora()
                if kind is StepKind.LORA
                else self._prepare_refresh(self.input_ids, slice(None), self.logits_index)
            )
        prepared()

    def _run_again(self, taken_back: list[Ids], going: list[bool]) -> None:
        """Run the tokens of LoRA steps, [B] each, and the new one through the refresh graph, from their first slot on.

        Rows run one by one where the engine takes several tokens after others in one row only. A row that is over runs
        with the others or not at all: what it writes lies within its capacity, and its lengths stay.
        """
        tokens = np.stack([*taken_back, self.input_ids[:, 0]], axis=1)  # [B, S]
        kept, dropped = self.len_kept.copy(), self.len_dropped.copy()
        together = self.batch == 1 or self.engine.batched_chunks
        groups = [slice(None)] if together else [slice(row, row + 1) for row in range(self.batch) if going[row]]
        try:
            self.len_kept[:] = np.maximum(kept - len(taken_back), 0)  # a row that is over may have fewer tokens
            for begin in range(0, tokens.shape[1], self._chunk):
                part = tokens[:, begin : begin + self._chunk]
                self.logits_index[:] = part.shape[1] - 1
                for rows in groups:
                    ids, step = self._chunk_step(part.shape[1], rows)
                    ids[:] = part[rows]
                    step()
                self.len_kept += part.shape[1]
                self.len_dropped += part.shape[1]
        finally:  # also when interrupted: the step can then be taken again
            self.len_kept[:], self.len_dropped[:] = kept, dropped
            self.logits_index[:] = 0

    def chunk(self, width: int) -> Step:
        """A refresh over so many tokens in every row, from the lengths on, which it leaves as they are."""
        self.logits_index[:] = width - 1
        return self._chunk_step(width, slice(None))[1]

    def _chunk_step(self, width: int, rows: slice) -> tuple[Ids, Step]:
        """The ids [b, width] of some rows, and a refresh over them."""
        key = width, rows.start or 0
        if key not in self._prepared_chunks:
            ids = self.engine.allocate(f"ids_again.{key}", (len(range(self.batch)[rows]), width), "int64")
            step = self._prepare_refresh(ids, rows, self.logits_index)
            self._prepared_chunks[key] = ids, step
        return self._prepared_chunks[key]

    def prepare_verification(self, ids: Ids, rows: slice, index: Ids, logits: Buffer, next_token: Ids) -> Step:
        """A refresh over `ids` [b, S] for some rows, with logits [b, R, V] at the positions `index` [b, R]."""
        return self._prepare(StepKind.REFRESH, ids, index, rows, (logits, next_token))

    def _prepare_refresh(self, ids: Ids, rows: slice, index: Ids) -> Step:
        """A refresh over `ids` [b, S] for some rows, from position `len_kept` on."""
        index = index[rows] if len(index) == self.batch else index
        return self._prepare(StepKind.REFRESH, ids, index, rows)

    def _prepare_lora(self) -> Step:
        return self._prepare(StepKind.LORA, self.input_ids, self.logits_index, slice(None))

    def _prepare(
        self, kind: StepKind, ids: Ids, index: Ids, rows: slice, chosen: tuple[Buffer, Ids] | None = None
    ) -> Step:
        """Bind a step of some rows; `chosen` are their logits and chosen tokens, the request's own when None."""
        inputs = {"input_ids": ids, "logits_index": index}
        inputs |= {"len_kept": self.len_kept[rows], "len_dropped": self.len_dropped[rows]}
        states = self.buffers.states
        before = after = states[0]
        if kind is StepKind.LORA:
            before, after = states[self.side], states[1 - self.side]
        logits, next_token = (self.logits[rows], self.next_token[rows]) if chosen is None else chosen
        return self.buffers.bind(kind, rows, inputs, logits, next_token, before, after)
