"""`lora-drop bench`: what LoRA-Drop saves on this machine, held against what the equations allow.

Enters: bundles of one model, windows k, prompt lengths, batches; perhaps other runtimes. Leaves: a `BenchResult`, which
report.py makes tables and figures of: every step's time, their quantiles, and medians over repeats of ratios.

All arms (a bundle under a window, or a peer) run in turn within each repeat, in an order that is rotated from repeat to
repeat, so that they see the same machine. A ratio is taken within a repeat. A step's time is what a caller of
`Session.stream` waits for a token: the choice of the token, the session's work and the engine's run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import ModelFacts
from lora_drop_runtime.command_line import tell
from lora_drop_runtime.decoding.schedules import named_schedule
from lora_drop_runtime.engines import huge_pages
from lora_drop_runtime.engines.threads import default_threads
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drafting import draft_source, scheduled
from lora_drop_runtime.plan.policy import POLICIES, policy_named
from lora_drop_runtime.plan.schedule import AdaptiveSchedule

from lora_drop_tools.bench.peers.options import PeerOptions, check_named, check_same_model, peer_options, reason_against
from lora_drop_tools.bench.peers.peer import Peer, open_peers, scratch_directory
from lora_drop_tools.shared import machine
from lora_drop_tools.shared.bundles import check_session, open_bundles, paths_of, weight_dtype
from lora_drop_tools.shared.results import check_results, said_command, then_shown, write_json

from .arms import Arm, SessionOptions, TimedSession, measure, peer_arm, session_arms
from .judge import MeasurementError, judge
from .memory import measure_memory
from .plots import FIGURES, write_plots
from .report import describe
from .requests import prompts_of, requests_of
from .result import KEYS, BenchResult, PeerRow, Request, Run, make_row, median_ratio, quantile
from .settings import BenchSettings


def _peer_row(peer: Peer, request: Request, runs: Sequence[Run]) -> PeerRow:
    steps = request.new_tokens - 1
    return PeerRow(
        name=peer.name,
        version=peer.version,
        built=peer.built,
        model_bytes=peer.model_bytes,
        context=request.context,
        tokens_per_second=statistics.median(steps / run.decode_seconds for run in runs),
        p50_ms=1000 * statistics.median(quantile(run.step_seconds, 0.5) for run in runs),
        prefill_tokens_per_second=statistics.median(request.context / run.prefill_seconds for run in runs),
        pss=peer.pss,
    )


def _measure_request(
    result: BenchResult,
    request: Request,
    arms: Sequence[Arm],
    bundles: Mapping[str, Bundle],
    peers: Sequence[Peer],
    sessions: Mapping[str, TimedSession],
) -> None:
    """Run one request on all arms and fill in their rows and raw figures."""
    prompts = prompts_of(next(iter(bundles.values())), request.context, request.rows)
    runs, failed = measure(arms, request, prompts, result.repeats, tell)
    result.peers_left_out |= {arms[index].peer: reason for index, reason in failed.items()}
    by_peer = {arms[index].peer: own for index, own in runs.items() if arms[index].peer}
    full = {arms[index].bundle: own for index, own in runs.items() if not arms[index].peer and not arms[index].k}
    rate = None if result.bandwidth is None else result.bandwidth.bytes_per_second
    for index, own in runs.items():
        arm = arms[index]
        result.raw.append(
            {"bundle": arm.bundle, "k": arm.k, "schedule": arm.schedule, "peer": arm.peer}
            | {"request": dataclasses.asdict(request)}
            | {"runs": [dataclasses.asdict(run) for run in own]}
        )
        if not arm.peer:
            manifest, policy = bundles[arm.bundle].manifest, POLICIES[result.policy]
            result.warnings += [f"{arm.label}: {note}." for note in {run.note for run in own} if note]
            chunk_seconds = sessions[arm.bundle].chunk_seconds
            row = make_row(
                arm.bundle, manifest, arm.k, request, own, full[arm.bundle], rate, policy, arm.schedule, chunk_seconds
            )
            for name, other in by_peer.items():
                row.over_peers[name] = median_ratio(
                    [run.decode_seconds for run in other], [run.decode_seconds for run in own]
                )
            result.rows.append(row)
    result.peer_rows += [_peer_row(peer, request, by_peer[peer.name]) for peer in peers if peer.name in by_peer]


def _measure_all(
    result: BenchResult,
    bundles: Mapping[str, Bundle],
    windows: Mapping[str, Sequence[int | str | AdaptiveSchedule]],
    requests: Sequence[Request],
    peers: Sequence[Peer],
    options: SessionOptions,
) -> None:
    """Fill in rows, raw figures and how busy others were."""
    with contextlib.ExitStack() as stack:
        ours: list[Arm] = []
        sessions: dict[str, TimedSession] = {}
        for name, bundle in bundles.items():
            sessions[name] = stack.enter_context(TimedSession.open(bundle, options))
            ours += session_arms(name, sessions[name], windows[name])
        theirs = [peer_arm(peer) for peer in peers]
        largest = max(requests, key=lambda request: request.context * request.rows)
        tell("warming up")
        for arm in ours:
            longest = max(one.k for one in ours if isinstance(one.k, int))
            # A cycle that runs on the device is captured when it comes for the second time
            warm = 2 * (longest + 1) + 1
            arm.run(prompts_of(next(iter(bundles.values())), largest.context, largest.rows), warm)
        huge_pages.settle()
        begin = machine.cpu_time(peer.pid for peer in peers)
        for request in requests:
            arms = ours + [arm for arm in theirs if arm.peer not in result.peers_left_out and request.rows == 1]
            _measure_request(result, request, arms, bundles, peers, sessions)
        alive = [peer.pid for peer in peers if peer.name not in result.peers_left_out]
        if len(alive) == len(peers):  # one that has gone took its processor time with it
            result.foreign_cores = machine.foreign_cores(begin, machine.cpu_time(alive))


def _wanted_peers(settings: BenchSettings, on_cpu: bool, engine: str, model: ModelFacts) -> PeerOptions | None:
    """The peers that were asked for, checked; None without --peers."""
    if settings.peers is None:
        return None
    wanted = peer_options(settings.peers, settings.model, settings.peer_cache, settings.peer_python)
    if not on_cpu:
        raise InputError(
            "The peers run on the CPU.",
            note=f"The bundle would run on {engine}.",
            hint="Leave --peers out, or use --provider cpu.",
        )
    check_same_model(wanted, model)
    check_named(wanted, {name: reason_against(name, wanted, weight_dtype(model)) for name in wanted.names})
    return wanted


@contextlib.contextmanager
def _running_peers(
    wanted: PeerOptions | None, result: BenchResult, longest_prompt: Sequence[int]
) -> Iterator[Sequence[Peer]]:
    """The peers that are ready; the result gets the reason for every other."""
    if wanted is None:
        yield ()
        return
    with scratch_directory() as scratch, contextlib.ExitStack() as stack:
        if wanted.cache is None:
            tell(f"what the peers build goes to {scratch} and is removed at the end; --peer-cache keeps it")
        ready, result.peers_left_out = open_peers(
            wanted, result.weight_dtype, result.threads, longest_prompt, result.new_tokens, Path(scratch), stack, tell
        )
        yield ready


def _new_result(bundles: Mapping[str, Bundle], settings: BenchSettings, target: str) -> BenchResult:
    """What is known before anything is measured."""
    manifest = next(iter(bundles.values())).manifest
    policy = policy_named(settings.policy or manifest.plan.policy)
    source = draft_source(settings.draft, policy, len(manifest.plan.sites), settings.lenience)
    return BenchResult(
        command=said_command(sys.argv),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine.machine_facts(),
        threads=settings.threads or default_threads(),
        engine=target + (f" on {settings.provider}" if settings.provider else ""),
        model=manifest.model.name,
        weight_dtype=weight_dtype(manifest.model),
        bandwidth=None,
        repeats=settings.repeats,
        new_tokens=settings.new_tokens,
        policy=policy.name,
        draft=source.name if policy.verifies else "",
        lenience=source.lenience,
        bundles={name: {"sites": list(bundle.manifest.plan.sites)} for name, bundle in bundles.items()},
    )


def _finish(result: BenchResult, settings: BenchSettings, out: TextIO | None) -> None:
    """Write and print everything.

    Raises:
        MeasurementError: after that, where a figure cannot be true or a peer that was named ended early.
    """
    lines = describe(result)
    with then_shown(lambda: print("\n".join(lines), file=out or sys.stdout)):
        if settings.json_file is not None:
            write_json(settings.json_file, result.to_json(), KEYS)
        if settings.plots is not None:
            write_plots(result, settings.plots)
    if result.problems:
        raise MeasurementError(
            "A speed-up is above what the bytes allow.",
            note=" ".join(result.problems),
            hint="Measure again on an idle machine with more --repeats. If it stays, the step's time does not go with "
            "its bytes: look at the GB/s of both kinds of step.",
        )
    if settings.peers and result.peers_left_out:
        raise MeasurementError(
            "A peer that was named ended before it was measured.",
            note="; ".join(f"{name}: {reason}" for name, reason in result.peers_left_out.items()) + ".",
            hint="The rest stands above. Leave it out of --peers, or try a smaller --contexts.",
        )


def _windows(
    bundles: Mapping[str, Bundle], settings: BenchSettings
) -> Mapping[str, Sequence[int | str | AdaptiveSchedule]]:
    """The windows of the periodic schedule, and the adaptive schedules as each bundle was calibrated for them.

    Raises:
        InputError: it was not, or for another policy, or there are too few new tokens for their cycles.
    """
    found: dict[str, list[int | str | AdaptiveSchedule]] = {}
    for name, bundle in bundles.items():
        found[name] = [*settings.windows]
        policy = settings.policy or bundle.manifest.plan.policy
        for schedule in settings.schedules:
            one, _ = named_schedule(bundle.manifest, schedule, None, policy)
            if isinstance(one, AdaptiveSchedule):
                settings.check_cycles(one.k)
                found[name].append(one)
    return found


def _check_alike(bundles: Mapping[str, Bundle], settings: BenchSettings) -> None:
    """Refuse what cannot run all bundles, and targets and policies of theirs of which none was chosen."""
    for bundle in bundles.values():
        check_session(bundle, settings.target, settings.provider, settings.threads, [settings.policy])
    targets = {name: bundle.target(settings.target)[0] for name, bundle in bundles.items()}
    if len(set(targets.values())) > 1:
        raise InputError(
            "The bundles would run on different targets.",
            note=f"{', '.join(f'{name} runs on {target}' for name, target in targets.items())}.",
            hint="Choose one that all have with --target.",
        )
    policies = {name: bundle.manifest.plan.policy for name, bundle in bundles.items()}
    if settings.policy is None and len(set(policies.values())) > 1:
        raise InputError(
            "The bundles have different policies.",
            note=f"{', '.join(f'{name} has {policy}' for name, policy in policies.items())}.",
            hint="Choose the one that all are measured under with --policy.",
        )
    for bundle in bundles.values():
        policy = policy_named(settings.policy or bundle.manifest.plan.policy)
        draft_source(settings.draft, policy, len(bundle.manifest.plan.sites), settings.lenience)
        for k in settings.windows:
            scheduled(k, policy)


def bench(
    bundles: Sequence[str | Path] | str | Path, settings: BenchSettings, *, out: TextIO | None = None
) -> BenchResult:
    """Measure bundles of one model under several windows, print tables, and hold them against the equations.

    Args:
        bundles: directories; several with different drop lists show what ρ does.
        out: where the tables go, standard output when None.

    Raises:
        InputError: bundles of different models, more than they allow, nothing for the peers to load, or one that was
            named cannot take part.
        BundleError: a bundle is damaged or cannot run here.
        MeasurementError: a speed-up above its ceiling by more than the noise; everything is written before.
    """
    opened = open_bundles(paths_of(bundles))
    _check_alike(opened, settings)
    windows = _windows(opened, settings)
    requests = requests_of(opened, settings)
    first = next(iter(opened.values()))
    (target, entry), *_ = [bundle.target(settings.target) for bundle in opened.values()]
    on_cpu = settings.provider == "cpu" or (settings.provider is None and not entry.on_device)
    wanted = _wanted_peers(settings, on_cpu, settings.provider or target, first.manifest.model)
    check_results(settings.json_file, KEYS, settings.plots, FIGURES)

    result = _new_result(opened, settings, target)
    options = SessionOptions(
        result.policy, settings.draft, settings.lenience, settings.target, settings.provider, settings.threads
    )
    if on_cpu:
        result.bandwidth = machine.read_bandwidth(result.threads)
        tell(f"read bandwidth: {result.bandwidth.describe()}")
    largest = max(requests, key=lambda request: (request.context * request.rows, request.rows))
    for name, bundle in opened.items():
        tell(f"memory of {name}: a process of its own")
        prompts = prompts_of(bundle, largest.context, largest.rows)
        result.memory += measure_memory(
            name, bundle, [*dict.fromkeys((settings.windows[-1], 0))], largest, prompts, options
        )
    longest = max(request.context for request in requests)
    prompt = prompts_of(first, longest, 1)[0].tolist()
    with _running_peers(wanted, result, prompt) as peers:
        _measure_all(result, opened, windows, requests, peers, options)
    judge(result)
    _finish(result, settings, out)
    return result
