"""One step of an engine over fixed buffers: a plain run first, then as a CUDA graph.

Enters: addresses and shapes. Leaves: a callable that runs the step and waits. Knows no name of a request's buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.engines.engine import Array
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.schedule import StepKind

from .cuda_device import CudaDevice
from .plans import Plans


@dataclass
class Captures:
    """The CUDA graphs captured so far, and why a step runs without one: empty while all are captured."""

    count: int = 0
    note: str = ""


@dataclass(frozen=True)
class StepBindings:
    """What a step works on.

    Attributes:
        shapes: of all inputs, which the context is told.
        addresses: on the device, of inputs, outputs and weights.
        copies_in: device address, host address and bytes, before the engine runs.
        copies_out: host address, device address and bytes, after it.
        hosts: the arrays of the copies, which keeps their memory.
    """

    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    copies_in: Sequence[tuple[int, int, int]]
    copies_out: Sequence[tuple[int, int, int]]
    hosts: Sequence[Array]


class EngineStep:
    """One step over its buffers; runs it and waits, also when interrupted, so that the host may write its arrays.

    Attributes:
        keeps_context: whether it will be captured; only over page-locked arrays.
    """

    def __init__(
        self, plans: Plans, device: CudaDevice, captures: Captures, kind: StepKind, bindings: StepBindings
    ) -> None:
        self._plans, self._device, self._captures, self._kind = plans, device, captures, kind
        self._shapes, self._addresses = bindings.shapes, bindings.addresses
        self._copies_in, self._copies_out = bindings.copies_in, bindings.copies_out
        self._hosts = bindings.hosts
        self._profile = plans.profile(kind, bindings.shapes)
        self.keeps_context = all(device.is_pinned(array) for array in bindings.hosts)
        self._context: Any = None
        self._ran = False
        self._tried = False  # to capture it; that it failed says nothing of other steps
        self._graph: Any = None

    def __call__(self) -> None:
        try:
            if self._graph is None and self._ran and not self._tried:
                self._capture()
            if self._graph is None:
                self._bind()
                self._enqueue()
                self._ran = self.keeps_context
            else:
                self._device.launch(self._graph)
        finally:
            self._device.synchronize()

    def drop(self) -> None:
        """Forget the graph and its context; the next run begins anew."""
        if self._graph is not None:
            self._device.destroy(self._graph)
        self._graph = self._context = None
        self._ran = self._tried = False

    def _bind(self) -> None:
        if self._context is None:
            self._context = self._plans.context(self._kind, self._profile, shared=not self.keeps_context)
        self._plans.bind(self._context, self._kind, self._shapes, self._addresses)

    def _enqueue(self) -> None:
        for address, host, size in self._copies_in:
            self._device.copy_in(address, host, size)
        if not self._context.execute_async_v3(self._device.stream):
            raise self._plans.failure("TensorRT cannot run a step.", self._kind)
        for host, address, size in self._copies_out:
            self._device.copy_out(host, address, size)

    def _capture(self) -> None:
        """Without a graph steps run all the same, only slower: the reason is kept for those who measure."""
        self._tried = True
        if not self._plans.may_be_captured(self._context):
            self._captures.note = f"{self._plans.target} says that the {self._kind.value} step cannot be captured"
            return
        try:
            self._graph = self._device.capture(self._enqueue)
        except BundleError as error:
            self._captures.note = f"{error.fact} {error.note}"
        else:
            self._captures.count += 1
