"""Runs of neighbours that are dropped together, and the surrogates that stand for them at their best.

Enters: a model under teacher forcing, windows of text, which layers may be dropped. Leaves: for each run, and for each
drop list, adapters in closed form (closed_form.py). What neighbours cost as they are says little of what they cost
beside adapters: these are one linear map for the whole run, which sees its input and what it did at the anchor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.teacher_forcing.closed_form import Site, batches_of, fitted_texts, solve, walk
from lora_drop_tools.teacher_forcing.layout import Layout
from lora_drop_tools.teacher_forcing.surrogates import Surrogates, features

from .choice import Choice
from .scoring import Scoring, Tick, not_finite
from .settings import RUN, RUN_SURROGATE

if TYPE_CHECKING:
    from lora_drop_export.console import Console

Run = tuple[str, ...]


def _runs_of(candidates: Collection[str], length: int) -> list[Run]:
    """All runs of so many layers next to each other that may all be dropped."""
    layers = sorted(map(int, candidates))
    starts = (layers[i : i + length] for i in range(len(layers) - length + 1))
    return [tuple(map(str, run)) for run in starts if length and run[-1] - run[0] == length - 1]


def _site(first: Any, last: Any, layout: Layout) -> Site:
    """What is summed up of a run, whose input and output over the windows are [N, T, d]."""
    form, site = SURROGATES[RUN_SURROGATE], Site()
    change = (last - first)[:, layout.full]
    feature, base = features(first[:, layout.lora], change, layout, form)
    wanted = last[:, layout.lora] - base
    for number, (x, y) in enumerate(zip(feature, wanted, strict=True)):
        (site.fit if fitted_texts(number, len(feature), 1) else site.held_out).add(x, y)
    return site


def _pair(site: Site, layers: int, scoring: Scoring) -> tuple[Any, Any]:
    solution = solve(site, layers * scoring.plan.rank)
    return solution.a.to(scoring.forcing.device), solution.b.to(scoring.forcing.device)


def with_adapters(scoring: Scoring, rank: int) -> Scoring:
    """The same for lists that have adapters of their own, of this rank."""
    plan = dataclasses.replace(scoring.plan, surrogate=RUN_SURROGATE, rank=rank)
    return dataclasses.replace(scoring, plan=plan)


def _of_runs(scoring: Scoring, windows: Any, runs: Collection[Run], tick: Tick) -> Iterator[tuple[Run, Surrogates]]:
    """Each run's adapters, from one pass over token ids [N, T]; `tick` after each layer.

    What stands before a run is the full model's own, so its input is exact. Its output at the anchor is taken to be
    exact too, which under policies that leave holes it nearly is. In memory are the inputs of as many layers as the
    longest run has.

    Args:
        scoring: `with_adapters`.

    Raises:
        ModelError: the model overflows.
    """
    import torch

    forcing = scoring.forcing
    with torch.no_grad():
        inputs = {0: torch.cat([forcing.embed(ids[None]) for ids in windows])}
        for index in range(len(forcing)):
            hidden = [forcing.exact_layer(index, one[None]).output for one in inputs[index]]
            inputs[index + 1] = torch.cat(hidden)
            if not inputs[index + 1].isfinite().all():
                raise not_finite(inputs[index + 1].dtype)
            for run in runs:
                if run[-1] == str(index):
                    site = _site(inputs[int(run[0])], inputs[index + 1], scoring.layout)
                    yield run, {run[-1]: _pair(site, len(run), scoring)}
            begins = [int(run[0]) for run in runs if int(run[-1]) > index]
            inputs = {begin: one for begin, one in inputs.items() if begin > index or begin in begins}
            tick()


def _of_list(scoring: Scoring, windows: Any, sites: Sequence[str]) -> Surrogates:
    """The adapters of a drop list, as `lora-drop fit --steps 0` finds them: one map for each run of neighbours.

    Args:
        scoring: `with_adapters`.
    """
    plan, layout, forcing = dataclasses.replace(scoring.plan, sites=tuple(sites)), scoring.layout, scoring.forcing
    lengths = {run[-1]: len(run) for run in plan.surrogate_runs}

    def choose(end: str, site: Site) -> tuple[Any, Any]:
        return _pair(site, lengths[end], scoring)

    batches = batches_of(forcing, ((ids[None], layout) for ids in windows))
    return walk(forcing, batches, plan, scoring.policy, plan.surrogate_runs, choose)


def of_lists(scoring: Scoring, lists: Sequence[Sequence[str]], fitting: Any, console: Console) -> list[Surrogates]:
    """The adapters of each drop list.

    Args:
        scoring: `with_adapters`.
    """
    found = []
    with console.progress("adapters of drop lists") as update:
        for number, sites in enumerate(lists, 1):
            found.append(_of_list(scoring, fitting, sites))
            update("drop lists", number, len(lists))
    return found


def best_runs(scoring: Scoring, fitting: Any, windows: Any, choice: Choice, console: Console) -> dict[float, Run]:
    """The run that costs least with an adapter in its place, for each ρ that neighbours can reach.

    Args:
        scoring: `with_adapters`.
        fitting, windows: token ids [N, T] to fit on, and to measure on.

    Raises:
        InputError: they reach none.
        ModelError: the model overflows.
    """
    lengths = {rho: len(choice.saved.list_under(choice.candidates, rho)) for rho in choice.ratios}
    runs = {length: _runs_of(choice.candidates, length) for length in sorted(set(lengths.values()))}
    every = [run for some in runs.values() for run in some]
    if not every:
        raise InputError(
            "No neighbours are as many as the shortest list drops.",
            note=f"It has {min(lengths.values())} of the layers {', '.join(choice.candidates)}.",
            hint=f"Leave {RUN} out of --rankings.",
        )
    layers = len(scoring.forcing)
    with console.progress("adapters of runs") as update:
        done = iter(range(1, layers + 1))
        found = dict(_of_runs(scoring, fitting, every, lambda: update("runs", next(done), layers)))
    with console.progress("runs on other text") as update:
        done = iter(range(1, len(windows) + 1))
        kls = scoring.of_lists(
            windows, list(found), lambda: update("runs", next(done), len(windows)), list(found.values())
        )
    cost = dict(zip(found, kls, strict=True))
    for run in every:
        what = f"layers {run[0]} to {run[-1]}" if run[1:] else f"layer {run[0]}"
        console.say(f"run: {what}, KL {cost[run]:.4f} with an adapter")
    return {rho: min(runs[length], key=cost.__getitem__) for rho, length in lengths.items() if runs[length]}
