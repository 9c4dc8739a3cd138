"""The tasks that lm-eval knows, opened by name: its own, and those of directories with YAML files.

Enters: names of tasks, groups and tags. Leaves: lm-eval's tasks over a seeded subset of their items, and groups. Data
come from where the definition says: the hub's cache, the network, local files. Every refusal is an InputError, and all
of them come before a model is opened.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime import bounds
from lora_drop_runtime.errors import InputError

from .code_eval import replaced, uses_code_eval
from .generation import generation_of
from .metrics import name_of
from .program import check_apart

os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars; read when tqdm is first imported
for _name in ("DISABLE_MULTIPROC", "LMEVAL_DISABLE_MULTIPROC"):  # the bootstrap reads the first
    os.environ.setdefault(_name, "1")  # it would fork a process that holds an engine
FEWSHOT_SEED = 1234  # lm-eval's
DEFINITIONS = Path(__file__).parent / "definitions"  # ours, beside lm-eval's
_FETCHING = ("DatasetNotFoundError", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")


@dataclass(frozen=True)
class OpenedTask:
    """One of lm-eval's tasks; it evaluates the items of its split that stand at `places`, in that order."""

    name: str
    task: Any
    places: tuple[int, ...]

    @property
    def writes(self) -> bool:
        """Whether it wants texts written, and not ones of its own scored."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")


@dataclass(frozen=True)
class OpenedGroup:
    """A group whose figure lm-eval takes from those of its tasks.

    Attributes:
        metric: of the tasks, whose mean it is; `filters` None takes the first there is.
        by_size: the mean counts items, and not tasks.
        is_part: of another group that was asked for and has a figure.
    """

    name: str
    tasks: tuple[str, ...]
    metric: str
    filters: tuple[str, ...] | None
    by_size: bool
    is_part: bool

    def figure_name(self, found: Sequence[str]) -> str | None:
        """The group's metric as a task names it; None where it has none such."""
        named = [name_of(self.metric, one) for one in self.filters or ()]
        known = named or [name for name in found if name.split(",")[0] == self.metric]
        return next((name for name in known if name in found), None)


@dataclass(frozen=True)
class Opened:
    """What was asked for, opened."""

    tasks: Mapping[str, OpenedTask]
    groups: Mapping[str, OpenedGroup]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets explain what they do; what matters is said by this command."""
    import datasets

    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _check_name(definition: Mapping[str, Any]) -> None:
    """Refuse names that YAML takes for numbers or dates: lm-eval sorts all names it knows."""
    name, tags = definition.get("group", definition.get("task", "")), definition.get("tag") or []
    for one in (name, *(tags if isinstance(tags, list) else [tags])):
        if not isinstance(one, str):
            raise ValueError(f"the name {one!r} is no text, which quotes make of it")


def _check_definitions(directory: Path) -> None:
    """Refuse YAML files that cannot be read; lm-eval would leave them out without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not directory.is_dir():
        raise InputError(
            "There are no definitions of tasks.",
            note=f"{directory} is no directory.",
            hint="Give --include-path a directory with YAML files of lm-eval.",
        )
    for path in sorted(directory.rglob("*.yaml")):
        try:
            _check_name(load_yaml(path, resolve_func=False))
        except Exception as error:  # of YAML, of the file, of what it includes
            raise InputError(
                "A definition of a task cannot be read.",
                note=f"{path}: {' '.join(str(error).split()):.300}.",
                hint="Correct the file; lm-eval's documentation says what it may hold.",
            ) from None


def _members(entry: Any) -> list[Any]:
    """What a group of lm-eval's index is made of: names, or dicts with settings; none of a task or tag."""
    members = (entry.cfg or {}).get("task")
    return members if isinstance(members, list) else []


def _within(names: Sequence[str], index: Mapping[str, Any]) -> bool:
    """Whether these tasks, groups and tags, and all that groups are made of, are in an index of lm-eval."""
    waiting, seen = list[Any](names), set[str]()
    while waiting:
        name = waiting.pop()
        if not isinstance(name, str) or name not in index:  # no name: a group that is written out in its place
            return False
        if name not in seen:
            seen.add(name)
            waiting += [one.get("task") if isinstance(one, dict) else one for one in _members(index[name])]
    return True


def _manager(names: Sequence[str], directories: Sequence[Path]) -> Any:
    """What knows these names. The 14,000 files of lm-eval itself, which take seconds, are read if one is not beside."""
    import lm_eval.tasks

    for directory in directories:
        _check_definitions(directory)
    paths = [str(path) for path in (DEFINITIONS, *directories)]
    beside = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
    return beside if _within(names, beside.task_index) else lm_eval.tasks.TaskManager(include_path=paths)


def _check_names(names: Sequence[str], index: Mapping[str, Any], within: Sequence[str] = ()) -> None:
    """Refuse names that lm-eval does not know, also of parts, and groups that contain themselves."""
    for name in names:
        if name not in index:
            close = difflib.get_close_matches(name, index, 3)
            raise InputError(
                "Unknown task.",
                note=f"{name!r}{f', a part of {within[-1]},' if within else ''} is no task, group or tag of lm-eval, "
                "nor of a directory that was given.",
                hint=f"Use for example {', '.join(close)}." if close else "List them with: lora-drop lm-eval ls tasks",
            )
        if name in within:
            raise InputError(
                "A group contains itself.",
                note=f"{' → '.join([*within[within.index(name) :], name])}.",
                hint="Correct the definitions; lm-eval's documentation says what they may hold.",
            )
        # A part that is written out, or gets its data from the group, need not be known
        inline = "dataset_path" in (index[name].cfg or {})
        known = [one for one in _members(index[name]) if isinstance(one, str) and (one in index or not inline)]
        _check_names(known, index, (*within, name))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _as_ours(name: str, error: Exception) -> InputError:
    """What a user can do about an exception of lm-eval, datasets, or the code of a definition."""
    text = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    causes = list(_causes(error))
    missing = next((one for one in causes if isinstance(one, ImportError)), None)
    if missing is not None or (isinstance(error, AssertionError) and "install" in text):
        package = getattr(missing, "name", None)
        return InputError(
            "A task needs a package that is not installed.",
            note=f"{name}: {f'{package} is missing; ' if package else ''}{text}.",
            hint="Install it with pip, or leave the task out.",
        )
    if any(type(one).__name__ in _FETCHING or isinstance(one, FileNotFoundError | OSError) for one in causes):
        return InputError(
            "The data of a task cannot be had.",
            note=f"{name}: {text}.",
            hint="It is fetched from the Hugging Face hub, or read from its cache (HF_HOME) or the files that the "
            "definition names; examples/eval has definitions for local files.",
        )
    said = [f"{type(one).__name__}: {' '.join(str(one).split()):.200}".rstrip(": .") for one in causes[:2]]
    return InputError(
        "A task cannot be opened.",
        note=f"{name}: {'; '.join(said)}.",
        hint="Its definition and its data do not fit each other, or the definition is damaged.",
    )


def _documents(task: Any) -> Any:
    docs = task.eval_docs
    return docs if hasattr(docs, "select") else list(docs)


def _drawn(name: str, task: Any, limit: int, seed: int) -> OpenedTask:
    """The task over a seeded subset: a larger one begins with the smaller, and with the same examples in prompts."""
    docs = _documents(task)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    places = tuple(generator.permutation(len(docs))[:limit].tolist())
    subset = docs.select(places) if hasattr(docs, "select") else [docs[place] for place in places]
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: subset)
    return OpenedTask(name, task, places)


def _functions(task: Any) -> list[Any]:
    config = task.config
    listed = [one.get("metric") for one in config.metric_list or ()] + [config.process_results]
    return [one for one in listed if callable(one)]


def _check_task(name: str, task: Any, unsafe: bool) -> None:
    """Refuse what cannot be run here, before anything is."""
    if getattr(task, "MULTIMODAL", False):
        raise InputError(
            "A task needs a model that sees or hears.", note=f"{name} does.", hint="Leave it out; bundles read text."
        )
    if getattr(task, "UNSAFE_CODE", False):
        if not uses_code_eval(_functions(task)) and not unsafe:
            raise InputError(
                "A task runs programs that a model writes in a way of its own.",
                note=f"{name} does so in lm-eval's process, not cut off from this machine.",
                hint="Leave it out, or trust the model with --unsafe-code.",
            )
        check_apart(name, unsafe)
    bounds.COUNT.whole("A task's repeats", task.config.repeats)
    if task.OUTPUT_TYPE == "generate_until":
        generation_of(task.config.generation_kwargs or {})


def _set_shots(task: Any, num_fewshot: int | None) -> None:
    """As lm-eval's own command does: a definition that says 0 keeps it."""
    said = task.get_config("num_fewshot")
    if said is None or (num_fewshot is not None and said != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _group(group: Any, figured: Sequence[Any]) -> OpenedGroup:
    config = group.aggregate_metric_list[0]
    filters = None if config.filter_list is None else tuple(config.filter_list)
    inner = {one.name for other in figured for one in other.get_all_groups()}
    tasks = tuple(task.task_name for task in group.get_all_tasks())
    return OpenedGroup(group.name, tasks, config.metric, filters, bool(config.weight_by_size), group.name in inner)


def _check_twice(name: str, new: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    twice = [one for one in new if one in tasks]
    if twice:
        raise InputError(
            "A task is named twice.",
            note=f"{twice[0]} is part of {name} and of what was named before.",
            hint="Name each task once, by itself or by a group or tag that it belongs to.",
        )


def _check_answers(name: str, task: Any) -> None:
    """Refuse options of which none is ever right: of a misspelt column, which lm-eval takes for a text."""
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "fewshot_cfg"):
        return
    if task.multiple_input or task.config.process_results is not None:  # other ways to say what is right
        return
    for doc in _documents(task):
        answer = task.doc_to_target(doc)
        if not isinstance(answer, str) or answer in task.doc_to_choice(doc):
            return
    raise InputError(
        "No item of a task has its answer among its options.",
        note=f"{name}: the last one's is {answer:.100}.",
        hint="Correct the definition: doc_to_target and doc_to_choice name columns of the data, or hold templates.",
    )


def _check_prompts(opened: OpenedTask) -> None:
    """Build the first item's prompt: where there are too few examples for it, this fails."""
    if not opened.places:
        raise InputError(
            "A task has no items.", note=f"{opened.name}: its split is empty.", hint="Give other data, or leave it out."
        )
    opened.task.set_fewshot_seed(FEWSHOT_SEED)
    task, doc = opened.task, _documents(opened.task)[0]
    if hasattr(task, "fewshot_cfg"):  # the others, written in Python, have no examples
        shots = task.config.num_fewshot
        try:
            task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        except ValueError as error:
            if "larger than population" not in str(error):
                raise
            raise InputError(
                "A task has too few examples for its prompts.",
                note=f"{opened.name}: a prompt has {shots} (num_fewshot), and its data has fewer.",
                hint="Use a smaller --num-fewshot, or give more data.",
            ) from None


def check_lm_eval() -> None:
    """Raises InputError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "Tasks need lm-eval.",
            note="It is not installed.",
            hint="pip install 'lora-drop-export[eval]'",
        )


def open_tasks(
    names: Sequence[str],
    directories: Sequence[Path] = (),
    limit: int | None = None,
    seed: int = 0,
    num_fewshot: int | None = None,
    unsafe: bool = False,
    shots: Mapping[str, int] | None = None,
) -> Opened:
    """Open tasks, groups and tags by name.

    Args:
        directories: with YAML files; a task there stands before lm-eval's of the same name.
        limit: items of each task at most; all when None.
        seed: of the subset.
        num_fewshot: examples in the prompt, for tasks that do not say 0 themselves.
        unsafe: run programs that a model writes without cutting them off.
        shots: `num_fewshot` of some of `names`, where that is None.

    Raises:
        InputError: lm-eval or a package is missing, an unknown name, a damaged definition, data that cannot be had,
            programs that cannot be cut off, more examples than there are.
    """
    check_lm_eval()
    with _quiet(), replaced():
        manager = _manager(names, directories)
        _check_names(names, manager.task_index)
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        own_shots: dict[str, int | None] = {}
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # whatever lm-eval, datasets and the code of a definition raise
                raise _as_ours(name, error) from None
            _check_twice(name, loaded["tasks"], tasks)
            tasks |= loaded["tasks"]
            own_shots |= dict.fromkeys(loaded["tasks"], (shots or {}).get(name) if num_fewshot is None else num_fewshot)
            groups |= loaded["groups"]
        opened = {}
        for name, task in tasks.items():
            _check_task(name, task, unsafe)
            try:
                _set_shots(task, own_shots[name])
                opened[name] = _drawn(name, task, sys.maxsize if limit is None else limit, seed)
                _check_prompts(opened[name])
                _check_answers(name, task)
            except InputError:
                raise
            except Exception as error:  # the code of a definition
                raise _as_ours(name, error) from None
    figured = [group for group in groups.values() if group.has_aggregation]
    return Opened(opened, {group.name: _group(group, figured) for group in figured})
