"""`lora-drop eval`: what LoRA-Drop costs in quality, against the full schedule of the same bundle.

Enters: bundles of one model, windows k, refresh policies; a text, tasks with local data files, or both. Leaves: an
`EvalResult`, which eval_report.py makes tables and figures of: perplexity, agreement and KL at each place of the cycle,
metrics of tasks, each with its interval and its difference to k = 0 on the same items.

Everything goes through the runtime, one decode step for each token (eval_scoring.py says how that is scored). Items are
a seeded subset; one that is larger contains the smaller. With `out_dir`, what was measured is kept item by item: the
same command goes on where it was cut off, and one with more items, tasks or windows k measures only what is new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES, Policy
from lora_drop_runtime.text import TextCodec

from lora_drop_tools.eval.tasks.files import TASKS
from lora_drop_tools.shared import costs, machine
from lora_drop_tools.shared.bundles import check_writable, open_bundles, weight_dtype
from lora_drop_tools.shared.progress import Progress

from .intervals import Sums
from .plots import write_plots
from .report import describe
from .requests import TaskItems, check, read_speedups, task_items, text_request, text_windows
from .result import FULL, EvalResult, EvalRow, TaskFigures, averages, safe_zones, task_figures, text_figures
from .scoring import Window, score_windows, windows_at_once
from .store import Key, Store, digest

KV_REQUEST = (512, 1536)  # tokens of prompt and decode steps that K/V bytes are given for
Items = dict[int, dict[str, float]]


def _open_stores(
    bundles: Mapping[str, Bundle], out_dir: str | Path | None, engine: Mapping[str, str | None], seed: int
) -> dict[str, Store]:
    """What is kept of each bundle; a bundle that was exported again is another one."""
    directory = None if out_dir is None else Path(out_dir)
    version = machine.machine_facts()["versions"].get("lora-drop-export", "")
    stores = {}
    for name, bundle in bundles.items():
        manifest_hash = hashlib.sha256((bundle.root / MANIFEST_NAME).read_bytes()).hexdigest()
        identity = {"manifest_sha256": manifest_hash, "bundle": bundle.manifest.model.name, "version": version}
        engine_name = bundle.target(engine["target"])[0] + (f" on {engine['provider']}" if engine["provider"] else "")
        stores[name] = Store(directory, identity | {"engine": engine_name, "seed": seed})
    return stores


def _measure_text(
    session: Session, windows: Mapping[int, Window], ks: Sequence[int], store: Store
) -> dict[int, list[Sums]]:
    """Sums of every window for each k, from the store or the session."""

    def key(place: int, k: int) -> Key:
        window = windows[place]
        question = digest([window.ids.tolist(), window.context, window.phase])
        return session.policy if k else FULL, k, "text", place, question

    todo = [place for place in windows if any(key(place, k) not in store for k in ks)]
    with Progress(f"text, k = {', '.join(map(str, ks))}", len(todo) * len(ks)) as progress:
        at_once = windows_at_once(session, next(iter(windows.values())))
        for begin in range(0, len(todo), at_once):
            batch = todo[begin : begin + at_once]

            def done(k: int, sums: list[Sums], batch: list[int] = batch) -> None:
                for place, own in zip(batch, sums, strict=True):
                    if key(place, k) not in store:
                        store[key(place, k)] = own.tolist()
                progress.advance(len(batch))

            score_windows(session, [windows[place] for place in batch], ks, done)
    return {k: [np.array(store[key(place, k)]) for place in windows] for k in ks}


def _measure_tasks(
    session: Session, codec: TextCodec, tasks: Mapping[str, TaskItems], ks: Sequence[int], seed: int, store: Store
) -> tuple[dict[int, dict[str, Items]], dict[int, dict[str, int]]]:
    """Metrics of every item for each k and task, and how many requests were cut."""
    found: dict[int, dict[str, Items]] = {k: {} for k in ks}
    cut: dict[int, dict[str, int]] = {k: {} for k in ks}
    for name, given in tasks.items():
        from lora_drop_tools.eval.tasks.session_lm import SessionLM, open_task, run_task

        task = open_task(name, given.items, given.shots, store)
        for k in ks:
            model = SessionLM(session, codec, k, seed, store)
            found[k][name] = run_task(task, name, model)
            cut[k][name] = model.cut
    return found, cut


def _row(name: str, label: str, bundle: Bundle, policy: Policy, k: int, speedups: Mapping[Key, float]) -> EvalRow:
    """What is known of an arm before anything is measured."""
    plan, arm = bundle.manifest.plan, policy.name if k else FULL
    return EvalRow(
        bundle=name,
        label=label,
        surrogate=plan.surrogate,
        rank=plan.rank,
        drop_layers=plan.drop_layers,
        rho=plan.rho,
        policy=arm,
        k=k,
        kv_bytes=costs.kv_reserved_bytes(bundle.manifest, *KV_REQUEST, k, policy),
        speedup=speedups.get((name, arm, k)),
        text=None,
        tasks={},
        average=None,
        average_difference=None,
    )


def _filled(row: EvalRow, sums: Sequence[Sums] | None, tasks: dict[str, TaskFigures], seed: int) -> EvalRow:
    mean, difference = averages(tasks)
    text = text_figures(sums, seed) if sums else None
    return dataclasses.replace(row, text=text, tasks=tasks, average=mean, average_difference=difference)


def eval(
    bundles: Sequence[str | Path] | str | Path,
    *,
    labels: Sequence[str] = (),
    k: Sequence[int] = (1, 3),
    policies: Sequence[str] = (DEFAULT_POLICY,),
    text: str | Path | None = None,
    window: int = 512,
    prompt: int = 32,
    windows: int = 32,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    limit: int = 300,
    seed: int = 0,
    out_dir: str | Path | None = None,
    bench_file: str | Path | None = None,
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    json_file: str | Path | None = None,
    plots: str | Path | None = None,
    out: TextIO | None = None,
) -> EvalResult:
    """Evaluate bundles of one model under several windows k and policies, and print tables.

    Args:
        bundles: directories.
        labels: names for the tables, one for each bundle; the directories' names when empty.
        k: LoRA steps between refreshes; 0, the full schedule, is always evaluated too.
        policies: `skip`, `backfill`, or both.
        text: a UTF-8 file for perplexity, agreement and KL.
        window, prompt: tokens of a window of the text, and of those how many are given.
        windows: how many windows at most.
        tasks: of `TASKS`; through lm-eval.
        data: the directory of their files.
        limit: items of each task at most.
        seed: of the subsets, the places in the cycle, and the bootstrap.
        out_dir: where every item's result is kept and looked for; not at all when None.
        bench_file: what `lora-drop bench --json` wrote, for the speed-ups.
        target, provider, threads: as for `Session.open`.
        json_file: gets all figures.
        plots: a directory for figures; needs matplotlib.
        out: where the tables go, standard output when None.

    Raises:
        InputError: an option out of range, an unknown task, a missing file, bundles of different models.
        BundleError: a bundle is damaged or cannot run here.
    """
    arguments = {name: value for name, value in locals().items() if name != "out"}
    opened = open_bundles([bundles] if isinstance(bundles, (str, Path)) else list(bundles))
    ks = sorted({0, *k})
    check(opened, labels, ks, policies, limit)
    if text is None and not tasks:
        raise InputError(
            "There is nothing to evaluate.",
            note="Neither a text nor a task was given.",
            hint=f"Use --text FILE, or --tasks with some of {', '.join(TASKS)}.",
        )
    request = None if text is None else text_request(text, window, prompt, windows, ks, opened)
    items = task_items(tasks, data, limit, seed)
    speedups, speed_request = read_speedups(bench_file, list(opened))
    check_writable(json_file, plots)
    engine = {"target": target, "provider": provider}
    stores = _open_stores(opened, out_dir, engine, seed)
    codecs = {name: TextCodec.open(bundle.root / "tokenizer") for name, bundle in opened.items()}
    drawn = {name: text_windows(request, codec, seed) if request else {} for name, codec in codecs.items()}

    first = next(iter(opened.values())).manifest.model
    facts = machine.machine_facts()
    if tasks:
        facts["versions"]["lm-eval"] = importlib.metadata.version("lm-eval")
    result = EvalResult(
        command=" ".join(sys.argv),
        arguments=json.loads(json.dumps(arguments, default=str)),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=facts,
        model=first.name,
        weight_dtype=weight_dtype(first),
        seed=seed,
        kv_request=KV_REQUEST,
        speed_request=speed_request,
    )
    for (name, bundle), label in zip(opened.items(), labels or opened, strict=True):
        for policy in dict.fromkeys(policies):
            print(f"{label}, policy {policy}", file=sys.stderr, flush=True)
            with Session.open(bundle.root, policy=policy, target=target, provider=provider, threads=threads) as session:
                sums = _measure_text(session, drawn[name], ks, stores[name]) if request else {}
                measured, cut = _measure_tasks(session, codecs[name], items, ks, seed, stores[name])
            for window_k in ks:
                if window_k or policy == policies[0]:
                    row = _row(name, label, bundle, POLICIES[policy], window_k, speedups)
                    found = {
                        task: task_figures(
                            TASKS[task].metric,
                            measured[window_k][task],
                            measured[0][task] if window_k else None,
                            cut[window_k][task],
                            seed,
                        )
                        for task in items
                    }
                    result.rows.append(_filled(row, sums.get(window_k), found, seed))
    result.safe_zones = safe_zones(result.rows)
    if json_file is not None:
        Path(json_file).write_text(result.to_json())
    if plots is not None:
        write_plots(result, Path(plots))
    print("\n".join(describe(result)), file=out or sys.stdout)
    return result
