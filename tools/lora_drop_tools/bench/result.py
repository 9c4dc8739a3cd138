"""What `lora-drop bench` measured, and the arithmetic on it.

Enters: the times of every step (`Run`), a manifest. Leaves: a `Row` for each bundle and window: quantiles, bytes and
their rate, the speed-up beside its ceiling, Eq. 11; all of that in a `BenchResult`. Measures nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.decoding.pace import MOST_DRAFTS
from lora_drop_runtime.decoding.statistics import Cycle, Statistics
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES, Policy
from lora_drop_runtime.plan.schedule import PERIODIC, StepKind

from lora_drop_tools.shared import costs
from lora_drop_tools.shared.machine import Bandwidth

T = TypeVar("T")
QUANTILES = (0.50, 0.95, 0.99)


@dataclass(frozen=True)
class Request:
    """What every arm is asked: `rows` prompts of `context` tokens, `new_tokens` more in each."""

    context: int
    rows: int
    new_tokens: int


@dataclass(frozen=True)
class Run:
    """One request as it was measured.

    Attributes:
        prefill_seconds: to the first token.
        step_seconds: of the N − 1 decode steps, in order.
        engine_seconds: the part of each step that the engine's run call took; None for a peer.
        kv_prompt, kv: `Session.kv_bytes` after the prefill and at the end; None for a peer.
        kinds: of the decode steps, as they ran; None for a peer.
        cycles: of drafts and their verification, where drafts are verified; `step_seconds` then has what a caller waits
            for a token, which for all but the first of a cycle is nearly nothing.
        note: what the session found about drafts that do not pay.
        device_cycles: steps of each whole cycle, where the engine ran them without the host; `step_seconds` then has
            what a caller waits for a token, all of a cycle for its first. None where steps ran one by one.
    """

    prefill_seconds: float
    step_seconds: list[float]
    engine_seconds: list[float] | None = None
    kv_prompt: dict[str, int] | None = None
    kv: dict[str, int] | None = None
    kinds: list[str] | None = None
    cycles: tuple[Cycle, ...] | None = None
    note: str = ""
    device_cycles: list[int] | None = None

    @property
    def decode_seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def cycle_seconds(self) -> list[float]:
        """Of each of `device_cycles`."""
        waits = iter(self.step_seconds)
        return [sum(itertools.islice(waits, count)) for count in self.device_cycles or ()]

    @property
    def form(self) -> str:
        """What was timed by itself: `steps`, or whole `cycles`."""
        return "steps" if self.device_cycles is None else "cycles"

    @property
    def timed_parts(self) -> list[tuple[str, float]]:
        """What was timed by itself, and its seconds: each step by its kind, or each cycle by its number of steps. One
        of a single step is that step."""
        kinds = iter(self.kinds or ())
        if self.device_cycles is None:
            return list(zip(kinds, self.step_seconds, strict=False))
        names = [
            next(iter(part)) if len(part) == 1 else f"cycle of {len(part)}"
            for part in (list(itertools.islice(kinds, count)) for count in self.device_cycles)
        ]
        return list(zip(names, self.cycle_seconds, strict=True))

    @property
    def token_seconds(self) -> list[float]:
        """Of each decode step; of a cycle that ran without the host each step has an even share."""
        if self.device_cycles is None:
            return self.step_seconds
        pairs = zip(self.cycle_seconds, self.device_cycles, strict=True)
        return [seconds / count for seconds, count in pairs for _ in range(count)]


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share q of all values does not exceed: always one that was measured."""
    return sorted(values)[max(0, math.ceil(q * len(values) - 1e-9) - 1)]


@dataclass(frozen=True)
class Tail:
    """Eq. 11 for one quantile: the kind of step it should be, and the kind whose median it is nearer to."""

    quantile: float
    measured_ms: float
    predicted: str
    nearer_to: str

    @property
    def holds(self) -> bool:
        return self.predicted == self.nearer_to


@dataclass(frozen=True)
class StepFigures:
    """One kind of step: median time, bytes moved on average, and how fast; `share` of the machine's bandwidth."""

    steps: int
    median_ms: float
    mean_bytes: float
    gb_per_second: float
    bandwidth_share: float | None


ChunkSeconds = Callable[[int, int], float]  # of a context, and so many tokens of one row behind it


@dataclass(frozen=True)
class Row:
    """A bundle under a window: medians over the repeats.

    Attributes:
        speedups: of each repeat, time per token of the full schedule over this one's.
        rho: of whole layers; of a plan with halves the largest that leaves LoRA steps no more to read.
        attention_share: share of all layers whose K/V LoRA steps leave out.
        noise: what the repeats differ by, largest minus smallest speed-up.
        own_speedup: from the medians of the request's own refreshes and LoRA steps: what drifts from request to request
            cancels out. None without both kinds, or where a refresh is more than a full step (backfill).
        ceiling: what the bytes of the request's own steps allow.
        kv_saved: share of the generated tokens' K/V that is not kept; `kv_saving` is what Eq. 16 says, of an adaptive
            schedule with its refreshes as counted, and `asymptotic` likewise Eq. 10,
            which says nothing where drafts are verified.
        over_peers: our tokens/s over a peer's, median over the repeats.
        schedule: `periodic`, or the adaptive one.
        refresh_share: of the steps, as counted.
        tokens_per_refresh: counted, where drafts are verified.
        operations_ceiling: of several rows whose refreshes run k + 1 tokens, what bytes and operations allow.
        timed: `steps`, one by one, or `cycles`, whole ones that the engine runs without the host. Then latencies are a
            cycle's time divided by its steps, and kinds of step are not told apart, but for k = 0.
    """

    bundle: str
    rho: float
    attention_share: float
    k: int | str
    context: int
    rows: int
    latency_ms: dict[str, float]
    tokens_per_second: float
    prefill_tokens_per_second: float
    first_token_ms: float
    kv_bytes: dict[str, int]
    kv_saved: float
    kv_saving: float
    overhead_share: float
    steps: dict[str, StepFigures]
    speedup: float
    speedups: list[float]
    noise: float
    own_speedup: float | None
    ceiling: float
    asymptotic: float | None
    tails: list[Tail]
    over_peers: dict[str, float]
    schedule: str = PERIODIC
    refresh_share: float = 1.0
    tokens_per_refresh: float | None = None
    operations_ceiling: float | None = None
    timed: str = "steps"

    @property
    def share(self) -> float:
        """Of the ceiling reached."""
        return self.speedup / self.ceiling

    @property
    def own_share(self) -> float | None:
        """The same of `own_speedup`."""
        return None if self.own_speedup is None else self.own_speedup / self.ceiling

    @property
    def gain_share(self) -> float | None:
        """Of the gain that the ceiling allows over 1; None where it allows none."""
        return (self.speedup - 1) / (self.ceiling - 1) if self.ceiling > 1 else None

    @property
    def above_ceiling(self) -> bool:
        return self.speedup - self.ceiling > self.noise


@dataclass(frozen=True)
class PeerRow:
    """A peer on one request: medians over the repeats."""

    name: str
    version: str | None
    built: str
    model_bytes: int
    context: int
    tokens_per_second: float
    p50_ms: float
    prefill_tokens_per_second: float
    pss: dict[str, int] | None


@dataclass(frozen=True)
class Memory:
    """A fresh process that has opened one bundle and answered one request under `k`; `pss` None: not measured."""

    bundle: str
    k: int | str
    request: Request
    pss: dict[str, int] | None


KEYS = ("command", "begun", "machine", "engine", "bundles", "rows", "raw")  # by which an earlier --json is known


@dataclass
class BenchResult:
    """Everything that was measured; `to_json` is what --json writes."""

    command: str
    begun: str
    machine: dict[str, Any]
    threads: int
    engine: str
    model: str
    weight_dtype: str
    bandwidth: Bandwidth | None
    repeats: int
    new_tokens: int
    bundles: dict[str, dict[str, Any]]
    policy: str = DEFAULT_POLICY
    draft: str = ""  # where drafts come from, under a policy that verifies them
    lenience: float = 1.0  # and how they are judged
    foreign_cores: float | None = None
    rows: list[Row] = field(default_factory=list)
    peer_rows: list[PeerRow] = field(default_factory=list)
    peers_left_out: dict[str, str] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        for row, entry in zip(self.rows, data["rows"], strict=True):
            entry["share_of_ceiling"], entry["own_share_of_ceiling"] = row.share, row.own_share
            entry["share_of_gain"] = row.gain_share
            for tail, written in zip(row.tails, entry["tails"], strict=True):
                written["holds"] = tail.holds
        return json.dumps(data, indent=1) + "\n"


def rotated(arms: Sequence[T], repeat: int) -> list[T]:
    """The order of the arms in a repeat: each begins once in as many repeats as there are arms."""
    first = repeat % len(arms)
    return [*arms[first:], *arms[:first]]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over the repeats of a ratio within each."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def tails_of(k: int, medians_ms: Mapping[str, float], quantiles_ms: Mapping[float, float]) -> list[Tail]:
    """Eq. 11 against measured quantiles, given the median of each kind of step."""
    return [
        Tail(
            q,
            value,
            (StepKind.REFRESH if costs.quantile_is_refresh(k, q) else StepKind.LORA).value,
            min(medians_ms, key=lambda kind: abs(medians_ms[kind] - value)),
        )
        for q, value in quantiles_ms.items()
    ]


def _figures_of_steps(
    seconds_of_runs: Sequence[Sequence[float]],
    kinds: Sequence[str],
    moved: Sequence[int],
    bandwidth: float | None,
    kinds_of_runs: Sequence[Sequence[str]] = (),
) -> dict[str, StepFigures]:
    """Figures of each kind of step, given the kind and the bytes of every step of the request.

    Where each run had its own kinds, times are sorted by `kinds_of_runs`.
    """
    figures = {}
    for kind in dict.fromkeys(kinds):
        own = [index for index in range(len(kinds)) if kinds[index] == kind]
        seconds = statistics.median(
            seconds[index]
            for seconds, own_kinds in zip(seconds_of_runs, kinds_of_runs or [kinds] * len(seconds_of_runs), strict=True)
            for index, one in enumerate(own_kinds)
            if one == kind
        )
        mean_bytes = statistics.fmean(moved[index] for index in own)
        rate = mean_bytes / seconds
        share = None if bandwidth is None else rate / bandwidth
        figures[kind] = StepFigures(len(own), 1000 * seconds, mean_bytes, rate / 1e9, share)
    return figures


@dataclass(frozen=True)
class _Steps:
    """Kinds of a request's steps, their bytes and their figures; what follows from them."""

    figures: dict[str, StepFigures]
    ceiling: float
    kv_saving: float
    asymptotic: float | None
    refresh_share: float = 1.0
    own_speedup: float | None = None
    tails: tuple[Tail, ...] = ()
    tokens_per_refresh: float | None = None


def _scheduled_steps(
    manifest: Manifest,
    k: int,
    request: Request,
    runs: Sequence[Run],
    bandwidth: float | None,
    policy: Policy,
    schedule: str,
    quantiles_ms: Mapping[float, float],
) -> _Steps:
    """Of a schedule that is known beforehand; of an adaptive one as the first run's steps were."""
    steps, periodic = request.new_tokens - 1, schedule == PERIODIC
    kinds = costs.periodic_kinds(steps, k) if periodic else [StepKind(kind) for kind in runs[0].kinds or ()]
    names, share = [kind.value for kind in kinds], kinds.count(StepKind.REFRESH) / steps
    moved = costs.bytes_of_steps(manifest, request.context, kinds, request.rows, policy)
    own_kinds = () if periodic else [run.kinds or names for run in runs]
    figures = _figures_of_steps([run.step_seconds for run in runs], names, moved, bandwidth, own_kinds)
    own_speedup = None
    if len(figures) > 1 and policy.refresh_tokens(k) == 1:
        mixed = sum(one.steps * one.median_ms for one in figures.values())
        own_speedup = steps * figures[StepKind.REFRESH.value].median_ms / mixed
    saving = costs.kv_saving(manifest, k, policy)
    if not periodic and policy.leaves_holes:
        saving = manifest.plan.attention_share * (1 - costs.entries_made(kinds, policy)[-1] / steps)
    medians_ms = {kind: one.median_ms for kind, one in figures.items()}
    both = manifest.plan.sites and len(figures) > 1 and periodic
    return _Steps(
        figures,
        costs.request_ceiling(manifest, request.context, steps, moved, request.rows),
        saving,
        costs.asymptotic_speedup(manifest, k if periodic else (1 - share) / max(share, 1 / steps)),
        share,
        own_speedup,
        tuple(tails_of(k, medians_ms, quantiles_ms)) if both else (),
    )


def _device_cycles(
    manifest: Manifest, k: int, request: Request, runs: Sequence[Run], bandwidth: float | None, policy: Policy
) -> _Steps:
    """Of cycles that ran without the host: what a cycle took, which is not split by the kinds of its steps."""
    steps, lengths = request.new_tokens - 1, runs[-1].device_cycles or []
    kinds = costs.periodic_kinds(steps, k)
    moved = costs.bytes_of_steps(manifest, request.context, kinds, request.rows, policy)
    ends = list(itertools.accumulate(lengths))
    names = [name for name, _ in runs[-1].timed_parts]
    of_cycles = [sum(moved[end - count : end]) for end, count in zip(ends, lengths, strict=True)]
    return _Steps(
        _figures_of_steps([run.cycle_seconds for run in runs], names, of_cycles, bandwidth),
        costs.request_ceiling(manifest, request.context, steps, moved, request.rows),
        costs.kv_saving(manifest, k, policy),
        costs.asymptotic_speedup(manifest, k),
        kinds.count(StepKind.REFRESH) / steps,
    )


def _verified_steps(manifest: Manifest, request: Request, runs: Sequence[Run], bandwidth: float | None) -> _Steps:
    """Of the cycles that were counted; of several repeats that differ the figures are the last one's, the ceiling the
    highest."""
    steps, cycles, seconds = request.new_tokens - 1, runs[-1].cycles or (), []
    waits = iter(runs[-1].step_seconds)
    for cycle in cycles:
        seconds.append(sum(itertools.islice(waits, max(cycle.made))))
    names = {count: f"refresh after {count}" for count in sorted({cycle.lora_steps for cycle in cycles})}
    kinds = [names[cycle.lora_steps] for cycle in cycles]
    moved = [costs.verified_bytes(manifest, request.context, run.cycles or ()) for run in runs]
    found = _figures_of_steps([seconds], kinds, moved[-1], bandwidth)
    figures = {name: found[name] for name in names.values()}
    ceilings = [costs.request_ceiling(manifest, request.context, steps, one, request.rows) for one in moved]
    tokens = statistics.median(Statistics(run.cycles or ()).tokens_per_refresh for run in runs)
    return _Steps(figures, max(ceilings), 0.0, None, tokens_per_refresh=tokens)


def make_row(
    name: str,
    manifest: Manifest,
    k: int | str,
    request: Request,
    runs: Sequence[Run],
    full: Sequence[Run],
    bandwidth: float | None,
    policy: Policy = POLICIES[DEFAULT_POLICY],
    schedule: str = PERIODIC,
    chunk_seconds: ChunkSeconds | None = None,
) -> Row:
    """What `runs` under k say, `full` being those of the full schedule in the same repeats.

    Args:
        chunk_seconds: times prompt chunks; asked where a batch runs several tokens of a row in its refreshes.
        bandwidth: bytes a second the machine reads, None where it does not apply.
        schedule: of an adaptive one what the bytes allow is computed from the kinds of steps in the first run; greedy
            runs are alike.
    """
    steps, rows = request.new_tokens - 1, request.rows
    quantiles_ms = {q: 1000 * statistics.median(quantile(run.token_seconds, q) for run in runs) for q in QUANTILES}
    most = k if isinstance(k, int) else MOST_DRAFTS
    if runs[-1].device_cycles is not None:
        own = _device_cycles(manifest, most, request, runs, bandwidth, policy)
    elif k == 0 or runs[-1].cycles is None:
        own = _scheduled_steps(manifest, most, request, runs, bandwidth, policy, schedule, quantiles_ms)
    else:
        own = _verified_steps(manifest, request, runs, bandwidth)
    operations = None
    several = policy.refresh_tokens(most) > 1 and not policy.verifies and schedule == PERIODIC
    has_room = request.context + rows * (most + 1) < manifest.limits.max_seq_len  # in one row
    if chunk_seconds is not None and rows > 1 and several and has_room:
        times = (chunk_seconds(request.context, rows * count) for count in (1, most + 1))
        operations = costs.operations_ceiling(manifest, request.context, most, rows, *times)
    speedups = [a.decode_seconds / b.decode_seconds for a, b in zip(full, runs, strict=True)]
    kv, kv_prompt = runs[-1].kv or {}, runs[-1].kv_prompt or {}
    grown = sum(kv.get(part, 0) - kv_prompt.get(part, 0) for part in ("kept", "dropped"))
    return Row(
        bundle=name,
        rho=costs.shares(manifest).rho,
        attention_share=manifest.plan.attention_share,
        k=k,
        context=request.context,
        rows=rows,
        latency_ms={f"p{100 * q:.0f}": value for q, value in quantiles_ms.items()},
        tokens_per_second=statistics.median(steps * rows / run.decode_seconds for run in runs),
        prefill_tokens_per_second=statistics.median(request.context * rows / run.prefill_seconds for run in runs),
        first_token_ms=1000 * statistics.median(run.prefill_seconds for run in runs),
        kv_bytes=kv,
        kv_saved=1 - grown / (rows * costs.kv_base_bytes(manifest, steps)),
        kv_saving=own.kv_saving,
        overhead_share=statistics.median(1 - sum(run.engine_seconds or []) / run.decode_seconds for run in runs),
        steps=own.figures,
        speedup=statistics.median(speedups),
        speedups=speedups,
        noise=max(speedups) - min(speedups),
        own_speedup=own.own_speedup,
        ceiling=own.ceiling,
        asymptotic=own.asymptotic,
        tails=list(own.tails),
        over_peers={},
        schedule=schedule,
        refresh_share=own.refresh_share,
        tokens_per_refresh=own.tokens_per_refresh,
        operations_ceiling=operations,
        timed=runs[-1].form,
    )
