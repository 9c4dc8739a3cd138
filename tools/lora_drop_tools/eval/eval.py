"""`lora-drop eval`: what LoRA-Drop costs in quality, against the full schedule of the same bundle.

Enters: bundles of one model, windows k, refresh policies; a text, tasks of lm-eval, or both. Leaves: an
`EvalResult`, which report.py makes tables and figures of: perplexity, agreement and KL at each place of the cycle,
metrics of tasks, each with its interval and its difference to k = 0 on the same items.

Everything goes through the runtime, one decode step for each token (scoring.py says how that is scored). Items are
a seeded subset; one that is larger contains the smaller. With `--out`, what was measured is kept item by item: the
same command goes on where it was cut off, and one with more items, tasks or windows k measures only what is new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.command_line import refuse_unused, tell
from lora_drop_runtime.decoding.schedules import named_schedule
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drafting import draft_source, said_policy
from lora_drop_runtime.plan.policy import POLICIES, Policy
from lora_drop_runtime.plan.schedule import PERIODIC, SCHEDULES, AdaptiveSchedule
from lora_drop_runtime.text import TextCodec

from lora_drop_tools.eval.tasks.catalogue import Opened, OpenedGroup, open_tasks
from lora_drop_tools.eval.tasks.metrics import Measured
from lora_drop_tools.shared import costs, machine
from lora_drop_tools.shared.bundles import check_session, open_bundles, paths_of, weight_dtype
from lora_drop_tools.shared.progress import Progress
from lora_drop_tools.shared.results import check_results, said_command, then_shown, write_json

from .intervals import Sums
from .methods import method_of
from .paper import FIGURE, PAPER, described, draw_kv, figure_files, kv_lines, latencies
from .plots import FIGURES, write_plots
from .report import describe
from .requests import checked, read_speedups, text_request, text_windows
from .result import (
    FULL,
    KEYS,
    EvalResult,
    EvalRow,
    TaskFigures,
    averages,
    group_figures,
    safe_zones,
    task_figures,
    text_figures,
    too_wide,
)
from .scoring import Window, WindowK, longest, score_windows, windows_at_once
from .settings import EvalSettings
from .spread import Spread, connected
from .store import Key, Store, digest
from .texts import Writer

KV_REQUEST = (512, 1536)  # tokens of prompt and decode steps that K/V bytes are given for, where bundles allow as many


def _kv_request(bundles: Mapping[str, Bundle]) -> tuple[int, int]:
    """`KV_REQUEST`, or of all tokens that the bundles allow a quarter and the rest."""
    limits = [bundle.manifest.limits for bundle in bundles.values()]
    tokens = min(sum(KV_REQUEST), *(one.max_seq_len for one in limits))
    prompt = min(max(1, tokens // 4), *(one.max_prompt_len for one in limits))
    return prompt, tokens - prompt


def _decoded(manifest: Manifest, target: str) -> dict[str, Any]:
    """What results depend on: not what was measured of the bundle, such as thresholds, and not its other targets."""
    folders = ("weights", "tokenizer", target)
    return {
        "files": {name: one.sha256 for name, one in manifest.files.items() if name.partition("/")[0] in folders},
        **{part: dataclasses.asdict(getattr(manifest, part)) for part in ("model", "plan", "limits", "special_tokens")},
    }


def _open_stores(bundles: Mapping[str, Bundle], settings: EvalSettings) -> dict[str, Store]:
    """What is kept of each bundle; one that was exported otherwise is another one."""
    version = machine.machine_facts()["versions"].get("lora-drop-export", "")
    provider = f" on {settings.provider}" if settings.provider else ""
    stores = {}
    for name, bundle in bundles.items():
        target, _ = bundle.target(settings.target)
        identity = {"decoded": digest(_decoded(bundle.manifest, target)), "bundle": bundle.manifest.model.name}
        identity |= {"engine": target + provider, "version": version}
        stores[name] = Store(settings.out_dir, {**identity, "seed": settings.seed})
    return stores


def _said(k: WindowK) -> str:
    return str(k) if isinstance(k, int) else f"{k.k} {k.name}"


def _measure_text(
    session: Session, windows: Mapping[int, Window], ks: Sequence[WindowK], store: Store, spread: Spread | None
) -> dict[WindowK, list[Sums]]:
    """Sums of every window for each k or adaptive schedule, from the store or the session."""

    def key(place: int, k: WindowK) -> Key:
        window = windows[place]
        adaptive = [] if isinstance(k, int) else [k.name, k.threshold]
        question = digest([window.ids.tolist(), window.context, window.phase, *adaptive])
        return session.policy if k else FULL, longest(k), "text", place, question

    todo = [place for place in windows if any(key(place, k) not in store for k in ks)]
    with Progress(f"text, k = {', '.join(map(_said, ks))}", len(todo) * len(ks)) as progress:
        at_once = windows_at_once(session, next(iter(windows.values())))
        batches = [todo[begin : begin + at_once] for begin in range(0, len(todo), at_once)]

        def done(batch: Sequence[int], k: WindowK, sums: list[Sums]) -> None:
            for place, own in zip(batch, sums, strict=True):
                if key(place, k) not in store:
                    store[key(place, k)] = own.tolist()
            progress.advance(len(batch))

        if spread is None:
            for batch in batches:
                score_windows(session, [windows[place] for place in batch], ks, partial(done, batch))
        else:
            for index, found in spread.windows([[windows[place] for place in batch] for batch in batches], ks):
                for k, sums in found.items():
                    done(batches[index], k, sums)
    return {k: [np.array(store[key(place, k)]) for place in windows] for k in ks}


def _measure_tasks(
    session: Session,
    codec: TextCodec,
    opened: Opened,
    ks: Sequence[int],
    settings: EvalSettings,
    store: Store,
    spread: Spread | None,
) -> dict[int, dict[str, Measured]]:
    """What lm-eval makes of the answers, for each k and task."""
    if not opened.tasks:
        return {k: {} for k in ks}
    from lora_drop_tools.eval.tasks.model import SessionLM
    from lora_drop_tools.eval.tasks.run import run_task

    found: dict[int, dict[str, Measured]] = {k: {} for k in ks}
    places = {name: one.places for name, one in opened.tasks.items()}
    lenience = settings.lenience_under(session.policy)
    engine = settings.target, settings.provider, settings.threads, lenience
    with Writer(session.bundle.root, codec, session.policy, *engine) as writer:
        for name, one in opened.tasks.items():
            for k in ks:
                model = SessionLM(session, codec, writer, k, settings.seed, store, places, spread)
                found[k][name] = run_task(one, model, store, settings.unsafe_code)
    return found


@dataclass(frozen=True)
class _Work:
    """What is measured of one bundle.

    Attributes:
        windows: of the text by their place; none without a text.
        opened: tasks and groups.
        kv_request: tokens of prompt and decode steps that K/V bytes are given for.
    """

    name: str
    label: str
    bundle: Bundle
    codec: TextCodec
    store: Store
    windows: Mapping[int, Window]
    opened: Opened
    kv_request: tuple[int, int]


def _row(work: _Work, policy: Policy, lenience: float | None, given: WindowK, speedups: Mapping[Key, float]) -> EvalRow:
    """What is known of an arm before anything is measured."""
    k, name, bundle = longest(given), work.name, work.bundle
    plan, share = bundle.manifest.plan, costs.shares(bundle.manifest)
    arm = said_policy(policy.name, lenience) if k else FULL
    return EvalRow(
        bundle=name,
        label=work.label,
        method=method_of(plan),
        surrogate=plan.surrogate,
        rank=plan.rank,
        sites=plan.sites,
        rho=share.rho,
        attentions=share.attentions,
        weight_bytes=share.weight_bytes,
        policy=arm,
        k=k,
        kv_bytes=sum(costs.kv_bytes(bundle.manifest, *work.kv_request, k, policy)),
        speedup=speedups.get((name, arm, k, PERIODIC if isinstance(given, int) else given.name)),
        text=None,
        tasks={},
        average=None,
        average_difference=None,
        schedule=PERIODIC if isinstance(given, int) else given.name,
        threshold=None if isinstance(given, int) else given.threshold,
    )


def _filled(
    row: EvalRow,
    sums: Sequence[Sums] | None,
    tasks: dict[str, TaskFigures],
    groups: Mapping[str, OpenedGroup],
    seed: int,
) -> EvalRow:
    found = {name: figures for name, group in groups.items() if (figures := group_figures(group, tasks)) is not None}
    mean, difference, test = averages(tasks, found)
    text = text_figures(sums, seed) if sums else None
    measured = dataclasses.replace(row, text=text, tasks=tasks, groups=found, average=mean)
    return dataclasses.replace(measured, average_difference=difference, average_test=test)


def _new_result(
    bundles: Mapping[str, Bundle], given: Sequence[str], settings: EvalSettings, speed_request: str
) -> EvalResult:
    """What is known before anything is measured."""
    first = next(iter(bundles.values())).manifest.model
    facts = machine.machine_facts()
    if settings.tasks:
        facts["versions"]["lm-eval"] = importlib.metadata.version("lm-eval")
    arguments = {"bundles": [*map(Path, given)], **dataclasses.asdict(settings)}
    return EvalResult(
        command=said_command(sys.argv),
        arguments=json.loads(json.dumps(arguments, default=lambda path: said_command([str(path)]))),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=facts,
        model=first.name,
        weight_dtype=weight_dtype(first),
        seed=settings.seed,
        kv_request=_kv_request(bundles),
        speed_request=speed_request,
    )


def _adaptive_row(row: EvalRow, work: _Work, policy: Policy, sums: Sequence[Sums], seed: int) -> EvalRow:
    """The row of an adaptive schedule: its K/V are those of as many refreshes as there were."""
    steps_at = np.sum(sums, axis=0)[:, 0].tolist()
    held = costs.kv_bytes_of_cycles(work.bundle.manifest, *work.kv_request, steps_at, policy)
    return dataclasses.replace(_filled(row, sums, {}, {}, seed), kv_bytes=held)


def _measure(
    work: _Work,
    policy: str,
    ks: Sequence[int],
    schedules: Sequence[AdaptiveSchedule],
    settings: EvalSettings,
    speedups: Mapping[Key, float],
) -> list[EvalRow]:
    """A row for each window k and each adaptive schedule under one policy; those of k = 0 are the same under all."""
    seed, bundle = settings.seed, work.bundle
    with contextlib.ExitStack() as opened:
        engine: dict[str, Any] = {"target": settings.target, "provider": settings.provider, "threads": settings.threads}
        session = opened.enter_context(Session.open(bundle.root, policy=policy, **engine))
        spread = opened.enter_context(Spread(bundle, policy, settings)) if settings.ray else None
        sums = _measure_text(session, work.windows, [*ks, *schedules], work.store, spread) if work.windows else {}
        measured = _measure_tasks(session, work.codec, work.opened, ks, settings, work.store, spread)
    rows, lenience = [], settings.lenience_under(policy)
    for k in ks:
        full = measured[0] if k else {}
        found = {task: task_figures(measured[k][task], full.get(task), seed) for task in work.opened.tasks}
        row = _row(work, POLICIES[policy], lenience, k, speedups)
        rows.append(_filled(row, sums.get(k), found, work.opened.groups, seed))
    for schedule in schedules:
        row = _row(work, POLICIES[policy], None, schedule, speedups)
        rows.append(_adaptive_row(row, work, POLICIES[policy], sums[schedule], seed))
    return rows


def _schedules(bundle: Bundle, settings: EvalSettings) -> dict[str, list[AdaptiveSchedule]]:
    """The adaptive schedules that are evaluated, by the policy that the bundle was calibrated for.

    Raises:
        InputError: it was not, or not for one of these policies, or windows of the text have no room for a cycle.
    """
    found: dict[str, list[AdaptiveSchedule]] = {}
    for name in settings.schedules:
        schedule, policy = named_schedule(bundle.manifest, name, None, None)
        if isinstance(schedule, AdaptiveSchedule):
            if settings.policies and policy not in settings.policies:
                named_schedule(bundle.manifest, name, None, settings.policies[0])
            settings.check_cycle(schedule.k)
            found.setdefault(policy, []).append(schedule)
    return found


def _opened(settings: EvalSettings) -> Opened:
    """The tasks that were asked for; lm-eval is not imported where there are none."""
    if not settings.tasks:
        return Opened({}, {})
    return open_tasks(
        settings.tasks,
        settings.include_path,
        settings.limit,
        settings.seed,
        settings.num_fewshot,
        settings.unsafe_code,
        PAPER[settings.paper].shots if settings.paper else None,
    )


def _lenience_warnings(settings: EvalSettings, opened: Opened) -> list[str]:
    """A warning where rows of a lenience have figures that it does not touch: those would say that it costs nothing.

    Raises:
        InputError: it touches none of them.
    """
    if settings.lenience is None:
        return []
    scored = [name for name, one in opened.tasks.items() if not one.writes]
    said = ", ".join([*scored, *(["--text"] if settings.text is not None else [])])
    if len(scored) == len(opened.tasks):
        because = f"no task wants a text written; scored as the full schedule does: {said}"
        refuse_unused(settings, ("lenience",), because, "add a task that does, such as gsm8k")
    if not said or settings.lenience == 1:
        return []
    return [
        f"--lenience judges drafts of texts that are written. Scored as the full schedule does, whatever it is: {said}"
    ]


def eval(
    bundles: Sequence[str | Path] | str | Path, settings: EvalSettings, *, out: TextIO | None = None
) -> EvalResult:
    """Evaluate bundles of one model under several windows k and policies, and print tables.

    Args:
        bundles: directories.
        out: where the tables go, standard output when None.

    Raises:
        InputError: an unknown task, data that cannot be had, bundles of different models, more than they allow.
        BundleError: a bundle is damaged or cannot run here.
    """
    given = paths_of(bundles)
    if settings.calibrate is not None:
        raise InputError(
            "eval finds no thresholds.",
            note=f"The settings say calibrate={settings.calibrate}.",
            hint="Call lora_drop_tools.calibrate(bundle, settings).",
        )
    if not settings.measures:
        raise InputError(
            "eval measures, and this part of the paper needs no measuring.",
            note=f"The settings say paper={settings.paper!r}.",
            hint="Call lora_drop_tools.reproduce(bundles, settings).",
        )
    opened = open_bundles(given)
    for one in opened.values():
        check_session(one, settings.target, settings.provider, settings.threads, settings.policies)
    if settings.lenience is not None and not settings.policies:
        for one in opened.values():
            plan = one.manifest.plan
            draft_source(None, plan.refresh_policy, len(plan.sites), settings.lenience)
    settings = checked(opened, settings)
    adaptive = {name: _schedules(bundle, settings) for name, bundle in opened.items()}
    request = text_request(settings)
    opened_tasks = _opened(settings)
    lenience_warnings = _lenience_warnings(settings, opened_tasks)
    speedups, speed_request = read_speedups(settings.bench_file, list(opened))
    check_results(settings.json_file, KEYS, settings.plots, FIGURES)
    codecs = {name: TextCodec.open(bundle.root / "tokenizer") for name, bundle in opened.items()}
    drawn = {name: text_windows(request, codec, settings.seed) if request else {} for name, codec in codecs.items()}
    stores = _open_stores(opened, settings)

    result = _new_result(opened, given, settings, speed_request)
    result.warnings += lenience_warnings
    with connected(settings.ray):
        for (name, bundle), label in zip(opened.items(), settings.labels or opened, strict=True):
            known = codecs[name], stores[name], drawn[name], opened_tasks
            work = _Work(name, label, bundle, *known, result.kv_request)
            policies = settings.policies or tuple(dict.fromkeys((bundle.manifest.plan.policy, *adaptive[name])))
            periodic = settings.ks if PERIODIC in (settings.schedules or SCHEDULES) else [0]
            aim = settings.aim_of(list(opened).index(name))
            for policy in policies:
                tell(f"{label}, policy {policy}")
                rows = _measure(work, policy, periodic, adaptive[name].get(policy, ()), settings, speedups)
                rows = [dataclasses.replace(row, aim=aim if row.k else None) for row in rows]
                result.rows += [row for row in rows if row.k or policy == policies[0]]
    result.safe_zones = safe_zones(result.rows)
    result.warnings += [said for said in map(too_wide, result.rows) if said is not None]
    lines = [*describe(result), *(described(settings.paper, result) if settings.paper else ())]
    with then_shown(lambda: print("\n".join(lines), file=out or sys.stdout)):
        if settings.json_file is not None:
            write_json(settings.json_file, result.to_json(), KEYS)
        if settings.plots is not None:
            write_plots(result, settings.plots)
    return result


def reproduce(bundles: Sequence[str | Path] | str | Path, settings: EvalSettings, *, out: TextIO | None = None) -> None:
    """Print Table IV, or Fig. 3 as a table; with `plots` draw the figure of each bundle.

    Raises:
        InputError, BundleError: another table is asked for, a bundle or a file cannot be read, or a figure cannot be
            written.
    """
    if settings.measures:
        raise InputError(
            "reproduce measures nothing.",
            note=f"The settings say paper={settings.paper!r}; it prints table4 and fig3.",
            hint="Call lora_drop_tools.eval(bundles, settings).",
        )
    opened = open_bundles(paths_of(bundles))
    if settings.paper == "table4":
        assert settings.bench_file is not None
        print("\n".join(latencies(settings.bench_file, list(opened))), file=out or sys.stdout)
        return
    check_results(None, KEYS, settings.plots, (f"{FIGURE}_*.png",))
    lines = [PAPER["fig3"].title]
    for (name, bundle), file in zip(opened.items(), figure_files(list(opened)), strict=True):
        lines += ["", *kv_lines(name, bundle.manifest)]
        if settings.plots is not None:
            draw_kv(name, bundle.manifest, settings.plots / file)
    print("\n".join(lines), file=out or sys.stdout)
