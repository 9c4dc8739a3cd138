"""Tools as the OpenAI API has them: what the model may write when it calls one, and the calls in what it wrote.

Enters: a list of tools and a choice; the finished text. Leaves: a constraint, and calls. Models are trained on a style
of calls, which their chat template tells them. Known is the style of Hermes, which Qwen2.5 and Qwen3 have as well:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.errors import InputError, wrong_type

from .grammar import GrammarConstraint, Grammars, checked_schema

BEGIN, END = MARKS = "<tool_call>", "</tool_call>"  # special tokens of some models
AUTO, NONE, REQUIRED = "auto", "none", "required"
MOST_TOOLS = 128
# In templates that have the mark and another style: arguments in XML (Qwen3-Coder, GLM), calls in a list (Apriel)
_OTHER_STYLES = ("<function=", "<arg_key>", "<tool_calls>")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEAD = re.compile(f'{BEGIN}\\n{{"name": "({_NAME.pattern})", "arguments": ')
_TAIL = f"}}\n{END}"
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_TOOL = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON, as the model wrote it."""

    name: str
    arguments: str


class FreeUntilCall:
    """A `Constraint` that allows everything until the text begins a call, then what a call may be.

    Args:
        body: of a call behind its beginning, to its end.
        grammars: that made it.
        parallel: whether text and further calls may follow one.
    """

    def __init__(self, body: GrammarConstraint, grammars: Grammars, parallel: bool) -> None:
        self._body, self._grammars, self._parallel = body, grammars, parallel
        self._call: GrammarConstraint | None = None
        self._tail = b""  # of the free text, shorter than a beginning
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
            if self._call.is_over and self._parallel:
                self._call = None
            return
        before, found, behind = (self._tail + self._grammars.tokenizer.decode_bytes([token])).partition(BEGIN.encode())
        if found:
            self._tail = b""
            self._call = self._body.behind(behind)  # None where a token goes beyond the mark with what no call has
        else:
            self._tail = before[1 - len(BEGIN) :]

    def fork(self) -> FreeUntilCall:
        new = copy.copy(self)
        new._call = None if self._call is None else self._call.fork()
        return new


def _checked(tools: object) -> dict[str, Mapping[str, Any]]:
    """Name → function."""
    hint = f"Use for example [{_TOOL}]."
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise wrong_type("The list of tools", tools, "a list of objects", hint)
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                "A tool is none, or has no name.",
                note=f"It is {tool!r:.100}; a name has up to 64 letters, digits, dots, dashes and underscores.",
                hint=hint,
            )
        if name in found:
            raise InputError(
                "Two tools have one name.", note=f"It is {name}.", hint="Give each tool a name of its own."
            )
        assert isinstance(function, Mapping)
        parameters = function.get("parameters")
        if parameters is not None and (
            not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object"
        ):
            raise InputError(
                "The parameters of a tool are no schema of an object.",
                note=f"Those of {name} are {parameters!r:.100}.",
                hint='Use for example {"type": "object", "properties": {"city": {"type": "string"}}}.',
            )
        found[name] = function
    if not 1 <= len(found) <= MOST_TOOLS:
        raise InputError(
            "The number of tools is out of range.",
            note=f"It is {len(found)}; possible is 1 to {MOST_TOOLS}.",
            hint=hint,
        )
    return found


def _chosen(choice: object, names: Sequence[str]) -> str:
    """`auto`, `none`, `required`, or the name of a tool behind a colon."""
    if choice in (AUTO, NONE, REQUIRED):
        return str(choice)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise InputError(
            "The choice of a tool is not known.",
            note=f"It is {choice!r:.100}; possible are auto, none, required and one of the tools {', '.join(names)}.",
            hint='Use for example {"type": "function", "function": {"name": "' + names[0] + '"}}.',
        )
    return f":{name}"


def _grammar(functions: Mapping[str, Mapping[str, Any]], start: str, begin: str, end: str) -> str:
    """In Lark, where `start` is made of `call`, `BEGIN` is `begin`, and a call's `body` stands between them."""
    rules = [
        f"start: {start}",
        f"call: {begin} body",
        "body: " + " | ".join(f"tool_{i}" for i in range(len(functions))),
    ]
    for i, (name, function) in enumerate(functions.items()):
        head = json.dumps(f'\n{{"name": {json.dumps(name)}, "arguments": ')
        tail = json.dumps("}\n")
        schema = function.get("parameters")
        schema = _NO_PARAMETERS if schema is None else {"type": "object", **schema}
        rules.append(f"tool_{i}: {head} arguments_{i} {tail} {end}")
        rules.append(f"arguments_{i}: %json {checked_schema(schema)}")
    return "\n".join(rules) + "\n"


def _end_of_json(text: str, begin: int) -> int:
    """Where the JSON ends that begins here; the text's end where it does not."""
    try:
        return json.JSONDecoder().raw_decode(text, begin)[1]
    except (ValueError, RecursionError):
        return len(text)


class CallStream:
    """Text in, as it grows; what it says beside calls out, as soon as it cannot change, and calls as they end.

    The content joined and all calls are those that `Tools.calls` finds in the whole text.

    Args:
        tools: find the calls.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._text = ""
        self._told, self._called = 0, 0  # characters of the content, and calls

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        """Content before the first call, and calls that are new; maybe none."""
        before, self._text = len(self._text), self._text + piece
        free, begin, _ = self._text.partition(BEGIN)
        if not begin:  # its end may begin a call
            begun = next((n for n in range(len(BEGIN) - 1, 0, -1) if free.endswith(BEGIN[:n])), 0)
            free = free[: len(free) - begun]
        content = free.rstrip()[self._told :]  # white space before a call is no content
        self._told += len(content)
        ended = self._text.find(END, max(0, before - len(END))) >= 0
        return content, self._new(self._tools.calls(self._text)[1]) if ended else []

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What is left when the text has ended."""
        content, calls = self._tools.calls(self._text)
        left = content[self._told :]
        self._told = len(content)
        return left, self._new(calls)

    def _new(self, calls: list[ToolCall]) -> list[ToolCall]:
        new = calls[self._called :]
        self._called = len(calls)
        return new


class Tools:
    """The tools of a request.

    Args:
        tools: as in the API, `{"type": "function", "function": {"name": …, "parameters": a JSON schema}}`.
        choice: `auto`, where the model is free until it begins a call; `none`; `required`, where it writes calls alone;
            or `{"type": "function", "function": {"name": …}}`, which it then calls.
        parallel: whether it may write several calls.

    Attributes:
        for_template: what `TextCodec.encode_chat` takes as its tools; None where the model is to call none.

    Raises:
        InputError: they are none, or the choice is not one of them.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], choice: object = AUTO, *, parallel: bool = True) -> None:
        self._functions = _checked(tools)
        self._choice = _chosen(choice, list(self._functions))
        self._parallel = parallel
        self.for_template = None if self._choice == NONE else list(tools)

    def constraint(self, grammars: Grammars, chat_template: str | None) -> Constraint | None:
        """What a row may write; None where the model is to call none.

        Args:
            chat_template: of the model for chats with tools.

        Raises:
            InputError: the template has calls of another style, or a tool's schema cannot be followed.
        """
        if self._choice == NONE:
            return None
        template = chat_template or ""
        if BEGIN not in template or any(mark in template for mark in _OTHER_STYLES):
            raise InputError(
                "The model's chat template has no tool calls of a known style.",
                note=f'Known is {BEGIN} with {{"name": …, "arguments": …}}, as Qwen2.5, Qwen3 and Hermes write it.',
                hint="Leave the tools out, or describe them in a message and use a JSON schema.",
            )
        name = self._choice[1:] if self._choice.startswith(":") else None
        functions = self._functions if name is None else {name: self._functions[name]}
        several = self._parallel and name is None
        start = "body" if self._choice == AUTO else "call (LINE call)*" if several else "call"
        marks = [grammars.token(mark) for mark in (BEGIN, END)]
        texts = [json.dumps(mark) for mark in (BEGIN, END)]
        tokens = [text if mark is None else f"<[{mark}]>" for text, mark in zip(texts, marks, strict=True)]
        line = "LINE: /\\n/\n" if several and self._choice != AUTO else ""
        grammar, trial = (line + _grammar(functions, start, *form) for form in (tokens, texts))
        body = grammars.constraint(grammar, trial)
        return FreeUntilCall(body, grammars, self._parallel) if self._choice == AUTO else body

    def calls(self, text: str) -> tuple[str, list[ToolCall]]:
        """What a finished text, which keeps the MARKS, says beside its calls, and the calls. One that is not at its end
        is text."""
        rest, calls, place = list[str](), list[ToolCall](), 0
        for head in _HEAD.finditer(text) if self._choice != NONE else ():
            end = _end_of_json(text, head.end())
            if head.start() >= place and head[1] in self._functions and text.startswith(_TAIL, end):
                calls.append(ToolCall(head[1], text[head.end() : end]))
                rest.append(text[place : head.start()])
                place = end + len(_TAIL)
        return "".join([*rest, text[place:]]).rstrip() if calls else text, calls

    def stream(self) -> CallStream:
        """A new stream for one text."""
        return CallStream(self)
