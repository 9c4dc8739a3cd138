"""What a JSON schema allows, as cases that no keyword joins any more: for those who follow it by themselves.

Enters: the schema of an object. Leaves: what the object, or a value in it, may be. References, alternatives and parts
that hold together are resolved; a keyword that would be lost by that is refused.
"""

from __future__ import annotations

import functools
import json
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from operator import ge, gt, le, lt
from typing import Any

from lora_drop_runtime.errors import InputError

TEXT, LIST, OBJECT, CONST = "string", "array", "object", "const"
_SCALARS = ("number", "boolean", "null")
_TYPES = (TEXT, *_SCALARS, LIST, OBJECT)  # what a schema without any allows; an integer is a number
_DEFINITIONS = ("$defs", "definitions")
_IN_DEFINITIONS = tuple(f"#/{name}/" for name in _DEFINITIONS)
_ROOT = "root"  # the definition that a whole schema becomes
_LEAST = ("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum")
_MOST = ("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum")
_SCHEMAS = ("items", "additionalProperties")
_BOUNDS = {"minimum": ge, "maximum": le, "exclusiveMinimum": gt, "exclusiveMaximum": lt}
_LENGTHS = {"minLength": ge, "maxLength": le}
_CASES = ("$ref", "anyOf", "oneOf")
_NOTES = ("title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id")
MOST_PARTS = 4096  # of a schema that are looked at: references may say more than is written
MOST_LEVELS = 64  # of values in values, and of schemas in schemas
_MOST_LENGTH = 1 << 16  # of texts and lists, where a schema says one


def refused(reason: str) -> InputError:
    return InputError(
        "The parameters of a tool cannot be followed.",
        note=f"The reason: {reason}.",
        hint="Use simpler ones; docs/serving.md says what this model's calls can follow.",
    )


def listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    """A keyword's list, empty without one. Raises InputError where it is none."""
    found = schema.get(name, [])
    if not isinstance(found, list):
        raise refused(f"{name} is {found!r:.80}, and no list")
    return found


def check_words(schema: Mapping[str, Any], words: Sequence[str]) -> None:
    """Raises InputError where a schema has one of these, or one that rules do not follow anywhere."""
    for word in (*words, "not", "if"):
        if schema.get(word):
            raise refused(f"{word} is not followed")


def counted(schema: Mapping[str, Any], name: str) -> int | None:
    """A keyword's number. Raises InputError where it is none, or too large."""
    found = schema.get(name)
    if found is not None and (not isinstance(found, int) or not 0 <= found <= _MOST_LENGTH):
        raise refused(f"{name} is {found!r:.80}, and no number up to {_MOST_LENGTH}")
    return found


def type_of(value: object) -> str:
    """The JSON type."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else OBJECT


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _named(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Schemas of the properties that a schema names."""
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _part(schema: Mapping[str, Any], name: str) -> Any:
    """The schema of a property, which may be one that is not named."""
    return _named(schema).get(name, schema.get("additionalProperties", {}))


def _item(schema: Mapping[str, Any], place: int) -> Any:
    """The schema of an item of a list."""
    first = listed(schema, "prefixItems")
    return first[place] if place < len(first) else schema.get("items", {})


def _all_of(one: object, other: object) -> Any:
    if one is False or other is False:
        return False
    given = [part for part in (one, other) if isinstance(part, Mapping) and part]
    return {"allOf": given} if len(given) == 2 and one != other else given[0] if given else {}


def in_both(one: list[Any], other: list[Any]) -> list[Any]:
    """Values of two lists, which JSON tells apart: 1 is not true."""
    known = {json.dumps(value) for value in other}
    return [value for value in one if json.dumps(value) in known]


def _types_in_both(one: list[Any], other: list[Any]) -> list[Any]:
    """An integer is a number."""
    known = [[*types, *(["integer"] if "number" in types else [])] for types in (one, other)]
    both = in_both(*known)
    return [kind for kind in both if kind != "integer" or "number" not in both]


def _both(one: object, other: object) -> Any:
    """A schema of what two allow."""
    if one is False or other is False:
        return False
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one if isinstance(one, Mapping) else other if isinstance(other, Mapping) else {}
    found = {**one, **other}
    for word in (word for word in one if word in other and one[word] != other[word]):
        values = one[word], other[word]
        if word == "type":
            found[word] = _types_in_both(*map(_as_list, values))
        elif word == "enum":
            found[word] = in_both(listed(one, word), listed(other, word))
        elif word in ("required", "allOf"):
            found[word] = [*listed(one, word), *listed(other, word)]
        elif word in _CASES:
            found |= {word: values[0], "allOf": [*listed(found, "allOf"), {word: values[1]}]}
        elif word in _SCHEMAS and not any(isinstance(value, list) for value in values):
            found[word] = _all_of(*values)
        elif word in (*_LEAST, *_MOST) and all(type_of(value) == "number" for value in values):
            found[word] = (max if word in _LEAST else min)(values)
        elif word not in (*_NOTES, *_DEFINITIONS, "properties", "prefixItems"):
            raise refused(f"{word} is both {values[0]!r:.80} and {values[1]!r:.80}")
    if all("properties" in schema or "additionalProperties" in schema for schema in (one, other)):
        names = {**_named(one), **_named(other)}
        parts = {name: _all_of(_part(one, name), _part(other, name)) for name in names}
        found["properties"] = {name: part for name, part in parts.items() if part is not False}
    if first := max(len(listed(schema, "prefixItems")) for schema in (one, other)):
        found["prefixItems"] = [_all_of(_item(one, n), _item(other, n)) for n in range(first)]
    return found


def _references(schema: object) -> Iterator[str]:
    """Paths of what a schema refers to."""
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    parts = schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ()
    for part in parts:
        yield from _references(part)


def _moved(schema: object) -> Any:
    """What refers to the root, where that is a definition."""
    if isinstance(schema, list):
        return [_moved(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {name: _moved(part) for name, part in schema.items()}
    path = found.get("$ref")
    return {**found, "$ref": f"#/$defs/{_ROOT}{path[1:]}"} if isinstance(path, str) and path.startswith("#") else found


def allows(schema: Mapping[str, Any], value: object) -> bool:
    """Whether a value is within the types, bounds and lengths of a schema."""
    kind = type_of(value)
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds = (kind, "integer") if kind == "number" and is_whole else (kind,)
    measured: Any = len(value) if isinstance(value, str) else value
    bounds = _BOUNDS if kind == "number" else _LENGTHS if kind == TEXT else {}
    return ("type" not in schema or any(one in _as_list(schema["type"]) for one in kinds)) and all(
        is_within(measured, schema[word])
        for word, is_within in bounds.items()
        if word in schema and type_of(schema[word]) == "number"
    )


class SchemaCases:
    """The cases of one schema, of which so many may be asked for until `again` is said.

    Args:
        root: the schema, of an object.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._looked_at = 0

    def objects(self) -> list[dict[str, Any]]:
        """What the object may be."""
        return [part for kind, part in self.alternatives(self._root) if kind == OBJECT]

    def _referred(self, path: str) -> Any:
        found: Any = self._root
        for part in path.removeprefix("#").split("/")[1:]:
            name = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise refused(f"{path:.100} is not in the schema")
            found = found[name]
        return found

    def _both(self, one: object, other: object) -> Any:
        """As `_both`, of which properties and first items count as parts."""
        for schema in (one, other):
            if isinstance(schema, Mapping):
                self._looked_at += len(_named(schema)) + len(listed(schema, "prefixItems"))
        return _both(one, other)

    def alternatives(self, schema: object, level: int = 0) -> Iterator[tuple[str, Any]]:
        """What a value may be: ("const", value), or a type and a schema.

        Args:
            level: of schemas in schemas.
        """
        self._looked_at += 1
        if self._looked_at > MOST_PARTS or level > MOST_LEVELS:
            raise refused("it refers to itself too often, or is too large")
        if schema is False:
            return
        if not isinstance(schema, Mapping):
            schema = {}
        rest = dict(schema)
        if "$ref" in rest:
            target = self._referred(str(rest.pop("$ref")))
            yield from self.alternatives(self._both(rest, target), level + 1)
            return
        for word in ("anyOf", "oneOf"):
            if parts := listed(rest, word):
                rest.pop(word)
                for part in parts:
                    yield from self.alternatives(self._both(rest, part), level + 1)
                return
        if parts := listed(rest, "allOf"):
            rest.pop("allOf")
            yield from self.alternatives(functools.reduce(self._both, parts, rest), level + 1)
            return
        types = rest.get("type", LIST if "items" in rest else OBJECT if "properties" in rest else _TYPES)
        types = [types] if isinstance(types, str) else types
        for one in types:
            if one not in (*_TYPES, "integer"):
                raise refused(f"{one!r:.80} is no type")
        if "const" in rest or "enum" in rest:
            values = listed(rest, "enum") if "enum" in rest else [rest["const"]]
            for value in in_both(values, [rest["const"]]) if "const" in rest else values:
                if allows(rest, value):
                    yield CONST, value
            return
        for one in types:
            yield ("number" if one == "integer" else one), {**rest, "type": one}

    def properties(self, schema: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """Schema of each property, and the names of those that are required."""
        required = [name for name in listed(schema, "required") if isinstance(name, str)]
        return {**_named(schema), **{name: _part(schema, name) for name in required}}, set(required)

    def as_json(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """A part of the schema, with what it may refer to."""
        if not any(_references(schema)):
            return dict(schema)
        definitions = {name: self._root[name] for name in _DEFINITIONS if name in self._root}
        if all(path.startswith(_IN_DEFINITIONS) for path in _references([schema, definitions])):
            return {**schema, **definitions}
        return {**_moved(schema), "$defs": {_ROOT: _moved(self._root)}}

    def again(self) -> None:
        """Count what is looked at from nothing."""
        self._looked_at = 0
