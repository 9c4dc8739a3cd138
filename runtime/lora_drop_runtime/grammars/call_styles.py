"""Styles in which models write calls of tools, as data.

A model is trained on one, which its chat template tells it. A text has sections of calls:

    section = begin opening call (between call)* closing end
    call = head[0] name head[1] arguments tail

The arguments are JSON, or written one by one (notations.py). A style that is new is a row of `STYLES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_drop_runtime.errors import InputError
from lora_drop_runtime.reasoning import CALL_HEADER

from .notations import Notation, as_json

ID = "#"


@dataclass(frozen=True)
class CallStyle:
    """How calls are written.

    Attributes:
        models: that write so, for messages.
        signs: all of them are in the chat template of such a model.
        others: none of them is.
        notation: of arguments; JSON when None.
        ids: a pattern of what stands for `ID` in the head, where the model numbers its calls.
        marks: parts of the text that are special tokens of some models.
        begin: of a section. Where it is empty, a call is the whole text.
        between: calls of a section; None where a section has one.
        after: a section, if another one follows; None where a text has one.
    """

    models: str
    signs: tuple[str, ...]
    head: tuple[str, str]
    tail: str
    others: tuple[str, ...] = ()
    notation: Notation | None = None
    ids: str = ""
    marks: tuple[str, ...] = ()
    begin: str = ""
    opening: str = ""
    between: str | None = None
    closing: str = ""
    end: str = ""
    after: str | None = None

    def head_of(self, name: str) -> str:
        return name.join(self.head)

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
        """A section of calls of names and arguments; None where their arguments are not JSON, or have ids beside."""
        if self.ids or not (self.notation is None or self.notation.in_json):
            return None
        as_text = as_json if self.notation is None else self.notation.written
        each = (f"{self.head_of(name)}{as_text(given)}{self.tail}" for name, given in calls)
        return f"{self.begin}{self.opening}{(self.between or '').join(each)}{self.closing}{self.end}"


_ARGUMENTS = ('{"name": "', '", "arguments": ')
_HERMES = CallStyle(
    models="Hermes, Qwen2.5 and Qwen3",
    signs=("<tool_call>",),
    others=("<function=", "<arg_key>", "<invoke", "<tool_calls>"),
    marks=("<tool_call>", "</tool_call>"),
    begin="<tool_call>",
    opening="\n",
    head=_ARGUMENTS,
    tail="}",
    closing="\n",
    end="</tool_call>",
    after="\n",
)
_XML = replace(
    _HERMES,
    models="Qwen3-Coder and Qwen3.5",
    signs=("<tool_call>", "<function=", "<parameter="),
    others=(),
    head=("<function=", ">\n"),
    notation=Notation(key=("<parameter=", ">\n"), behind="\n</parameter>\n"),
    tail="</function>",
)
_SEED = ("<seed:tool_call>", "</seed:tool_call>")
_GLM = replace(
    _HERMES,
    models="GLM 4.5 and later",
    signs=("<tool_call>", "</arg_key>\n<arg_value>"),
    others=(),
    marks=(*_HERMES.marks, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    opening="",
    head=("", "\n"),
    notation=Notation(key=("<arg_key>", "</arg_key>\n<arg_value>"), behind="</arg_value>\n"),
    tail="",
    closing="",
)
_MISTRAL = CallStyle(
    models="Mistral",
    signs=("[AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
    others=("[ARGS]", "[CALL_ID]"),
    marks=("[TOOL_CALLS]",),
    begin="[TOOL_CALLS]",
    opening="[",
    head=_ARGUMENTS,
    tail="}",
    between=", ",
    closing="]",
)
_PYTHON = replace(
    _MISTRAL,
    models="LFM2",
    signs=("List of tools: ", "<|im_start|>"),
    others=("<tool_call>",),
    marks=("<|tool_call_start|>", "<|tool_call_end|>"),
    begin="<|tool_call_start|>",
    head=("", "("),
    notation=Notation(key=("", "="), between=", ", in_json=True),
    tail=")",
    end="<|tool_call_end|>",
)
_MINISTRAL = CallStyle(
    models="Ministral 3",
    signs=("[TOOL_CALLS]", "[ARGS]"),
    others=("[CALL_ID]",),
    marks=("[TOOL_CALLS]", "[ARGS]"),
    begin="[TOOL_CALLS]",
    head=("", "[ARGS]"),
    tail="",
    after="",
)
STYLES = (
    _HERMES,
    _XML,
    replace(
        _XML,
        models="Seed-OSS",
        signs=(_SEED[0], "<function=", "<parameter="),
        marks=_SEED,
        begin=_SEED[0],
        end=_SEED[1],
        notation=Notation(key=("<parameter=", ">"), behind="</parameter>\n"),
    ),
    _GLM,
    replace(
        _GLM,
        signs=("<tool_call>", "</arg_key><arg_value>"),
        head=("", ""),
        notation=Notation(key=("<arg_key>", "</arg_key><arg_value>"), behind="</arg_value>"),
        after="",
    ),
    CallStyle(
        models="GPT-OSS",
        signs=("<|channel|>commentary", "functions."),
        marks=("<|channel|>", "<|constrain|>", "<|message|>"),
        begin=CALL_HEADER[0],
        head=("", CALL_HEADER[1]),
        tail="",
    ),
    CallStyle(
        models="Gemma 4",
        signs=("<|tool_call>call:", "<tool_call|>"),
        marks=("<|tool_call>", '<|"|>', "<tool_call|>"),
        begin="<|tool_call>",
        head=("call:", "{"),
        notation=Notation(key=("", ":"), between=",", quote='<|"|>'),
        tail="}",
        end="<tool_call|>",
        after="",
    ),
    CallStyle(
        models="Llama 3.1 to 3.3",
        signs=('{"name": function name, "parameters": dictionary of argument name and its value}',),
        head=('{"name": "', '", "parameters": '),
        tail="}",
    ),
    replace(_MISTRAL, signs=(*_MISTRAL.signs, "[TOOL_CALLS] ["), opening=" ["),
    _MISTRAL,
    _MINISTRAL,
    replace(
        _MINISTRAL,
        models="Mistral Small 3.2",
        signs=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        others=(),
        marks=(*_MINISTRAL.marks, "[CALL_ID]"),
        head=("", f"[CALL_ID]{ID}[ARGS]"),
        ids="[A-Za-z0-9]{9}",
    ),
    CallStyle(
        models="Command R7B",
        signs=("<|START_ACTION|>", '"tool_call_id"', '"tool_name"'),
        marks=("<|START_ACTION|>", "<|END_ACTION|>"),
        begin="<|START_ACTION|>",
        opening="[\n    ",
        head=(f'{{"tool_call_id": "{ID}", "tool_name": "', '", "parameters": '),
        ids="[0-9]{1,3}",
        tail="}",
        between=",\n    ",
        closing="\n]",
        end="<|END_ACTION|>",
    ),
    replace(
        _MISTRAL,
        models="Granite 3",
        signs=("<|tool_call|>", "a JSON list of tools used"),
        others=(),
        marks=("<|tool_call|>",),
        begin="<|tool_call|>",
    ),
    _PYTHON,
    replace(
        _PYTHON,
        models="OLMo 3",
        signs=("<function_calls>", "</functions>"),
        marks=("<function_calls>", "</function_calls>"),
        begin="<function_calls>",
        opening="",
        between="\n",
        closing="",
        end="</function_calls>",
    ),
)


def style_of(chat_template: str | None) -> CallStyle:
    """The style that a chat template tells.

    Raises:
        InputError: none that is known.
    """
    template = (chat_template or "").replace('\\"', '"')
    for style in STYLES:
        if all(sign in template for sign in style.signs) and not any(other in template for other in style.others):
            return style
    raise InputError(
        "The model's chat template has no tool calls of a known style.",
        note=f"Known are those of {', '.join(dict.fromkeys(style.models for style in STYLES))}.",
        hint="Leave the tools out, or describe them in a message and use a JSON schema.",
    )


def with_calls_in_texts(messages: Sequence[Mapping[str, Any]], chat_template: str) -> Sequence[Mapping[str, Any]]:
    """Messages for a template that leaves out the calls of earlier answers, as LFM2's does: they stand in the texts.

    Args:
        messages: whose calls have arguments as objects.
    """
    if "tool_calls" in chat_template or not any(message.get("tool_calls") for message in messages):
        return messages
    try:
        style = style_of(chat_template)
    except InputError:
        return messages
    found = []
    for message in messages:
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        text = style.written([(one["name"], one["arguments"]) for one in functions]) if functions else ""
        found.append({**message, "content": f"{message.get('content') or ''}{text}"} if text else message)
    return found
