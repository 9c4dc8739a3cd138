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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema_cases import (
    CONST,
    LIST,
    MOST_LEVELS,
    MOST_PARTS,
    OBJECT,
    TEXT,
    SchemaCases,
    allows,
    check_words,
    counted,
    in_both,
    listed,
    refused,
    type_of,
)

_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_NAME = re.compile(r"[A-Za-z0-9_.$@-]+")
_MOST_CHARACTERS = 1 << 19  # of rules
# Keywords that rules do not follow
_OF_OBJECTS = ("patternProperties", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies")
_OF_LISTS = ("uniqueItems", "contains")

Piece = Callable[[str], str]  # a text in Lark, some parts of which are special tokens


def as_json(value: object) -> str:
    """As chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Notation:
    """How arguments are written.

    Attributes:
        key: what stands around a name.
        behind: each value.
        between: a pair and the next one.
        quote: stands around texts, which may then be within lists and objects, whose keys have none. Where it is
            empty, a value is a text as it is, or JSON.
        in_json: all values are JSON.
    """

    key: tuple[str, str]
    behind: str = ""
    between: str = ""
    quote: str = ""
    in_json: bool = False

    def written(self, arguments: Mapping[str, Any]) -> str:
        """The pairs of an object whose values are JSON."""
        return self.between.join(f"{name.join(self.key)}{as_json(one)}" for name, one in arguments.items())


class _Rules:
    """Makes rules; a part of a schema that comes twice has one."""

    def __init__(
        self,
        cases: SchemaCases,
        notation: Notation,
        name: str,
        piece: Piece,
        json_schema: Callable[[Mapping[str, Any]], str],
    ) -> None:
        self._cases, self._notation, self._name = cases, notation, name
        self._piece, self._json_schema = piece, json_schema
        self._rules = list[str]()
        self._known = dict[str, str]()  # part of a schema → its rule
        self._count, self._characters = 0, 0

    def all(self) -> list[str]:
        bodies = [self._pairs(part) for part in self._cases.objects()]
        if not bodies:
            raise refused("no object is allowed")
        return [f"{self._name}: {' | '.join(bodies)}", *self._rules]

    def _new(self, body: str, attribute: str = "") -> str:
        name = self._next()
        self._checked_size(len(body))
        self._rules.append(f"{name}{attribute}: {body}")
        return name

    def _new_json(self, schema: Mapping[str, Any]) -> str:
        return self._new(f"%json {self._json_schema(self._cases.as_json(schema))}")

    def _checked_size(self, characters: int) -> None:
        """Count characters; references and alternatives may say a part many times."""
        self._characters += characters
        if self._characters > _MOST_CHARACTERS:
            raise refused("it is too large")

    def _next(self) -> str:
        self._count += 1
        if self._count > MOST_PARTS:
            raise refused("it is too large")
        return f"{self._name}_{self._count}"

    def _pairs(self, schema: Mapping[str, Any]) -> str:
        """What an object's pairs may be; some may be left out, and what stands between them with it."""
        check_words(schema, _OF_OBJECTS)
        properties, required = self._cases.properties(schema)
        if (counted(schema, "minProperties") or 0) > len(required):
            raise refused("minProperties asks for more than required does")
        most = counted(schema, "maxProperties")
        if most is not None and (most < len(properties) or not properties):
            raise refused("maxProperties allows fewer than there are")
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
                raise refused(f"the name {name!r:.80} of a parameter is no word")
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
            if self._notation.in_json:
                bodies = [] if schema is False else [self._new_json(schema if isinstance(schema, Mapping) else {})]
            else:
                found = list(self._cases.alternatives(schema))
                bodies = (self._quoted if self._notation.quote else self._plain)(found)
            if not bodies:
                raise refused("a parameter allows no value")
            self._rules.append(f"{self._known[key]}: " + " | ".join(dict.fromkeys(bodies)))
        return self._known[key]

    def _plain(self, alternatives: Sequence[tuple[str, Any]]) -> list[str]:
        """A text that goes on to what is behind it, or JSON."""
        behind, bodies = self._notation.behind, list[str]()
        others = list[dict[str, Any]]()
        for kind, part in alternatives:
            if kind == TEXT:
                bodies.append(self._text(part, behind))
            elif kind == CONST and isinstance(part, str):
                if behind in part:
                    raise refused("a text of a parameter has the mark that ends it")
                bodies.append(f"{json.dumps(part, ensure_ascii=False)} {self._piece(behind)}")
            else:
                others.append({"const": part} if kind == CONST else part)
        if others:
            for part in others:
                self._checked_size(len(json.dumps(part)))
            value = self._new_json(others[0] if len(others) == 1 else {"anyOf": others})
            bodies.append(f"{value} {self._piece(behind)}")
        return bodies

    def _quoted(self, alternatives: Sequence[tuple[str, Any]]) -> list[str]:
        quote, bodies = self._notation.quote, list[str]()
        for kind, part in alternatives:
            if kind == TEXT:
                bodies.append(f"{self._piece(quote)} {self._text(part, quote)}")
            elif kind == CONST:
                bodies.append(self._constant(part))
            elif kind == LIST:
                bodies.append(self._list(part))
            elif kind == OBJECT:
                bodies.append(f'"{{" {self._pairs(part)} "}}"')
            else:
                bodies.append(self._new_json(part))
        return bodies

    def _constant(self, value: object) -> str:
        quote = self._notation.quote
        if isinstance(value, str):
            if quote in value:
                raise refused("a text of a parameter has the mark that ends it")
            text = json.dumps(value, ensure_ascii=False)
            return f"{self._piece(quote)} {text} {self._piece(quote)}"
        if isinstance(value, list | dict):
            raise refused("a list or an object is a constant")
        return json.dumps(json.dumps(value))

    def _list(self, schema: Mapping[str, Any]) -> str:
        """A list; the first items may have schemas of their own."""
        check_words(schema, _OF_LISTS)
        least, most = counted(schema, "minItems") or 0, counted(schema, "maxItems")
        is_old = isinstance(schema.get("items"), list)
        first = listed(schema, "items" if is_old else "prefixItems")
        other = schema.get("additionalItems" if is_old else "items", {})
        if other is False:
            most = min(len(first), len(first) if most is None else most)
        elif not first:
            first = [other]
        if most is not None and most < least:
            raise refused("a list allows fewer items than it needs")
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
        check_words(schema, ())
        least, most, closing = counted(schema, "minLength") or 0, counted(schema, "maxLength"), self._piece(end)
        if most == 0:
            return closing
        if closing.startswith("<["):  # which no text has
            text = self._new_terminal(f"(?s:.{{{max(least, 1)},{'' if most is None else most}}})")
            return f"{text} {closing}" if least else f"{text}? {closing}"
        span = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
        mark = "".join(f"\\x{{{ord(character):X}}}" for character in end)
        return self._new(f"/(?s:.{span}){mark}/", "[lazy]")


def _no_number(name: str) -> object:
    raise ValueError(name)


def json_value(text: str, place: int) -> tuple[str, int] | None:
    """The JSON value that begins here, and where it ends; None where none does."""
    try:
        end = json.JSONDecoder(parse_constant=_no_number).raw_decode(text, place)[1]
    except (ValueError, RecursionError):
        return None
    return text[place:end], end


class Arguments:
    """The arguments of one tool.

    Args:
        schema: of its parameters, an object.
    """

    def __init__(self, notation: Notation, schema: Mapping[str, Any]) -> None:
        self._notation, self._cases = notation, SchemaCases(schema)

    @functools.cached_property
    def _known(self) -> tuple[dict[str, Any], Any]:
        """Schema of each parameter, and of those that none names."""
        self._cases.again()
        objects = self._cases.objects()
        known = {name: part for one in objects for name, part in self._cases.properties(one)[0].items()}
        return known, next((other for one in objects if (other := one.get("additionalProperties"))), {})

    def rules(self, name: str, piece: Piece, json_schema: Callable[[Mapping[str, Any]], str]) -> list[str]:
        """Rules in Lark, of which the one with the given name is what the arguments may be.

        Args:
            json_schema: as it is compiled.

        Raises:
            InputError: the schema cannot be followed.
        """
        return _Rules(self._cases, self._notation, name, piece, json_schema).all()

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
        if self._notation.in_json:
            return json_value(text, place)
        if not quote:
            end = text.find(self._notation.behind, place)
            return None if end < 0 else (self._text_or_json(text[place:end], schema), end)
        if text.startswith(quote, place):
            begin = place + len(quote)
            end = text.find(quote, begin)
            return None if end < 0 else (json.dumps(text[begin:end], ensure_ascii=False), end + len(quote))
        if text.startswith(("{", "["), place):
            return self._read_nested(text, place, level + 1) if level < MOST_LEVELS else None
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
        self._cases.again()
        allowed = list(self._cases.alternatives(schema))
        try:
            found = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError):
            found = value
        kind = type_of(found)
        fits = any(in_both([found], [part]) if one == CONST else allows(part, found) for one, part in allowed)
        is_json = kind != TEXT and fits and value == value.strip()
        return value if is_json else json.dumps(value, ensure_ascii=False)
