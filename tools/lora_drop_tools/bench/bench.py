"""`lora-drop bench`: what LoRA-Drop saves on this machine, held against what the equations allow.

Enters: bundles of one model, windows k, prompt lengths, batches; perhaps other runtimes. Leaves: a `BenchResult`, which
bench_report.py makes tables and figures of: every step's time, their quantiles, and medians over repeats of ratios.

All arms (a bundle under a window, or a peer) run in turn within each repeat, in an order that is rotated from repeat to
repeat, so that they see the same machine. A ratio is taken within a repeat. A step's time is what a caller of
`Session.stream` waits for a token: the choice of the token, the session's work and the engine's run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import DEVICE_TARGETS
from lora_drop_runtime.bundle.manifest import ModelFacts
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError, LoraDropError
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind
from lora_drop_runtime.text import TextCodec

from lora_drop_tools.bench.peers.peer import (
    Peer,
    PeerError,
    PeerOptions,
    open_peers,
    peer_options,
    peer_version,
    scratch_directory,
)
from lora_drop_tools.shared import machine

from .report import describe, write_plots
from .result import BenchResult, Memory, PeerRow, Request, Run, make_row, median_ratio, quantile, rotated

Ids = npt.NDArray[np.int64]
Say = Callable[[str], None]
QUANTIZED = ("int4", "int8")
CONTEXTS = (128, 2048)
FEWEST_CYCLES = 2  # in a request, for each k
OVERHEAD_TARGET = 0.03
LOAD_LIMIT = 0.5  # of the one-minute load average before the run
FOREIGN_LIMIT = 0.1  # cores that others keep busy during the run
MEMORY_LIMIT = 0.8  # share of the machine's memory that all arms together should take
SETTLE_SECONDS = 0.05  # between two runs: threads that spin after their last work fall asleep
TEXT = (
    "The harbour town wakes before the sun does. Boats come in with the tide, gulls follow them, and the first "
    "crates of fish are on the quay while the lamps still burn. Mara keeps the ledger: how many crates, from "
    "which boat, at what price, and who is to be paid on Friday. She writes small and quickly, because the wind "
    "turns the pages. At seven the baker opens; at eight the school bell rings; by nine the market is so loud "
    "that nobody hears the sea. When the crates are sold she adds the columns twice, once from the top and once "
    "from the bottom, and only if both sums agree does she close the book. Her father taught her that. A mistake, "
    "he used to say, does not mind being found, but it minds being found by somebody else. In the afternoon the "
    "town is quiet again. Nets are mended, ropes are tarred, and children count the ships on the horizon, which "
    "are always fewer than they hoped. "
)


class MeasurementError(LoraDropError):
    """A figure that cannot be true: something was measured wrongly, or the equations do not hold here."""

    exit_code = 1


# ── one request ────────────────────────────────────────────────────────────────────────────────────────────────


class TimedEngine:
    """An engine that notes the seconds of each run."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.run_seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prepare(self, kind: StepKind, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        step, seconds, clock = self._engine.prepare(kind, inputs, outputs), self.run_seconds, time.perf_counter

        def timed() -> None:
            begin = clock()
            step()
            seconds.append(clock() - begin)

        return timed


class TimedSession:
    """The one place that looks inside a session: its engine is wrapped, and its token loop runs whole batches."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._engine = TimedEngine(session._engine)
        session._engine = self._engine

    def run(self, prompts: Ids, new_tokens: int, k: int) -> Run:
        """One greedy request, prompts int64 [B, T]; end tokens are ignored."""
        clock, runs = time.perf_counter, self._engine.run_seconds
        runs.clear()
        seconds: list[float] = []
        engine: list[float] = []  # of a step, which is several runs where rows are backfilled one by one
        kv_prompt: dict[str, int] = {}
        begin = clock()
        for _ in self.session._tokens(list(prompts), new_tokens, k, None, ()):
            seconds.append(clock() - begin)
            engine.append(sum(runs))
            runs.clear()
            if not kv_prompt:
                kv_prompt = self.session.kv_bytes()
            begin = clock()
        return Run(seconds[0], seconds[1:], engine[1:], kv_prompt, self.session.kv_bytes())


def report_memory(argument: str) -> None:
    """The body of the process that `Memory` is about; prints what it found as JSON."""
    options = json.loads(argument)
    ids = np.array(options["prompts"], np.int64)
    found = []
    with Session.open(options["bundle"], **options["session"]) as session:
        timed = TimedSession(session)
        for k in options["windows"]:
            timed.run(ids, options["new_tokens"], k)
            found.append({"k": k, "pss": machine.pss_bytes()})
    print(json.dumps(found))


def _measure_memory(bundle: Bundle, windows: Sequence[int], prompts: Ids, new_tokens: int, session: Any) -> Any:
    options = {
        "bundle": str(bundle.root),
        "windows": list(windows),
        "prompts": prompts.tolist(),
        "new_tokens": new_tokens,
        "session": session,
    }
    code = "import sys; from lora_drop_tools.bench import report_memory; report_memory(sys.stdin.read())"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(options), capture_output=True, text=True)
    if done.returncode:
        raise InputError(
            "The process that measures the memory failed.",
            note=(done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1],
            hint="Run the bundle with: lora-drop generate",
        )
    return json.loads(done.stdout.splitlines()[-1])


def prompts_of(bundle: Bundle, context: int, rows: int) -> Ids:
    """Prompts int64 [rows, context]: this module's text, again and again, from another place in each row.

    Without a tokenizer random ids, the same ones each time.
    """
    directory = bundle.root / "tokenizer"
    if (directory / "tokenizer.json").is_file():
        ids = TextCodec.open(directory).encode(TEXT)
    else:
        ids = np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, 256)
    return np.stack([np.resize(np.roll(ids, -11 * row), context) for row in range(rows)]).astype(np.int64)


# ── what is asked for ──────────────────────────────────────────────────────────────────────────────────────────


def open_bundles(paths: Sequence[str | Path]) -> dict[str, Bundle]:
    """Bundles by a short name each; they must be of one model with weights of one kind."""
    if not paths:
        raise InputError("There is no bundle to measure.", note="None was given.", hint="Give at least one.")
    opened = [Bundle.open(path) for path in paths]
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    bundles = dict(zip(names, opened, strict=True))
    if len(bundles) < len(opened):
        raise InputError("A bundle is given twice.", note=", ".join(names) + ".", hint="Give each once.")
    first = opened[0].manifest.model
    for name, bundle in bundles.items():
        model = bundle.manifest.model
        if model.fingerprint != first.fingerprint or weight_dtype(model) != weight_dtype(first):
            raise InputError(
                "The bundles are not of one model.",
                note=f"{names[0]} holds {first.name} in {weight_dtype(first)}, {name} holds {model.name} in "
                f"{weight_dtype(model)}" + (", another model's weights." if model.name == first.name else "."),
                hint="Give bundles of one checkpoint and one dtype, with different drop lists.",
            )
    return bundles


def weight_dtype(model: ModelFacts) -> str:
    """How a bundle stores the weights of its matrices; caches and activations have the model's `dtype`."""
    stored = getattr(model, "weight_dtype", model.dtype)
    return str(stored) if stored in QUANTIZED else model.dtype


def _longest_prompt(bundles: Mapping[str, Bundle], new_tokens: int) -> int:
    """Tokens that all bundles take before `new_tokens` more; at least 1, which `_check` may refuse."""
    limits = [bundle.manifest.limits for bundle in bundles.values()]
    return max(1, min(min(one.max_prompt_len, one.max_seq_len - new_tokens) for one in limits))


def _check(bundles: Mapping[str, Bundle], windows: Sequence[int], requests: Sequence[Request], repeats: int) -> None:
    """Refuse before any work what would fail or mean nothing after minutes.

    Raises:
        InputError: k, context, batch, new tokens or repeats out of range, or more than a bundle allows.
    """
    if repeats < 2:
        raise InputError(
            "There are too few repeats.",
            note=f"--repeats is {repeats}; the noise is what repeats differ by, so it takes 2.",
            hint="Use for example --repeats 5.",
        )
    for k in windows:
        PeriodicSchedule(k)
    for request in requests:
        if request.context < 1 or request.rows < 1:
            raise InputError(
                "A prompt length or batch is out of range.",
                note=f"{request.context} tokens in {request.rows} rows were asked for, the smallest is 1.",
                hint="Use for example --contexts 128,2048 --batches 1.",
            )
        longest = max(windows)
        needed = FEWEST_CYCLES * (longest + 1) + 1
        if request.new_tokens < needed:
            raise InputError(
                "There are too few new tokens to measure.",
                note=f"--new-tokens is {request.new_tokens}; {FEWEST_CYCLES} cycles of k = {longest} take {needed}.",
                hint=f"Use at least --new-tokens {needed}, or a smaller --k.",
            )
        for name, bundle in bundles.items():
            limits = bundle.manifest.limits
            total = request.context + request.new_tokens
            for what, value, limit, option in (
                ("prompts of", request.context, limits.max_prompt_len, "--max-prompt-len"),
                ("sequences of", total, limits.max_seq_len, "--max-seq-len"),
                ("batches of", request.rows, limits.max_batch, "--max-batch"),
            ):
                if value > limit:
                    raise InputError(
                        "The bundle does not allow what is to be measured.",
                        note=f"It takes {what} {value}, {name} allows {limit}.",
                        hint=f"Ask for less, or export with a larger {option}.",
                    )


def check_writable(json_file: str | Path | None, plots: str | Path | None) -> None:
    """Refuse before any work what could not be written after it."""
    if plots is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "Figures need matplotlib.",
            note="--plots was given, and matplotlib is not installed.",
            hint="pip install 'lora-drop-export[bench]', or leave --plots out.",
        )
    try:
        if plots is not None:
            Path(plots).mkdir(parents=True, exist_ok=True)
        if json_file is not None:
            with Path(json_file).open("a"):
                pass
    except OSError as error:
        raise InputError(
            "The results cannot be written.",
            note=f"{error.filename}: {error.strerror}.",
            hint="Give another --json or --plots.",
        ) from None


# ── the run ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Arm:
    """Something that answers requests: a bundle under a window, or a peer (`bundle` is "" there)."""

    bundle: str
    k: int
    peer: str
    run: Callable[[Ids, int], Run]

    @property
    def label(self) -> str:
        return self.peer or f"{self.bundle} k={self.k}"


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
                continue
            runs[index].append(run)
            speeds[index] = request.rows * len(run.step_seconds) / run.decode_seconds
        shown = ", ".join(f"{arms[index].label} {speeds[index]:.1f}" for index in sorted(speeds))
        say(f"context {request.context}, batch {request.rows}, repeat {repeat + 1} of {repeats}, tokens/s: {shown}")
    return {index: own for index, own in runs.items() if index not in failed}, failed


def _session_arms(name: str, timed: TimedSession, windows: Sequence[int]) -> Iterator[Arm]:
    for k in windows:

        def run(prompts: Ids, new_tokens: int, k: int = k) -> Run:
            return timed.run(prompts, new_tokens, k)

        yield Arm(name, k, "", run)


def _peer_arm(peer: Peer) -> Arm:
    def run(prompts: Ids, new_tokens: int) -> Run:
        answer = peer.generate(prompts[0].tolist(), new_tokens)
        return Run(answer["prefill_seconds"], answer["step_seconds"])

    return Arm("", 0, peer.name, run)


def bench(
    bundles: Sequence[str | Path] | str | Path,
    *,
    k: Sequence[int] = (1, 3, 5),
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    new_tokens: int = 64,
    policy: str | None = None,
    repeats: int = 5,
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    peers: Sequence[str] | None = None,
    model: str | Path | Sequence[str | Path] | None = None,
    peer_cache: str | Path | None = None,
    peer_python: Sequence[str] = (),
    json_file: str | Path | None = None,
    plots: str | Path | None = None,
    out: TextIO | None = None,
) -> BenchResult:
    """Measure bundles of one model under several windows, print tables, and hold them against the equations.

    Args:
        bundles: directories; several with different drop lists show what ρ does.
        k: windows; 0, the full schedule, is always measured too.
        contexts: tokens of the prompts; 128 and 2048 when None, or as many of them as all bundles allow.
        batches: rows of a request.
        new_tokens: of each row; the first comes from the prefill, so there is one step less.
        policy: of the refreshes; the first bundle's when None.
        repeats: how often each arm runs; at least 2.
        target, provider: as for `Session.open`.
        threads: of ONNX Runtime, the peers and the bandwidth measurement; one per physical core when None.
        peers: other runtimes to measure in the same run, at batch 1; empty for all of them, None for none.
        model: what the peers load: a Hugging Face directory, a .gguf file, or one of each.
        peer_cache: where what peers build from it is kept; a temporary directory when None.
        peer_python: `NAME=PATH`, the Python that a peer is installed in, where it is not this one.
        json_file: gets all figures, every step's time among them.
        plots: a directory for figures; needs matplotlib.
        out: where the tables go, standard output when None.

    Raises:
        InputError: an option out of range, bundles of different models, nothing for the peers to load.
        BundleError: a bundle is damaged or cannot run here.
        MeasurementError: a speed-up above its ceiling by more than the noise; everything is written before.
    """
    paths = [bundles] if isinstance(bundles, (str, Path)) else list(bundles)
    opened = open_bundles(paths)
    windows = sorted({0, *k})
    if contexts is None:
        contexts = sorted({min(context, _longest_prompt(opened, new_tokens)) for context in CONTEXTS})
    requests = [Request(context, rows, new_tokens) for rows in batches for context in contexts]
    if not requests:
        raise InputError(
            "There is nothing to measure.", note="No context or no batch was given.", hint="Use --contexts 128."
        )
    _check(opened, windows, requests, repeats)
    manifest = next(iter(opened.values())).manifest
    target_name, *_ = [bundle.target(target)[0] for bundle in opened.values()]
    on_cpu = provider == "cpu" or (provider is None and target_name not in DEVICE_TARGETS)
    wanted: PeerOptions | None = None
    if peers is not None:
        wanted = peer_options(peers, model, peer_cache, peer_python)
        if not on_cpu:
            raise InputError(
                "The peers run on the CPU.",
                note=f"The bundle would run on {provider or target_name}.",
                hint="Leave --peers out, or use --provider cpu.",
            )
    check_writable(json_file, plots)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    policy = policy or manifest.plan.policy
    session_options = {"policy": policy, "target": target, "provider": provider, "threads": threads}
    used_threads = threads or machine.physical_cores()
    result = BenchResult(
        command=" ".join(sys.argv),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine.machine_facts(),
        threads=used_threads,
        engine=target_name + (f" on {provider}" if provider else ""),
        model=manifest.model.name,
        weight_dtype=weight_dtype(manifest.model),
        bandwidth=None,
        repeats=repeats,
        new_tokens=new_tokens,
        policy=policy,
        bundles={
            name: {"path": str(bundle.root), "drop_layers": list(bundle.manifest.plan.drop_layers)}
            for name, bundle in opened.items()
        },
        load_before=machine.load_average(),
    )
    if on_cpu:
        result.bandwidth = machine.read_bandwidth(used_threads)
        say(f"read bandwidth: {result.bandwidth.describe()}")
    largest = max(requests, key=lambda request: (request.context * request.rows, request.rows))
    for name, bundle in opened.items():
        say(f"memory of {name}: a process of its own")
        prompts = prompts_of(bundle, largest.context, largest.rows)
        found = _measure_memory(bundle, [windows[-1], 0], prompts, new_tokens, session_options)
        result.memory += [Memory(name, entry["k"], largest, entry["pss"]) for entry in found]

    with contextlib.ExitStack() as stack:
        ready: list[Peer] = []
        if wanted is not None:
            scratch = Path(stack.enter_context(scratch_directory()))
            if wanted.cache is None:
                say(f"what the peers build goes to {scratch} and is removed at the end; --peer-cache keeps it")
            longest = max(request.context for request in requests)
            prompt = prompts_of(next(iter(opened.values())), longest, 1)[0].tolist()
            ready, result.peers_left_out = open_peers(
                wanted, result.weight_dtype, used_threads, prompt, new_tokens, scratch, say
            )
        for peer in ready:
            stack.callback(peer.close)
        _measure_all(result, opened, windows, requests, ready, session_options, stack, say)
    result.load_after = machine.load_average()
    _judge(result)

    if json_file is not None:
        Path(json_file).write_text(result.to_json())
    if plots is not None:
        write_plots(result, Path(plots))
    print("\n".join(describe(result)), file=out or sys.stdout)
    if result.problems:
        raise MeasurementError(
            "A speed-up is above what the bytes allow.",
            note=" ".join(result.problems),
            hint="Measure again on an idle machine with more --repeats. If it stays, the step's time does not go with "
            "its bytes: look at the GB/s of both kinds of step.",
        )
    return result


def _measure_all(
    result: BenchResult,
    bundles: Mapping[str, Bundle],
    windows: Sequence[int],
    requests: Sequence[Request],
    peers: Sequence[Peer],
    session_options: Mapping[str, Any],
    stack: contextlib.ExitStack,
    say: Say,
) -> None:
    """Fill in rows, raw figures and how busy others were."""
    first = next(iter(bundles.values()))
    ours: list[Arm] = []
    for name, bundle in bundles.items():
        session = stack.enter_context(Session.open(bundle.root, **session_options))
        ours += _session_arms(name, TimedSession(session), windows)
    theirs = [_peer_arm(peer) for peer in peers]
    running = {peer.name: peer for peer in peers}
    largest = max(requests, key=lambda request: request.context * request.rows)
    say("warming up")
    for arm in ours:
        arm.run(prompts_of(first, largest.context, largest.rows), max(windows) + 3)
    begin = machine.cpu_time(peer.pid for peer in peers)
    for request in requests:
        arms = ours + [arm for arm in theirs if arm.peer not in result.peers_left_out and request.rows == 1]
        prompts = prompts_of(first, request.context, request.rows)
        runs, failed = measure(arms, request, prompts, result.repeats, say)
        result.peers_left_out |= {arms[index].peer: reason for index, reason in failed.items()}
        by_peer = {arms[index].peer: own for index, own in runs.items() if arms[index].peer}
        full = {arms[index].bundle: own for index, own in runs.items() if not arms[index].peer and not arms[index].k}
        rate = None if result.bandwidth is None else result.bandwidth.bytes_per_second
        for index, own in runs.items():
            arm = arms[index]
            result.raw.append(
                {"bundle": arm.bundle, "k": arm.k, "peer": arm.peer, "request": dataclasses.asdict(request)}
                | {"runs": [dataclasses.asdict(run) for run in own]}
            )
            if not arm.peer:
                row = make_row(
                    arm.bundle,
                    bundles[arm.bundle].manifest,
                    arm.k,
                    request,
                    own,
                    full[arm.bundle],
                    rate,
                    result.policy,
                )
                for name, other in by_peer.items():
                    row.over_peers[name] = median_ratio(
                        [run.decode_seconds for run in other], [run.decode_seconds for run in own]
                    )
                result.rows.append(row)
        for name, own in by_peer.items():
            steps = request.new_tokens - 1
            result.peer_rows.append(
                PeerRow(
                    name=name,
                    version=peer_version(name),
                    built=running[name].built,
                    model_bytes=running[name].model_bytes,
                    context=request.context,
                    tokens_per_second=statistics.median(steps / run.decode_seconds for run in own),
                    p50_ms=1000 * statistics.median(quantile(run.step_seconds, 0.5) for run in own),
                    prefill_tokens_per_second=statistics.median(request.context / run.prefill_seconds for run in own),
                    pss=running[name].pss,
                )
            )
    alive = [peer.pid for peer in peers if peer.name not in result.peers_left_out]
    if len(alive) == len(peers):  # one that has gone took its processor time with it
        result.foreign_cores = machine.foreign_cores(begin, machine.cpu_time(alive))


def _judge(result: BenchResult) -> None:
    """Warnings about the machine, and the figures that cannot be true."""
    load = result.load_before
    if load is not None and load[0] > LOAD_LIMIT:
        result.warnings.append(
            f"The load average was {load[0]:.2f} before the run: something else was running, so measure again when "
            f"it is below {LOAD_LIMIT}."
        )
    if result.foreign_cores is not None and result.foreign_cores > FOREIGN_LIMIT:
        result.warnings.append(
            f"Other processes kept {result.foreign_cores:.2f} cores busy while it was measured: the figures are noisy."
        )
    held = {one.bundle: one.pss for one in result.memory} | {row.name: row.pss for row in result.peer_rows}
    total, memory = sum(pss["total"] for pss in held.values() if pss), result.machine["memory_bytes"]
    if memory and total > MEMORY_LIMIT * memory:
        result.warnings.append(
            f"Bundles and peers held {total / 1e9:.1f} GB together, of {memory / 1e9:.1f}: weights may have been read "
            "from disk. Measure fewer at a time."
        )
    for row in result.rows:
        what = f"{row.bundle} (ρ {row.rho:.2f}, k = {row.k}, context {row.context}, batch {row.rows})"
        if row.overhead_share > OVERHEAD_TARGET:
            result.warnings.append(
                f"{what}: {row.overhead_share:.1%} of a step is not the engine's, more than {OVERHEAD_TARGET:.0%}."
            )
        if row.above_ceiling:
            result.problems.append(
                f"{what}: {row.speedup:.3f}× is above the ceiling of {row.ceiling:.3f}× by more than the repeats "
                f"differ by, {row.noise:.3f}."
            )
