"""Numbers are refused alike wherever they come from: by their type, and below and above their bounds."""

from __future__ import annotations

import dataclasses
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from lora_drop_runtime.bounds import LENIENCE, SEED, THREADS, TOP_P, Bounds
from lora_drop_runtime.command_line import add_options, check_options, option
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_tools.bench.settings import BenchSettings
from lora_drop_tools.compare import CompareSettings
from lora_drop_tools.eval.settings import EvalSettings
from lora_drop_tools.fit.settings import FitSettings
from lora_drop_tools.generate import ChatSettings, GenerateSettings
from lora_drop_tools.profile.settings import ProfileSettings

from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.targets.trt.options import BuilderOptions

# Every settings class, and the least that it wants
CLASSES: dict[type, dict[str, Any]] = {
    ExportOptions: {},
    BuilderOptions: {},
    GenerateSettings: {},
    ChatSettings: {},
    CompareSettings: {},
    BenchSettings: {},
    EvalSettings: {"text": Path("t")},
    FitSettings: {"text": (Path("t"),), "out": Path("o")},
    ProfileSettings: {"text": (Path("t"),), "out": Path("o")},
}
NUMBERS = [
    (cls, field.name, hint)
    for cls in CLASSES
    for field in dataclasses.fields(cls)
    for hint in [str(get_type_hints(cls)[field.name])]
    if field.metadata and field.metadata["option"].choices is None and ("int" in hint or "float" in hint)
    if field.name != "drop_layers"  # sites, which have a check of their own
]


@pytest.mark.parametrize("value", [1, 64, np.int64(7), np.uint8(3), np.array(5)])
def test_whole_numbers_are_taken(value: Any) -> None:
    found = Bounds(1, 64).whole("--n", value)
    assert type(found) is int
    assert found == int(value)


@pytest.mark.parametrize("value", [0, 1, 0.25, np.float32(0.25), np.int8(1)])
def test_numbers_are_taken(value: Any) -> None:
    found = Bounds(0, 1).real("--x", value)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize(
    ("value", "fact", "note"),
    [
        (0, "--n is too small.", "It is 0; the smallest possible is 1."),
        pytest.param(-(10**400), "--n is too small.", "It is −2^1328 or beyond; the smallest possible is 1.", id="low"),
        (65, "--n is too large.", "It is 65; the largest possible is 64."),
        pytest.param(10**9999, "--n is too large.", "It is 2^33215 or beyond; the largest possible is 64.", id="long"),
        (True, "--n must be a whole number.", "It is True, of type bool; possible is 1 to 64."),
        (3.0, "--n must be a whole number.", "It is 3.0, of type float; possible is 1 to 64."),
        (np.float64(3), "--n must be a whole number.", "It is 3.0, of type float64; possible is 1 to 64."),
        (np.True_, "--n must be a whole number.", "It is np.True_, of type bool; possible is 1 to 64."),
        ("3", "--n must be a whole number.", "It is '3', of type str; possible is 1 to 64."),
        (None, "--n must be a whole number.", "It is None, of type NoneType; possible is 1 to 64."),
        ([3], "--n must be a whole number.", "It is [3], of type list; possible is 1 to 64."),
    ],
)
def test_whole_numbers_are_refused(value: Any, fact: str, note: str) -> None:
    with pytest.raises(InputError) as refused:
        Bounds(1, 64).whole("--n", value)
    assert (refused.value.fact, refused.value.note) == (fact, note)
    assert refused.value.hint == "Use a number from 1 to 64."


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (0, "is too small"),
        (-np.inf, "is too small"),
        (1.001, "is too large"),
        (np.inf, "is too large"),
        pytest.param(10**400, "is too large", id="long"),
        (np.nan, "is not a number"),
        (np.float32("nan"), "is not a number"),
        (True, "must be a number"),
        ("0.5", "must be a number"),
        (1j, "must be a number"),
    ],
)
def test_numbers_are_refused(value: Any, fact: str) -> None:
    with pytest.raises(InputError, match=f"^top_p {fact}") as refused:
        TOP_P.real("top_p", value)
    assert refused.value.note
    assert refused.value.hint == "Use a number above 0, at most 1."


@pytest.mark.parametrize("value", [Fraction(1, 10**400), np.longdouble("1e-4000")])
def test_what_only_a_wider_type_tells_from_a_bound_is_refused(value: Any) -> None:
    """As a float it is 0, whose logarithm a lenience has none of."""
    if not value > 0:
        pytest.skip("a longdouble is no wider here")
    with pytest.raises(InputError, match="above 0"):
        LENIENCE.real("The lenience", value)
    assert Bounds(0, 1).real("--x", value) == 0


def test_a_reason_and_another_error() -> None:
    with pytest.raises(PlanError) as refused:
        Bounds(1, 64).whole("--rank", 65, why="the hidden size", error=PlanError)
    assert refused.value.note == "It is 65; the largest possible is 64, the hidden size."


def test_threads_are_bounded_by_the_machine() -> None:
    cores = os.cpu_count() or 1
    assert min(cores, 1024) <= THREADS.most <= max(64, min(4 * cores, 1024))


@pytest.mark.parametrize(("cls", "name", "hint"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_every_number_of_every_command_has_bounds(cls: type, name: str, hint: str) -> None:
    """Neither a huge nor a negative number, no NaN and no bool gets through, and it is named by its flag."""
    flag = "--" + name.replace("_", "-")
    for value in (10**30, -3, -(10**30), True, "1", float("nan"), float("inf")):
        given = (value,) if hint.startswith(("tuple", "collections", "typing.Sequence")) else value
        with pytest.raises(InputError, match=f"^{flag} "):
            cls(**{**CLASSES[cls], name: given})


def test_seeds_have_one_range_in_all_commands() -> None:
    found = {cls: field for cls in CLASSES for field in dataclasses.fields(cls) if field.name == "seed"}
    assert len(found) == 5  # generate, chat, eval, fit, profile
    assert {id(field.metadata["option"].bounds) for field in found.values()} == {id(SEED)}
    for cls in found:
        drawn = {"temperature": 1.0} if issubclass(cls, GenerateSettings) else {}
        assert cls(**CLASSES[cls], **drawn, seed=np.int64(2**63 - 1)).seed == 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Toy:
    """One field of each kind."""

    several: tuple[int, ...] = option((1,), bounds=Bounds(0, 9), help="some")
    names: tuple[str, ...] = option((), help="names")
    file: Path | None = option(None, help="a file")
    flag: bool = option(False, help="on or off")
    text: str = option("a", help="a text")

    def __post_init__(self) -> None:
        check_options(self)


def test_types_of_settings() -> None:
    toy = Toy(several=np.arange(3), names=["a"], file="here")
    assert (toy.several, toy.names, toy.file) == ((0, 1, 2), ("a",), Path("here"))
    assert [type(one) for one in toy.several] == [int, int, int]


@pytest.mark.parametrize(
    "wrong", [{"several": 3}, {"several": "3"}, {"several": [3.5]}, {"names": "ab"}, {"names": [1]}, {"file": 3},
              {"flag": 1}, {"flag": "yes"}, {"text": b"a"}, {"text": None}, {"names": None}]
)  # fmt: skip
def test_wrong_types_of_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^--{next(iter(wrong))} ") as refused:
        Toy(**wrong)
    assert refused.value.note
    assert refused.value.hint


@pytest.mark.parametrize(
    ("cls", "given", "word"),
    [
        (ExportOptions, {"drop_layers": [4.0]}, "needed is a whole number or a text"),
        (FitSettings, {"drop_layers": [None]}, "needed is a whole number or a text"),
        (FitSettings, {"offset_weights": ()}, "--offset-weights has 0, --k has 3"),
    ],
)
def test_odd_lists_of_settings(cls: type, given: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError) as refused:
        cls(**CLASSES[cls], **given)
    assert word in refused.value.note


def test_help_says_the_bounds() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser, GenerateSettings)
    text = " ".join(parser.format_help().split())
    assert f"one per physical core) [1 to {THREADS.most}]" in text
    assert "draw the same text every time, but for --k auto [0 to 2^63 − 1]" in text
    assert "1 is off (default) [above 0, at most 1]" in text
