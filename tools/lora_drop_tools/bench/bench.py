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
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import DEVICE_TARGETS
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import POLICIES, policy_named

from lora_drop_tools.bench.peers.options import PeerOptions, peer_options, peer_version
from lora_drop_tools.bench.peers.peer import Peer, open_peers, scratch_directory
from lora_drop_tools.shared import machine
from lora_drop_tools.shared.bundles import check_writable, open_bundles, weight_dtype

from .arms import Arm, Say, TimedSession, measure, peer_arm, session_arms
from .judge import MeasurementError, judge
from .memory import measure_memory
from .plots import write_plots
from .report import describe
from .requests import CONTEXTS, check, longest_prompt, prompts_of
from .result import BenchResult, Memory, PeerRow, Request, make_row, median_ratio, quantile


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
        ours += session_arms(name, TimedSession(session), windows)
    theirs = [peer_arm(peer) for peer in peers]
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
                    POLICIES[result.policy],
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
        contexts = sorted({min(context, longest_prompt(opened, new_tokens)) for context in CONTEXTS})
    requests = [Request(context, rows, new_tokens) for rows in batches for context in contexts]
    if not requests:
        raise InputError(
            "There is nothing to measure.", note="No context or no batch was given.", hint="Use --contexts 128."
        )
    check(opened, windows, requests, repeats)
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

    policy = policy_named(policy or manifest.plan.policy).name
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
        found = measure_memory(bundle, [windows[-1], 0], prompts, new_tokens, session_options)
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
    judge(result)

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
