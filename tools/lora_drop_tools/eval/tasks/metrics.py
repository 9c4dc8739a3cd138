"""What lm-eval says of a task's items, as figures by name.

A metric is named as in lm-eval's tables: `acc`, or with its filter `exact_match,strict-match`. One whose figure is the
mean of its items' values is kept item by item. Any other is lm-eval's own figure over all items, with its error.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_drop_runtime.errors import InputError

# The figure of tasks for which it is not the first metric of lm-eval's definition
MAIN_METRICS = {
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "lambada_openai": "acc",
    "lambada_standard": "acc",
    "openbookqa": "acc_norm",
}
Items = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Aggregate:
    """lm-eval's figure over all items; `stderr` None where it gives none."""

    value: float
    stderr: float | None
    count: int


@dataclass(frozen=True)
class Measured:
    """A task under one k.

    Attributes:
        items: by the item's place in its split, the metrics that are means.
        likelihoods: names of those among them that are log-likelihoods of items, whose figure is a perplexity.
        aggregates: the others.
        metric: the main one, of either; `rises` with quality, or falls.
        cut: requests that lost the beginning of their context.
    """

    items: Items
    metric: str
    rises: bool = True
    likelihoods: frozenset[str] = frozenset()
    aggregates: dict[str, Aggregate] = field(default_factory=dict)
    cut: int = 0


def name_of(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def main_metric(task_name: str, defined: Sequence[str], found: Sequence[str]) -> str:
    """Which of the metrics found stands for the task: by the table, else the first that is defined.

    A function that is a metric may name its figures otherwise (`pass_at_k`: `pass@1`); then it is the first found.
    """
    wanted = MAIN_METRICS.get(task_name)
    for metric in ([wanted] if wanted else []) + list(defined):
        for name in found:
            if name.split(",")[0] == metric:
                return name
    if not found:
        raise InputError(
            "A task has no figure.",
            note=f"{task_name}: lm-eval made none of {', '.join(defined) or 'its metrics'}.",
            hint="Name metrics that lm-eval knows in the definition's metric_list.",
        )
    return found[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or type(value).__name__ == "bool"


def measured(task: Any, result: Mapping[str, Any], places: Sequence[int], cut: int) -> Measured:
    """What `evaluate` returned of a task.

    Args:
        places: of each evaluated item, its place in the split.
    """
    from lm_eval.api.metrics import mean, perplexity

    name = str(task.task_name)
    aggregations, samples = task.aggregation(), result["samples"][name]
    values: dict[str, dict[int, Any]] = {}
    plain: dict[str, str] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            full = name_of(metric, sample["filter"])
            plain[full] = metric
            values.setdefault(full, {})[places[int(sample["doc_id"])]] = sample[metric]
    items: Items = {place: {} for place in places}
    likelihoods, aggregates = set(), {}
    for full, own in values.items():
        aggregation = aggregations.get(plain[full], mean)
        whole = len(own) == len(items) and all(map(_is_number, own.values()))
        if whole and (aggregation is mean or aggregation is perplexity):
            for place, value in own.items():
                items[place][full] = float(value)
            if aggregation is perplexity:
                likelihoods.add(full)
            continue
        key = plain[full], full.partition(",")[2] or "none"
        stderr = result["results"][name].get(f"{key[0]}_stderr,{key[1]}")
        error = float(stderr) if isinstance(stderr, numbers.Real) else None
        aggregates[full] = Aggregate(float(result["results"][name][",".join(key)]), error, len(own))
    defined = [str(getattr(one["metric"], "__name__", one["metric"])) for one in task.config.metric_list or ()]
    main = main_metric(name, defined, list(values))
    rises = bool(task.higher_is_better().get(plain[main], True))
    return Measured(items, main, rises, frozenset(likelihoods), aggregates, cut)
