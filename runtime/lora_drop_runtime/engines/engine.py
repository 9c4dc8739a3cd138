"""What a session needs of an engine.

An engine gives memory by name, binds it to the step graphs by name, and runs steps. It knows no schedule and no token.
Two kinds of memory: what the session itself reads and writes (ids, lengths, chosen tokens) is a numpy array; what only
steps touch (caches, states, logits) is a `Buffer`, which may lie on a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import StepKind

Array = npt.NDArray[Any]
Step = Callable[[], None]


class Buffer(Protocol):
    """Memory that only steps touch; a slice of the first axis is a view."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True)
class DeviceBuffer:
    """Memory on the device, C-contiguous; `dtype` is a name, since numpy has no bfloat16."""

    name: str
    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_NAME[self.dtype].size_bytes

    def __getitem__(self, rows: slice) -> DeviceBuffer:
        begin, end, step = rows.indices(self.shape[0])
        assert step == 1
        row_bytes = self.nbytes // self.shape[0]
        return replace(self, address=self.address + begin * row_bytes, shape=(end - begin, *self.shape[1:]))


class Engine(Protocol):
    """Runs the steps of requests: a `BindingEngine`, or a `PagedEngine` where `block_slots` is a number.

    Attributes:
        block_slots: slots of a block where caches are paged; None where each row has caches of its own.
        target: whose graphs it runs; names their table of inputs and outputs (graph_io.py).
        chooses_tokens: whether the graphs have an output `next_token`, the index of the largest logit; −1 in a row
            with NaN or +∞ among its logits.
        prefill_chunk: the most tokens of a row in one run, None for no limit.
        verified_tokens: the most tokens of a row in one run that gives logits for each of them, None for no limit.
        batched_chunks: whether several rows that have tokens in their caches may get more than one in the same run.
        many_requests: whether several requests may have their buffers at the same time; else each needs an engine
            `beside` the first.
        idle_rows: whether rows stand still where `logits_index` is −1 (graph_io.py), in both steps.
        warms_up: whether its first request compiles and captures what later ones use, so that a session runs one at
            its opening.
    """

    block_slots: int | None
    target: str
    chooses_tokens: bool
    prefill_chunk: int | None
    verified_tokens: int | None
    batched_chunks: bool
    many_requests: bool
    idle_rows: bool
    warms_up: bool

    @property
    def runs_cycles(self) -> bool:
        """Whether it is a `CycleEngine`."""
        ...

    def slots(self, needed: Mapping[str, int]) -> Mapping[str, int]:
        """The cache slots to allocate for a request that needs `slots_kept` and `slots_dropped` of them.

        Raises:
            InputError: the engine has fewer.
        """
        ...

    def replace_adapters(self, weights: Mapping[str, Array]) -> None:
        """Use other weights of the surrogates (adapters.folded) from now on; prepared steps are void.

        Raises:
            InputError: the engine's adapters are constants.
            BundleError: it cannot take them; those from before go on working, or if they cannot be had again, every
                later step says so.
        """
        ...

    def beside(self) -> Self:
        """The engine for a request that has its buffers at the same time as this one's: itself under `many_requests`;
        else another over the same weights and graphs, for one thread at a time with it."""
        ...

    def notes(self) -> list[str]:
        """What a user who measures should know of the engine, a line each."""
        ...

    def close(self) -> None:
        """Free what the engine holds; what it shares with others beside it goes with the last of them."""
        ...


class BindingEngine(Engine, Protocol):
    """Gives memory by name, and binds it to steps. Where `many_requests` is false, asking for a buffer again ends the
    use of the one of that name; one of the same sizes has what was in it."""

    def allocate(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """Zeros that the host reads and writes between steps."""
        ...

    def allocate_resident(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Memory that only steps touch: finite values, those of an earlier request perhaps."""
        ...

    def read(self, buffer: Any) -> npt.NDArray[np.float32]:
        """The values of a resident buffer, valid until the next call of the engine."""
        ...

    def copy(self, source: Any, target: Any, slots: int | None) -> None:
        """Copy the first `slots` of a cache's rows [b, H, slots, D] to another's of any number of slots, or all of a
        buffer when None; between two steps."""
        ...

    def zero(self, buffer: Any) -> None:
        """Fill a resident buffer with zeros; between two steps."""
        ...

    def prepare(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Step:
        """Bind buffers by name; the returned callable runs the step on them, again and again, and waits for it."""
        ...


@dataclass(frozen=True)
class CycleRows:
    """What the steps of a cycle read of B rows, and what chooses their tokens, by name.

    Attributes:
        device: buffers that steps bind: `ids` int64 [B, 1] and `window` int64 [B, W], the tokens of a LoRA step and of
            the refresh; `len_kept` and `len_dropped` int64 [B]; `logits_index` int64 [B, 1]; `next_token` int64 [B, 1].
        host: arrays to fill before `Cycle.begin`: the tokens that come first, the lengths, the refresh's
            `logits_index`; and `stops` uint8 [B, V], 1 at tokens that end a row, `seen` uint8 [B, V], 1 at those that
            the repetition penalty lowers, `uniforms` float64 [draws, B] in [0, 1), one for each token, `top_p` float64
            [B], `top_k` int64 [B], `temperature` and `penalty` float32 [B], `new_tokens` int32 [B], the most that a row
            makes, and `over` int32 [B], 1 of a row that stands still from the first step on.
    """

    device: Mapping[str, Any]
    host: Mapping[str, Array]


@dataclass(frozen=True)
class CycleStep:
    """A step as `BindingEngine.prepare` binds it, whose token is chosen on the device.

    Attributes:
        kept, dropped: entries that it writes in each row.
        back: how many entries of kept layers the next step writes again.
        next_width: tokens that the next step writes in each row.
        place: in the window, of the token that it makes.
    """

    kind: StepKind
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    kept: int
    dropped: int
    back: int
    next_width: int
    place: int


class Cycle(Protocol):
    """Steps that run one after another without the host: each feeds the token that the one before it made.

    A row whose token is a stop or its last, or whose logits are no numbers, stands still from then on: what it writes
    all the same lies behind its entries, or within its slots where these end.
    """

    def begin(self) -> None:
        """Take over what `CycleRows.host` holds."""
        ...

    def run(self, count: int) -> None:
        """Begin the first `count` steps; does not wait for them. At most two runs may be unread."""
        ...

    def read(self, number: int) -> npt.NDArray[np.int64]:
        """Tokens [count, B] of one of the two latest runs, counted from 0 since `begin`, −1 where logits are no
        numbers. Waits for it."""
        ...


class CycleEngine(BindingEngine, Protocol):
    """Runs whole cycles, and chooses their tokens, without the host."""

    def cycle_rows(self, rows: int, window: int) -> CycleRows:
        """For so many rows, whose refresh runs `window` tokens; those of before end."""
        ...

    def cycle(self, rows: CycleRows, steps: Sequence[CycleStep], slots: Mapping[str, int]) -> Cycle:
        """Bind steps on these rows, whose caches have `slots_kept` and `slots_dropped` slots."""
        ...


class Pool(Protocol):
    """Blocks of cache slots of one kind of layers; a block's number is the same in all of them."""

    @property
    def block_bytes(self) -> int:
        """Of a block in all layers."""
        ...

    def take(self, count: int) -> list[int]:
        """Blocks of one's own."""
        ...

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Another row has these as well; returns them."""
        ...

    def give_back(self, blocks: Iterable[int]) -> None:
        """A row has these no more."""
        ...

    def will_write(self, blocks: Iterable[int]) -> None:
        """A step is about to write into these."""
        ...

    def is_shared(self, block: int) -> bool: ...

    def copy(self, source: int, target: int) -> None:
        """Copy what is in a block."""
        ...


class Feed(Protocol):
    """What a call over paged caches reads; written in place (bundle/paged_io.py).

    Attributes:
        ids, positions: int64 [1, T]. index: int64 [R]. last: int64 [b]. states: float32 [sites, b, d].
        tables: of each of the engine's pools past_lens [r], begins [r + 1], blocks [n], block_begins [r + 1] and
            longest [], int32, of the rows that have tokens.
        recurrence: the inputs that recurrent states need, by name.
    """

    ids: Array
    positions: Array
    index: Array
    last: Array
    states: Array
    tables: list[list[Array]]
    recurrence: dict[str, Array]


class PagedSteps(Protocol):
    """Calls of one request, whose results stay until its next."""

    def feed(
        self,
        kind: StepKind,
        tokens: int,
        wanted: int,
        rows: tuple[int, int],
        blocks: tuple[int, ...],
        recurrence: Mapping[str, tuple[Any, ...]],
    ) -> Feed:
        """What a call reads of so many tokens in all, logits that are wanted, and blocks of each pool.

        Args:
            rows: those that have a state, and all that have tokens.
            recurrence: dtype and sizes of the inputs that recurrent states need.
        """
        ...

    def hold(self, arrays: Mapping[str, Array]) -> None:
        """What all calls read, and write in place, by the names of the graph's inputs."""
        ...

    def give(self, which: Any, arrays: Callable[[], Mapping[str, Array]]) -> None:
        """What some inputs of a call with the latest feed read, and where it writes some outputs, by their names.

        Args:
            which: the same for the same arrays.
        """
        ...

    def run(self) -> None:
        """One call with the latest feed."""
        ...

    def logits(self) -> npt.NDArray[np.float32]:
        """float32 [R, V]."""
        ...

    def states(self) -> npt.NDArray[np.float32]:
        """float32 [sites, b, d]."""
        ...

    def output(self, name: str) -> npt.NDArray[np.float32]:
        """Another output of the graph."""
        ...


class PagedEngine(Engine, Protocol):
    """Has pools of blocks, each of layers that have tables in common; rows with any numbers of new tokens run in one
    call.

    Attributes:
        table_groups: of each pool 0 for kept layers or 1 for dropped ones, and their sliding window in slots, which
            needs no blocks before it; 0 for none.
        pads_tokens: whether a call of up to eight tokens costs less than one of another number than the one before.
    """

    pools: list[Any]
    table_groups: Sequence[tuple[int, int]]
    pads_tokens: bool

    def states_shape(self, rows: int) -> tuple[int, int, int]:
        """Of the states of so many rows, [sites, rows, d]; no site where the plan has none."""
        ...

    def prepare_for_several(self) -> None:
        """Many calls of several tokens of a row will come between those of one."""
        ...

    def steps(self, several: bool) -> PagedSteps:
        """For one request.

        Args:
            several: whether calls of several tokens of a row come between those of one.
        """
        ...


def head_spans(source: DeviceBuffer, target: DeviceBuffer, slots: int | None) -> list[tuple[int, int, int]]:
    """What `Engine.copy` copies: (address to, address from, bytes), one for each row and head."""
    if slots is None:
        return [(target.address, source.address, source.nbytes)]
    heads = source.shape[0] * source.shape[1]
    strides = [buffer.nbytes // heads for buffer in (target, source)]
    count = slots * (strides[1] // source.shape[2])
    return [(target.address + n * strides[0], source.address + n * strides[1], count) for n in range(heads)]


def copy_arrays(source: Array, target: Array, slots: int | None) -> None:
    """`Engine.copy` of numpy arrays."""
    if slots is None:
        target[...] = source
    else:
        target[:, :, :slots] = source[:, :, :slots]


# Of an engine whose rows write where they stand still: so many more than a row needs take what others write at once
STANDING_SLOTS = 16


def fitting_slots(capacities: Mapping[str, int], needed: Mapping[str, int]) -> Mapping[str, int]:
    """`Engine.slots` where the graphs fix the capacities {"kept": n, "dropped": m}, `STANDING_SLOTS` among them."""
    for group, capacity in capacities.items():
        most = capacity - STANDING_SLOTS
        if needed[f"slots_{group}"] > most:
            raise InputError(
                f"The request does not fit into the caches of the {group} layers.",
                note=f"It needs {needed[f'slots_{group}']} slots in a row, the engines have {most}.",
                hint="Ask for fewer new tokens (max_new_tokens; for a batch max_seq_len), for a larger k with policy "
                "skip, or export with a smaller --k.",
            )
    return {f"slots_{group}": capacity for group, capacity in capacities.items()}


def constant_adapters() -> InputError:
    """For `Engine.replace_adapters` where the weights are no inputs of the engines."""
    return InputError(
        "The adapters of this bundle cannot be replaced.",
        note="Its weights are constants inside the engines (--weight-sharing constants).",
        hint="Export with --weight-sharing inputs, or with the adapters.",
    )
