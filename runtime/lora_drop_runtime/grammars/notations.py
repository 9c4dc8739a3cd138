"""Arguments of a call that are not one JSON object, but written one by one.

Enters: how a model writes them; the schema of a tool's parameters; a text. Leaves: rules in Lark for what may be
written, and what was written, as JSON.

    arguments = pair (between pair)*
    pair = key[0] name key[1] value behind

Properties come in the order of the schema, and no others but where it names none. Followed are `$ref` within the
schema, `anyOf`, `oneOf`, `allOf`, `enum`, `const`, `type`, `required`, and the lengths of texts; within quotes those
of lists, too. What stands as JSON follows the whole of its schema.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.errors import InputError

_TEXT, _LIST, _OBJECT, _CONST = "string", "array", "object", "const"
_SCALARS = ("number", "boolean", "null")
_TYPES = (_TEXT, *_SCALARS, _LIST, _OBJECT)  # what a schema without any allows; an integer is a number
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_NAME = re.compile(r"[A-Za-z0-9_.$@-]+")
_DEFINITIONS = ("$defs", "definitions")
_MOST_PARTS = 4096  # of a schema that are looked at: references may say more than is written
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


class Arguments:
    """The arguments of one tool.

    Args:
        schema: of its parameters, an object.
    """

    def __init__(self, notation: Notation, schema: Mapping[str, Any]) -> None:
        self._notation, self._root = notation, schema
        self._looked_at = 0

    @functools.cached_property
    def _known(self) -> dict[str, Any]:
        """Schema of each parameter."""
        self._looked_at = 0
        return {name: part for one in self.objects() for name, part in self.properties(one)[0].items()}

    def objects(self) -> list[dict[str, Any]]:
        """What the arguments may be."""
        return [part for kind, part in self.alternatives(self._root) if kind == _OBJECT]

    # ── what a schema allows ───────────────────────────────────────────────────────────────────────────────────

    def _referred(self, path: str) -> Any:
        found: Any = self._root
        for part in path.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise _refused(f"{path:.100} is not in the schema")
            found = found[name]
        return found

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
            yield from self.alternatives({**target, **rest} if isinstance(target, Mapping) else target, level + 1)
            return
        for word in ("anyOf", "oneOf"):
            if parts := _listed(rest, word):
                rest.pop(word)
                for part in parts:
                    yield from self.alternatives({**rest, **part} if isinstance(part, Mapping) else part, level + 1)
                return
        if parts := _listed(rest, "allOf"):
            rest.pop("allOf")
            for part in parts:
                rest |= part if isinstance(part, Mapping) else {}
            yield from self.alternatives(rest, level + 1)
            return
        if "const" in rest or "enum" in rest:
            for value in [rest["const"]] if "const" in rest else _listed(rest, "enum"):
                yield _CONST, value
            return
        types = rest.get("type", _LIST if "items" in rest else _OBJECT if "properties" in rest else _TYPES)
        for one in [types] if isinstance(types, str) else types:
            if one not in (*_TYPES, "integer"):
                raise _refused(f"{one!r:.80} is no type")
            yield ("number" if one == "integer" else one), {**rest, "type": one}

    def properties(self, schema: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """Schema of each property, and the names of those that are required."""
        required = [name for name in _listed(schema, "required") if isinstance(name, str)]
        found = schema.get("properties")
        known = dict(found) if isinstance(found, Mapping) else {}
        return {**known, **{name: known.get(name, {}) for name in required}}, set(required)

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
        return {**schema, **{name: self._root[name] for name in _DEFINITIONS if name in self._root}}

    # ── what was written ───────────────────────────────────────────────────────────────────────────────────────

    def read(self, text: str, place: int) -> tuple[str, int] | None:
        """The arguments that begin here, as JSON, and where they end; None where they are none."""
        found = self._read_pairs(text, place, self._notation.key, 0)
        return None if found is None else ("{" + ", ".join(found[0]) + "}", found[1])

    def _read_pairs(self, text: str, place: int, key: tuple[str, str], level: int) -> tuple[list[str], int] | None:
        notation, pairs = self._notation, list[str]()
        known = {} if level or notation.quote else self._known
        while True:
            begin = place + len(notation.between) if pairs and text.startswith(notation.between, place) else place
            name = _NAME.match(text, begin + len(key[0])) if text.startswith(key[0], begin) else None
            if (
                name is None
                or not text.startswith(key[1], name.end())
                or (pairs and notation.between and begin == place)
            ):
                return pairs, place
            found = self._read_value(text, name.end() + len(key[1]), known.get(name[0], {}), level)
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
        kinds = {_type_of(schema) if kind == _CONST else kind for kind, schema in self.alternatives(schema)}
        try:
            found = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError):
            found = value
        is_json = not isinstance(found, str) and _type_of(found) in kinds and value == value.strip()
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
        self._count = 0

    def all(self) -> list[str]:
        bodies = [self._pairs(part) for part in self._arguments.objects()]
        if not bodies:
            raise _refused("no object is allowed")
        return [f"{self._name}: {' | '.join(bodies)}", *self._rules]

    def _new(self, body: str, attribute: str = "") -> str:
        name = self._next()
        self._rules.append(f"{name}{attribute}: {body}")
        return name

    def _next(self) -> str:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise _refused("it is too large")
        return f"{self._name}_{self._count}"

    def _pairs(self, schema: Mapping[str, Any]) -> str:
        """What an object's pairs may be; some may be left out, and what stands between them with it."""
        properties, required = self._arguments.properties(schema)
        between, key = self._piece(self._notation.between), self._notation.key
        if not properties:
            if schema.get("additionalProperties", True) is False:
                return '""'
            name = self._new_terminal(_NAME.pattern)
            pair = f"{self._piece(key[0])} {name} {self._piece(key[1])} {self._value({})} {self._behind}"
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
            schema = others[0] if len(others) == 1 else {"anyOf": others}
            value = self._new(f"%json {self._json_schema(self._arguments.as_json(schema))}")
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
                bodies.append(self._new(f"%json {self._json_schema(self._arguments.as_json(part))}"))
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
        item = self._value(schema.get("items", {}))
        least, most = _counted(schema, "minItems") or 0, _counted(schema, "maxItems")
        if most == 0:
            return '"[" "]"'
        span = f"{{{max(least - 1, 0)},{'' if most is None else max(most, 1) - 1}}}"
        items = f'{item} ("," {item}){span}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _text(self, schema: Mapping[str, Any], end: str) -> str:
        """A text and what ends it."""
        least, most, closing = _counted(schema, "minLength") or 0, _counted(schema, "maxLength"), self._piece(end)
        if most == 0:
            return closing
        if closing.startswith("<["):  # which no text has
            text = self._new_terminal(f"(?s:.{{{max(least, 1)},{'' if most is None else most}}})")
            return f"{text} {closing}" if least else f"{text}? {closing}"
        span = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
        mark = "".join(f"\\x{{{ord(character):X}}}" for character in end)
        return self._new(f"/(?s:.{span}){mark}/", "[lazy]")
