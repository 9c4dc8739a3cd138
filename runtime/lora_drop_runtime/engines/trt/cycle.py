"""A cycle without the host: steps one after another, each followed by the kernel that chooses its tokens.

Enters: steps bound to device memory. Leaves: tokens, copied out once a cycle. A whole cycle runs plainly once and is
captured as one CUDA graph when it runs again; a part of one, at a request's end, is never captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.engines.engine import CycleRows, CycleStep, DeviceBuffer
from lora_drop_runtime.errors import BundleError

from .cuda_device import ALIGNMENT, CudaDevice
from .kernels import ADDRESSES, Choice, Chooser
from .memory import SessionMemory
from .plans import Plans
from .step import Captures, StepBindings

ROWS = "rows of a cycle"


def rows_in(memory: SessionMemory, rows: int, window: int, vocab: int, draws: int) -> CycleRows:
    """One block on the device and a page-locked one like it, which a single copy fills."""
    parts: dict[str, tuple[tuple[int, ...], str]] = {
        "ids": ((rows, 1), "int64"),
        "window": ((rows, window), "int64"),
        "len_kept": ((rows,), "int64"),
        "len_dropped": ((rows,), "int64"),
        "logits_index": ((rows, 1), "int64"),
        "next_token": ((rows, 1), "int64"),
        "drawn": ((rows,), "int32"),
        "over": ((rows,), "int32"),
        "new_tokens": ((rows,), "int32"),
        "top_p": ((rows,), "float64"),
        "top_k": ((rows,), "int64"),
        "temperature": ((rows,), "float32"),
        "penalty": ((rows,), "float32"),
        "stops": ((rows, vocab), "uint8"),
        "seen": ((rows, vocab), "uint8"),
        "uniforms": ((draws, rows), "float64"),
    }
    begins, size = {}, 0
    for name, (shape, dtype) in parts.items():
        begins[name] = size
        size += -(-DeviceBuffer(name, 0, shape, dtype).nbytes // ALIGNMENT) * ALIGNMENT
    host_block = memory.pinned(ROWS, (size,), "uint8")
    block = memory.buffer(ROWS, (size,), "uint8")
    host_block[...] = 0
    host, device = {}, {}
    for name, (shape, dtype) in parts.items():
        device[name] = part = DeviceBuffer(name, block.address + begins[name], shape, dtype)
        host[name] = host_block[begins[name] : begins[name] + part.nbytes].view(dtype).reshape(shape)
    return CycleRows(device | {ROWS: block}, host | {ROWS: host_block})


class DeviceCycle:
    """The protocol `Cycle`.

    Args:
        rows: from `rows_in`.
        steps: with the bindings of each.
        slots: {"slots_kept": n, "slots_dropped": m}, of a row.
        events: two, of which a cycle sets one when its tokens have come.
    """

    def __init__(
        self,
        plans: Plans,
        device: CudaDevice,
        memory: SessionMemory,
        chooser: Chooser,
        captures: Captures,
        rows: CycleRows,
        steps: Sequence[tuple[CycleStep, StepBindings]],
        slots: Mapping[str, int],
        events: Sequence[Any],
    ) -> None:
        self._plans, self._device, self._chooser, self._captures = plans, device, chooser, captures
        self._steps, self._rows = steps, rows
        count = rows.device["ids"].shape[0]
        self._tokens = memory.buffer("tokens of a cycle", (len(steps), count), "int64")
        # Two, since one is read while the next cycle runs
        self._read = memory.pinned("tokens of cycles", (2, len(steps), count), "int64")
        self._events = events
        self._choices = [self._choice(number, step, slots) for number, (step, _) in enumerate(steps)]
        self._contexts: list[Any] = []
        self._graph: Any = None
        self._ran = False
        self._tried = False  # to capture it
        self._counts: list[int] = []  # steps of each run since `begin`

    def begin(self) -> None:
        self._counts.clear()
        host = self._rows.host[ROWS]
        self._device.copy_in(self._rows.device[ROWS].address, host.ctypes.data, host.nbytes)

    def run(self, count: int) -> None:
        side = len(self._counts) % 2
        whole = count == len(self._steps)
        if whole and self._graph is None and self._ran and not self._tried:
            self._capture()
        if whole and self._graph is not None:
            self._device.launch(self._graph)
        else:
            self._enqueue(count)
            self._ran = self._ran or whole
        tokens = self._read[side]
        size = tokens.nbytes // len(self._steps) * count
        self._device.copy_out(tokens.ctypes.data, self._tokens.address, size)
        self._device.mark(self._events[side])
        self._counts.append(count)

    def read(self, number: int) -> npt.NDArray[np.int64]:
        assert len(self._counts) - 2 <= number < len(self._counts)
        self._device.wait(self._events[number % 2])
        found: npt.NDArray[np.int64] = self._read[number % 2, : self._counts[number]].copy()
        return found

    def drop(self) -> None:
        """Forget the graph and its contexts, and what is under way; the next run begins anew."""
        self._device.settle()
        if self._graph is not None:
            self._device.destroy(self._graph)
        self._graph = None
        self._contexts = []
        self._ran = self._tried = False

    # ── steps ──────────────────────────────────────────────────────────────────────────────────────────────

    def _choice(self, number: int, step: CycleStep, slots: Mapping[str, int]) -> Choice:
        device = self._rows.device
        tokens = self._tokens[number : number + 1]
        places = {name: part.address for name, part in device.items() if name in ADDRESSES}
        places |= {"logits": step.outputs["logits"].address, "tokens": tokens.address}
        rows, _, vocab = step.outputs["logits"].shape
        return Choice(
            **places,
            rows=rows,
            vocab=vocab,
            window_width=device["window"].shape[1],
            place=step.place,
            kept=step.kept,
            dropped=step.dropped,
            back=step.back,
            next_width=step.next_width,
            most_kept=slots["slots_kept"],
            most_dropped=slots["slots_dropped"],
        )

    def _bind(self) -> None:
        """A context of the cycle's own for each set of addresses: LoRA steps on one side of the state share one."""
        made: dict[Any, Any] = {}
        contexts = []  # kept once all are bound: where one cannot be, the next run begins anew
        for step, bindings in self._steps:
            key = step.kind, tuple(bindings.addresses.items())
            if key not in made:
                profile = self._plans.profile(step.kind, bindings.shapes)
                made[key] = self._plans.context(step.kind, profile, shared=False)
                self._plans.bind(made[key], step.kind, bindings.shapes, bindings.addresses)
            contexts.append(made[key])
        self._contexts = contexts

    def _enqueue(self, count: int) -> None:
        if not self._contexts:
            self._bind()
        for (step, _), context, choice in zip(self._steps[:count], self._contexts, self._choices, strict=False):
            if not context.execute_async_v3(self._device.stream):
                raise self._plans.failure("TensorRT cannot run a step.", step.kind)
            self._chooser.launch(choice)

    def _capture(self) -> None:
        """As of a step (step.py)."""
        self._tried = True
        for (step, _), context in zip(self._steps, self._contexts, strict=True):
            if not self._plans.may_be_captured(context):
                self._captures.note = f"{self._plans.target} says that the {step.kind.value} step cannot be captured"
                return
        try:
            self._graph = self._device.capture(lambda: self._enqueue(len(self._steps)))
        except BundleError as error:
            self._captures.note = f"{error.fact} {error.note}"
        else:
            self._captures.count += 1
