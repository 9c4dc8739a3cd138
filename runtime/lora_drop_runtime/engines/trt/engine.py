"""TensorRT or TensorRT-RTX as the engine of a session; one module serves both, whose Python interfaces are the same.

Enters: a bundle and one of its device targets. Leaves: steps that run on the GPU. Knows no schedule and no token.

    weights     network inputs of both engines, bound to one device block that is filled once (`inputs`), or inside
                each engine (`constants`)
    buffers     one device block per name, kept over requests and only ever replaced by a larger one: a step's
                addresses stay what they were, and so do the CUDA graphs that hold them
    cycles      LoRA steps and their refresh without the host: a kernel chooses tokens and counts lengths, and what it
                chose is copied out once a cycle (cycle.py)
    host        arrays that the session reads and writes are page-locked; a step copies them in and out
    scratch     one block for the contexts of both engines, which run one after the other on one stream
    contexts    one for each step that is captured, one per engine and profile for all that are not: a graph is only
                good while the context it was captured from stays as it was
    CUDA graph  per step kind and bindings (batch, and side of the state): the copies in, the engine, the copies out.
                The first run of a step is a plain one, which lets TensorRT finish what it defers to it; the second is
                captured. A step over arrays that are not page-locked, as a prompt's ids, is never captured.

Caches need not be emptied for a new request, since lengths hide what an old one left. But what they hide is multiplied
by a probability of 0, and 0 · NaN is NaN: new memory is zeroed once, and that of a row whose logits were no numbers
when it is over (`Slots.wipe`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.dtypes import float32_from_bfloat16, in_dtype
from lora_drop_runtime.engines.engine import (
    Array,
    CycleRows,
    CycleStep,
    DeviceBuffer,
    Step,
    constant_adapters,
    fitting_slots,
    head_spans,
)
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.schedule import StepKind

from .cuda_device import ALIGNMENT, CudaDevice
from .cycle import DeviceCycle, rows_in
from .kernels import Chooser
from .library import library
from .memory import SessionMemory
from .plans import Plans
from .step import Captures, EngineStep, StepBindings

_SIZED_AS = {"next_token": "logits_index"}  # outputs that the host reads, and inputs of as many values
_BEGINS = ("past_key.", "past_value.", "state.")  # which only a request that begins asks for, as `logits`


# With contexts and CUDA graphs of their own, which take memory on the device. Each k, policy and number of rows has its
# cycle, and requests choose them
MOST_STEPS, MOST_CYCLES = 64, 16
_Kept = TypeVar("_Kept", EngineStep, DeviceCycle)


def _remember(kept: dict[Any, _Kept], key: Any, one: _Kept, most: int) -> None:
    """Keep the latest ones; the one that was not used for longest gives its graph and contexts back."""
    kept[key] = one
    if len(kept) > most:
        kept.pop(next(iter(kept))).drop()


class TrtEngine:
    """Both engines of a bundle on one GPU.

    Args:
        bundle: an opened bundle.
        target: `tensorrt` or `tensorrt-rtx`.
        trt: the target's Python module, imported when None.
        device: which this engine then owns and closes; the first visible GPU when None.

    Raises:
        NoDeviceError: no driver, no GPU, or another GPU than the engines were built for.
        BundleError: a missing Python module or plugin library, engines of another TensorRT version, engines that do
            not fit the manifest, too little memory.
    """

    chooses_tokens = True
    batched_chunks = True
    many_requests = False
    idle_rows = False
    warms_up = True
    block_slots: int | None = None

    def __init__(self, bundle: Bundle, target: str, *, trt: Any = None, device: CudaDevice | None = None) -> None:
        self.target = target
        entry = bundle.target(target)[1]
        assert isinstance(entry, TrtEntry)
        self._entry = entry
        self.prefill_chunk: int | None = entry.prefill_chunk
        self.verified_tokens: int | None = entry.refresh_profiles["decode"][1]
        self._captures = Captures()
        self._steps: dict[Any, EngineStep] = {}
        self._cycles: dict[Any, DeviceCycle] = {}
        self._chooser: Chooser | None = None
        self._events: list[Any] = []
        self._host_note = ""  # why tokens go through the host
        self._draws, self._vocab = bundle.manifest.limits.max_seq_len, bundle.manifest.model.vocab_size
        self._made: weakref.WeakSet[EngineStep | DeviceCycle] = weakref.WeakSet()
        self._sharing: weakref.WeakSet[TrtEngine] = weakref.WeakSet([self])  # what is loaded, on one stream
        trt = library(target) if trt is None else trt
        self._device = CudaDevice() if device is None else device
        self._plans = Plans(bundle, target, trt, self._device)
        self._memory = SessionMemory(self._device, self._drop_steps)
        try:
            weights = bundle.weight_inputs(target)
            self._plans.load(weights)
            self._memory.upload_weights(bundle, weights)
        except BaseException:
            self.close()
            raise

    # ── the protocol ───────────────────────────────────────────────────────────────────────────────────────

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        return fitting_slots(self._entry.slots, needed)

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        array = self._memory.pinned(name, shape, dtype)
        array[...] = 0
        return array

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        return self._memory.buffer(name, shape, dtype, begins=name == "logits" or name.startswith(_BEGINS))

    def read(self, buffer: DeviceBuffer) -> npt.NDArray[np.float32]:
        dtype = "uint16" if buffer.dtype == "bfloat16" else buffer.dtype
        array = self._memory.pinned(f"read {buffer.name}", buffer.shape, dtype)
        self._device.copy_out(array.ctypes.data, buffer.address, buffer.nbytes)
        self._device.synchronize()
        if buffer.dtype == "bfloat16":
            return float32_from_bfloat16(array)
        return array.astype(np.float32, copy=False)

    def copy(self, source: DeviceBuffer, target: DeviceBuffer, slots: int | None) -> None:
        for to, origin, size_bytes in head_spans(source, target, slots):
            self._device.copy_within(to, origin, size_bytes)

    def zero(self, buffer: DeviceBuffer) -> None:
        self._device.zero(buffer.address, buffer.nbytes)

    def prepare(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Step:
        bindings = self._bindings(kind, inputs, outputs)
        places = tuple((name, bindings.shapes.get(name), address) for name, address in bindings.addresses.items())
        key = kind, places, (*bindings.copies_in, *bindings.copies_out)
        step = self._steps.pop(key, None)
        if step is None:
            step = EngineStep(self._plans, self._device, self._captures, kind, bindings)
            self._made.add(step)
        if step.keeps_context:
            _remember(self._steps, key, step, MOST_STEPS)
        return step

    @property
    def runs_cycles(self) -> bool:
        """Whether the kernel that chooses tokens could be compiled, which is tried when this is asked first."""
        if self._chooser is None and not self._host_note:
            try:
                self._chooser = Chooser(self._device)
            except BundleError as error:
                self._host_note = f"every token goes through the host: {error.note} Hint: {error.hint}"
        return self._chooser is not None

    def cycle_rows(self, rows: int, window: int) -> CycleRows:
        self._device.settle()  # a request that was given up may still run
        return rows_in(self._memory, rows, window, self._vocab, self._draws)

    def cycle(self, rows: CycleRows, steps: Sequence[CycleStep], slots: Mapping[str, int]) -> DeviceCycle:
        assert self._chooser is not None
        bound = [(step, self._bindings(step.kind, step.inputs, step.outputs)) for step in steps]
        key = tuple(
            (step.kind, step.kept, step.back, tuple(one.shapes.items()), tuple(one.addresses.items()))
            for step, one in bound
        )
        found = self._cycles.pop(key, None)
        if found is None:
            if not self._events:
                self._events = [self._device.event() for _ in range(2)]
            parts = self._plans, self._device, self._memory, self._chooser, self._captures
            found = DeviceCycle(*parts, rows, bound, slots, self._events)
            self._made.add(found)
        _remember(self._cycles, key, found, MOST_CYCLES)
        return found

    def replace_adapters(self, weights: Mapping[str, Array]) -> None:
        """As the protocol has it, into the same device memory: prepared steps and CUDA graphs stay good."""
        buffers = self._memory.weights
        if not buffers:
            raise constant_adapters()
        for name, array in weights.items():
            assert array.shape == buffers[name].shape
            self._device.upload(buffers[name].address, in_dtype(array, buffers[name].dtype))

    def beside(self) -> Self:
        other = copy.copy(self)
        other._steps, other._cycles, other._events = {}, {}, []
        other._made = weakref.WeakSet()
        other._memory = self._memory.beside(other._drop_steps)
        self._sharing.add(other)
        return other

    def notes(self) -> list[str]:
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in self.resident_bytes.items())
        slow = f"steps run without CUDA graphs: {self.capture_note}"
        return [f"GPU memory: {sizes}", *([slow] if self.capture_note else []), *filter(None, [self._host_note])]

    def close(self) -> None:
        """As the protocol has it; safe to call again, and after a constructor that failed half way."""
        self._sharing.discard(self)
        try:
            self._drop_steps()
            self._steps.clear()
            for step in self._made:  # held by someone still, as by the traceback of an error
                step.drop()
            if self._sharing:
                self._device.settle()
                self._memory.free()
                return
            self._plans.close()
            self._memory.close()
        finally:
            if not self._sharing:
                self._device.close()

    # ── for those who measure ──────────────────────────────────────────────────────────────────────────────

    @property
    def capture_note(self) -> str:
        """Why steps run without CUDA graphs; empty while they are captured."""
        return self._captures.note

    @property
    def captures(self) -> int:
        """CUDA graphs captured so far."""
        return self._captures.count

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device: weights that both engines share, the plans of both, scratch, buffers of requests."""
        return {
            "weights": self._memory.weights_bytes,
            "plans": self._plans.size_bytes,
            "scratch": self._plans.scratch_bytes,
            "buffers": self._memory.buffers_bytes,
        }

    # ── steps ──────────────────────────────────────────────────────────────────────────────────────────────

    def _bindings(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> StepBindings:
        """Where a step's tensors lie on the device, and which of them are copied from and to host arrays."""
        copies_in, copies_out, hosts = [], [], []
        shapes: dict[str, tuple[int, ...]] = {}
        addresses = {name: self._memory.weights[name].address for name in self._plans.weight_names[kind]}
        for name, value in (*inputs.items(), *outputs.items()):
            buffer = value
            if isinstance(value, np.ndarray):
                assert value.flags["C_CONTIGUOUS"]
                buffer = self._staging(name, value)
                if name in inputs:
                    copies_in.append((buffer.address, value.ctypes.data, value.nbytes))
                else:
                    copies_out.append((value.ctypes.data, buffer.address, value.nbytes))
                hosts.append(value)
            assert buffer.address % ALIGNMENT == 0, f"{name} begins at {buffer.address}"
            addresses[name] = buffer.address
            shapes[name] = buffer.shape
        return StepBindings({name: shapes[name] for name in inputs}, addresses, copies_in, copies_out, hosts)

    def _staging(self, name: str, array: Array) -> DeviceBuffer:
        """The device's copy of a host array, at once as large as it may become in either step: its address stays."""
        values = max(self._plans.most_values(_SIZED_AS.get(name, name)), array.size)
        return replace(self._memory.buffer(f"copy of {name}", (values,), array.dtype.name), shape=array.shape)

    def _drop_steps(self) -> None:
        """Forget captured graphs and their contexts, before memory that they use is freed. Steps stay known: a request
        that goes on captures them again."""
        for cycle in self._cycles.values():
            cycle.drop()
        for step in self._steps.values():
            step.drop()
        self._cycles.clear()
