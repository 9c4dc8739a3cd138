"""A model whose answers are written down, and tasks of lm-eval over files of a few items."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.model import LM

LM_EVAL = Path(lm_eval.tasks.__file__).parent


class ScriptedLM(LM):  # type: ignore[misc] # lm-eval is left untyped
    """Answers by what is asked, and remembers what was.

    Args:
        likelihood: of a continuation, by itself.
        texts: what it writes, in the order of the requests.
    """

    def __init__(self, likelihood: Callable[[str], float] | None = None, texts: Sequence[str] = ()) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []
        self._likelihood, self._texts = likelihood, list(texts)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        assert self._likelihood is not None
        self.asked += [request.args for request in requests]
        return [(self._likelihood(request.args[1]), self._likelihood(request.args[1]) > -2) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        assert self._likelihood is not None
        self.asked += [request.args for request in requests]
        return [self._likelihood(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        self.asked += [(request.args[0],) for request in requests]
        self.options += [request.args[1] for request in requests]
        assert len(self._texts) == len(requests)
        return self._texts


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def define(
    directory: Path, name: str, include: str, test: Sequence[dict[str, Any]], shots: Sequence[dict[str, Any]] = ()
) -> None:
    """A YAML file that includes lm-eval's definition of a task and takes its items from files beside it.

    Args:
        include: the file, below lm-eval's directory of tasks.
        shots: the split that examples in the prompt are drawn from.
    """
    files = {"test": str(write_rows(directory / f"{name}-test.jsonl", test))}
    if shots:
        files["shots"] = str(write_rows(directory / f"{name}-shots.jsonl", shots))
    definition: dict[str, Any] = {
        "include": str(LM_EVAL / include),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    if shots:
        definition["fewshot_split"] = "shots"
    (directory / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
