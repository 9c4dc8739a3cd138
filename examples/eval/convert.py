"""Items of the local files as the hub's data sets have them."""

import itertools

import datasets
from lm_eval.tasks.hellaswag.utils import process_docs

HELLASWAG_LINES = 6  # context, gold, four endings
MBPP_TEST = range(11, 511)  # the test part's task_id; those before are for prompts, those behind for training


def _mapped(convert, dataset):
    return datasets.Dataset.from_list([convert(row) for row in dataset])


def arc_easy(dataset):
    def convert(row):
        labels = [str(index) for index in range(len(row["choices"]))]
        return {
            "question": row["query"].removeprefix("Question: "),
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["gold"]],
        }

    return _mapped(convert, dataset)


def lambada(dataset):
    return _mapped(lambda row: {"text": f"{row['context']} {row['continuation']}"}, dataset)


def piqa(dataset):
    def convert(row):
        first, second = row["choices"]
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}

    return _mapped(convert, dataset)


def winogrande(dataset):
    def convert(row):
        first, second = row["context_options"]
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        shared = "".join(character for character, _ in same)
        return {
            "sentence": f"{shared}_ {row['continuation']}",
            "option1": first[len(shared) :],
            "option2": second[len(shared) :],
            "answer": str(row["gold"] + 1),
        }

    return _mapped(convert, dataset)


def mbpp(dataset):
    return dataset.filter(lambda row: row["task_id"] in MBPP_TEST)


def hellaswag(dataset):
    lines = dataset["text"]
    items = []
    for begin in range(0, len(lines), HELLASWAG_LINES):
        context, gold, *endings = lines[begin : begin + HELLASWAG_LINES]
        if len(endings) != HELLASWAG_LINES - 2:
            raise ValueError(f"the item at line {begin + 1} has {len(endings)} endings")
        activity, _, rest = context.partition(": ")
        items.append({"activity_label": activity, "ctx_a": rest, "ctx_b": "", "endings": endings, "label": gold})
    return process_docs(datasets.Dataset.from_list(items))
