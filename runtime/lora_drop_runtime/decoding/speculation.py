"""The steps of a request whose tokens are drafts until a refresh has verified them: what is run, on which lengths.

Enters: a token for each row that takes part. Leaves: logits. Both kinds of run begin at the lengths of the request; a
cycle moves them on while drafts are made and puts them back, so rolling back copies nothing. Knows no token's choice.

A row that stands still takes part in runs of all rows: what it writes lies behind its last token and is overwritten, or
it is over and nobody reads it again. Rows verify drafts together where the engine takes several tokens of several rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_drop_runtime.engines.engine import Buffer, Step
from lora_drop_runtime.plan.schedule import StepKind

from .request import Request
from .sampling import Ids

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class _Verification:
    """A prepared refresh over ids [b, S] with logits [b, S, V] at `index` [b, S]."""

    ids: Ids
    index: Ids
    logits: Buffer
    run: Step


class Speculation:
    """Drafting and verifying steps over one request's caches.

    Attributes:
        most: tokens of a row that one refresh verifies, the row's own among them; None for no limit.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._engine = request.engine
        self._batch = request.batch
        self._slots = min((cache.shape[2] for cache in request.caches.values()), default=2**62)
        outputs = request.bundle.manifest.io(StepKind.REFRESH, request.engine.target).outputs
        self._logits = next(spec for spec in outputs if spec.name == "logits")
        self._prepared: dict[tuple[int, int | None], _Verification] = {}
        self._buffers: dict[tuple[int, int], tuple[Ids, Ids, Buffer, Ids]] = {}
        limits = [limit for limit in (self._engine.prefill_chunk, self._engine.verified_tokens) if limit is not None]
        self.most = min(limits, default=None)

    def runs(self, rows: int) -> int:
        """How many runs of the refresh graph verify drafts of so many rows."""
        return 1 if self._engine.batched_chunks else rows

    def draft(self, tokens: Mapping[int, int], behind: Sequence[int]) -> Logits:
        """Run a LoRA step.

        Args:
            tokens: row → token.
            behind: how many tokens each row has fed since its lengths.

        Returns:
            float32 [B, V]; valid until the next run.
        """
        request = self._request
        kept, dropped = request.len_kept.copy(), request.len_dropped.copy()
        try:
            request.len_kept += behind
            self._keep_within(1)
            request.input_ids[:, 0] = 0
            for row, token in tokens.items():
                request.input_ids[row, 0] = token
            request.run_one_token(StepKind.LORA)
        finally:
            request.len_kept[:], request.len_dropped[:] = kept, dropped
        if request.buffers.are_double:
            request.side = 1 - request.side
        return self._engine.read(request.logits)[:, 0]  # [B, V]

    def verify(self, fed: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """Run the refresh graph over each row's tokens, from its lengths on, and leave the lengths as they are.

        Args:
            fed: row → its tokens, at least one.

        Returns:
            row → logits float32 [n, V] after each of its n tokens; valid until the next run.
        """
        request = self._request
        kept, dropped = request.len_kept.copy(), request.len_dropped.copy()
        together = self._batch == 1 or self._engine.batched_chunks
        try:
            if not together and max(map(len, fed.values())) > 1:
                return {row: self._verify_row(row, tokens).copy() for row, tokens in fed.items()}
            parts: dict[int, list[Logits]] = {row: [] for row in fed}
            left = dict(fed)
            while left:  # once, unless a row comes to its last slots while others have more tokens than it
                room = min(self._slots - int(request.len_kept[row]) for row in left)
                width = min(room, max(map(len, left.values())))
                found = self._verify_together({row: tokens[:width] for row, tokens in left.items()}, width)
                left = {row: tokens[width:] for row, tokens in left.items() if tokens[width:]}
                for row, logits in found.items():
                    parts[row].append(logits.copy() if left else logits)
                    request.len_kept[row] += len(logits)
                    request.len_dropped[row] += len(logits)
            return {row: found[0] if len(found) == 1 else np.concatenate(found) for row, found in parts.items()}
        finally:
            request.len_kept[:], request.len_dropped[:] = kept, dropped
            request.side = 0

    def _verify_together(self, fed: Mapping[int, Sequence[int]], width: int) -> dict[int, Logits]:
        """Shorter rows have padding behind their tokens, and their state is that of their last token."""
        kept, dropped = self._request.len_kept.copy(), self._request.len_dropped.copy()
        self._keep_within(width)
        step = self._verification(width, None)
        step.ids[:] = 0
        step.index[:] = -1 if self._engine.idle_rows else 0
        for row, tokens in fed.items():
            step.ids[row, : len(tokens)] = tokens
            step.index[row] = np.minimum(np.arange(width), len(tokens) - 1)
        step.run()
        self._request.len_kept[:], self._request.len_dropped[:] = kept, dropped
        logits = self._engine.read(step.logits)  # [B, S, V]
        return {row: logits[row, : len(tokens)] for row, tokens in fed.items()}

    def _verify_row(self, row: int, tokens: Sequence[int]) -> Logits:
        step = self._verification(len(tokens), row)
        step.ids[0] = tokens
        step.index[0] = np.arange(len(tokens))
        step.run()
        logits: Logits = self._engine.read(step.logits)[0]  # [n, V]
        return logits

    def _verification(self, width: int, row: int | None) -> _Verification:
        """Of all rows, or of one."""
        key = width, row
        if key not in self._prepared:
            rows, count = (slice(None), self._batch) if row is None else (slice(row, row + 1), 1)
            ids, index, logits, tokens = self._buffers_of(count, width)
            run = self._request.prepare_verification(ids, rows, index, logits, tokens)
            self._prepared[key] = _Verification(ids, index, logits, run)
        return self._prepared[key]

    def _buffers_of(self, count: int, width: int) -> tuple[Ids, Ids, Buffer, Ids]:
        """Ids, index, logits and chosen tokens of so many rows and tokens; one row's serve every row."""
        key = count, width
        if key not in self._buffers:
            engine, spec = self._engine, self._logits
            sizes = {"batch": count, "rows": width}
            ids, index, tokens = (
                engine.allocate(f"verified_{name}.{count}.{width}", (count, values), "int64")
                for name, values in (("ids", width), ("index", width), ("token", width * engine.chooses_tokens))
            )
            logits = engine.allocate_resident(f"verified_logits.{count}.{width}", spec.sized(sizes), spec.dtype)
            self._buffers[key] = ids, index, logits, tokens
        return self._buffers[key]

    def _keep_within(self, width: int) -> None:
        """Let rows that are over, and are run all the same, write into their own last slots."""
        np.minimum(self._request.len_kept, self._slots - width, out=self._request.len_kept)
        np.minimum(self._request.len_dropped, self._slots - width, out=self._request.len_dropped)
