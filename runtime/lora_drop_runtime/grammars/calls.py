"""Calls of tools: what a model may write when it calls one, and the calls in what it wrote.

Enters: functions, a choice, the style of a model's calls (call_styles.py); the text. Leaves: a constraint, and calls.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.reasoning import Thoughts

from .call_styles import ID, CallStyle
from .grammar import GrammarConstraint, Grammars, checked_schema
from .notations import Arguments, json_value

AUTO, NONE, REQUIRED = "auto", "none", "required"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON, as the model wrote it where it writes JSON."""

    name: str
    arguments: str


class FreeUntilCall:
    """A `Constraint` that allows everything until the text begins a call, then what a call may be.

    Args:
        body: of a section of calls. Behind its mark; where the style has none, from its first letter.
        grammars: that made it.
        begins: what a section begins with, one of these; a whole text where the style has no mark.
        kept: special tokens that are text; others may stand anywhere, as before Llama's calls.
        is_whole: a call is the whole text, beside white space. Of such, some tokenizers leave out a first space.
        goes_on: whether text and further calls may follow a section.
        thoughts: reasoning that the text may begin with, in which no call begins.
    """

    def __init__(
        self,
        body: GrammarConstraint,
        grammars: Grammars,
        begins: Sequence[str],
        kept: Collection[str],
        *,
        is_whole: bool,
        goes_on: bool,
        thoughts: Thoughts | None = None,
    ) -> None:
        self._body, self._grammars, self._goes_on = body, grammars, goes_on
        self._begins, self._is_whole = [begin.encode() for begin in begins], is_whole
        self._kept = (*kept, *(() if thoughts is None else thoughts.style.marks))
        self._thoughts = None if thoughts is None else thoughts.stream(calls=True)
        self._call: GrammarConstraint | None = None
        self._text: bytes | None = b""  # the free text, or its end, which may begin a call; None where nothing can
        self._everything = np.ones(grammars.tokenizer.vocab_size, np.bool_)

    @property
    def is_over(self) -> bool:
        return self._call is not None and self._call.is_over

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [V]."""
        return self._everything if self._call is None else self._call.allowed()

    def accept(self, token: int) -> None:
        """Raises InputError as `GrammarConstraint.accept` does."""
        if self._call is not None:
            self._call.accept(token)
            if self._call.is_over and self._goes_on:
                self._call = None
        elif self._text is not None and not self._grammars.codec.skips(token, self._kept):
            text = self._text + self._behind_thoughts(self._grammars.tokenizer.decode_bytes([token]))
            self._text = self._begun_as_whole(text.lstrip()) if self._is_whole else self._begun_at_mark(text)

    def _behind_thoughts(self, piece: bytes) -> bytes:
        """What a piece adds to the text behind the reasoning."""
        if self._thoughts is None:
            return piece
        _, content = self._thoughts.push(piece.decode("latin-1"))  # a character for each byte; marks are ASCII
        return content.encode("latin-1")

    def _begun_at_mark(self, text: bytes) -> bytes:
        (mark,) = self._begins
        before, found, behind = text.partition(mark)
        if not found:
            return before[1 - len(mark) :]
        self._call = self._body.behind(behind)  # None where a token goes beyond the mark with what no call has
        return b"" if self._call is not None else self._begun_at_mark(behind)

    def _begun_as_whole(self, text: bytes) -> bytes | None:
        if not any(text.startswith(begin) for begin in self._begins):
            return text if any(begin.startswith(text) for begin in self._begins) else None
        self._call = self._body.behind(text)
        return None

    def fork(self) -> FreeUntilCall:
        new = copy.copy(self)
        new._call = None if self._call is None else self._call.fork()
        new._thoughts = None if self._thoughts is None else self._thoughts.fork()
        return new


def _piece(text: str, tokens: Mapping[str, int]) -> str:
    """A text in Lark, of which some parts are special tokens and `ID` is an id; without any, the text alone."""
    parts = re.split("(" + "|".join(map(re.escape, (ID, *tokens))) + ")", text)
    known = {ID: "CALL_ID"} | {mark: f"<[{token}]>" for mark, token in tokens.items()}
    return " ".join(known.get(part) or json.dumps(part) for part in parts if part)


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments."""
    schema = function.get("parameters")
    return _NO_PARAMETERS if schema is None else {"type": "object", **schema}


@contextmanager
def _named(tool: str) -> Iterator[None]:
    """What is refused of its parameters says whose they are."""
    try:
        yield
    except InputError as error:
        raise type(error)(error.fact, note=f"{error.note} The tool is {tool}.".lstrip(), hint=error.hint) from error


def _grammar(
    schemas: Mapping[str, str], style: CallStyle, several: bool, is_free: bool, tokens: Mapping[str, int]
) -> str:
    """What may be written, in Lark.

    Args:
        schemas: of the arguments of each function, checked.
        several: calls.
        is_free: text stands before the section of calls, of which the mark is written already.
        tokens: the special ones that marks are written with; no grammar with such is compiled apart.
    """
    piece = functools.partial(_piece, tokens=tokens)
    more = f"({piece(style.between)} call)*" if several and style.between is not None else ""
    again = f"({piece(style.after)} section)*" if several and style.after is not None else ""
    rules = [
        "start: body" if is_free else f"start: section {again}",
        f"section: {piece(style.begin)} body",
        f"body: {piece(style.opening)} call {more} {piece(style.closing)} {piece(style.end)}",
        "call: " + " | ".join(f"tool_{i}" for i in range(len(schemas))),
    ]
    for i, (name, schema) in enumerate(schemas.items()):
        arguments = f"arguments_{i}"
        rules.append(f"tool_{i}: {piece(style.head_of(name))} {arguments} {piece(style.tail)}")
        if style.notation is None:
            rules.append(f"{arguments}: %json {schema}")
        else:
            with _named(name):
                rules += Arguments(style.notation, json.loads(schema)).rules(arguments, piece, checked_schema)
    return "\n".join([*rules, *([f"CALL_ID: /{style.ids}/"] if style.ids else [])]) + "\n"


class CallStream:
    """Text in, as it grows; what it says beside calls out, as soon as it cannot change, and calls as they end.

    The content joined and all calls are those that `Calls.find` finds in the whole text.

    Args:
        calls: find them.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._text = ""
        self._told, self._called = 0, 0  # characters of the content, and calls

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        """Content before the first call, and calls that are new; maybe none."""
        before, self._text = len(self._text), self._text + piece
        content = self._calls.free(self._text).rstrip()[self._told :]  # white space before a call is no content
        self._told += len(content)
        return content, self._new(self._calls.find(self._text)[1]) if self._calls.may_end(self._text, before) else []

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What is left when the text has ended."""
        content, calls = self._calls.find(self._text)
        left = content[self._told :]
        self._told = len(content)
        return left, self._new(calls)

    def _new(self, calls: list[ToolCall]) -> list[ToolCall]:
        new = calls[self._called :]
        self._called = len(calls)
        return new


class Calls:
    """Calls of a request's tools in the style of a model.

    Args:
        functions: that may be called, by name.
        choice: `auto`, `required`, or the name of a tool behind a colon.
        style: of calls.
        parallel: whether the model may write several calls, where the style has such.

    Attributes:
        marks: of calls, which some models have special tokens for: they are to be kept in the text.
    """

    def __init__(
        self, functions: Mapping[str, Mapping[str, Any]], choice: str, style: CallStyle, *, parallel: bool
    ) -> None:
        self._functions, self._choice, self._style, self._parallel = functions, choice, style, parallel
        self.marks = style.marks
        self._heads = [style.head_of(name) for name in functions]
        before, behind = (re.escape(part).replace(re.escape(ID), f"(?:{style.ids})") for part in style.head)
        self._head = re.compile(f"{before}({NAME.pattern}){behind}")
        self._arguments = {name: self._notated(function) for name, function in functions.items()}

    def _notated(self, function: Mapping[str, Any]) -> Arguments | None:
        return None if self._style.notation is None else Arguments(self._style.notation, _parameters(function))

    @property
    def is_free(self) -> bool:
        """Whether a text may stand before a call, or without one."""
        return self._choice == AUTO

    def constraint(self, grammars: Grammars, thoughts: Thoughts | None = None) -> Constraint:
        """What a row may write.

        Args:
            thoughts: reasoning that a free text may begin with, which is not bound.

        Raises:
            InputError: a tool's schema cannot be followed.
        """
        style, is_free = self._style, self.is_free
        name = self._choice[1:] if self._choice.startswith(":") else None
        functions = self._functions if name is None else {name: self._functions[name]}
        schemas = dict[str, str]()
        for one, function in functions.items():
            with _named(one):
                schemas[one] = checked_schema(_parameters(function))
        several = self._parallel and name is None
        found = {mark: grammars.token(mark) for mark in style.marks}
        tokens = {mark: token for mark, token in found.items() if token is not None}
        grammar = _grammar(schemas, style, several, is_free, tokens)
        body = grammars.constraint(grammar, _grammar(schemas, style, several, is_free, {}) if tokens else grammar)
        if not is_free:
            return body
        begins, goes_on = [style.begin] if style.begin else self._heads, several and style.after is not None
        return FreeUntilCall(
            body, grammars, begins, style.marks, is_whole=not style.begin, goes_on=goes_on, thoughts=thoughts
        )

    def find(self, text: str) -> tuple[str, list[ToolCall]]:
        """What a finished text, which keeps the marks, says beside its calls, and the calls. One that is not at its end
        is text with all behind it, since an argument may quote calls."""
        rest, calls, place = list[str](), list[ToolCall](), 0
        for begin in re.finditer(re.escape(self._style.begin) or r"\A\s*", text, re.ASCII):
            section = self._section(text, begin.end()) if begin.start() >= place else None
            if section is not None and not section[0]:
                break
            if section is not None:
                calls += section[0]
                rest.append(text[place : begin.start()])
                place = section[1]
        return "".join([*rest, text[place:]]).rstrip() if calls else text, calls

    def free(self, text: str) -> str:
        """What is content for certain of a text that may go on, if it ends without white space."""
        begin = self._style.begin
        if not begin:
            whole = text.lstrip(string.whitespace)
            return "" if any(head.startswith(whole) or whole.startswith(head) for head in self._heads) else text
        free, found, _ = text.partition(begin)
        begun = 0 if found else next((n for n in range(len(begin) - 1, 0, -1) if free.endswith(begin[:n])), 0)
        return free[: len(free) - begun]

    def may_end(self, text: str, before: int) -> bool:
        """Whether a section may have ended behind that many characters; where a style has no end, the text ends it."""
        return bool(self._style.end) and text.find(self._style.end, max(0, before - len(self._style.end))) >= 0

    def stream(self) -> CallStream:
        """A new stream for one text."""
        return CallStream(self)

    def _read(self, name: str, text: str, place: int) -> tuple[str, int] | None:
        """The arguments of a tool that begin here, as JSON, and where they end; None where they are none."""
        arguments = self._arguments[name]
        if arguments is not None:
            return arguments.read(text, place)
        return json_value(text, place) if text.startswith("{", place) else None

    def _section(self, text: str, place: int) -> tuple[list[ToolCall], int] | None:
        """The calls of a section whose mark ends here, and where it ends; no calls where it does not, and None where no
        call of a tool begins."""
        style, calls = self._style, list[ToolCall]()
        piece, closing = style.opening, style.closing + style.end
        while text.startswith(piece, place):
            head = self._head.match(text, place + len(piece))
            if head is None or head[1] not in self._functions:
                return ([], place) if calls else None
            found = self._read(head[1], text, head.end())
            if found is None or not text.startswith(style.tail, found[1]):
                return [], place
            calls.append(ToolCall(head[1], found[0]))
            place = found[1] + len(style.tail)
            if style.between is None:
                break
            piece = style.between
        ends = text.startswith(closing, place) and (style.begin or not text[place:].strip())
        return (calls if ends else [], place + len(closing)) if calls else None
