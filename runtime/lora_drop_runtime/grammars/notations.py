"""Arguments of a call that are not one JSON object, but written one by one.

Enters: how a model writes them; the schema of a tool's parameters; a text. Leaves: rules in Lark for what may be
written, and what was written, as JSON.

    arguments = pair (between pair)*
    pair = key[0] name key[1] value behind

Properties come in the order of the schema, and no others but where it names none. Followed are `$ref` within the
schema, `anyOf`, `oneOf`, `allOf`, `enum`, `const`, `type`, `required`, `additionalProperties`, and the lengths of
texts; within quotes those of lists and their first items, too. Of texts `pattern` and `format` are not, and other
keywords are refused. What stands as JSON follows the whole of its schema.
"""

from __future__ import annotations

import functools
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from lora_drop_runtime.errors import InputError

_TEXT, _LIST, _OBJECT, _CONST = "string", "array", "object", "const"
_SCALARS = ("number", "boolean", "null")
_TYPES = (_TEXT, *_SCALARS, _LIST, _OBJECT)  # what a schema without any allows; an integer is a number
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_NAME = re.compile(r"[A-Za-z0-9_.$@-]+")
_DEFINITIONS = ("$defs", "definitions")
_IN_DEFINITIONS = tuple(f"#/{name}/" for name in _DEFINITIONS)
_ROOT = "root"  # the definition that a whole schema becomes
_OF_OBJECTS = ("patternProperties", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies")
_OF_LISTS = ("uniqueItems", "contains")
_LEAST = ("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum")
_MOST = ("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum")
_SCHEMAS = ("items", "additionalProperties")
_BOUNDS = {"minimum": ge, "maximum": le, "exclusiveMinimum": gt, "exclusiveMaximum": lt}
_LENGTHS = {"minLength": ge, "maxLength": le}
_CASES = ("$ref", "anyOf", "oneOf")
_NOTES = ("title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id")
_MOST_PARTS = 4096  # of a schema that are looked at: references may say more than is written
_MOST_CHARACTERS = 1 << 19  # of rules
_MOST_LEVELS = 64  # of values in values, and of schemas in schemas
_MOST_LENGTH = 1 << 16  # of texts and lists, where a schema says one

Piece = Callable[[str], str]  # a text in Lark, some parts of which are special tokens


@dataclass(frozen=True)
class Notation:
    """How arguments are written.

    Attributes:
        key: what stands around a name.
        behind: each value.
        between: a pair and the next one.
        quote: stands around texts, which may then be within lists and objects, whose keys have none. Where it is
            empty, a value is a text as it is, or JSON.
    """

    key: tuple[str, str]
    behind: str = ""
    between: str = ""
    quote: str = ""


def _refused(reason: str) -> InputError:
    return InputError(
        "The parameters of a tool cannot be followed.",
        note=f"The reason: {reason}.",
        hint="Use simpler ones; docs/serving.md says what this model's calls can follow.",
    )


def _no_number(name: str) -> object:
    raise ValueError(name)


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    found = schema.get(name, [])
    if not isinstance(found, list):
        raise _refused(f"{name} is {found!r:.80}, and no list")
    return found


def _check_words(schema: Mapping[str, Any], words: Sequence[str]) -> None:
    """Raises InputError where a schema has one of these, or one that rules do not follow anywhere."""
    for word in (*words, "not", "if"):
        if schema.get(word):
            raise _refused(f"{word} is not followed")


def _counted(schema: Mapping[str, Any], name: str) -> int | None:
    found = schema.get(name)
    if found is not None and (not isinstance(found, int) or not 0 <= found <= _MOST_LENGTH):
        raise _refused(f"{name} is {found!r:.80}, and no number up to {_MOST_LENGTH}")
    return found


def _type_of(value: object) -> str:
    """The JSON type."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return _TEXT if isinstance(value, str) else _LIST if isinstance(value, list) else _OBJECT


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
    first = _listed(schema, "prefixItems")
    return first[place] if place < len(first) else schema.get("items", {})


def _all_of(one: object, other: object) -> Any:
    if one is False or other is False:
        return False
    given = [part for part in (one, other) if isinstance(part, Mapping) and part]
    return {"allOf": given} if len(given) == 2 and one != other else given[0] if given else {}


def _in_both(one: list[Any], other: list[Any]) -> list[Any]:
    """Values."""
    known = {json.dumps(value) for value in other}
    return [value for value in one if json.dumps(value) in known]


def _types_in_both(one: list[Any], other: list[Any]) -> list[Any]:
    """An integer is a number."""
    known = [[*types, *(["integer"] if "number" in types else [])] for types in (one, other)]
    both = _in_both(*known)
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
            found[word] = _in_both(_listed(one, word), _listed(other, word))
        elif word in ("required", "allOf"):
            found[word] = [*_listed(one, word), *_listed(other, word)]
        elif word in _CASES:
            found |= {word: values[0], "allOf": [*_listed(found, "allOf"), {word: values[1]}]}
        elif word in _SCHEMAS and not any(isinstance(value, list) for value in values):
            found[word] = _all_of(*values)
        elif word in (*_LEAST, *_MOST) and all(_type_of(value) == "number" for value in values):
            found[word] = (max if word in _LEAST else min)(values)
        elif word not in (*_NOTES, *_DEFINITIONS, "properties", "prefixItems"):
            raise _refused(f"{word} is both {values[0]!r:.80} and {values[1]!r:.80}")
    if all("properties" in schema or "additionalProperties" in schema for schema in (one, other)):
        names = {**_named(one), **_named(other)}
        parts = {name: _all_of(_part(one, name), _part(other, name)) for name in names}
        found["properties"] = {name: part for name, part in parts.items() if part is not False}
    if first := max(len(_listed(schema, "prefixItems")) for schema in (one, other)):
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


def _allows(schema: Mapping[str, Any], value: object) -> bool:
    """Whether a value is within the types, bounds and lengths of a schema."""
    kind = _type_of(value)
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds = (kind, "integer") if kind == "number" and is_whole else (kind,)
    measured: Any = len(value) if isinstance(value, str) else value
    bounds = _BOUNDS if kind == "number" else _LENGTHS if kind == _TEXT else {}
    return ("type" not in schema or any(one in _as_list(schema["type"]) for one in kinds)) and all(
        is_within(measured, schema[word])
        for word, is_within in bounds.items()
        if word in schema and _type_of(schema[word]) == "number"
    )


class Arguments:
    """The arguments of one tool.

    Args:
        schema: of its parameters, an object.
    """

    def __init__(self, notation: Notation, schema: Mapping[str, Any]) -> None:
        self._notation, self._root = notation, schema
        self._looked_at = 0

    @functools.cached_property
    def _known(self) -> tuple[dict[str, Any], Any]:
        """Schema of each parameter, and of those that none names."""
        self._looked_at = 0
        objects = self.objects()
        known = {name: part for one in objects for name, part in self.properties(one)[0].items()}
        return known, next((other for one in objects if (other := one.get("additionalProperties"))), {})

    def objects(self) -> list[dict[str, Any]]:
        """What the arguments may be."""
        return [part for kind, part in self.alternatives(self._root) if kind == _OBJECT]

    # ── what a schema allows ───────────────────────────────────────────────────────────────────────────────────

    def _referred(self, path: str) -> Any:
        found: Any = self._root
        for part in path.removeprefix("#").split("/")[1:]:
            name = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise _refused(f"{path:.100} is not in the schema")
            found = found[name]
        return found

    def _both(self, one: object, other: object) -> Any:
        """As `_both`, of which properties and first items count as parts."""
        for schema in (one, other):
            if isinstance(schema, Mapping):
                self._looked_at += len(_named(schema)) + len(_listed(schema, "prefixItems"))
        return _both(one, other)

    def alternatives(self, schema: object, level: int = 0) -> Iterator[tuple[str, Any]]:
        """What a value may be: ("const", value), or a type and a schema.

        Args:
            level: of schemas in schemas.
        """
        self._looked_at += 1
        if self._looked_at > _MOST_PARTS or level > _MOST_LEVELS:
            raise _refused("it refers to itself too often, or is too large")
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
            if parts := _listed(rest, word):
                rest.pop(word)
                for part in parts:
                    yield from self.alternatives(self._both(rest, part), level + 1)
                return
        if parts := _listed(rest, "allOf"):
            rest.pop("allOf")
            yield from self.alternatives(functools.reduce(self._both, parts, rest), level + 1)
            return
        types = rest.get("type", _LIST if "items" in rest else _OBJECT if "properties" in rest else _TYPES)
        types = [types] if isinstance(types, str) else types
        for one in types:
            if one not in (*_TYPES, "integer"):
                raise _refused(f"{one!r:.80} is no type")
        if "const" in rest or "enum" in rest:
            values = _listed(rest, "enum") if "enum" in rest else [rest["const"]]
            for value in _in_both(values, [rest["const"]]) if "const" in rest else values:
                if _allows(rest, value):
                    yield _CONST, value
            return
        for one in types:
            yield ("number" if one == "integer" else one), {**rest, "type": one}

    def properties(self, schema: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """Schema of each property, and the names of those that are required."""
        required = [name for name in _listed(schema, "required") if isinstance(name, str)]
        return {**_named(schema), **{name: _part(schema, name) for name in required}}, set(required)

    # ── rules ──────────────────────────────────────────────────────────────────────────────────────────────────

    def rules(self, name: str, piece: Piece, json_schema: Callable[[Mapping[str, Any]], str]) -> list[str]:
        """Rules in Lark, of which the one with the given name is what the arguments may be.

        Args:
            json_schema: as it is compiled.

        Raises:
            InputError: the schema cannot be followed.
        """
        return _Rules(self, self._notation, name, piece, json_schema).all()

    def as_json(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """A part of the schema, with what it may refer to."""
        if not any(_references(schema)):
            return dict(schema)
        definitions = {name: self._root[name] for name in _DEFINITIONS if name in self._root}
        if all(path.startswith(_IN_DEFINITIONS) for path in _references([schema, definitions])):
            return {**schema, **definitions}
        return {**_moved(schema), "$defs": {_ROOT: _moved(self._root)}}

    # ── what was written ───────────────────────────────────────────────────────────────────────────────────────

    def read(self, text: str, place: int) -> tuple[str, int] | None:
        """The arguments that begin here, as JSON, and where they end; None where they are none."""
        found = self._read_pairs(text, place, self._notation.key, 0)
        return None if found is None else ("{" + ", ".join(found[0]) + "}", found[1])

    def _read_pairs(self, text: str, place: int, key: tuple[str, str], level: int) -> tuple[list[str], int] | None:
        notation, pairs = self._notation, list[str]()
        known, other = ({}, {}) if level or notation.quote else self._known
        while True:
            begin = place + len(notation.between) if pairs and text.startswith(notation.between, place) else place
            name = _NAME.match(text, begin + len(key[0])) if text.startswith(key[0], begin) else None
            if (
                name is None
                or not text.startswith(key[1], name.end())
                or (pairs and notation.between and begin == place)
            ):
                return pairs, place
            found = self._read_value(text, name.end() + len(key[1]), known.get(name[0], other), level)
            if found is None or not text.startswith(notation.behind, found[1]):
                return None
            pairs.append(f"{json.dumps(name[0])}: {found[0]}")
            place = found[1] + len(notation.behind)

    def _read_value(self, text: str, place: int, schema: object, level: int) -> tuple[str, int] | None:
        quote, end = self._notation.quote, 0
        if not quote:
            end = text.find(self._notation.behind, place)
            return None if end < 0 else (self._text_or_json(text[place:end], schema), end)
        if text.startswith(quote, place):
            begin = place + len(quote)
            end = text.find(quote, begin)
            return None if end < 0 else (json.dumps(text[begin:end], ensure_ascii=False), end + len(quote))
        if text.startswith(("{", "["), place):
            return self._read_nested(text, place, level + 1) if level < _MOST_LEVELS else None
        scalar = _SCALAR.match(text, place)
        return None if scalar is None else (scalar[0], scalar.end())

    def _read_nested(self, text: str, place: int, level: int) -> tuple[str, int] | None:
        if text[place] == "{":
            pairs = self._read_pairs(text, place + 1, self._notation.key, level)
            closed = pairs is not None and text.startswith("}", pairs[1])
            return ("{" + ", ".join(pairs[0]) + "}", pairs[1] + 1) if pairs is not None and closed else None
        items = list[str]()
        place += 1
        while not text.startswith("]", place):
            if items and not text.startswith(",", place):
                return None
            found = self._read_value(text, place + bool(items), {}, level)
            if found is None:
                return None
            items.append(found[0])
            place = found[1]
        return "[" + ", ".join(items) + "]", place + 1

    def _text_or_json(self, value: str, schema: object) -> str:
        """As JSON: what the schema takes for JSON of another type, or else the text."""
        self._looked_at = 0
        allowed = list(self.alternatives(schema))
        try:
            found = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError):
            found = value
        kind = _type_of(found)
        fits = any(_in_both([found], [part]) if one == _CONST else _allows(part, found) for one, part in allowed)
        is_json = kind != _TEXT and fits and value == value.strip()
        return value if is_json else json.dumps(value, ensure_ascii=False)


class _Rules:
    """Makes rules; a part of a schema that comes twice has one."""

    def __init__(
        self,
        arguments: Arguments,
        notation: Notation,
        name: str,
        piece: Piece,
        json_schema: Callable[[Mapping[str, Any]], str],
    ) -> None:
        self._arguments, self._notation, self._name = arguments, notation, name
        self._piece, self._json_schema = piece, json_schema
        self._rules = list[str]()
        self._known = dict[str, str]()  # part of a schema → its rule
        self._count, self._characters = 0, 0

    def all(self) -> list[str]:
        bodies = [self._pairs(part) for part in self._arguments.objects()]
        if not bodies:
            raise _refused("no object is allowed")
        return [f"{self._name}: {' | '.join(bodies)}", *self._rules]

    def _new(self, body: str, attribute: str = "") -> str:
        name = self._next()
        self._checked_size(len(body))
        self._rules.append(f"{name}{attribute}: {body}")
        return name

    def _new_json(self, schema: Mapping[str, Any]) -> str:
        return self._new(f"%json {self._json_schema(self._arguments.as_json(schema))}")

    def _checked_size(self, characters: int) -> None:
        """Count characters; references and alternatives may say a part many times."""
        self._characters += characters
        if self._characters > _MOST_CHARACTERS:
            raise _refused("it is too large")

    def _next(self) -> str:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise _refused("it is too large")
        return f"{self._name}_{self._count}"

    def _pairs(self, schema: Mapping[str, Any]) -> str:
        """What an object's pairs may be; some may be left out, and what stands between them with it."""
        _check_words(schema, _OF_OBJECTS)
        properties, required = self._arguments.properties(schema)
        if (_counted(schema, "minProperties") or 0) > len(required):
            raise _refused("minProperties asks for more than required does")
        most = _counted(schema, "maxProperties")
        if most is not None and (most < len(properties) or not properties):
            raise _refused("maxProperties allows fewer than there are")
        between, key = self._piece(self._notation.between), self._notation.key
        if not properties:
            if schema.get("additionalProperties", True) is False:
                return '""'
            name = self._new_terminal(_NAME.pattern)
            value = self._value(schema.get("additionalProperties", {}))
            pair = f"{self._piece(key[0])} {name} {self._piece(key[1])} {value} {self._behind}"
            return f"({pair} ({between} {pair})*)?"
        first = more = self._new('""')
        for name, part in reversed(properties.items()):
            if not _NAME.fullmatch(name):
                raise _refused(f"the name {name!r:.80} of a parameter is no word")
            pair = f"{self._piece(name.join(key))} {self._value(part)} {self._behind}"
            left_out = name not in required
            first, more = (
                self._new(f"{pair} {more}" + (f" | {first}" if left_out else "")),
                self._new(f"{between} {pair} {more}" + (f" | {more}" if left_out else "")),
            )
        return first

    @property
    def _behind(self) -> str:
        return self._piece(self._notation.behind) if self._notation.quote else ""  # else it ends a text

    def _new_terminal(self, pattern: str) -> str:
        name = self._next().upper()
        self._rules.append(f"{name}: /{pattern}/")
        return name

    def _value(self, schema: object) -> str:
        """The rule of a value."""
        key = json.dumps(schema, sort_keys=True)
        if key not in self._known:
            self._known[key] = self._next()
            found = list(self._arguments.alternatives(schema))
            bodies = (self._quoted if self._notation.quote else self._plain)(found)
            if not bodies:
                raise _refused("a parameter allows no value")
            self._rules.append(f"{self._known[key]}: " + " | ".join(dict.fromkeys(bodies)))
        return self._known[key]

    def _plain(self, alternatives: Sequence[tuple[str, Any]]) -> list[str]:
        """A text that goes on to what is behind it, or JSON."""
        behind, bodies = self._notation.behind, list[str]()
        others = list[dict[str, Any]]()
        for kind, part in alternatives:
            if kind == _TEXT:
                bodies.append(self._text(part, behind))
            elif kind == _CONST and isinstance(part, str):
                if behind in part:
                    raise _refused("a text of a parameter has the mark that ends it")
                bodies.append(f"{json.dumps(part, ensure_ascii=False)} {self._piece(behind)}")
            else:
                others.append({"const": part} if kind == _CONST else part)
        if others:
            for part in others:
                self._checked_size(len(json.dumps(part)))
            value = self._new_json(others[0] if len(others) == 1 else {"anyOf": others})
            bodies.append(f"{value} {self._piece(behind)}")
        return bodies

    def _quoted(self, alternatives: Sequence[tuple[str, Any]]) -> list[str]:
        quote, bodies = self._notation.quote, list[str]()
        for kind, part in alternatives:
            if kind == _TEXT:
                bodies.append(f"{self._piece(quote)} {self._text(part, quote)}")
            elif kind == _CONST:
                bodies.append(self._constant(part))
            elif kind == _LIST:
                bodies.append(self._list(part))
            elif kind == _OBJECT:
                bodies.append(f'"{{" {self._pairs(part)} "}}"')
            else:
                bodies.append(self._new_json(part))
        return bodies

    def _constant(self, value: object) -> str:
        quote = self._notation.quote
        if isinstance(value, str):
            if quote in value:
                raise _refused("a text of a parameter has the mark that ends it")
            text = json.dumps(value, ensure_ascii=False)
            return f"{self._piece(quote)} {text} {self._piece(quote)}"
        if isinstance(value, list | dict):
            raise _refused("a list or an object is a constant")
        return json.dumps(json.dumps(value))

    def _list(self, schema: Mapping[str, Any]) -> str:
        """A list; the first items may have schemas of their own."""
        _check_words(schema, _OF_LISTS)
        least, most = _counted(schema, "minItems") or 0, _counted(schema, "maxItems")
        is_old = isinstance(schema.get("items"), list)
        first = _listed(schema, "items" if is_old else "prefixItems")
        other = schema.get("additionalItems" if is_old else "items", {})
        if other is False:
            most = min(len(first), len(first) if most is None else most)
        elif not first:
            first = [other]
        if most is not None and most < least:
            raise _refused("a list allows fewer items than it needs")
        first = first[:most]
        items = ""
        if most is None or most > len(first):
            span = f"{{{max(least - len(first), 0)},{'' if most is None else most - len(first)}}}"
            items = f'("," {self._value(other)}){span}'
        for n, part in reversed(list(enumerate(first))):
            items = f"{self._value(part)} {items}"
            items = f'"," {items}' if n else items
            items = f"({items})?" if n >= least else items
        return f'"[" {items} "]"'

    def _text(self, schema: Mapping[str, Any], end: str) -> str:
        """A text and what ends it."""
        _check_words(schema, ())
        least, most, closing = _counted(schema, "minLength") or 0, _counted(schema, "maxLength"), self._piece(end)
        if most == 0:
            return closing
        if closing.startswith("<["):  # which no text has
            text = self._new_terminal(f"(?s:.{{{max(least, 1)},{'' if most is None else most}}})")
            return f"{text} {closing}" if least else f"{text}? {closing}"
        span = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
        mark = "".join(f"\\x{{{ord(character):X}}}" for character in end)
        return self._new(f"/(?s:.{span}){mark}/", "[lazy]")
