"""What stands beside a step's lengths in ONNX Runtime's graphs, of both cache groups.

Enters: the arrays of a step that the session writes. Leaves: those that it knows nothing of, set before each run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_drop_runtime.bundle.graph_io import LAST_SLOTS, NEW_TOKENS, PACKED_STEP, TOTALS
from lora_drop_runtime.engines.engine import Array


class BesideLengths:
    """Totals and last slots; called before each run.

    Args:
        inputs: of the step.
        slots: of each length, how many its caches have.
        ragged: whether rows may have different numbers of new tokens.
        captured: whether the step becomes a CUDA graph. What attention reads of the totals on the host is in the graph
            as it was when it was captured, so that they are the capacity: no more than the room for the work is then
            planned with them, and the device reads how far each row's cache is valid.
    """

    def __init__(self, inputs: Mapping[str, Any], slots: Mapping[str, int], ragged: bool, captured: bool) -> None:
        # Plain Python over memory views: after a step that streamed all weights, numpy's code has left the CPU's caches
        self._batch, self._width = inputs["input_ids"].shape
        totals = {length: np.zeros((), np.int32) for length in TOTALS if length in inputs}
        lasts = {length: np.zeros(self._batch, np.int32) for length in totals}
        self.totals: dict[str, Array] = {TOTALS[length]: total for length, total in totals.items()}
        self.rows: dict[str, Array] = {LAST_SLOTS[length]: last for length, last in lasts.items()}
        self._ragged, self._captured = ragged, captured
        if captured:
            for length, total in totals.items():
                total[()] = slots[length]
        self._groups = [(totals[n], lasts[n].data, inputs[n].data, slots[n] - self._width) for n in totals]
        if ragged:
            counts, self._packed = np.zeros(self._batch, np.int32), np.array(False)
            self.rows |= {NEW_TOKENS: counts, PACKED_STEP: self._packed}
            self._counts = counts.data
            self._index = inputs["logits_index"].data
            self._last_index = inputs["logits_index"].shape[1] - 1

    def __call__(self) -> None:
        if not self._ragged:
            for total, lasts, lengths, _ in self._groups:
                for row in range(self._batch):
                    lasts[row] = lengths[row] + self._width - 1
                if not self._captured:
                    total[()] = max(lasts) + 1
            return
        tokens = 0
        for row in range(self._batch):
            self._counts[row] = count = self._index[row, self._last_index] + 1
            tokens += count
        for total, lasts, lengths, most in self._groups:
            longest = self._width
            for row, count in enumerate(self._counts):
                # The operator wants a slot, and room for the whole chunk, of a row that stands still as well
                end = lengths[row] + count if count else max(1, min(lengths[row], most))
                lasts[row] = end - 1
                longest = max(longest, end)
            total[()] = longest
        self._packed[()] = self._width > 1 and tokens < self._batch * self._width
