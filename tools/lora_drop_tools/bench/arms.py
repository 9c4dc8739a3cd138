"""What is timed against what: a bundle's schedules, and peers, interleaved."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.engine import Engine
from lora_drop_runtime.engines.open import open_engine
from lora_drop_runtime.errors import DraftsDoNotPay
from lora_drop_runtime.plan.schedule import PERIODIC, AdaptiveSchedule, PeriodicSchedule, StepKind

from lora_drop_tools.bench.peers.peer import Peer, PeerError

from .requests import Ids
from .result import Request, Run, rotated

Say = Callable[[str], None]
CHUNK_REPEATS = 7
SETTLE_SECONDS = 0.05  # between two runs: threads that spin after their last work fall asleep


class TimedEngine:
    """An engine that notes the seconds of each run, and the kinds of its steps: one, or all of a whole cycle."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.run_seconds: list[float] = []
        self.last_kind = StepKind.REFRESH
        self.cycle_kinds: list[list[StepKind]] = []  # of each cycle that was read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prepare(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        step, seconds, clock = self._engine.prepare(kind, inputs, outputs), self.run_seconds, time.perf_counter

        def timed() -> None:
            begin = clock()
            step()
            seconds.append(clock() - begin)
            self.last_kind = kind

        return timed

    def cycle(self, *parts: Any) -> _TimedCycle:
        """Of an engine that runs whole cycles."""
        _, steps, _ = parts
        return _TimedCycle(self, self._engine.cycle(*parts), [step.kind for step in steps])

    def steps(self, several: bool) -> Any:
        """Of an engine whose caches are paged; as long-running processes have them."""
        if several:
            self._engine.prepare_for_several()
        return _TimedSteps(self, self._engine.steps(several))


class _TimedCycle:
    """A cycle of one request, noted by the engine: the seconds that the host begins it and waits for its tokens."""

    def __init__(self, engine: TimedEngine, cycle: Any, kinds: list[StepKind]) -> None:
        self._engine, self._cycle, self._kinds = engine, cycle, kinds

    def begin(self) -> None:
        self._cycle.begin()

    def run(self, count: int) -> None:
        begin = time.perf_counter()
        self._cycle.run(count)
        self._engine.run_seconds.append(time.perf_counter() - begin)

    def read(self, number: int) -> Any:
        begin = time.perf_counter()
        tokens = self._cycle.read(number)
        self._engine.run_seconds.append(time.perf_counter() - begin)
        self._engine.cycle_kinds.append(self._kinds[: len(tokens)])
        return tokens


class _TimedSteps:
    """Calls of one request, noted by the engine."""

    def __init__(self, engine: TimedEngine, steps: Any) -> None:
        self._engine, self._steps = engine, steps
        self._kind = StepKind.REFRESH

    def __getattr__(self, name: str) -> Any:
        return getattr(self._steps, name)

    def feed(self, kind: StepKind, *sizes: Any) -> Any:
        self._kind = kind
        return self._steps.feed(kind, *sizes)

    def run(self) -> None:
        begin = time.perf_counter()
        self._steps.run()
        self._engine.run_seconds.append(time.perf_counter() - begin)
        self._engine.last_kind = self._kind


@dataclass(frozen=True)
class SessionOptions:
    """How all sessions of a benchmark run; as for `Session.open`."""

    policy: str
    draft: str | None = None
    lenience: float | None = None
    target: str | None = None
    provider: str | None = None
    threads: int | None = None


class TimedSession:
    """A session whose engine notes its runs, and whose token loop runs whole batches. Use as a context manager."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        policy: str | None = None,
        draft: str | None = None,
        lenience: float | None = None,
    ) -> None:
        self._engine = TimedEngine(engine)
        self._chunks: dict[tuple[int, int], float] = {}
        schedule = PeriodicSchedule(bundle.manifest.plan.k)  # every request brings its own
        self.session = Session(bundle, cast("Engine", self._engine), schedule, policy, draft, lenience)

    @classmethod
    def open(cls, bundle: Bundle, options: SessionOptions) -> TimedSession:
        """Raises BundleError where the bundle cannot run here."""
        engine = open_engine(bundle, options.target, options.provider, options.threads)
        timed = cls(bundle, engine, options.policy, options.draft, options.lenience)
        if engine.warms_up:
            try:
                timed.session.warm_up()
            except BaseException:
                timed.session.close()
                raise
        return timed

    def __enter__(self) -> TimedSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def run(self, prompts: Ids, new_tokens: int, k: int | str | AdaptiveSchedule) -> Run:
        """One greedy request, prompts int64 [B, T]; end tokens are ignored."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DraftsDoNotPay)  # it stands in the report
            return self._run(prompts, new_tokens, k)

    def chunk_seconds(self, context: int, tokens: int) -> float:
        """The median time of a run of so many tokens of one row behind a prompt of `context`; measured once."""
        if (context, tokens) in self._chunks:
            return self._chunks[context, tokens]
        self.session.prefill(np.zeros((1, context), np.int64), max_new_tokens=tokens + 1, k=0)
        step = self.session._running().chunk(tokens)
        runs = self._engine.run_seconds
        runs.clear()
        for _ in range(CHUNK_REPEATS + 1):
            step()
        self._chunks[context, tokens] = statistics.median(runs[1:])  # the first run prepares
        return self._chunks[context, tokens]

    def _run(self, prompts: Ids, new_tokens: int, k: int | str | AdaptiveSchedule) -> Run:
        clock, runs = time.perf_counter, self._engine.run_seconds
        runs.clear()
        self._engine.cycle_kinds.clear()
        seconds: list[float] = []
        kinds: list[str] = []
        engine: list[float] = []  # of a step, which is several runs where rows are backfilled one by one
        kv_prompt: dict[str, int] = {}
        begin = clock()
        for _ in self.session._tokens(list(prompts), new_tokens, k, None, ()):
            seconds.append(clock() - begin)
            engine.append(sum(runs))
            kinds.append(self._engine.last_kind.value)
            runs.clear()
            if not kv_prompt:
                kv_prompt = self.session.kv_bytes()
            begin = clock()
        counted = self.session.statistics()
        cycles, note = (None, "") if counted is None else (counted.cycles, counted.note)
        kv = self.session.kv_bytes()
        on_device = self._engine.cycle_kinds
        if not on_device:
            return Run(seconds[0], seconds[1:], engine[1:], kv_prompt, kv, kinds[1:], cycles, note)
        kinds = [kind.value for cycle in on_device for kind in cycle]
        lengths = [len(cycle) for cycle in on_device]
        return Run(seconds[0], seconds[1:], engine[1:], kv_prompt, kv, kinds, device_cycles=lengths)


@dataclass(frozen=True)
class Arm:
    """Something that answers requests: a bundle under a schedule, or a peer (`bundle` is "" there)."""

    bundle: str
    k: int | str
    peer: str
    run: Callable[[Ids, int], Run]
    schedule: str = PERIODIC

    @property
    def label(self) -> str:
        return self.peer or f"{self.bundle} k={self.k}" + ("" if self.schedule == PERIODIC else f" {self.schedule}")


def measure(
    arms: Sequence[Arm], request: Request, prompts: Ids, repeats: int, say: Say, settle: float = SETTLE_SECONDS
) -> tuple[dict[int, list[Run]], dict[int, str]]:
    """Run all arms in turn within each repeat.

    Returns:
        Runs by the arm's index, one for each repeat, in order; and for an arm that failed the reason instead.
    """
    runs: dict[int, list[Run]] = {index: [] for index in range(len(arms))}
    failed: dict[int, str] = {}
    for repeat in range(repeats):
        speeds: dict[int, float] = {}
        for index in rotated(range(len(arms)), repeat):
            if index in failed:
                continue
            time.sleep(settle)
            try:
                run = arms[index].run(prompts, request.new_tokens)
            except PeerError as error:
                failed[index] = str(error)
                say(f"peer {arms[index].peer}: left out, {error}")
                continue
            runs[index].append(run)
            speeds[index] = request.rows * (request.new_tokens - 1) / run.decode_seconds
        shown = ", ".join(f"{arms[index].label} {speeds[index]:.1f}" for index in sorted(speeds))
        say(f"context {request.context}, batch {request.rows}, repeat {repeat + 1} of {repeats}, tokens/s: {shown}")
    return {index: own for index, own in runs.items() if index not in failed}, failed


def session_arms(name: str, timed: TimedSession, windows: Sequence[int | str | AdaptiveSchedule]) -> Iterator[Arm]:
    for k in windows:

        def run(prompts: Ids, new_tokens: int, k: int | str | AdaptiveSchedule = k) -> Run:
            return timed.run(prompts, new_tokens, k)

        yield Arm(name, k.k, "", run, k.name) if isinstance(k, AdaptiveSchedule) else Arm(name, k, "", run)


def peer_arm(peer: Peer) -> Arm:
    def run(prompts: Ids, new_tokens: int) -> Run:
        answer = peer.generate(prompts[0].tolist(), new_tokens)
        return Run(answer["prefill_seconds"], answer["step_seconds"])

    return Arm("", 0, peer.name, run)
