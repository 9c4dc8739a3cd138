"""OpenVINO as the engine of a session: one compiled model of both steps, and pools of cache blocks.

Enters: the tokens of the rows of a call, and their tables of blocks. Leaves: logits. Knows no schedule and no text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.paged_io import (
    BLOCK,
    GROUPS,
    LAST_TOKENS,
    LORA_STEP,
    PAST_STATES,
    POSITIONS,
    PRESENT_STATES,
    cache_names,
    table_names,
)
from lora_drop_runtime.dtypes import in_dtype
from lora_drop_runtime.engines.engine import Array
from lora_drop_runtime.engines.threads import default_threads
from lora_drop_runtime.errors import BundleError
from lora_drop_runtime.plan.schedule import StepKind

from .compiled import Compiled, Settings, compiled_model, said
from .io_check import layers_with_tables
from .package import import_openvino
from .pool import BlockPool

_FEEDS = 64  # calls of different sizes whose memory stays
MOST_TWICE = 512 << 20  # bytes of weights that are held twice, where steps of one token and of several take turns
ENOUGH_CALLS = 400  # of several tokens, which together lose about the time that one model more takes to compile


class Feed:
    """The memory that a call of some sizes reads.

    Attributes:
        ids, positions: int64 [1, T]; index: int64 [R]; last: int64 [b]; states: float32 [sites, b, d].
        tables: of each of the engine's pools past_lens [r], begins [r + 1], blocks [n], block_begins [r + 1] and
            longest [], int32.
        recurrence: the inputs that recurrent states need, by name.
    """

    def __init__(
        self,
        kind: StepKind,
        tokens: int,
        wanted: int,
        rows: tuple[int, int],
        blocks: tuple[int, ...],
        states: tuple[int, ...],
        groups: Sequence[tuple[int, int]],
        recurrence: Mapping[str, tuple[Any, ...]],
    ):
        with_state, with_tokens = rows
        self.ids, self.positions = np.zeros((1, tokens), np.int64), np.zeros((1, tokens), np.int64)
        self.index, self.last = np.zeros(wanted, np.int64), np.zeros(with_state, np.int64)
        self.states = np.zeros(states, np.float32)
        self.tables = [
            [
                np.zeros(shape, np.int32)
                for shape in ((with_tokens,), (with_tokens + 1,), (count,), (with_tokens + 1,), ())
            ]
            for count in blocks
        ]
        arrays: dict[str, Array] = {
            "input_ids": self.ids,
            POSITIONS: self.positions,
            "logits_index": self.index,
            LAST_TOKENS: self.last,
            PAST_STATES: self.states,
            LORA_STEP: np.array(kind is StepKind.LORA),
        }
        for (group, window), tables in zip(groups, self.tables, strict=True):
            arrays |= dict(zip(table_names(GROUPS[group], window), tables, strict=True))
        self.recurrence = {name: np.zeros(size, dtype) for name, (dtype, *size) in recurrence.items()}
        arrays |= self.recurrence
        self.arrays = arrays


class _Request:
    """An inference request of a compiled model, over the engine's pools. From one thread at a time."""

    def __init__(self, engine: OpenVinoEngine, compiled: Compiled) -> None:
        self._engine, self._compiled = engine, compiled
        self._ov = import_openvino()
        self._request = self._compiled.model.create_infer_request()
        self._versions = [-1] * len(engine.pools)
        self._feeds: dict[tuple[Any, ...], tuple[Feed, list[tuple[int, Any]]]] = {}
        self._bound: Feed | None = None
        self._given: Any = None

    def feed(
        self,
        kind: StepKind,
        tokens: int,
        wanted: int,
        rows: tuple[int, int],
        blocks: tuple[int, ...],
        recurrence: Mapping[str, tuple[Any, ...]],
    ) -> Feed:
        """What a call of these sizes reads; rows with a state, and with tokens; `blocks` of each of the pools."""
        key = (kind, tokens, wanted, rows, blocks, *recurrence.values())
        if key not in self._feeds:
            engine, sites = self._engine, self._engine.states_shape(rows[0])
            feed = Feed(kind, tokens, wanted, rows, blocks, sites, engine.table_groups, recurrence)
            tensors = [
                (self._compiled.inputs[name], self._ov.Tensor(array, shared_memory=True))
                for name, array in feed.arrays.items()
                if name in self._compiled.inputs
            ]
            self._feeds[key] = feed, tensors
            if len(self._feeds) > _FEEDS:
                del self._feeds[next(iter(self._feeds))]
        feed, tensors = self._feeds[key]
        if self._bound is not feed:
            for place, tensor in tensors:
                self._request.set_input_tensor(place, tensor)
            self._bound = feed
        return feed

    def run(self) -> None:
        """One call with the latest feed.

        Raises:
            BundleError: OpenVINO cannot run it.
        """
        try:
            with self._engine.lock:
                self._bind_caches()
                self._request.infer(share_outputs=True)  # else all outputs are copied, to be returned
        except RuntimeError as error:
            raise BundleError(
                "OpenVINO cannot run a step of the bundle.",
                note=f"{self._engine.bundle.root}: {said(error)}",
                hint="Free memory; or check the bundle with: lora-drop inspect --check.",
            ) from error
        self._compiled.has_run()

    def logits(self) -> npt.NDArray[np.float32]:
        """float32 [R, V] of the latest call, valid until the next."""
        found: npt.NDArray[np.float32] = self._request.get_output_tensor(self._compiled.outputs["logits"]).data[0]
        return found

    def output(self, name: str) -> npt.NDArray[np.float32]:
        """What the latest call has given by that name, valid until the next."""
        found: npt.NDArray[np.float32] = self._request.get_output_tensor(self._compiled.outputs[name]).data
        return found

    def hold(self, arrays: Mapping[str, Array]) -> None:
        """What all calls read and write."""
        for name, array in arrays.items():
            self._request.set_input_tensor(self._compiled.inputs[name], self._ov.Tensor(array, shared_memory=True))

    def give(self, which: Any, arrays: Callable[[], Mapping[str, Array]]) -> None:
        """What some inputs read and where some outputs go from now on, by their names; `which` tells one such choice
        from others."""
        if which == self._given:
            return
        self._given = None
        for name, array in arrays().items():
            tensor = self._ov.Tensor(array, shared_memory=True)
            if name in self._compiled.outputs:
                self._request.set_output_tensor(self._compiled.outputs[name], tensor)
            else:
                self._request.set_input_tensor(self._compiled.inputs[name], tensor)
        self._given = which

    def _bind_caches(self) -> None:
        for number, pool in enumerate(self._engine.pools):
            if pool.version == self._versions[number]:
                continue
            for name, array in pool.caches.items():
                tensor = self._ov.Tensor(array, self._ov.Shape(array.shape), self._compiled.cache_type)
                self._request.set_input_tensor(self._compiled.inputs[name], tensor)
            self._versions[number] = pool.version


class Steps:
    """The calls of one request: of one token of each row, and of several by a model of their own where there is one."""

    def __init__(self, engine: OpenVinoEngine, several: bool) -> None:
        self._engine, self._several = engine, several
        self._narrow = self._now = _Request(engine, engine.compiled)
        self._wide = _Request(engine, engine.wide) if several and engine.wide is not None else self._narrow

    def feed(
        self,
        kind: StepKind,
        tokens: int,
        wanted: int,
        rows: tuple[int, int],
        blocks: tuple[int, ...],
        recurrence: Mapping[str, tuple[Any, ...]],
    ) -> Feed:
        self._now = self._narrow
        if tokens > rows[1]:
            self._now = self._wide
            self._engine.calls_of_several += self._several
        return self._now.feed(kind, tokens, wanted, rows, blocks, recurrence)

    def hold(self, arrays: Mapping[str, Array]) -> None:
        for request in {id(one): one for one in (self._narrow, self._wide)}.values():
            request.hold(arrays)

    def give(self, which: Any, arrays: Callable[[], Mapping[str, Array]]) -> None:
        self._now.give(which, arrays)

    def run(self) -> None:
        self._now.run()

    def logits(self) -> npt.NDArray[np.float32]:
        return self._now.logits()

    def states(self) -> npt.NDArray[np.float32]:
        return self._now.output(PRESENT_STATES)

    def output(self, name: str) -> npt.NDArray[np.float32]:
        return self._now.output(name)


class OpenVinoEngine:
    """Both steps of a bundle in OpenVINO on the CPU.

    Args:
        bundle: an opened bundle.
        target: whose graph.
        threads: of a step; one per physical core when None.
        exact: products of quantized weights in float32, slow, and caches that are not rounded; of a mixture of experts
            all in float32.

    Raises:
        InputError: no OpenVINO is installed, or another version.
        BundleError: it cannot load the graph, or this processor cannot compute it.
    """

    chooses_tokens = False
    prefill_chunk: int | None = None
    verified_tokens: int | None = None
    batched_chunks = True
    many_requests = True
    idle_rows = True
    warms_up = False
    runs_cycles = False
    block_slots: int | None = BLOCK

    def __init__(
        self, bundle: Bundle, target: str = "openvino", *, threads: int | None = None, exact: bool = False
    ) -> None:
        self.bundle, self.target = bundle, target
        # Where tokens change from call to call the plugin prepares all kernels anew, 4 to 8 ms on two cores; in
        # bfloat16 eight tokens cost hardly more than one
        self.pads_tokens = bundle.manifest.model.dtype == "bfloat16"
        self._settings = Settings(threads or default_threads(), exact)
        self.compiled: Compiled = compiled_model(bundle, target, self._settings)
        self._replaced: Mapping[str, Array] = {}  # adapters
        self.wide: Compiled | None = None  # for calls of several tokens of a row
        self.calls_of_several = 0  # in requests where such calls come between others
        self.lock = threading.RLock()
        shapes = self.compiled.cache_shapes
        groups = layers_with_tables(bundle.manifest, self.compiled.inputs)
        self.table_groups = [(GROUPS.index(group), window) for group, window in groups]
        self.pools: list[BlockPool] = [
            BlockPool({name: shapes[name] for name in cache_names(own)}, self.compiled.memory_type, self.lock)
            for own in groups.values()
        ]

    def states_shape(self, rows: int) -> tuple[int, int, int]:
        """Of the states of so many rows, [sites, rows, d]."""
        manifest = self.bundle.manifest
        return (len(manifest.plan.states), rows, manifest.model.hidden_size)

    def prepare_for_several(self) -> None:
        """Have a model of their own for calls of several tokens of a row, where a copy of the weights is small: else
        all kernels are prepared anew whenever such a call comes behind one of one token. Not where the bundle has been
        replaced since: this model would have the weights of another."""
        is_small = self.bundle.manifest.model.weight_bytes <= MOST_TWICE
        gains = is_small and not self.pads_tokens and not self._settings.exact
        if gains and self.wide is None and self.bundle.is_in_place():
            settings = replace(self._settings, wide=True)
            self.wide = compiled_model(self.bundle, self.target, settings, self._replaced)

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        return needed

    def steps(self, several: bool) -> Steps:
        if several and self.calls_of_several >= ENOUGH_CALLS:
            self.prepare_for_several()
        return Steps(self, several)

    def replace_adapters(self, weights: Mapping[str, Array]) -> None:
        self.bundle.check_in_place()
        replaced = {name: in_dtype(array, self.bundle.manifest.model.dtype) for name, array in weights.items()}
        self.compiled = compiled_model(self.bundle, self.target, self._settings, replaced)
        self._replaced, self.wide = replaced, None

    def beside(self) -> Self:
        return self

    def notes(self) -> list[str]:
        if self.wide is None:
            return list(self.compiled.notes)
        size = self.bundle.manifest.model.weight_bytes >> 20
        held = f"{size} MiB of weights are held twice, for steps of one token and of several"
        return [*self.compiled.notes, held]

    def close(self) -> None:
        self.pools, self.wide = [], None
        self.__dict__.pop("compiled", None)
