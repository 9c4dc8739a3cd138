"""What llguidance alone would get wrong: texts are allowed where they are valid under their schema, and only there."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.grammars.grammar import Grammars


@pytest.fixture(scope="module")
def grammars(bundle: Bundle) -> Grammars:
    return Grammars.of(bundle)


def is_allowed(grammars: Grammars, schema: Any, value: Any) -> bool:
    fork = grammars.json_schema(schema).behind(json.dumps(value).encode())
    return fork is not None and (fork.is_over or bool(fork.allowed()[grammars.tokenizer.eos_tokens].any()))


def check(grammars: Grammars, schema: Any, values: list[Any]) -> None:
    for value in values:
        assert is_allowed(grammars, schema, value) == jsonschema.Draft202012Validator(schema).is_valid(value), value


@pytest.mark.parametrize("pattern", [r'^[^"\\/]+$', r'^\[[^"]\]$', r"^\\[^\\]$"])
def test_a_negated_class_allows_no_escape_of_what_it_leaves_out(grammars: Grammars, pattern: str) -> None:
    texts = ["", "a", '"', "\\", "\n", '"a', "a\\", "[a]", '["]', "[\\]", "\\a", "\\\\", '\\"', "/"]
    names = {"type": "object", "patternProperties": {pattern: {"type": "null"}}, "additionalProperties": False}
    schema = {"anyOf": [{"type": "string", "pattern": pattern}, names]}
    check(grammars, schema, [*texts, *({text: None} for text in texts)])


def test_what_only_looks_like_a_pattern_is_left_alone(grammars: Grammars) -> None:
    named = {"type": "object", "properties": {"pattern": {"const": "[^a]"}}, "additionalProperties": False}
    schema = {"anyOf": [{"const": {"pattern": "[^b]"}}, named]}
    check(grammars, schema, [{"pattern": text} for text in ("[^a]", "[^b]", r"[^\x00a]", "a")])


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0, "maximum": 0.5},
        {"exclusiveMinimum": 3, "exclusiveMaximum": 3.25, "minimum": 2},
        {"minimum": -3.5, "exclusiveMaximum": -3.0},
        {"exclusiveMinimum": 1000, "minimum": 1000.25, "maximum": 1000.5},
        {"exclusiveMinimum": 3, "maximum": 4},
        {"exclusiveMinimum": 2**20, "maximum": 2**20 + 0.5},  # a float has no number within 2⁻⁴⁰ of it
    ],
)
def test_a_number_that_a_bound_excludes_is_not_allowed(grammars: Grammars, bounds: dict[str, float]) -> None:
    edges = {edge + more for edge in bounds.values() for more in (-1, -0.25, -0.125, 0, 0.125, 0.25, 1)}
    numbers = [int(one) if one % 1 == 0 else one for one in edges]
    check(grammars, {"type": "number", **bounds}, numbers)


def test_an_integer_that_would_be_rounded_is_refused(grammars: Grammars) -> None:
    exact = {"enum": [2**53, -(2**53)], "default": 2**60, "title": "of 2 values"}
    check(grammars, exact, [2**53, -(2**53), 2**53 - 1])
    for schema in ({"const": 2**53 + 1}, {"properties": {"id": {"enum": [1, {"a": [-(2**60)]}]}}}):
        with pytest.raises(InputError, match="too large"):
            grammars.json_schema(schema)


@pytest.mark.parametrize("names", [True, {}, {"type": "string"}])
def test_names_of_properties_may_be_said_to_be_texts(grammars: Grammars, names: Any) -> None:
    record = {"type": "object", "propertyNames": names, "additionalProperties": {"type": "integer"}}
    named = {"type": "array", "items": {"properties": {"propertyNames": {"const": 1}}}}
    check(grammars, {"anyOf": [record, named]}, [{}, {"a": 1}, {"a": "x"}, [{"propertyNames": 1}]])
    assert not is_allowed(grammars, named, [{"propertyNames": 2}])


def test_a_format_that_json_schema_has_not_is_a_note(grammars: Grammars) -> None:
    named = {"type": "object", "properties": {"format": {"type": "string", "format": "path", "maxLength": 3}}}
    check(grammars, named | {"additionalProperties": False}, [{"format": "/a"}, {"format": "/abc"}, {"format": 1}, {}])
    assert is_allowed(grammars, {"type": "string", "format": "date"}, "2026-01-31")
    assert not is_allowed(grammars, {"type": "string", "format": "date"}, "/a")
    with pytest.raises(InputError, match="regex"):
        grammars.json_schema({"type": "string", "format": "regex"})
