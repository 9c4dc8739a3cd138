"""The metric `code_eval` in the place of the hub's: pass@k of programs, which program.py runs cut off from the machine.

Tasks of lm-eval that run programs load it with `evaluate.load("code_eval")`, code that the hub sends and that runs the
programs as the user. `replaced` gives them this one, so nothing is fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from math import comb
from types import ModuleType
from typing import Any

NAME = "code_eval"
Runner = Callable[[str], bool]


def pass_at_k(count: int, passed: int, k: int) -> float:
    """The share of draws of `k` among `count` programs that hold one of the `passed` (Chen et al. 2021, Eq. 1)."""
    return 1.0 - comb(count - passed, k) / comb(count, k)


class CodeEval:
    """What `evaluate.load("code_eval")` returns.

    `runner` says whether a program runs to its end. Without one nothing is run and nothing passes: modules of lm-eval
    try the metric when they are imported.
    """

    def __init__(self) -> None:
        self.runner: Runner | None = None

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """pass@k for each k of which there are as many programs, over all problems; and no further results.

        Args:
            references: the tests of each problem.
            predictions: programs for each problem.
        """
        runner = self.runner
        passed = [
            (len(programs), sum(runner is not None and runner(f"{program}\n{tests}") for program in programs))
            for programs, tests in zip(predictions, references, strict=True)
        ]
        figures = {
            f"pass@{most}": sum(pass_at_k(count, hits, most) for count, hits in passed) / len(passed)
            for most in k
            if all(count >= most for count, _ in passed)
        }
        return figures, {}


CODE_EVAL = CodeEval()  # one for the process, as the modules of lm-eval's tasks keep theirs


def _evaluate() -> ModuleType:
    """The package, read once something of it is asked for: it imports transformers, and most tasks need neither."""
    if "evaluate" in sys.modules:
        return sys.modules["evaluate"]
    spec = importlib.util.find_spec("evaluate")
    assert spec is not None, "lm-eval needs it"
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules["evaluate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_read(module: ModuleType) -> bool:
    return type(module) is ModuleType


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """Where `evaluate.load("code_eval")` is this one; all else is loaded as ever."""
    evaluate: Any = _evaluate()
    before = evaluate.load if _is_read(evaluate) else None

    def ours(path: str, *arguments: Any, **options: Any) -> Any:
        load = before or evaluate.loading.load
        return CODE_EVAL if path == NAME else load(path, *arguments, **options)

    evaluate.load = ours
    try:
        yield
    finally:
        if _is_read(evaluate):
            evaluate.load = before or evaluate.loading.load
        else:
            del sys.modules["evaluate"]


@contextlib.contextmanager
def running(runner: Runner) -> Iterator[None]:
    """Where programs are run by `runner`."""
    before, CODE_EVAL.runner = CODE_EVAL.runner, runner
    try:
        yield
    finally:
        CODE_EVAL.runner = before


def uses_code_eval(functions: Sequence[Any]) -> bool:
    """Whether one of a task's functions stands in a module that loaded this metric."""
    return any(
        isinstance(value, CodeEval) for function in functions for value in getattr(function, "__globals__", {}).values()
    )
