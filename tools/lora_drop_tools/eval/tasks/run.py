"""One task under one model, by lm-eval's arithmetic."""

from __future__ import annotations

import contextlib
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.errors import InputError, LoraDropError, first_line

from lora_drop_tools.eval.store import Store, digest

from .catalogue import DEFINITIONS, FEWSHOT_SEED, OpenedTask
from .code_eval import running
from .metrics import Measured, measured
from .program import runs_to_its_end

if TYPE_CHECKING:
    from .model import SessionLM

BOOTSTRAPS = 1000  # of lm-eval's, for figures that are no means


def _kept_run(store: Store, unsafe: bool, program: str) -> bool:
    """Whether a program runs to its end, once for each program."""
    key = ("program", digest([program, unsafe]))
    if key not in store:
        store[key] = runs_to_its_end(program, unsafe=unsafe)
    return bool(store[key])


def is_of_lm_eval(error: Exception) -> bool:
    """Whether lm-eval or a definition raised it, and not what this package does when it is asked."""
    ours = Path(__file__).parents[2]
    _, *deeper = traceback.extract_tb(error.__traceback__)  # the first is who asks
    files = [Path(frame.filename) for frame in deeper]
    return not any(ours in file.parents and DEFINITIONS not in file.parents for file in files)


def _has_others(task: Any) -> bool:
    """Whether a figure is neither a mean nor a perplexity, whose intervals are our own."""
    from lm_eval.api.metrics import mean, perplexity

    return any(aggregation not in (mean, perplexity) for aggregation in task.aggregation().values())


def run_task(opened: OpenedTask, model: SessionLM | Any, store: Store, unsafe: bool = False) -> Measured:
    """Ask the model about each item of the task, and let lm-eval say what its answers are worth.

    Args:
        store: keeps which programs ran to their end.

    Raises:
        InputError: the code of the task's definition fails on an answer.
    """
    from lm_eval.evaluator import evaluate

    task = opened.task
    task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples in the prompt for every k
    with running(partial(_kept_run, store, unsafe)), contextlib.redirect_stdout(sys.stderr):
        try:
            result: Any = evaluate(
                model,
                {"tasks": {opened.name: task}, "groups": {}},
                bootstrap_iters=BOOTSTRAPS if _has_others(task) else 0,
                confirm_run_unsafe_code=True,  # programs are cut off, or were asked for
            )
        except Exception as error:
            if isinstance(error, LoraDropError | OSError | MemoryError) or not is_of_lm_eval(error):
                raise
            raise InputError(
                "A task cannot be evaluated.",
                note=f"{opened.name}: {type(error).__name__}: {first_line(error):.300}.",
                hint="Its definition or lm-eval may be at fault; leave it out. What was answered is kept with --out.",
            ) from error
    return measured(task, result, opened.places, getattr(model, "cut", 0))
