"""lm-eval's definitions of the papers' tasks over an item each, worked by hand: what is asked, what answers are worth.

The items have the schema of the hub's data sets, lie in files, and nothing is fetched.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")

from lora_drop_tools.eval.result import task_figures
from lora_drop_tools.eval.store import Store
from lora_drop_tools.eval.tasks import run as run_module
from lora_drop_tools.eval.tasks.catalogue import DEFINITIONS, Opened, open_tasks
from lora_drop_tools.eval.tasks.metrics import Measured
from lora_drop_tools.eval.tasks.program import why_not_apart
from lora_drop_tools.eval.tasks.run import run_task

from .support import ScriptedLM, define

ITEMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "arc_easy": (
        "arc/arc_easy.yaml",
        [
            {
                "question": "Which is wet?",
                "choices": {"text": ["stone", "the wide sea"], "label": ["A", "B"]},
                "answerKey": "B",
            }
        ],
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        [{"question": "Which is dry?", "choices": {"text": ["rain", "sand"], "label": ["1", "2"]}, "answerKey": "2"}],
    ),
    "lambada_openai": ("lambada/lambada_openai.yaml", [{"text": "The boat sank, so he bought a boat"}]),
    "piqa": ("piqa/piqa.yaml", [{"goal": "tie a boat", "sol1": "use a rope", "sol2": "use a fish", "label": 0}]),
    "winogrande": (
        "winogrande/default.yaml",
        [{"sentence": "Sam met Sally because _ was late.", "option1": "Sam", "option2": "Sally", "answer": "2"}],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        [
            {
                "activity_label": "Roof",
                "ctx_a": "A man sits on it.",
                "ctx_b": "he",
                "endings": ["sings [title] a song.", "jumps  down [step] now.", "eats.", "flies."],
                "label": "1",
            }
        ],
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        [
            {
                "question_stem": "The sun is",
                "choices": {"text": ["a star", "a lamp", "a fish", "a moon"], "label": ["A", "B", "C", "D"]},
                "answerKey": " A",
            }
        ],
    ),
    "race": (
        "race/race.yaml",
        [
            {
                "article": "Ann has a cat.",
                "problems": str(
                    [
                        {"question": "Who has a cat?", "options": ["Ann", "Bob", "Cid", "Dan"], "answer": "A"},
                        {"question": "It is a  _  .", "options": ["cow", "cat", "dog", "hen"], "answer": "B"},
                        {"question": "Ann has", "options": ["none.", "one cat.", "two.", "ten."], "answer": "B"},
                    ]
                ),
            }
        ],
    ),
    "hendrycks_math_algebra": (
        "hendrycks_math/hendrycks_math_algebra.yaml",
        [{"problem": "Find $x$ if $x+1=3$.", "solution": "So $x=\\boxed{\\frac12}$."}],
    ),
    "bbh_fewshot_boolean_expressions": (
        "bbh/fewshot/boolean_expressions.yaml",
        [{"input": "True or False is", "target": "True"}],
    ),
    "longbench_qasper": (
        "longbench/qasper.yaml",
        [{"context": "The boat is at sea.", "question": "Where is it?", "answers": ["the sea", "a pond"]}],
    ),
    "xnli_en": ("xnli/xnli_en.yaml", [{"premise": "It rains", "hypothesis": "it is wet.", "label": 0}]),
    "xcopa_it": (
        "xcopa/default_it.yaml",
        [
            {
                "premise": "Il mare è mosso.",
                "question": "effect",
                "choice1": "La barca affonda.",
                "choice2": "Il sole splende.",
                "label": 0,
            }
        ],
    ),
    "humaneval": (
        "humaneval/humaneval.yaml",
        [
            {
                "task_id": "T/0",
                "prompt": "def add(a, b):\n",
                "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
                "entry_point": "add",
            }
        ],
    ),
    "mbpp": (
        "mbpp/mbpp.yaml",
        [
            {
                "task_id": 1,
                "text": "Write a function to add one.",
                "code": "def inc(a): return a + 1",
                "test_list": ["assert inc(1) == 2", "assert inc(2) == 3", "assert inc(0) == 1"],
            }
        ],
    ),
    "cola": (
        "glue/cola/default.yaml",
        [{"sentence": f"This is {i}.", "label": label} for i, label in enumerate((1, 1, 0, 0))],
    ),
    "wikitext": ("wikitext/wikitext.yaml", [{"page": " = Sea = \n The sea is wide ."}]),
}
STORE = Store(None, {})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("definitions")
    for name, (include, rows) in ITEMS.items():
        define(root, name, include, rows)
    letters = "ABCDE"
    shots = [
        {"question": f" Bone {letter}?", "choices": ["a", "b", "c", "d"], "answer": i % 4}
        for i, letter in enumerate(letters)
    ]
    item = {"question": "Which is a bone?", "choices": ["rib", "lung", "skin", "hair"], "answer": 0}
    define(root, "mmlu_anatomy", "mmlu/default/mmlu_anatomy.yaml", [item], shots)
    solved = {"question": "1+1?", "answer": "It is 1+1 = 2.\n#### 2"}
    define(root, "gsm8k", "gsm8k/gsm8k.yaml", [{"question": "2+3?", "answer": "2+3 = 5\n#### 5"}], [solved] * 5)
    return root


@pytest.fixture(scope="module", autouse=True)
def packages_of_longbench() -> Iterator[None]:
    """Stand-ins for what LongBench's other subtasks need (pip install 'lm-eval[longbench]'); Qasper calls none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("jieba", "fuzzywuzzy", "rouge"):
            module: Any = types.ModuleType(name)
            module.fuzz, module.Rouge = None, None
            patch.setitem(sys.modules, name, module)
        yield


@pytest.fixture(scope="module")
def opened(directory: Path) -> Opened:
    names = [name for name in ITEMS if name != "mbpp"]
    return open_tasks([*names, "gsm8k"], [directory], unsafe=bool(why_not_apart()))


def run(opened: Opened, name: str, model: ScriptedLM) -> Measured:
    return run_task(opened.tasks[name], model, STORE, unsafe=bool(why_not_apart()))


def likelihoods(*values: float, of: Sequence[str]) -> Callable[[str], float]:
    return dict(zip(of, values, strict=True)).__getitem__


def choices(
    opened: Opened, name: str, values: Sequence[float], context: str | Sequence[str], continuations: Sequence[str]
) -> Measured:
    """Ask for the likelihoods of continuations; what is asked has to be these, with their contexts."""
    contexts = [context] * len(continuations) if isinstance(context, str) else context
    model = ScriptedLM()
    by_pair = dict(zip(zip(contexts, continuations, strict=True), values, strict=True))

    def answer(requests: Sequence[Any]) -> list[tuple[float, bool]]:
        model.asked += [request.args for request in requests]
        return [(by_pair[request.args], by_pair[request.args] > -2) for request in requests]

    model.loglikelihood = answer
    found = run(opened, name, model)
    assert model.asked == list(by_pair)
    return found


def written(opened: Opened, name: str, texts: Sequence[str]) -> tuple[Measured, str, dict[str, Any]]:
    """Let the model write these; what it was asked, and how."""
    model = ScriptedLM(texts=texts)
    found = run(opened, name, model)
    assert len(set(model.asked)) == 1
    return found, model.asked[0][0], model.options[0]


# ── continuations ──────────────────────────────────────────────────────────────────────────────────────────────


def test_arc_easy(opened: Opened) -> None:
    found = choices(opened, "arc_easy", [-2.0, -2.5], "Question: Which is wet?\nAnswer:", [" stone", " the wide sea"])
    # The second, right one is likelier for each of its 12 characters (-0.21) than the first of 5 (-0.4)
    assert found.items == {0: {"acc": 0.0, "acc_norm": 1.0}}
    assert found.metric == "acc"


def test_arc_challenge(opened: Opened) -> None:
    found = choices(opened, "arc_challenge", [-3.0, -1.0], "Question: Which is dry?\nAnswer:", [" rain", " sand"])
    assert found.items == {0: {"acc": 1.0, "acc_norm": 1.0}}
    assert found.metric == "acc_norm"


def test_lambada_openai(opened: Opened) -> None:
    found = choices(opened, "lambada_openai", [-1.5], "The boat sank, so he bought a", [" boat"])
    assert found.items == {0: {"perplexity": -1.5, "acc": 1.0}}
    assert found.metric == "acc"
    figures = task_figures(found, None, seed=0)
    assert figures.metrics["perplexity"].value == pytest.approx(math.exp(1.5))


def test_piqa(opened: Opened) -> None:
    found = choices(opened, "piqa", [-4.0, -3.0], "Question: tie a boat\nAnswer:", [" use a rope", " use a fish"])
    assert found.items == {0: {"acc": 0.0, "acc_norm": 0.0}}
    assert found.metric == "acc"


def test_winogrande(opened: Opened) -> None:
    contexts = ["Sam met Sally because Sam", "Sam met Sally because Sally"]
    found = choices(opened, "winogrande", [-4.0, -3.0], contexts, [" was late.", " was late."])
    assert found.items == {0: {"acc": 1.0}}


def test_mmlu_with_five_examples(directory: Path) -> None:
    (one,) = open_tasks(["mmlu_anatomy"], [directory], num_fewshot=5).tasks.values()
    model = ScriptedLM(likelihoods(-1.0, -2.0, -3.0, -4.0, of=[" A", " B", " C", " D"]))
    found = run_task(one, model, STORE)
    solved = "".join(
        f"Bone {letter}?\nA. a\nB. b\nC. c\nD. d\nAnswer: {answer}\n\n"
        for letter, answer in zip("ABCDE", "ABCDA", strict=True)
    )
    prompt = (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        + solved
        + "Which is a bone?\nA. rib\nB. lung\nC. skin\nD. hair\nAnswer:"
    )
    assert model.asked == [(prompt, f" {letter}") for letter in "ABCD"]
    assert found.items == {0: {"acc": 1.0}}


def test_hellaswag(opened: Opened) -> None:
    endings = [" sings. a song.", " jumps down now.", " eats.", " flies."]  # as lm-eval cleans them
    found = choices(opened, "hellaswag", [-8.0, -6.0, -4.0, -9.0], "Roof: A man sits on it. He", endings)
    # For each character -0.57, -0.4, -0.8, -1.5
    assert found.items == {0: {"acc": 0.0, "acc_norm": 1.0}}
    assert found.metric == "acc_norm"


def test_openbookqa(opened: Opened) -> None:
    found = choices(
        opened, "openbookqa", [-1.0, -2.0, -3.0, -4.0], "The sun is", [" a star", " a lamp", " a fish", " a moon"]
    )
    assert found.items == {0: {"acc": 1.0, "acc_norm": 1.0}}
    assert found.metric == "acc_norm"


def test_race(opened: Opened) -> None:
    prompt = "Article: Ann has a cat.\n\nQuestion: Who has a cat?\nAnswer: Ann\nIt is a cat\nAnn has"
    found = choices(opened, "race", [-4.0, -1.0, -2.0, -3.0], prompt, [" none.", " one cat.", " two.", " ten."])
    assert found.items == {0: {"acc": 1.0}}


def test_xnli(opened: Opened) -> None:
    texts = [f" It rains, right? {word}, it is wet." for word in ("Yes", "Also", "No")]
    assert choices(opened, "xnli_en", [-3.0, -2.0, -9.0], "", texts).items == {0: {"acc": 0.0}}


def test_xcopa(opened: Opened) -> None:
    texts = [" la barca affonda.", " il sole splende."]
    assert choices(opened, "xcopa_it", [-3.0, -4.0], "Il mare è mosso quindi", texts).items == {0: {"acc": 1.0}}


def test_a_figure_that_is_no_mean_is_lm_evals_own(opened: Opened) -> None:
    """WikiText's perplexities weight each page by its words; there is no value of an item, and no difference."""
    model = ScriptedLM(lambda _: -10.0)
    found = run(opened, "wikitext", model)
    assert model.asked == [(" = Sea =\nThe sea is wide .",)]
    assert found.items == {0: {}}
    # lm-eval counts the words of the page as it is: "", =, Sea, =, The, sea, is, wide, .
    assert found.aggregates["word_perplexity"].value == pytest.approx(math.exp(10 / 9))
    assert found.aggregates["word_perplexity"].stderr is None
    figures = task_figures(found, found, seed=0)
    assert figures.metric == "word_perplexity"
    assert figures.difference is None
    assert not figures.is_share


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")  # in some draws of the bootstrap
def test_such_a_figure_has_lm_evals_error_where_it_gives_one(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matthews' correlation of four items: gold 1, 1, 0, 0, said 1, 1, 0, 1."""
    monkeypatch.setattr(run_module, "BOOTSTRAPS", 50)
    model = ScriptedLM()
    said = {"This is 0.": 1, "This is 1.": 1, "This is 2.": 0, "This is 3.": 1}

    def answer(requests: Sequence[Any]) -> list[tuple[float, bool]]:
        model.asked += [request.args for request in requests]
        wanted = [said[request.args[0].partition("\n")[0]] for request in requests]
        return [(0.0 if request.idx == one else -1.0, False) for request, one in zip(requests, wanted, strict=True)]

    model.loglikelihood = answer
    found = run(opened, "cola", model)
    assert ("This is 0.\nQuestion: Does this sentence make sense?\nAnswer:", " yes") in model.asked
    one = found.aggregates["mcc"]
    assert (one.value, one.count) == (pytest.approx(2 / math.sqrt(3 * 2 * 1 * 2)), 4)
    assert one.stderr is not None
    figure = task_figures(found, found, seed=0).figure
    assert (figure.low, figure.high) == (
        pytest.approx(one.value - 1.96 * one.stderr, abs=1e-4),
        pytest.approx(one.value + 1.96 * one.stderr, abs=1e-4),
    )


# ── texts ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "strict", "flexible"), [(" It is 5.\n#### 5", 1.0, 1.0), (" So 5", 0.0, 1.0), (" #### 6", 0.0, 0.0)]
)
def test_gsm8k(opened: Opened, text: str, strict: float, flexible: float) -> None:
    found, prompt, options = written(opened, "gsm8k", [text])
    assert prompt == "Question: 1+1?\nAnswer: It is 1+1 = 2.\n#### 2\n\n" * 5 + "Question: 2+3?\nAnswer:"
    assert options["until"][0] == "Question:"
    assert found.items == {0: {"exact_match,strict-match": strict, "exact_match,flexible-extract": flexible}}
    assert found.metric == "exact_match,strict-match"


@pytest.mark.parametrize(("text", "match"), [(" It is $\\frac{1}{2}$.", 1.0), (" $2$", 0.0)])
def test_math(opened: Opened, text: str, match: float) -> None:
    """hendrycks_math needs no further package; minerva_math needs those of lm-eval[math]."""
    found, prompt, options = written(opened, "hendrycks_math_algebra", [text])
    assert prompt == "Problem: Find $x$ if $x+1=3$.\nAnswer:"
    assert options["until"] == ["Problem:"]
    assert found.items == {0: {"exact_match": match}}


@pytest.mark.parametrize(("text", "match"), [("True", 1.0), ("False", 0.0)])
def test_bbh(opened: Opened, text: str, match: float) -> None:
    found, prompt, options = written(opened, "bbh_fewshot_boolean_expressions", [text])
    assert prompt == (
        "Evaluate the result of a random Boolean expression.\n\n"
        "Q: not ( ( not not True ) ) is\nA: False\n\n"
        "Q: True and False and not True and True is\nA: False\n\n"
        "Q: not not ( not ( False ) ) is\nA: True\n\n"
        "Q: True or False is\nA:"
    )
    assert options["until"] == ["</s>", "Q", "\n\n"]
    assert found.items == {0: {"exact_match": match}}


def test_longbench(opened: Opened) -> None:
    found, prompt, options = written(opened, "longbench_qasper", [" The  Sea, wide"])
    how = (
        'If the question cannot be answered based on the information in the article, write "unanswerable". If the '
        'question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.'
    )
    assert prompt == (
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        f"single phrase or sentence if possible. {how}\n\nArticle: The boat is at sea.\n\n Answer the question based "
        "on the above article as concisely as you can, using a single phrase or sentence if possible. "
        f"{how}\n\nQuestion: Where is it?\n\nAnswer:"
    )
    assert (options["max_gen_toks"], options["do_sample"]) == (128, False)
    # Without article and punctuation "sea wide" of "sea": precision 1/2, recall 1
    assert found.items[0]["qa_f1_score"] == pytest.approx(2 / 3)
    figures = task_figures(found, None, seed=0)
    assert figures.figure.value == pytest.approx(2 / 3)
    assert figures.is_share


@pytest.mark.parametrize(("text", "passes"), [("    return a + b\n", 1.0), ("    return a - b\n", 0.0)])
def test_humaneval(opened: Opened, text: str, passes: float) -> None:
    found, prompt, options = written(opened, "humaneval", [text])
    assert prompt == "def add(a, b):\n"
    assert options["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert found.items == {0: {"pass@1,create_test": passes}}
    assert found.metric == "pass@1,create_test"


def test_mbpp_ten_times(directory: Path) -> None:
    """pass@1 and pass@10 of ten programs, of which three are right; the examples are lm-eval's."""
    opened = open_tasks(["mbpp_10"], [directory], unsafe=bool(why_not_apart()))
    right, wrong = "def inc(a):\n    return a + 1\n", "def inc(a):\n    return 2\n"
    found, prompt, options = written(opened, "mbpp", [right, wrong, wrong, right, *[wrong] * 5, right])
    first = (
        "You are an expert Python programmer, and here is your task: Write a function to find the similar elements "
        "from the given two tuple lists. Your code should pass these tests:\n\n"
        "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n"
        "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)\n"
        "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)\n"
        "[BEGIN]\ndef similar_elements(test_tup1, test_tup2):\r\n"
        "  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) \n[DONE]\n\n"
    )
    last = (
        "[DONE]\n\nYou are an expert Python programmer, and here is your task: Write a function to add one. "
        "Your code should pass these tests:\n\n"
        "assert inc(1) == 2\nassert inc(2) == 3\nassert inc(0) == 1\n[BEGIN]\n"
    )
    assert prompt.startswith(first)
    assert prompt.endswith(last)
    assert prompt.count("[BEGIN]") == 4
    assert (options["do_sample"], options["until"]) == (True, ["[DONE]"])
    assert found.items == {0: {"pass@1,all": pytest.approx(0.3), "pass@10,all": 1.0}}
    assert found.metric == "pass@1,all"
    none, _, _ = written(opened, "mbpp", [wrong] * 10)
    assert none.items == {0: {"pass@1,all": 0.0, "pass@10,all": 0.0}}


DEPTHS = ((0.0, 0), (0.5, 1), (1.0, 2))


@pytest.fixture(scope="module")
def needles(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    root = tmp_path_factory.mktemp("needles")
    for depth, place in DEPTHS:
        (root / f"{place}.yaml").write_text(
            f"include: {DEFINITIONS / 'needle.yaml'}\ntask: needle_{place}\n"
            f"dataset_kwargs: {{characters: [40], depths: [{depth}], count: 2, seed: 3}}\n"
        )
    return open_tasks([f"needle_{place}" for _, place in DEPTHS], [root])


@pytest.mark.parametrize("place", [place for _, place in DEPTHS])
def test_needle(needles: Opened, place: int) -> None:
    """Two sentences of hay fit into 40 characters; the needle stands before, between or after them."""
    one = needles.tasks[f"needle_{place}"]
    model = ScriptedLM(texts=["no idea", "no idea"])
    assert run_task(one, model, STORE).items == {0: {"found": 0.0}, 1: {"found": 0.0}}
    numbers = []
    for (prompt,) in model.asked:
        city, number = re.findall(r"The magic number of (\w+) is (\d{7})\.", prompt)[0]
        sentences = ["The grass is green.", "The sky is blue."]
        sentences.insert(place, f"The magic number of {city} is {number}.")
        assert prompt == (
            " ".join(sentences)
            + f"\n\nWhat is the magic number of {city} that the text names?\nAnswer: The magic number is"
        )
        numbers.append(number)
    assert numbers[0] != numbers[1]
    model = ScriptedLM(texts=[f" {numbers[0]}, of course", f" {numbers[0]}"])
    assert sorted(one["found"] for one in run_task(one, model, STORE).items.values()) == [0.0, 1.0]
